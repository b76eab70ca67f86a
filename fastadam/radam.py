"""Rectified Adam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

from fastadam.adam import AVERAGING
from fastadam.arrays import Number
from fastadam.hyperparameters import Hyperparameters, Schedule
from fastadam.kernels import relatives
from fastadam.optimizer import FusedOptimizer, Options
from fastadam.rectification import Rectification
from fastadam.rule import LARGEST_STEP_SIZE, LR_OVER_BIAS_CORRECTION1, PerStep, Rule, in_range, number
from fastadam.tunables import HasBetas, HasDecoupled, HasEps

_RULE = Rule(
    relatives.RAdam,
    ("exp_avg", "exp_avg_sq"),
    (LR_OVER_BIAS_CORRECTION1, *AVERAGING, PerStep(Rectification, ("beta2",)), number("eps")),
    (LARGEST_STEP_SIZE, in_range("eps", "eps")),
)


@dataclass(frozen=True)
class RAdamHyperparameters(Hyperparameters):
    """The hyperparameters of :class:`FusedRAdam`."""

    KIND = "radam"
    OWN = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize")

    lr: Any = 1e-3
    betas: Any = (0.9, 0.999)
    eps: Any = 1e-8

    @property
    def rule(self) -> Rule:
        """RAdam."""
        return _RULE


class FusedRAdam(HasBetas, HasEps, HasDecoupled, FusedOptimizer):
    """Rectified Adam, in one fused pass over flat buffers, in place: ``torch.optim.RAdam``.

    Parameters
    ----------
    lr : float or callable, default 1e-3
        Learning rate, at least 0, or a function of the step number, counted from 1.
    betas : tuple of float, default (0.9, 0.999)
        Decay rates of the first and the second moment, each in [0, 1).
    eps : float, default 1e-8
        Added to the root of the second moment, before its bias correction; at least 0.
    weight_decay : float, default 0.0
        Weight decay, at least 0.
    decoupled_weight_decay : bool, default False
        False adds ``weight_decay * param`` to the gradient (L2). True subtracts ``lr * weight_decay * param``
        from the parameter, before the update, as AdamW does.
    maximize : bool, default False
        Ascend: the gradient is negated, before any weight decay.
    **options
        What all optimizers have, as :class:`fastadam.FusedAdam`: clipping, skipping, averages, telemetry,
        storage, segments, backends.

    Raises
    ------
    TypeError, ValueError, ImportError
        As :class:`fastadam.FusedAdam` does.

    References
    ----------
    Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", ICLR 2020, Algorithm 2.
    """

    HYPERPARAMETERS: ClassVar[type[Hyperparameters]] = RAdamHyperparameters

    def __init__(
        self,
        lr: Number | Schedule = 1e-3,
        betas: tuple[Number, Number] | list[float] = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        own = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
        }
        self._begin_with(own, options)
