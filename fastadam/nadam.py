"""Adam with Nesterov's momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

from fastadam.adam import AVERAGING
from fastadam.arrays import Number
from fastadam.checks import at_least_zero
from fastadam.hyperparameters import Hyperparameters, Schedule
from fastadam.kernels import relatives
from fastadam.momentum_schedule import Average, Gradient
from fastadam.optimizer import FusedOptimizer, Options
from fastadam.rule import LARGEST_STEP_SIZE, InverseBiasCorrection, LrOver, PerStep, Rule, in_range, number
from fastadam.tunables import HasBetas, HasDecoupled, HasEps

_RULE = Rule(
    relatives.NAdam,
    ("exp_avg", "exp_avg_sq"),
    (
        LrOver(Gradient, ("beta1", "momentum_decay")),
        LrOver(Average, ("beta1", "momentum_decay")),
        *AVERAGING,
        PerStep(InverseBiasCorrection, ("beta2",)),
        number("eps"),
    ),
    (LARGEST_STEP_SIZE, in_range("eps", "eps")),
)


@dataclass(frozen=True)
class NAdamHyperparameters(Hyperparameters):
    """The hyperparameters of :class:`FusedNAdam`."""

    KIND = "nadam"
    OWN = ("lr", "betas", "eps", "weight_decay", "momentum_decay", "decoupled_weight_decay", "maximize")
    OWN_CHECKS: ClassVar = {"momentum_decay": at_least_zero}

    lr: Any = 2e-3
    betas: Any = (0.9, 0.999)
    eps: Any = 1e-8
    momentum_decay: Any = 4e-3

    @property
    def rule(self) -> Rule:
        """NAdam."""
        return _RULE


class FusedNAdam(HasBetas, HasEps, HasDecoupled, FusedOptimizer):
    """Adam with Nesterov's momentum, in one fused pass over flat buffers, in place: ``torch.optim.NAdam``.

    Parameters
    ----------
    lr : float or callable, default 2e-3
        Learning rate, at least 0, or a function of the step number, counted from 1.
    betas : tuple of float, default (0.9, 0.999)
        Decay rates of the first and the second moment, each in [0, 1).
    eps : float, default 1e-8
        Added to the root of the second moment, after its bias correction; at least 0.
    weight_decay : float, default 0.0
        Weight decay, at least 0.
    momentum_decay : float, default 4e-3
        How fast the momentum rises to ``betas[0]``: at least 0. That of step t is
        ``betas[0] * (1 - 0.96 ** (t * momentum_decay) / 2)``.
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
    Dozat, "Incorporating Nesterov Momentum into Adam", ICLR workshop 2016, Algorithm 2.
    """

    HYPERPARAMETERS: ClassVar[type[Hyperparameters]] = NAdamHyperparameters

    def __init__(
        self,
        lr: Number | Schedule = 2e-3,
        betas: tuple[Number, Number] | list[float] = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 0.0,
        momentum_decay: Number = 4e-3,
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
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
        }
        self._begin_with(own, options)

    @property
    def momentum_decay(self) -> float:
        """How fast the momentum rises; set it between steps."""
        value: float = self._hyperparameters.momentum_decay
        return value

    @momentum_decay.setter
    def momentum_decay(self, value: Number) -> None:
        self._change(momentum_decay=value)
