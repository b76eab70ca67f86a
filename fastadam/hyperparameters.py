"""The hyperparameters of Adam: their ranges, and the coefficients of each step.

Every range check of the package stands here. Coefficients are formed in float64 and rounded once to the dtype
of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias, cast

import numpy as np

from fastadam import bias_correction, precision
from fastadam.checks import at_least_zero, real, require_flag
from fastadam.kernels import rules
from fastadam.kernels.cuda import KernelTypes

Floating: TypeAlias = np.dtype[np.floating[Any]]

Schedule: TypeAlias = Callable[[int], float]
"""A learning rate as a function of the step number, counted from 1."""


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
    return None if value is None else _beta(name, value)


_CHECKS: dict[str, Callable[[str, object], object]] = {
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


def check(name: str, value: object) -> Any:
    """Return the value of a hyperparameter as its plain type, or raise."""
    return _CHECKS[name](name, value)


@dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters of Adam, with PyTorch's names, meanings and defaults.

    Parameters
    ----------
    lr : float or callable
        Learning rate, at least 0, or a function of the step number, counted from 1.
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
        How the moments are stored: "float32" (the dtype of the arithmetic), "bfloat16" or "8bit"; one for
        each.
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

    lr: float | Schedule = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    amsgrad: bool = False
    maximize: bool = False
    max_grad_norm: float | None = None
    max_grad_value: float | None = None
    skip_nonfinite: bool = False
    ema_decay: float | None = None
    zero_grads: bool = False
    telemetry: bool = False
    state_dtype: precision.StateDtype = "float32"
    master_params: str | None = None
    rounding: str = "stochastic"
    seed: int = 0
    offset: int = 0

    def __post_init__(self) -> None:
        for name in _CHECKS:
            object.__setattr__(self, name, check(name, getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """Return those that are not None, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def changed(self, **values: object) -> Hyperparameters:
        """Return a copy with some values changed; only those are checked, as every step may change ``lr``."""
        checked = {name: check(name, value) for name, value in values.items()}
        copy = object.__new__(Hyperparameters)
        copy.__dict__.update(self.__dict__, **checked)
        return copy

    @property
    def state(self) -> tuple[str, ...]:
        """The names of what is kept of each element: the moments in the order of the rule, the average."""
        moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if self.amsgrad else ("exp_avg", "exp_avg_sq")
        return moments if self.ema_decay is None else (*moments, "param_ema")

    @property
    def stores_plainly(self) -> bool:
        """Whether all that is kept is of the dtype of the arithmetic."""
        return self.state_dtype == "float32" and self.master_params is None


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


_MASK = bias_correction.BLOCK - 1  # it is a power of two
_BITS = _MASK.bit_length()


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


def outside(values: Any, dtype: Floating) -> Any:
    """Return where :func:`require_range` would raise."""
    return (values > _LARGEST[dtype]) | ((values > 0) & (values < _SMALLEST[dtype]))


