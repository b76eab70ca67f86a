"""The hyperparameters of Adam: their ranges, and the coefficients of each step.

Every range check of the package stands here. Coefficients are formed in float64 and rounded once to the dtype
of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from fastadam import bias_correction
from fastadam.checks import at_least_zero, real, require_flag
from fastadam.kernels import rules
from fastadam.kernels.cuda import KernelTypes

Floating: TypeAlias = np.dtype[np.floating[Any]]


def _beta(name: str, value: object) -> float:
    number = real(name, value)
    if not 0 <= number < 1:
        raise ValueError(f"{name} must be in [0, 1); got {number}.")
    return number


def _betas(_: str, value: object) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"betas must be a pair of real numbers; got {type(value).__name__}.")
    if len(value) != 2:
        raise ValueError(f"betas must be a pair of real numbers; got {len(value)} values.")
    return _beta("betas[0]", value[0]), _beta("betas[1]", value[1])


_CHECKS: dict[str, Callable[[str, object], object]] = {
    "lr": at_least_zero,
    "betas": _betas,
    "eps": at_least_zero,
    "weight_decay": at_least_zero,
    "decoupled_weight_decay": require_flag,
    "amsgrad": require_flag,
    "maximize": require_flag,
}


@dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters of Adam, with PyTorch's names, meanings and defaults.

    Parameters
    ----------
    lr : float
        Learning rate, at least 0.
    betas : tuple of float
        Decay rates of the first and second moment, each in [0, 1).
    eps : float
        Added to the root of the debiased second moment, at least 0.
    weight_decay : float
        Weight decay, at least 0.
    decoupled_weight_decay : bool
        False: L2, added to the gradient. True: AdamW, scaled by ``lr``.
    amsgrad : bool
        Divide by the maximum of the second moments so far.
    maximize : bool
        Ascend.

    Raises
    ------
    TypeError
        If a number is not a real number, or a flag not a bool.
    ValueError
        If a number is not finite or out of its range.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    amsgrad: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))

    def changed(self, **values: object) -> Hyperparameters:
        """Return a copy with some values changed; only those are checked, as every step may change ``lr``."""
        checked = {name: _CHECKS[name](name, value) for name, value in values.items()}
        copy = object.__new__(Hyperparameters)
        copy.__dict__.update(self.__dict__, **checked)
        return copy

    @property
    def moments(self) -> tuple[str, ...]:
        """The names of the state that the rule keeps, in the order of the rule's ``state``."""
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if self.amsgrad else ("exp_avg", "exp_avg_sq")


_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
_LARGEST = {dtype: float(np.finfo(dtype).max) for dtype in _DTYPES}
_SMALLEST = {dtype: float(np.finfo(dtype).smallest_subnormal) for dtype in _DTYPES}


def _require_range(name: str, value: float, dtype: Floating) -> None:
    largest, smallest = _LARGEST[dtype], _SMALLEST[dtype]
    if value > largest:
        raise ValueError(f"{name} must be at most {largest:.7g} for {dtype} buffers; got {value:.7g}.")
    if 0 < value < smallest:
        raise ValueError(f"{name} must be 0 or at least {smallest:.7g} for {dtype} buffers; got {value:.7g}.")


@lru_cache(maxsize=16)
def _inverse_corrections(beta: float, number: int, dtype: Floating) -> list[np.floating[Any]]:
    """Return ``1 / (1 - beta ** step)``, rounded, for a block of steps."""
    with np.errstate(divide="ignore"):  # step 0 is never taken
        return list((1 / bias_correction.block(beta, number)).astype(dtype))


@lru_cache(maxsize=16)
def _corrections(beta: float, number: int) -> list[float]:
    """Return ``1 - beta ** step`` for a block of steps."""
    corrections: list[float] = bias_correction.block(beta, number).tolist()
    return corrections


class Coefficients:
    """The coefficients of every step in one dtype; what does not depend on the step is rounded only once.

    Parameters
    ----------
    hyperparameters : Hyperparameters
    dtype : dtype
        float32 or float64.

    Attributes
    ----------
    direction : Maximize or None
    decay : L2Decay, DecoupledDecay or None
        Of :mod:`fastadam.kernels.rules`.
    types : KernelTypes
        What a kernel is compiled for.

    Raises
    ------
    ValueError
        If a coefficient overflows in ``dtype`` or becomes zero in it.
    """

    def __init__(self, hyperparameters: Hyperparameters, dtype: Floating) -> None:
        h = hyperparameters
        beta1, beta2 = h.betas
        rounded = dtype.type
        _require_range("lr", h.lr, dtype)
        _require_range("lr / (1 - betas[0])", h.lr / (1 - beta1), dtype)
        _require_range("eps", h.eps, dtype)

        self.dtype = dtype
        self.direction = rules.Maximize() if h.maximize else None
        self.decay: rules.L2Decay | rules.DecoupledDecay | None = None
        if h.weight_decay > 0 and h.decoupled_weight_decay:
            _require_range("lr * weight_decay", h.lr * h.weight_decay, dtype)
            decay = rules.lr_times_weight_decay(h.lr, h.weight_decay)
            self.decay = rules.DecoupledDecay(rounded(decay))
        elif h.weight_decay > 0:
            _require_range("weight_decay", h.weight_decay, dtype)
            self.decay = rules.L2Decay(rounded(h.weight_decay))
        self._rule: type[rules.Adam] = rules.AMSGrad if h.amsgrad else rules.Adam
        self.types = KernelTypes(dtype, len(h.moments), type(self.direction), type(self.decay), self._rule)

        self._rounded = rounded
        self._lr, self._betas = h.lr, h.betas
        self._averaging = (rounded(beta1), rounded(1 - beta1), rounded(beta2), rounded(1 - beta2))
        self._eps = rounded(h.eps)
        self._block: int | None = None

    def rule(self, step: int) -> rules.Adam:
        """Return the rule's coefficients for step number ``step``, counted from 1."""
        block, place = divmod(step, bias_correction.BLOCK)
        if block != self._block:
            beta1, beta2 = self._betas
            self._corrections1 = _corrections(beta1, block)
            self._inverse_corrections2 = _inverse_corrections(beta2, block, self.dtype)
            self._block = block
        step_size = self._rounded(rules.step_size(self._lr, self._corrections1[place]))
        inv_bias_correction2 = self._inverse_corrections2[place]
        # What the NamedTuple's constructor does, in half of its time.
        return tuple.__new__(self._rule, (step_size, *self._averaging, inv_bias_correction2, self._eps))
