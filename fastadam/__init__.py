"""Compiled-kernel Adam: one fused pass over any flat buffer, the same bits everywhere."""

from fastadam import schedules
from fastadam.flat import flatten
from fastadam.loss_scale import DynamicLossScale
from fastadam.optimizer import FusedAdam
from fastadam.segments import Segment
from fastadam.warming import warmup

__version__ = "0.1.0"

__all__ = ["DynamicLossScale", "FusedAdam", "Segment", "__version__", "flatten", "schedules", "warmup"]
