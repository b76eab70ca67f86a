"""Stochastic gradient descent, with momentum or without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import numpy as np

from fastadam.arrays import Number
from fastadam.bias_correction import BLOCK, Corrections
from fastadam.checks import at_least_zero, require_flag
from fastadam.hyperparameters import Hyperparameters, Schedule
from fastadam.kernels import relatives
from fastadam.optimizer import FusedOptimizer, Options
from fastadam.rule import LR, PerStep, Rule, in_range, number
from fastadam.tunables import HasMomentum


@dataclass(frozen=True)
class _Undampened:
    """1 in the first step, and ``1 - dampening`` in all others."""

    dampening: float

    def block(self, number: int) -> Corrections:
        """Return those of a block."""
        found = np.full(BLOCK, 1 - self.dampening)
        if number == 0:
            found[1] = 1
        return found

    def table(self) -> Corrections:
        """Return all that differ."""
        return np.array([1.0, 1 - self.dampening])


_SGD = Rule(relatives.SGD, (), (LR,))
_COLUMNS = (LR, number("momentum"), PerStep(_Undampened, ("dampening",)))
_RANGES = (in_range("momentum", "momentum"), in_range("dampening", "dampening"))
_MOMENTUM = Rule(relatives.Momentum, ("momentum_buffer",), _COLUMNS, _RANGES)
_NESTEROV = Rule(relatives.Nesterov, ("momentum_buffer",), _COLUMNS, _RANGES)


@dataclass(frozen=True)
class SGDHyperparameters(Hyperparameters):
    """The hyperparameters of :class:`FusedSGD`."""

    KIND = "sgd"
    OWN = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    OWN_CHECKS: ClassVar = {"momentum": at_least_zero, "dampening": at_least_zero, "nesterov": require_flag}

    lr: Any = 1e-3
    momentum: Any = 0.0
    dampening: Any = 0.0
    nesterov: Any = False

    @property
    def rule(self) -> Rule:
        """With momentum, Nesterov's or none."""
        if self.momentum == 0:
            return _SGD
        return _NESTEROV if self.nesterov else _MOMENTUM

    def require_possible(self) -> None:
        """Raise ValueError where Nesterov's momentum has none, or dampening."""
        if self.nesterov and self.momentum == 0:
            raise ValueError("momentum must be greater than 0 with nesterov=True; got 0.0.")
        if self.nesterov and self.dampening != 0:
            raise ValueError(f"dampening must be 0 with nesterov=True; got {self.dampening}.")


class FusedSGD(HasMomentum, FusedOptimizer):
    """Stochastic gradient descent, in one fused pass over flat buffers, in place: ``torch.optim.SGD``.

    Parameters
    ----------
    lr : float or callable, default 1e-3
        Learning rate, at least 0, or a function of the step number, counted from 1.
    momentum : float, default 0.0
        How much of the last update is in the next one, at least 0. With 0 there is no state, and no memory.
    dampening : float, default 0.0
        How much of a gradient is not, from the second step on; at least 0.
    weight_decay : float, default 0.0
        Added to the gradient, times the parameter (L2); at least 0.
    nesterov : bool, default False
        Nesterov's momentum; without dampening.
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
    Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013.
    """

    HYPERPARAMETERS: ClassVar[type[Hyperparameters]] = SGDHyperparameters
    _hyperparameters: Any

    def __init__(
        self,
        lr: Number | Schedule = 1e-3,
        momentum: Number = 0.0,
        dampening: Number = 0.0,
        weight_decay: Number = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        own = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        self._begin_with(own, options)

    @property
    def dampening(self) -> float:
        """How much of a gradient is not in the momentum; set it between steps."""
        value: float = self._hyperparameters.dampening
        return value

    @dampening.setter
    def dampening(self, value: Number) -> None:
        self._change(dampening=value)

    @property
    def nesterov(self) -> bool:
        """Whether the momentum is Nesterov's."""
        value: bool = self._hyperparameters.nesterov
        return value
