"""The hyperparameters of all optimizers, and their ranges: every range check of the package stands here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, TypeAlias, cast

import numpy as np

from fastadam import precision
from fastadam.checks import at_least_zero, real, require_flag
from fastadam.rule import Rule

Floating: TypeAlias = np.dtype[np.floating[Any]]

Schedule: TypeAlias = Callable[[int], float]
"""A learning rate as a function of the step number, counted from 1."""

Check: TypeAlias = Callable[[str, object], Any]
"""Takes a name and a value, and returns that as its plain type, or raises."""


def in_unit_interval(name: str, value: object) -> float:
    """Return a number in [0, 1), such as the decay of an average."""
    number = real(name, value)
    if not 0 <= number < 1:
        raise ValueError(f"{name} must be in [0, 1); got {number}.")
    return number


def _betas(_: str, value: object) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"betas must be a pair of real numbers; got {type(value).__name__}.")
    if len(value) != 2:
        raise ValueError(f"betas must be a pair of real numbers; got {len(value)} values.")
    return in_unit_interval("betas[0]", value[0]), in_unit_interval("betas[1]", value[1])


def _lr(name: str, value: object) -> float | Schedule:
    return cast("Schedule", value) if callable(value) else at_least_zero(name, value)


def _limit(name: str, value: object) -> float | None:
    if value is None:
        return None
    number = real(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be greater than 0, or None; got {number}.")
    return number


def _ema_decay(name: str, value: object) -> float | None:
    return None if value is None else in_unit_interval(name, value)


CHECKS: dict[str, Check] = {
    "lr": _lr,
    "betas": _betas,
    "eps": at_least_zero,
    "weight_decay": at_least_zero,
    "decoupled_weight_decay": require_flag,
    "amsgrad": require_flag,
    "maximize": require_flag,
    "max_grad_norm": _limit,
    "max_grad_value": _limit,
    "skip_nonfinite": require_flag,
    "ema_decay": _ema_decay,
    "zero_grads": require_flag,
    "telemetry": require_flag,
    "state_dtype": precision.state_dtype,
    "master_params": precision.master_params,
    "rounding": precision.rounding,
    "seed": precision.from_zero,
    "offset": precision.from_zero,
}
"""Of what more than one optimizer has."""


@dataclass(frozen=True, kw_only=True)
class Hyperparameters(ABC):
    """What all optimizers have, with PyTorch's names, meanings and defaults; a subclass for each has its own.

    Parameters
    ----------
    lr : float or callable
        Learning rate, at least 0, or a function of the step number, counted from 1.
    weight_decay : float
        Weight decay, at least 0.
    decoupled_weight_decay : bool
        False: L2, added to the gradient. True: as in AdamW, scaled by ``lr``.
    maximize : bool
        Ascend.
    max_grad_norm, max_grad_value : float or None
        Clip the gradient to this global norm, and each of its elements to this magnitude; greater than 0.
    skip_nonfinite : bool
        Take no step where an element of the gradient is inf or NaN.
    ema_decay : float or None
        Of the average of the parameters, in [0, 1).
    zero_grads : bool
        Set the gradients to zero.
    telemetry : bool
        Report norms and counts of each step.
    state_dtype : str or tuple of str
        How the states are stored: "float32" (the dtype of the arithmetic), "bfloat16" or "8bit"; or one for
        those with a sign and one for those that are never negative.
    master_params : str or None
        What is kept of 16-bit parameters: "float32", or "split", what they lack.
    rounding : str
        Of what is stored in 16 or 8 bits: "stochastic" or "nearest".
    seed, offset : int
        Of stochastic rounding; index of the first element in the whole buffer.

    Raises
    ------
    TypeError
        If a number is not a real number, or a flag not a bool.
    ValueError
        If a number is not finite or out of its range.
    """

    KIND: ClassVar[str]
    """What a checkpoint calls the optimizer."""
    OWN: ClassVar[tuple[str, ...]]
    """What the optimizer's own arguments are, in their order: all but what follows ``maximize`` here."""
    KINDS: ClassVar[dict[str, type[Hyperparameters]]] = {}
    """Those of every optimizer, by what a checkpoint calls it."""
    OWN_CHECKS: ClassVar[dict[str, Check]] = {}
    """Checks of what only this optimizer has."""
    _CHECKS: ClassVar[dict[str, Check]] = CHECKS
    """All checks of this optimizer."""

    # Any: numbers of NumPy, too, become plain ones.
    lr: Any
    weight_decay: Any = 0.0
    decoupled_weight_decay: bool = False
    maximize: bool = False
    max_grad_norm: Any = None
    max_grad_value: Any = None
    skip_nonfinite: bool = False
    ema_decay: Any = None
    zero_grads: bool = False
    telemetry: bool = False
    state_dtype: precision.StateDtype = "float32"
    master_params: str | None = None
    rounding: str = "stochastic"
    seed: Any = 0
    offset: Any = 0

    def __init_subclass__(cls) -> None:
        cls._CHECKS = {**CHECKS, **cls.OWN_CHECKS}
        if "KIND" in vars(cls):
            cls.KINDS[cls.KIND] = cls

    def __post_init__(self) -> None:
        for name in (*self.names(), *(field.name for field in fields(self))):
            object.__setattr__(self, name, self.check(name, getattr(self, name)))
        self.require_possible()

    @classmethod
    def check(cls, name: str, value: object) -> Any:
        """Return the value of a hyperparameter as its plain type, or raise."""
        return cls._CHECKS[name](name, value)

    def require_possible(self) -> None:  # noqa: B027 - most values do
        """Raise ValueError unless the values go with each other."""

    @property
    @abstractmethod
    def rule(self) -> Rule:
        """The update rule."""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return all names: the optimizer's own arguments, then what all have."""
        return (*cls.OWN, *_SHARED)

    def numbers(self) -> dict[str, float]:
        """Return the numbers that a rule may ask for, by name; ``betas`` are ``beta1`` and ``beta2``."""
        found = {}
        for name in self.OWN:
            value = getattr(self, name)
            if name == "betas":
                found["beta1"], found["beta2"] = value
            elif name not in {"lr", "weight_decay"} and isinstance(value, (float, int)):
                found[name] = float(value)
        return found

    def start(self) -> dict[str, float]:
        """Return what states begin with that do not begin with 0."""
        numbers = self.numbers()
        return {name: numbers[of] for name, of in self.rule.start.items() if numbers[of] != 0}

    def to_dict(self) -> dict[str, Any]:
        """Return those that are not None, by name."""
        values = ((name, getattr(self, name)) for name in self.names())
        return {name: value for name, value in values if value is not None}

    def changed(self, **values: object) -> Self:
        """Return a copy with some values changed; only those are checked, as every step may change ``lr``."""
        checks = self._CHECKS
        checked = {name: checks[name](name, value) for name, value in values.items()}
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, **checked)
        if len(values) > 1 or "lr" not in values:
            copy.require_possible()
        return copy

    @property
    def state(self) -> tuple[str, ...]:
        """The names of what is kept of each element: the states in the order of the rule, the average."""
        states = self.rule.states
        return states if self.ema_decay is None else (*states, "param_ema")

    def formats(self, state_dtype: precision.StateDtype | None = None) -> tuple[str, ...]:
        """Return the format of each state, or what it would be with another ``state_dtype``."""
        stored = self.state_dtype if state_dtype is None else state_dtype
        rule = self.rule
        return precision.of_states(self.state, rule.nonnegative or frozenset(), rule.exact, stored)

    @property
    def stores_plainly(self) -> bool:
        """Whether all that is kept is of the dtype of the arithmetic."""
        return self.state_dtype == "float32" and self.master_params is None


