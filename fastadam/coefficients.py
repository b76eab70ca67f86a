"""The coefficients of each step: formed in float64, and rounded once to the dtype of the arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from fastadam import bias_correction
from fastadam.checks import at_least_zero, real
from fastadam.hyperparameters import Floating, Hyperparameters, Schedule, require_range
from fastadam.kernels import rules
from fastadam.kernels.columns import Columns, Formed, laid_out
from fastadam.kernels.cuda import KernelTypes
from fastadam.rule import LrOver, PerStep, Rule, Sequence, unsettled

_MASK = bias_correction.BLOCK - 1  # it is a power of two
_BITS = _MASK.bit_length()


@lru_cache(maxsize=32)
def _block(sequence: Sequence, number: int) -> list[float]:
    """Return the numbers of a block of steps."""
    found: list[float] = sequence.block(number).tolist()
    return found


@lru_cache(maxsize=32)
def _rounded(sequence: Sequence, number: int, dtype: Floating) -> list[np.floating[Any]]:
    """Return the same, rounded."""
    return list(sequence.block(number).astype(dtype))


def _split(
    rule: Rule, numbers: dict[str, float], dtype: Floating
) -> tuple[list[Any], list[tuple[int, bool, Sequence]]]:
    """Return the coefficients that stay, in their places, and the places and sequences of the others.

    With each sequence stands whether a coefficient is the learning rate over its number.
    """
    values: list[Any] = []
    sequences = []
    for k, column in enumerate(rule.columns):
        made: Any = column.of(*(numbers[name] for name in column.names))
        if isinstance(column, (LrOver, PerStep)):
            sequences.append((k, isinstance(column, LrOver), made))
            made = np.nan
        values.append(dtype.type(made))
    return values, sequences


def _require_ranges(
    rule: Rule, numbers: dict[str, float], dtype: Floating
) -> list[tuple[str, Callable[..., Any], tuple[float, ...], tuple[float, ...]]]:
    """Check all that the learning rate is not in, and return the other checks.

    With each of these stand the numbers before and behind the learning rate.
    """
    of_lr = []
    for label, of, names in rule.ranges:
        if "lr" in names:
            k = names.index("lr")
            given = [tuple(numbers[name] for name in part) for part in (names[:k], names[k + 1 :])]
            of_lr.append((label, of, given[0], given[1]))
        else:
            require_range(label, of(*(numbers[name] for name in names)), dtype)
    return of_lr


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
        h, rule = hyperparameters, hyperparameters.rule
        rounded, numbers = dtype.type, h.numbers()
        self._rounded = rounded
        self._schedule = h.lr if callable(h.lr) else None
        self._decoupled = h.weight_decay if h.decoupled_weight_decay and h.weight_decay > 0 else None
        self._of_lr = _require_ranges(rule, numbers, dtype)
        self.dtype = dtype

        self.decay: rules.L2Decay | rules.DecoupledDecay | None = None
        self.set_lr(_lr_at(h.lr, 1) if callable(h.lr) else h.lr)
        if h.weight_decay > 0 and self._decoupled is None:
            require_range("weight_decay", h.weight_decay, dtype)
            self.decay = rules.L2Decay(rounded(h.weight_decay))
        self.direction = rules.Maximize() if h.maximize else None
        self._of, self._rule, self._numbers = rule, rule.coefficients, numbers
        self._values, self._sequences = _split(rule, numbers, dtype)
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
        for label, of, before, behind in self._of_lr:
            require_range(label, of(*before, lr, *behind), self.dtype)
        if self._decoupled is not None:
            decay = rules.lr_times_weight_decay(lr, self._decoupled)
            require_range("lr * weight_decay", decay, self.dtype)
            self.decay = rules.DecoupledDecay(self._rounded(decay))
        self.lr = lr

    def lr_of(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.lr if self._schedule is None else _lr_at(self._schedule, step)

    def rule(self, step: int) -> rules.Rule:
        """Return the rule's coefficients for step number ``step``, counted from 1."""
        block, place = step >> _BITS, step & _MASK
        if block != self._block:
            self._of_block: list[tuple[int, bool, list[Any]]] = [
                (k, True, _block(of, block)) if is_over_lr else (k, False, _rounded(of, block, self.dtype))
                for k, is_over_lr, of in self._sequences
            ]
            self._block = block
        values = self._values
        for k, is_over_lr, of_block in self._of_block:
            # rules.step_size, without a call.
            values[k] = self._rounded(self.lr / of_block[place]) if is_over_lr else of_block[place]
        # What the NamedTuple's constructor does, in half of its time.
        return tuple.__new__(self._rule, values)

    def columns(self) -> Columns:
        """Return what a GPU forms the rule's coefficients from.

        Raises
        ------
        ValueError
            If one of them never stays as it is.
        """
        formed = []
        for k, is_over_lr, sequence in self._sequences:
            table = sequence.table()
            if table is None:
                raise unsettled(self._of, k, self._numbers)
            formed.append(Formed(k, is_over_lr, [table], np.zeros(1, np.int64)))
        return laid_out(formed, 1)

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
