"""A step of buffers that are not all of one dtype: what is checked, and the loop that takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastadam import buffers, formats
from fastadam.buffers import Array, Buffer
from fastadam.coefficients import Coefficients
from fastadam.hyperparameters import Hyperparameters
from fastadam.kernels import rules
from fastadam.kernels.rounding import Storage
from fastadam.rounding import rounding
from fastadam.segmented import Segmented
from fastadam.segments import Segment, Segments
from fastadam.state import MASTERS, State


def require_possible(h: Hyperparameters, dtype: np.dtype[Any]) -> None:
    """Raise ValueError unless parameters of a dtype can be kept as the hyperparameters say."""
    if h.master_params is None and (h.state_dtype == "float32" or dtype != formats.FLOAT64):
        return
    kind = formats.name_of(dtype)
    if dtype == formats.FLOAT64 and h.state_dtype != "float32":
        raise ValueError(
            f"state_dtype must be 'float32', the default, for float64 parameters; got {h.state_dtype!r}."
        )
    if h.master_params is not None and dtype in formats.FLOATS:
        raise ValueError(f"master_params must be None for {kind} parameters; got {h.master_params!r}.")
    if h.master_params == "split" and dtype != formats.BFLOAT16:
        raise ValueError(f"master_params must be None or 'float32' for {kind} parameters; got 'split'.")


def rounds_at_random(h: Hyperparameters, dtype: np.dtype[Any]) -> bool:
    """Return whether a step of parameters of a dtype rounds anything at random."""
    rounds = (dtype not in formats.FLOATS and h.master_params is None) or h.state_dtype != "float32"
    return rounds and h.rounding == "stochastic"


def master_of(h: Hyperparameters) -> str | None:
    """Return what the master of the parameters is called in the state, if there is one."""
    return None if h.master_params is None else MASTERS[h.master_params]


def copy_of_params(out: object, params: Array, grads: Array, state: State) -> Array:
    """Return the buffer for a copy of the parameters.

    Raises
    ------
    TypeError, ValueError
        If it is none.
    """
    buffer = buffers.flat(out, "out", writable=True)
    buffers.require_in_cpu_memory("out", buffer)
    require_copy(buffer, params, grads, state)
    return buffer  # type: ignore[return-value]


def require_copy(buffer: Buffer, params: Buffer, grads: Buffer, state: State) -> None:
    """Raise TypeError or ValueError if a buffer in the memory of the parameters cannot be a copy of them."""
    if params.dtype == formats.FLOAT64:
        kind = formats.name_of(buffer.dtype)
        raise TypeError(f"out must be None for float64 parameters; got a {kind} buffer.")
    if buffer.dtype == formats.FLOAT64:
        raise TypeError("out must be float32, float16 or bfloat16; got float64.")
    buffers.require_same_size("out", buffer, "flat_params", params)
    for name, other in (("flat_params", params), ("flat_grads", grads), ("the state", state._block)):
        buffers.require_disjoint("out", buffer, name, other)


def warmup(
    h: Hyperparameters, params: Array, c: Coefficients, update: rules.Update, segments: Sequence[Segment]
) -> None:
    """Compile, or load from the disk cache, all loops for parameters and gradients like ``params``, empty."""
    kinds = h.formats()
    state = State.of_params(params, h.state, kinds, master_of(h), State())
    storage, _ = storage_of(h, params, params, None, state, step=1)
    size = max((segment.stop for segment in segments), default=1)
    steps = Segmented(Segments(segments), h, c, size)
    steps.warmup_stored(params, state._arrays, update, c.clear, storage)


def storage_of(
    h: Hyperparameters, params: Array, grads: Buffer, out: object, state: State, step: int
) -> tuple[Storage, tuple[object, ...]]:
    """Return how a step of checked buffers stores them, and what a loop is compiled for because of it."""
    copy = None if out is None else copy_of_params(out, params, grads, state)  # type: ignore[arg-type]
    require_possible(h, params.dtype)
    draw = rounding(h.seed, step, h.offset) if rounds_at_random(h, params.dtype) else None
    storage = Storage(draw, state._master, copy, state._scales or None)
    kinds = tuple(None if array is None else array.dtype for array in (params, grads, state._master, copy))
    return storage, (*kinds, draw is None)
