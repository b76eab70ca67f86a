"""A step with no Python in it: what :mod:`fastadam.numba` calls.

The formulas are those of :mod:`fastadam.hyperparameters`, :mod:`fastadam.bias_correction` and
:mod:`fastadam.kernels.rules`, the loops those of :mod:`fastadam.kernels.cpu` and
:mod:`fastadam.kernels.norms`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from fastadam.bias_correction import BLOCK, _halves, _multiply, _one_minus, _power
from fastadam.buffers import Array
from fastadam.kernels import cpu, norms, rules
from fastadam.kernels.compiling import JIT_OPTIONS

# --- What numbers a step needs ------------------------------------------------------------------------------
# One function a part; the types of its arguments decide. ``called`` ones are the same for all types.

called = register_jitable(**JIT_OPTIONS)
for _formula in (_halves, _multiply, _power, _one_minus):
    called(_formula)


@called
def form_block(number: int, beta1: float, beta2: float, powers: Array, first: Array, second: Array) -> None:
    """Form the corrections of a block of steps, a :class:`fastadam.compiled_state.Corrections`."""
    base1, base2 = _power((beta1, 0.0), number * BLOCK), _power((beta2, 0.0), number * BLOCK)
    for k in range(BLOCK):
        first[k] = _one_minus(_multiply((powers[0, 0, k], powers[0, 1, k]), base1))
        second[k] = 1 / _one_minus(_multiply((powers[1, 0, k], powers[1, 1, k]), base2))


@called
def lr_fits(lr: float, beta1: float, weight_decay: float, smallest: float, largest: float) -> bool:
    """Whether nothing that is formed of a learning rate overflows in a dtype, or becomes zero in it."""
    for value in (lr, lr / (1 - beta1), rules.lr_times_weight_decay(lr, weight_decay)):
        if not (value == 0 or smallest <= value <= largest):
            return False
    return True


def rounded(value: Any, like: Any) -> Any:
    """Return a float64 rounded to the dtype of a number."""
    return like.dtype.type(value)


@overload(rounded, jit_options=JIT_OPTIONS, strict=False)
def _rounded(value: Any, like: Any) -> Any:
    kind = np.float32 if like == types.float32 else np.float64
    return lambda value, like: kind(value)  # noqa: ARG005


def rule_of(rule: Any, step_size: Any, inv_bias_correction2: Any) -> Any:
    """Return the coefficients of a rule for another step; for compiled code."""
    return rule._replace(step_size=step_size, inv_bias_correction2=inv_bias_correction2)


@overload(rule_of, jit_options=JIT_OPTIONS, strict=False)
def _rule_of(rule: Any, step_size: Any, inv_bias_correction2: Any) -> Any:
    kind = rule.instance_class

    def rule_of_step(rule: Any, step_size: Any, inv_bias_correction2: Any) -> Any:
        averaging = rule.beta1, rule.one_minus_beta1, rule.beta2, rule.one_minus_beta2
        return kind(step_size, *averaging, inv_bias_correction2, rule.eps)

    return rule_of_step


def decay_of(decay: Any, lr: Any, weight_decay: Any) -> Any:
    """Return the coefficients of a decay for another learning rate; for compiled code."""
    return decay


@overload(decay_of, jit_options=JIT_OPTIONS, strict=False)
def _decay_of(decay: Any, lr: Any, weight_decay: Any) -> Any:
    if getattr(decay, "instance_class", None) is not rules.DecoupledDecay:
        return lambda decay, lr, weight_decay: decay  # noqa: ARG005
    return lambda decay, lr, weight_decay: rules.DecoupledDecay(
        rounded(rules.lr_times_weight_decay(lr, weight_decay), decay.lr_times_weight_decay)
    )


def conditioning_of(conditioning: Any, grad_scale: Any, factor: Any, max_value: Any) -> Any:
    """Return the conditioning of a step; for compiled code."""
    return conditioning


@overload(conditioning_of, jit_options=JIT_OPTIONS, strict=False)
def _conditioning_of(conditioning: Any, grad_scale: Any, factor: Any, max_value: Any) -> Any:
    if not isinstance(grad_scale, types.NoneType):
        return lambda conditioning, grad_scale, factor, max_value: rules.Conditioning(  # noqa: ARG005
            rounded(grad_scale, max_value), rounded(factor, max_value), max_value
        )
    if isinstance(conditioning, types.NoneType):
        return lambda conditioning, grad_scale, factor, max_value: None  # noqa: ARG005
    return lambda conditioning, grad_scale, factor, max_value: rules.Clipping(  # noqa: ARG005
        rounded(factor, max_value), max_value
    )


def scale_of(grad_scale: Any, numbers: Any) -> Any:
    """Return what the norm is divided by, if that can be; for compiled code."""
    return 1.0 if grad_scale is None else grad_scale


@overload(scale_of, jit_options=JIT_OPTIONS, strict=False)
def _scale_of(grad_scale: Any, numbers: Any) -> Any:
    if isinstance(grad_scale, types.NoneType):
        return lambda grad_scale, numbers: 1.0  # noqa: ARG005

    def scale(grad_scale: Any, numbers: Any) -> float:
        # Not `fits`: 0 does not.
        if not numbers.smallest <= grad_scale <= numbers.largest:
            raise ValueError(
                "grad_scale must be greater than 0, and neither overflow nor become zero in the dtype of"
                " flat_params."
            )
        return float(grad_scale)

    return scale


# --- The step -----------------------------------------------------------------------------------------------
# Numba leaves out what `is None` decides where that is asked of an argument, not of an attribute of one.


@called
def factor_of(norm: float, max_grad_norm: Any) -> float:
    """Return what takes a gradient of a norm to the largest, at most 1."""
    if max_grad_norm is None:
        return 1.0
    factor: float = rules.clip_factor(norm, max_grad_norm, rules.CLIP_EPS, 1.0)
    return factor


@called
def clear_all(grads: Any, clear: Any) -> None:
    """Set gradients to zero that are not used, where those that are would be."""
    if clear is not None:
        grads[:] = 0


def measured(
    grads: Any, reads: Any, skips: Any, scratch: Any, last: Any, scale: Any, limit: Any, parallel: Any
) -> Any:
    """Return the factor that clips gradients, and whether they skip the step; for compiled code."""
    return 1.0, False


@overload(measured, jit_options=JIT_OPTIONS, strict=False)
def _measured(
    grads: Any, reads: Any, skips: Any, scratch: Any, last: Any, scale: Any, limit: Any, parallel: Any
) -> Any:
    if isinstance(reads, types.NoneType):
        return lambda grads, reads, skips, scratch, last, scale, limit, parallel: (1.0, False)  # noqa: ARG005
    serial, fold, parallel_from = norms.serial, norms.fold, norms.PARALLEL_FROM
    loop = norms.serial if isinstance(parallel, types.NoneType) else norms.parallel

    def measure(
        grads: Any, reads: Any, skips: Any, scratch: Any, last: Any, scale: float, limit: Any, parallel: Any
    ) -> Any:
        chunks = scratch.size // 2
        if grads.size < parallel_from:
            serial(grads, scratch, 0, chunks)
        else:
            loop(grads, scratch, 0, chunks)
        squares, nonfinite = fold(scratch, chunks)
        norm = rules.grad_norm(squares, scale)
        factor = factor_of(norm, limit)
        last.grad_norm[0], last.clip_factor[0], last.nonfinite[0] = norm, factor, nonfinite
        return factor, skips is not None and nonfinite > 0

    return measure


def advance(params: Any, grads: Any, states: Any, c: Any, clear: Any, parallel: Any) -> None:
    """Take a step with coefficients; for compiled code."""


@overload(advance, jit_options=JIT_OPTIONS, strict=False)
def _advance(params: Any, grads: Any, states: Any, c: Any, clear: Any, parallel: Any) -> Any:
    is_serial = isinstance(parallel, types.NoneType)
    parallel_from = cpu.PARALLEL_FROM
    if all(isinstance(part, types.NoneType) for part in (c.types[0], c.types[-1], clear)):
        serial, loop = cpu.serial, cpu.serial if is_serial else cpu.parallel

        def take(params: Any, grads: Any, states: Any, c: Any, clear: Any, parallel: Any) -> None:
            if params.size < parallel_from:
                serial(params, grads, states, c.direction, c.decay, c.rule)
            else:
                loop(params, grads, states, c.direction, c.decay, c.rule)

    else:
        serial, loop = cpu.whole_serial, cpu.whole_serial if is_serial else cpu.whole_parallel

        def take(params: Any, grads: Any, states: Any, c: Any, clear: Any, parallel: Any) -> None:
            rest = c.conditioning, c.average, clear
            if params.size < parallel_from:
                serial(params, grads, states, c.direction, c.decay, c.rule, *rest)
            else:
                loop(params, grads, states, c.direction, c.decay, c.rule, *rest)

    return take


def make_step(parallel: bool | None) -> Callable[..., bool]:
    """Return the step, by one thread (None) or by all (True); for compiled code."""

    def take_step(flat_params: Any, flat_grads: Any, adam: Any, grad_scale: Any = None) -> bool:
        lr, step, states, last, update, clear, reads, skips, numbers, corrections, scratch, _ = adam
        if last.calls[0] < 0:
            raise ValueError("adam must be used inside the block that fastadam.numba.compiled gave it to.")
        if flat_params.size != states[0].size:
            raise ValueError("flat_params must have the size that adam was made for.")
        if flat_grads.size != flat_params.size:
            raise ValueError("flat_grads must have the size of flat_params.")
        start, other = flat_params.ctypes.data, flat_grads.ctypes.data
        if start < other + flat_grads.nbytes and other < start + flat_params.nbytes:
            raise ValueError("flat_grads must not overlap flat_params.")
        decay, now = numbers.weight_decay, lr[0]
        if not lr_fits(now, numbers.beta1, decay, numbers.smallest, numbers.largest):
            raise ValueError(
                "adam.lr[0] must be at least 0, and neither it nor lr / (1 - betas[0]) nor lr * weight_decay"
                " may overflow or become zero in the dtype of flat_params."
            )
        scale = scale_of(grad_scale, numbers)

        limit = numbers.max_grad_norm
        factor, is_skipped = measured(flat_grads, reads, skips, scratch, last, scale, limit, parallel)
        last.calls[0] += 1
        last.lr[0] = now
        if is_skipped:
            clear_all(flat_grads, clear)
            return False
        number, place = (step[0] + 1) // BLOCK, (step[0] + 1) % BLOCK
        block, powers, first, inverse_second = corrections
        if number != block[0]:
            form_block(number, numbers.beta1, numbers.beta2, powers, first, inverse_second)
            block[0] = number
        size = rounded(rules.step_size(now, first[place]), update.rule.eps)
        c = rules.Update(
            conditioning_of(update.conditioning, grad_scale, factor, numbers.max_value),
            update.direction,
            decay_of(update.decay, now, decay),
            rule_of(update.rule, size, inverse_second[place]),
            update.average,
        )
        step[0] += 1
        advance(flat_params, flat_grads, states, c, clear, parallel)
        return True

    return take_step
