"""The hyperparameters of an optimizer as its attributes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from fastadam.arrays import Number
from fastadam.hyperparameters import Hyperparameters, Schedule
from fastadam.precision import StateDtype


class Tunables(ABC):
    """Gets and sets hyperparameters; no change of a number compiles anything."""

    _hyperparameters: Hyperparameters

    @abstractmethod
    def _change(self, **values: Any) -> None:
        """Check values, and use them from the next step on."""

    @property
    def lr(self) -> float | Any:
        """Learning rate, or the schedule that gives it; set it between steps.

        To a type checker it is a number, so that ``opt.lr *= 0.5`` passes; ``callable`` finds a schedule.

        With ``capturable=True`` setting it is queued on the current stream, or that given to the last step.
        """
        return self._hyperparameters.lr

    @lr.setter
    def lr(self, value: Number | Schedule) -> None:
        self._change(lr=value)

    @property
    def weight_decay(self) -> float:
        """Weight decay; set it between steps."""
        value: float = self._hyperparameters.weight_decay
        return value

    @weight_decay.setter
    def weight_decay(self, value: Number) -> None:
        self._change(weight_decay=value)

    @property
    def max_grad_norm(self) -> float | None:
        """Global norm to which gradients are clipped, or None; set it between steps."""
        value: float | None = self._hyperparameters.max_grad_norm
        return value

    @max_grad_norm.setter
    def max_grad_norm(self, value: Number | None) -> None:
        self._change(max_grad_norm=value)

    @property
    def max_grad_value(self) -> float | None:
        """Magnitude to which the elements of gradients are clipped, or None; set it between steps."""
        value: float | None = self._hyperparameters.max_grad_value
        return value

    @max_grad_value.setter
    def max_grad_value(self, value: Number | None) -> None:
        self._change(max_grad_value=value)

    @property
    def skip_nonfinite(self) -> bool:
        """Whether gradients with inf or NaN make no step; set it between steps."""
        return self._hyperparameters.skip_nonfinite

    @skip_nonfinite.setter
    def skip_nonfinite(self, value: bool) -> None:
        self._change(skip_nonfinite=value)

    @property
    def zero_grads(self) -> bool:
        """Whether a step sets the gradients to zero; set it between steps."""
        return self._hyperparameters.zero_grads

    @zero_grads.setter
    def zero_grads(self, value: bool) -> None:
        self._change(zero_grads=value)

    @property
    def telemetry(self) -> bool:
        """Whether :attr:`FusedAdam.last_step` has norms and counts; set it between steps."""
        return self._hyperparameters.telemetry

    @telemetry.setter
    def telemetry(self, value: bool) -> None:
        self._change(telemetry=value)

    @property
    def ema_decay(self) -> float | None:
        """Decay of the average of the parameters, or None."""
        value: float | None = self._hyperparameters.ema_decay
        return value

    @property
    def maximize(self) -> bool:
        """Whether steps ascend."""
        return self._hyperparameters.maximize

    @property
    def state_dtype(self) -> StateDtype:
        """How the states are stored: a format, or one for those with a sign and one for the others."""
        return self._hyperparameters.state_dtype

    @property
    def master_params(self) -> str | None:
        """What is kept of 16-bit parameters, or None."""
        return self._hyperparameters.master_params

    @property
    def rounding(self) -> str:
        """How what is stored in 16 or 8 bits is rounded."""
        return self._hyperparameters.rounding

    @property
    def seed(self) -> int:
        """Of stochastic rounding."""
        value: int = self._hyperparameters.seed
        return value

    @property
    def offset(self) -> int:
        """Index of the first element in the whole buffer."""
        value: int = self._hyperparameters.offset
        return value


class HasBetas(Tunables):
    """The decay rates of two averages."""

    _hyperparameters: Any

    @property
    def betas(self) -> tuple[float, float]:
        """Decay rates of the moments; set them between steps."""
        value: tuple[float, float] = self._hyperparameters.betas
        return value

    @betas.setter
    def betas(self, value: tuple[Number, Number] | list[float]) -> None:
        self._change(betas=value)


class HasEps(Tunables):
    """What is added so that nothing is divided by 0."""

    _hyperparameters: Any

    @property
    def eps(self) -> float:
        """Added to the root of the second moment; set it between steps."""
        value: float = self._hyperparameters.eps
        return value

    @eps.setter
    def eps(self, value: Number) -> None:
        self._change(eps=value)


class HasMomentum(Tunables):
    """Momentum, or none."""

    _hyperparameters: Any

    @property
    def momentum(self) -> float:
        """How much of the last update is in the next one; set it between steps, but not from or to 0."""
        value: float = self._hyperparameters.momentum
        return value

    @momentum.setter
    def momentum(self, value: Number) -> None:
        self._change(momentum=value)


class HasDecoupled(Tunables):
    """Weight decay of two kinds."""

    @property
    def decoupled_weight_decay(self) -> bool:
        """Whether weight decay is AdamW's."""
        return self._hyperparameters.decoupled_weight_decay
