"""Adadelta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

from fastadam.arrays import Number
from fastadam.hyperparameters import Hyperparameters, Schedule, in_unit_interval
from fastadam.kernels import relatives
from fastadam.optimizer import FusedOptimizer, Options
from fastadam.rule import LR, Rule, in_range, number, one_minus
from fastadam.tunables import HasEps

_RULE = Rule(
    relatives.Adadelta,
    ("square_avg", "acc_delta"),
    (LR, number("rho"), one_minus("rho"), number("eps")),
    (in_range("eps", "eps"),),
)


@dataclass(frozen=True)
class AdadeltaHyperparameters(Hyperparameters):
    """The hyperparameters of :class:`FusedAdadelta`."""

    KIND = "adadelta"
    OWN = ("lr", "rho", "eps", "weight_decay", "maximize")
    OWN_CHECKS: ClassVar = {"rho": in_unit_interval}

    lr: Any = 1.0
    rho: Any = 0.9
    eps: Any = 1e-6

    @property
    def rule(self) -> Rule:
        """Adadelta."""
        return _RULE


class FusedAdadelta(HasEps, FusedOptimizer):
    """Adadelta, in one fused pass over flat buffers, in place: ``torch.optim.Adadelta``.

    Parameters
    ----------
    lr : float or callable, default 1.0
        Learning rate, at least 0, or a function of the step number, counted from 1.
    rho : float, default 0.9
        Decay rate of the averages of squares, of gradients and of updates, in [0, 1).
    eps : float, default 1e-6
        Added below both roots; at least 0.
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
    Zeiler, "ADADELTA: An Adaptive Learning Rate Method", 2012, Algorithm 1.
    """

    HYPERPARAMETERS: ClassVar[type[Hyperparameters]] = AdadeltaHyperparameters

    def __init__(
        self,
        lr: Number | Schedule = 1.0,
        rho: Number = 0.9,
        eps: Number = 1e-6,
        weight_decay: Number = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        own = {
            "lr": lr,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        self._begin_with(own, options)

    @property
    def rho(self) -> float:
        """Decay rate of the averages of squares; set it between steps."""
        value: float = self._hyperparameters.rho
        return value

    @rho.setter
    def rho(self, value: Number) -> None:
        self._change(rho=value)
