"""RMSprop: plain, centered, with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

from fastadam.arrays import Number
from fastadam.checks import at_least_zero, require_flag
from fastadam.hyperparameters import Hyperparameters, Schedule, in_unit_interval
from fastadam.kernels import relatives
from fastadam.optimizer import FusedOptimizer, Options
from fastadam.rule import LR, Constant, Rule, in_range, number, one_minus
from fastadam.tunables import HasEps, HasMomentum


def _nothing() -> float:
    return 0.0


_COLUMNS = (LR, number("alpha"), one_minus("alpha"), number("eps"))
_RANGES = (in_range("eps", "eps"),)
_WITH_MOMENTUM = (*_RANGES, in_range("momentum", "momentum"))
_ZERO, _MOMENTUM = Constant(_nothing, ()), number("momentum")
_EXACT = frozenset({"square_avg", "grad_avg"})
"""Of which the variance is the difference: less than 0 soon, were they rounded to less than float32."""
_RULES = {
    (False, False): Rule(relatives.RMSprop, ("square_avg",), _COLUMNS, _RANGES),
    (True, False): Rule(
        relatives.CenteredRMSprop,
        ("square_avg", "grad_avg"),
        (*_COLUMNS, _ZERO),
        _RANGES,
        exact=_EXACT,
    ),
    (False, True): Rule(
        relatives.MomentumRMSprop, ("square_avg", "momentum_buffer"), (*_COLUMNS, _MOMENTUM), _WITH_MOMENTUM
    ),
    (True, True): Rule(
        relatives.CenteredMomentumRMSprop,
        ("square_avg", "momentum_buffer", "grad_avg"),
        (*_COLUMNS, _ZERO, _MOMENTUM),
        _WITH_MOMENTUM,
        exact=_EXACT,
    ),
}
"""By whether it is centered, and whether it has momentum."""


@dataclass(frozen=True)
class RMSpropHyperparameters(Hyperparameters):
    """The hyperparameters of :class:`FusedRMSprop`."""

    KIND = "rmsprop"
    OWN = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize")
    OWN_CHECKS: ClassVar = {"alpha": in_unit_interval, "momentum": at_least_zero, "centered": require_flag}

    lr: Any = 1e-2
    alpha: Any = 0.99
    eps: Any = 1e-8
    momentum: Any = 0.0
    centered: Any = False

    @property
    def rule(self) -> Rule:
        """One of four."""
        return _RULES[self.centered, self.momentum > 0]


class FusedRMSprop(HasEps, HasMomentum, FusedOptimizer):
    """RMSprop, in one fused pass over flat buffers, in place: ``torch.optim.RMSprop``.

    Parameters
    ----------
    lr : float or callable, default 1e-2
        Learning rate, at least 0, or a function of the step number, counted from 1.
    alpha : float, default 0.99
        Decay rate of the average of squares, in [0, 1).
    eps : float, default 1e-8
        Added to the root; at least 0.
    weight_decay : float, default 0.0
        Added to the gradient, times the parameter (L2); at least 0.
    momentum : float, default 0.0
        How much of the last update is in the next one, at least 0; with 0 no memory is kept for it.
    centered : bool, default False
        Divide by the root of the variance of the gradient, not of its square. Where rounding makes that less
        than 0, it is 0; PyTorch's parameter becomes NaN. ``square_avg`` and ``grad_avg`` are kept in float32,
        whatever ``state_dtype`` is: they differ by little.
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
    Hinton, "Neural Networks for Machine Learning", lecture 6e, 2012.
    Graves, "Generating Sequences With Recurrent Neural Networks", 2013, equations 38 to 41.
    """

    HYPERPARAMETERS: ClassVar[type[Hyperparameters]] = RMSpropHyperparameters

    def __init__(
        self,
        lr: Number | Schedule = 1e-2,
        alpha: Number = 0.99,
        eps: Number = 1e-8,
        weight_decay: Number = 0.0,
        momentum: Number = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        own = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "maximize": maximize,
        }
        self._begin_with(own, options)

    @property
    def alpha(self) -> float:
        """Decay rate of the average of squares; set it between steps."""
        value: float = self._hyperparameters.alpha
        return value

    @alpha.setter
    def alpha(self, value: Number) -> None:
        self._change(alpha=value)

    @property
    def centered(self) -> bool:
        """Whether an update is divided by the root of the variance."""
        value: bool = self._hyperparameters.centered
        return value
