"""Adam with the infinity norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

from fastadam.arrays import Number
from fastadam.hyperparameters import Hyperparameters, Schedule
from fastadam.kernels import relatives
from fastadam.optimizer import FusedOptimizer, Options
from fastadam.rule import LARGEST_STEP_SIZE, LR_OVER_BIAS_CORRECTION1, Rule, in_range, number, one_minus
from fastadam.tunables import HasBetas, HasEps

_RULE = Rule(
    relatives.Adamax,
    ("exp_avg", "exp_inf"),
    (LR_OVER_BIAS_CORRECTION1, number("beta1"), one_minus("beta1"), number("beta2"), number("eps")),
    (LARGEST_STEP_SIZE, in_range("eps", "eps")),
)


@dataclass(frozen=True)
class AdamaxHyperparameters(Hyperparameters):
    """The hyperparameters of :class:`FusedAdamax`."""

    KIND = "adamax"
    OWN = ("lr", "betas", "eps", "weight_decay", "maximize")

    lr: Any = 2e-3
    betas: Any = (0.9, 0.999)
    eps: Any = 1e-8

    @property
    def rule(self) -> Rule:
        """Adamax."""
        return _RULE


class FusedAdamax(HasBetas, HasEps, FusedOptimizer):
    """Adam with the infinity norm, in one fused pass over flat buffers, in place: ``torch.optim.Adamax``.

    Parameters
    ----------
    lr : float or callable, default 2e-3
        Learning rate, at least 0, or a function of the step number, counted from 1.
    betas : tuple of float, default (0.9, 0.999)
        Decay rates of the first and the norm, each in [0, 1).
    eps : float, default 1e-8
        Added to the magnitude of the gradient; at least 0.
    weight_decay : float, default 0.0
        Added to the gradient, times the parameter (L2); at least 0.
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
    Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, Algorithm 2.
    """

    HYPERPARAMETERS: ClassVar[type[Hyperparameters]] = AdamaxHyperparameters

    def __init__(
        self,
        lr: Number | Schedule = 2e-3,
        betas: tuple[Number, Number] | list[float] = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        own = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        self._begin_with(own, options)
