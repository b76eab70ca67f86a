"""Compiled-kernel Adam: one fused pass over any flat buffer, the same bits everywhere."""

from fastadam.optimizer import FusedAdam
from fastadam.warming import warmup

__version__ = "0.1.0"

__all__ = ["FusedAdam", "__version__", "warmup"]
