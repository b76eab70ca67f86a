"""AdaGrad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import numpy as np

from fastadam.arrays import Number
from fastadam.bias_correction import BLOCK, Corrections
from fastadam.checks import at_least_zero
from fastadam.hyperparameters import Hyperparameters, Schedule
from fastadam.kernels import relatives
from fastadam.optimizer import FusedOptimizer, Options
from fastadam.rule import LrOver, Rule, in_range, number
from fastadam.tunables import HasEps


@dataclass(frozen=True)
class _Slowing:
    """``1 + (step - 1) * lr_decay``."""

    lr_decay: float

    def block(self, number: int) -> Corrections:
        """Return those of a block."""
        steps = np.arange(number * BLOCK, (number + 1) * BLOCK, dtype=np.float64)
        found: Corrections = 1 + (steps - 1) * self.lr_decay
        return found

    def table(self) -> Corrections | None:
        """Return the only number, if there is one."""
        return np.ones(1) if self.lr_decay == 0 else None


_RULE = Rule(
    relatives.Adagrad,
    ("sum",),
    (LrOver(_Slowing, ("lr_decay",)), number("eps")),
    (in_range("eps", "eps"), in_range("initial_accumulator_value", "initial_accumulator_value")),
    {"sum": "initial_accumulator_value"},
)


@dataclass(frozen=True)
class AdagradHyperparameters(Hyperparameters):
    """The hyperparameters of :class:`FusedAdagrad`."""

    KIND = "adagrad"
    OWN = ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps", "maximize")
    OWN_CHECKS: ClassVar = {"lr_decay": at_least_zero, "initial_accumulator_value": at_least_zero}

    lr: Any = 1e-2
    lr_decay: Any = 0.0
    initial_accumulator_value: Any = 0.0
    eps: Any = 1e-10

    @property
    def rule(self) -> Rule:
        """AdaGrad."""
        return _RULE


class FusedAdagrad(HasEps, FusedOptimizer):
    """AdaGrad, in one fused pass over flat buffers, in place: ``torch.optim.Adagrad``.

    Parameters
    ----------
    lr : float or callable, default 1e-2
        Learning rate, at least 0, or a function of the step number, counted from 1.
    lr_decay : float, default 0.0
        The learning rate of a step is ``lr / (1 + (step - 1) * lr_decay)``; at least 0.
    weight_decay : float, default 0.0
        Added to the gradient, times the parameter (L2); at least 0.
    initial_accumulator_value : float, default 0.0
        What the sum of squares begins with; at least 0.
    eps : float, default 1e-10
        Added to the root of the sum; at least 0.
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
    Duchi, Hazan & Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization",
    JMLR 2011.
    """

    HYPERPARAMETERS: ClassVar[type[Hyperparameters]] = AdagradHyperparameters

    def __init__(
        self,
        lr: Number | Schedule = 1e-2,
        lr_decay: Number = 0.0,
        weight_decay: Number = 0.0,
        initial_accumulator_value: Number = 0.0,
        eps: Number = 1e-10,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        own = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "maximize": maximize,
        }
        self._begin_with(own, options)

    @property
    def initial_accumulator_value(self) -> float:
        """What the sum of squares began with."""
        value: float = self._hyperparameters.initial_accumulator_value
        return value

    @property
    def lr_decay(self) -> float:
        """How fast the learning rate falls; set it between steps."""
        value: float = self._hyperparameters.lr_decay
        return value

    @lr_decay.setter
    def lr_decay(self, value: Number) -> None:
        self._change(lr_decay=value)
