"""Evolved sign momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

from fastadam.adam import AVERAGING
from fastadam.arrays import Number
from fastadam.hyperparameters import Hyperparameters, Schedule
from fastadam.kernels import relatives
from fastadam.optimizer import FusedOptimizer, Options
from fastadam.rule import LR, Rule
from fastadam.tunables import HasBetas

_RULE = Rule(relatives.Lion, ("exp_avg",), (LR, *AVERAGING))


@dataclass(frozen=True)
class LionHyperparameters(Hyperparameters):
    """The hyperparameters of :class:`FusedLion`."""

    KIND = "lion"
    OWN = ("lr", "betas", "weight_decay", "maximize")

    lr: Any = 1e-4
    betas: Any = (0.9, 0.99)
    decoupled_weight_decay: Any = True

    @property
    def rule(self) -> Rule:
        """Lion."""
        return _RULE


class FusedLion(HasBetas, FusedOptimizer):
    """Lion, in one fused pass over flat buffers, in place.

    Parameters
    ----------
    lr : float or callable, default 1e-4
        Learning rate, at least 0, or a function of the step number, counted from 1.
    betas : tuple of float, default (0.9, 0.99)
        How much of the momentum is in an update, and the decay rate of the momentum, each in [0, 1).
    weight_decay : float, default 0.0
        ``lr * weight_decay * param`` is subtracted from the parameter; at least 0.
    maximize : bool, default False
        Ascend: the gradient is negated, before any weight decay.
    **options
        What all optimizers have, as :class:`fastadam.FusedAdam`: clipping, skipping, averages, telemetry,
        storage, segments, backends.

    Raises
    ------
    TypeError, ValueError, ImportError
        As :class:`fastadam.FusedAdam` does.

    Notes
    -----
    An update is the sign of a number, so its size is ``lr``: a third to a tenth of Adam's, with 3 to
    10 times the weight decay, is right.

    References
    ----------
    Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, Program 1.
    """

    HYPERPARAMETERS: ClassVar[type[Hyperparameters]] = LionHyperparameters

    def __init__(
        self,
        lr: Number | Schedule = 1e-4,
        betas: tuple[Number, Number] | list[float] = (0.9, 0.99),
        weight_decay: Number = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        own = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        self._begin_with(own, options)
