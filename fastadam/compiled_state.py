"""What compiled code takes for an optimizer: one NamedTuple of numbers and arrays.

Its type selects the code, as that of the coefficients does: ``None`` in place of a part costs nothing. What
changes lies in arrays.

Numba's disk cache of users' functions names these classes by module and name, and raises where one is gone:
they stay where they are, whatever becomes of their fields.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.core.errors import TypingError

from fastadam import bias_correction
from fastadam.bias_correction import BLOCK
from fastadam.buffers import Array
from fastadam.coefficients import Coefficients
from fastadam.hyperparameters import Hyperparameters
from fastadam.kernels import norms, rules
from fastadam.kernels.compiling import digest
from fastadam.segments import Segment
from fastadam.state import State


class Last(NamedTuple):
    """What the last call of a step did; arrays of one element."""

    calls: Array
    """Calls of a step, int64; -1 when there may be no more."""
    lr: Array
    """Learning rate, float64."""
    grad_norm: Array
    """Global norm of the gradient, float64, where ``max_grad_norm`` or ``skip_nonfinite`` asked for it."""
    clip_factor: Array
    """What the gradient was multiplied with, float64."""
    nonfinite: Array
    """Elements of the gradient that were inf or NaN, int64, where one of the two asked for it."""


class Numbers(NamedTuple):
    """Hyperparameters in float64, and the range of the dtype."""

    beta1: float
    beta2: float
    weight_decay: float  # 0 where it is not decoupled
    max_grad_norm: float | None
    max_value: Any  # of the dtype
    largest: float
    smallest: float


class Corrections(NamedTuple):
    """The bias corrections of a block of steps, formed when its first step is taken."""

    block: Array  # its number, int64[1]
    powers: Array  # beta ** (0, ..., BLOCK - 1), float64[2, 2, BLOCK]: of each beta, and what rounding left
    first: Array  # 1 - beta1 ** step, float64[BLOCK]
    inverse_second: Array  # 1 / (1 - beta2 ** step), rounded to the dtype


class CompiledAdam(NamedTuple):
    """What a compiled function takes for an optimizer: its coefficients by type, and its state in arrays.

    Public are ``lr``, ``step``, ``states`` and ``last``; only ``lr[0]`` may be written to, before any step.
    """

    lr: Array
    """Learning rate of the next step, float64[1]."""
    step: Array
    """Steps taken, int64[1]."""
    states: tuple[Array, ...]
    """The moments and the average of the parameters, the optimizer's own."""
    last: Last
    update: rules.Update  # of some step: what changes is replaced
    clear: rules.Clear | None
    reads_gradients_first: bool | None  # None or True, for the type
    skips: bool | None
    numbers: Numbers
    corrections: Corrections
    scratch: Array  # of the pass over the gradients, float64
    version: Array


@cache
def _version() -> Array:
    """Return an array whose type names the sources of all that compiled code calls.

    The key of Numba's disk cache has the types of a function's arguments, but nothing of the functions that
    it calls: without this, a user's ``@njit(cache=True)`` function would run the machine code of the release
    it was compiled with.
    """
    sha = hashlib.sha256(digest().encode())
    for name in ("bias_correction", "compiled_state", "compiled_steps", "numba"):
        sha.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return np.empty(0, np.dtype([(f"sources_{sha.hexdigest()[:32]}", np.uint8)]))


def compiled_adam(c: Coefficients, h: Any, state: State) -> CompiledAdam:
    """Return what compiled code takes for a state in CPU memory, whose arrays it shares.

    Parameters
    ----------
    c : Coefficients
    h : Hyperparameters
        With an ``lr`` that is a number.
    state : State
    """
    size = int(state._arrays[0].size)
    limits = np.finfo(c.dtype)
    decoupled = h.decoupled_weight_decay and h.weight_decay > 0
    powers = np.array([bias_correction._first_powers(beta) for beta in h.betas])
    reads = c.reads_gradients_first
    return CompiledAdam(
        lr=np.array([c.lr]),
        step=np.array([state._step]),
        states=tuple(np.asarray(array) for array in state._arrays),
        last=Last(np.zeros(1, np.int64), np.array([c.lr]), np.zeros(1), np.ones(1), np.zeros(1, np.int64)),
        update=c.update(max(state._step, 1)),
        clear=c.clear,
        reads_gradients_first=True if reads else None,
        skips=True if c.skips else None,
        numbers=Numbers(
            h.betas[0],
            h.betas[1],
            float(h.weight_decay) if decoupled else 0.0,
            h.max_grad_norm,
            c.dtype.type(np.inf if h.max_grad_value is None else h.max_grad_value),
            float(limits.max),
            float(limits.smallest_subnormal),
        ),
        corrections=Corrections(np.array([-1]), powers, np.empty(BLOCK), np.empty(BLOCK, c.dtype)),
        scratch=np.empty(norms.scratch_size(size) if reads else 0),
        version=_version(),
    )


def require_defaults(
    h: Hyperparameters, segments: tuple[Segment, ...], names: tuple[str, ...], where: str
) -> None:
    """Raise ValueError where an optimizer has what compiled code of a kind cannot do.

    Parameters
    ----------
    h : Hyperparameters
    segments : tuple of Segment
        There must be none.
    names : tuple of str
        Hyperparameters that must have their defaults.
    where : str
        What errors call the code.
    """
    if h.KIND != "adam":
        raise ValueError(f"opt must be a FusedAdam for {where}; got one of {h.KIND!r}.")
    for name in names:
        value, wanted = getattr(h, name), getattr(Hyperparameters, name)
        if value != wanted:
            raise ValueError(f"{name} must be {wanted!r} for {where}; got {value!r}.")
    if segments:
        raise ValueError(f"segments must be empty for {where}; got {len(segments)}.")


# --- Types, checked when a user's function is compiled ------------------------------------------------------

_FLOATS = (types.float32, types.float64)


def require_types(params: Any, grads: Any, adam: Any, grad_scale: Any) -> None:
    """Raise TypingError, which the user's function then raises, for arguments that are not of their types."""
    if getattr(adam, "instance_class", None) is not CompiledAdam:
        raise TypingError(f"adam must be what fastadam.numba.compiled gives; got {adam}.")
    dtype = adam.types[CompiledAdam._fields.index("states")][0].dtype
    for name, array in (("flat_params", params), ("flat_grads", grads)):
        if not isinstance(array, types.Array):
            raise TypingError(f"{name} must be an array; got {array}.")
        if array.ndim != 1 or array.layout != "C":
            raise TypingError(
                f"{name} must be a C-contiguous array of one dimension; got {array}. Pass {name}.ravel() of"
                " a contiguous one."
            )
        if array.dtype != dtype:
            raise TypingError(f"{name} must be {dtype}, as adam was made for; got {array.dtype}.")
    clears = not isinstance(adam.types[CompiledAdam._fields.index("clear")], types.NoneType)
    for name, array in (("flat_params", params), *[("flat_grads", grads)] * clears):
        if not array.mutable:
            raise TypingError(f"{name} must be writable; got {array}.")
    absent = grad_scale is None or isinstance(grad_scale, (types.NoneType, types.Omitted))
    if not absent and not isinstance(grad_scale, (types.Float, types.Integer)):
        raise TypingError(f"grad_scale must be a real number; got {grad_scale}.")
