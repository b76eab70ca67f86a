"""Compiled-kernel Adam: one fused pass over any flat buffer, the same bits everywhere."""

from fastadam import own_rule, schedules
from fastadam.adadelta import FusedAdadelta
from fastadam.adagrad import FusedAdagrad
from fastadam.adam import FusedAdam, FusedAdamW
from fastadam.adamax import FusedAdamax
from fastadam.flat import flatten
from fastadam.lion import FusedLion
from fastadam.loss_scale import DynamicLossScale
from fastadam.nadam import FusedNAdam
from fastadam.radam import FusedRAdam
from fastadam.rmsprop import FusedRMSprop
from fastadam.segments import Segment
from fastadam.sgd import FusedSGD
from fastadam.warming import warmup

__version__ = "0.1.0"

__all__ = [
    "DynamicLossScale",
    "FusedAdadelta",
    "FusedAdagrad",
    "FusedAdam",
    "FusedAdamW",
    "FusedAdamax",
    "FusedLion",
    "FusedNAdam",
    "FusedRAdam",
    "FusedRMSprop",
    "FusedSGD",
    "Segment",
    "__version__",
    "flatten",
    "own_rule",
    "schedules",
    "warmup",
]