_SHARED = (
    "max_grad_norm",
    "max_grad_value",
    "skip_nonfinite",
    "ema_decay",
    "zero_grads",
    "telemetry",
    "state_dtype",
    "master_params",
    "rounding",
    "seed",
    "offset",
)
"""What every optimizer has besides its own arguments."""


_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
_LARGEST = {dtype: float(np.finfo(dtype).max) for dtype in _DTYPES}
_SMALLEST = {dtype: float(np.finfo(dtype).smallest_subnormal) for dtype in _DTYPES}


def require_range(name: str, value: float, dtype: Floating, or_zero: str = "0 or ") -> None:
    """Raise ValueError if a number, at least 0, overflows in ``dtype`` or becomes zero in it."""
    largest, smallest = _LARGEST[dtype], _SMALLEST[dtype]
    if value > largest:
        raise ValueError(f"{name} must be at most {largest:.7g} for {dtype} buffers; got {value:.7g}.")
    if 0 < value < smallest:
        raise ValueError(
            f"{name} must be {or_zero}at least {smallest:.7g} for {dtype} buffers; got {value:.7g}."
        )


def outside(values: Any, dtype: Floating) -> Any:
    """Return where :func:`require_range` would raise."""
    return (values > _LARGEST[dtype]) | ((values > 0) & (values < _SMALLEST[dtype]))