class Coefficients:
    """The coefficients of every step in one dtype; what does not depend on the step is rounded only once.

    Parameters
    ----------
    hyperparameters : Hyperparameters
    dtype : dtype
        float32 or float64.

    Attributes
    ----------
    lr : float
        Of the step whose :meth:`update` was asked for last, or of step 1.
    types, scaled_types : KernelTypes
        What a kernel is compiled for, without and with a ``grad_scale``.
    reads_gradients_first, skips : bool
        Whether a step takes a pass over all gradients before, and is not taken where one is inf or NaN.
    clear : Clear or None
        Whether the gradients are set to zero.
    is_plain : bool
        Whether there is nothing but the rule, its decay and its direction, with a fixed learning rate.

    Raises
    ------
    TypeError, ValueError
        If a coefficient overflows in ``dtype`` or becomes zero in it, or a schedule gives no learning rate.
    """

    def __init__(self, hyperparameters: Hyperparameters, dtype: Floating) -> None:
        h = hyperparameters
        beta1, beta2 = h.betas
        rounded = dtype.type
        self._rounded = rounded
        self._schedule = h.lr if callable(h.lr) else None
        self._decoupled = h.weight_decay if h.decoupled_weight_decay and h.weight_decay > 0 else None
        self._betas = h.betas
        self.dtype = dtype

        self.decay: rules.L2Decay | rules.DecoupledDecay | None = None
        self.set_lr(_lr_at(h.lr, 1) if callable(h.lr) else h.lr)
        require_range("eps", h.eps, dtype)
        if h.weight_decay > 0 and self._decoupled is None:
            require_range("weight_decay", h.weight_decay, dtype)
            self.decay = rules.L2Decay(rounded(h.weight_decay))
        self.direction = rules.Maximize() if h.maximize else None
        self._rule: type[rules.Adam] = rules.AMSGrad if h.amsgrad else rules.Adam
        self._averaging = (rounded(beta1), rounded(1 - beta1), rounded(beta2), rounded(1 - beta2))
        self._eps = rounded(h.eps)
        self._block: int | None = None
        self.average: rules.Average | None = None
        if h.ema_decay is not None:
            self.average = rules.Average(rounded(h.ema_decay), rounded(1 - h.ema_decay))
        self._max_norm, self._max_value = h.max_grad_norm, rounded(np.inf)
        self._clips = h.max_grad_norm is not None
        if h.max_grad_value is not None:
            require_range("max_grad_value", h.max_grad_value, dtype, or_zero="")
            self._max_value, self._clips = rounded(h.max_grad_value), True
        self.clear = rules.Clear() if h.zero_grads else None
        self.is_plain = not (
            self._schedule or self._clips or h.skip_nonfinite or self.average or self.clear is not None
        )
        self.types = KernelTypes.of(dtype, len(h.state), self.update(1), self.clear)
        self.scaled_types = self.types._replace(conditioning=rules.Conditioning)
        self.skips = h.skip_nonfinite
        self.reads_gradients_first = h.skip_nonfinite or h.max_grad_norm is not None

    def set_lr(self, lr: float) -> None:
        """Check a learning rate, and form what depends on nothing else."""
        require_range("lr", lr, self.dtype)
        require_range("lr / (1 - betas[0])", lr / (1 - self._betas[0]), self.dtype)
        if self._decoupled is not None:
            decay = rules.lr_times_weight_decay(lr, self._decoupled)
            require_range("lr * weight_decay", decay, self.dtype)
            self.decay = rules.DecoupledDecay(self._rounded(decay))
        self.lr = lr

    def lr_of(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.lr if self._schedule is None else _lr_at(self._schedule, step)

    def rule(self, step: int) -> rules.Adam:
        """Return the rule's coefficients for step number ``step``, counted from 1."""
        block, place = step >> _BITS, step & _MASK
        if block != self._block:
            beta1, beta2 = self._betas
            self._corrections1 = _corrections(beta1, block)
            self._inverse_corrections2 = _inverse_corrections(beta2, block, self.dtype)
            self._block = block
        step_size = self._rounded(rules.step_size(self.lr, self._corrections1[place]))
        inv_bias_correction2 = self._inverse_corrections2[place]
        # What the NamedTuple's constructor does, in half of its time.
        return tuple.__new__(self._rule, (step_size, *self._averaging, inv_bias_correction2, self._eps))

    def update(self, step: int, grad_scale: float | None = None, clip_factor: float = 1.0) -> rules.Update:
        """Return all coefficients of step number ``step``.

        Parameters
        ----------
        step : int
            Counted from 1.
        grad_scale : float, optional
            What the gradients are divided by.
        clip_factor : float
            What they are multiplied with, then.
        """
        if self._schedule is not None:
            self.set_lr(_lr_at(self._schedule, step))
        conditioning: rules.Clipping | rules.Conditioning | None = None
        if grad_scale is not None:
            scale, factor = self._rounded(grad_scale), self._rounded(clip_factor)
            conditioning = rules.Conditioning(scale, factor, self._max_value)
        elif self._clips:
            conditioning = rules.Clipping(self._rounded(clip_factor), self._max_value)
        parts = (conditioning, self.direction, self.decay, self.rule(step), self.average)
        return tuple.__new__(rules.Update, parts)

    def clip_factor(self, norm: float) -> float:
        """Return what takes a gradient of a norm to ``max_grad_norm``, at most 1; NaN for NaN.

        As in ``torch.nn.utils.clip_grad_norm_``, 1e-6 is added to the norm.
        """
        if self._max_norm is None:
            return 1.0
        factor: float = rules.clip_factor(norm, self._max_norm, rules.CLIP_EPS, 1.0)
        return factor


def _lr_at(schedule: Schedule, step: int) -> float:
    return at_least_zero(f"lr({step})", schedule(step))


def divisor(grad_scale: object, summed: int, dtype: Floating) -> float | None:
    """Return what the gradients of a step are divided by; None if by nothing.

    Parameters
    ----------
    grad_scale : float, array or tensor of one in CPU memory, or None
    summed : int
        The gradients that were added up, if so many; 0 for one that was not.
    dtype : dtype
        Of the gradients.

    Raises
    ------
    TypeError
        If ``grad_scale`` is not a real number.
    ValueError
        If it is not greater than 0, or not finite, or zero or inf in ``dtype``.
    """
    if grad_scale is None:
        return float(summed) if summed else None
    if getattr(grad_scale, "shape", None) == () and hasattr(grad_scale, "item"):  # a scalar tensor
        grad_scale = grad_scale.item()
    number = real("grad_scale", grad_scale)
    if number <= 0:
        raise ValueError(f"grad_scale must be greater than 0; got {number}.")
    require_range("grad_scale", number, dtype, or_zero="")
    return number * max(summed, 1)
