"""Steps on the CPU of many buffers that lie anywhere, in one pass: nothing is copied.

Buffers are thought of as side by side in a *virtual* one, each from a multiple of 16 elements on: each is a
unit of it (:mod:`fastadam.kernels.units`), so that they are cut into shares for threads as segments are.
Where a buffer really lies stands in a table. Memory traffic is that of separate steps, and about 100 bytes
for each buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numba import prange

from . import rules, threads
from .compiling import jit
from .cpu import PARALLEL_FROM
from .distinct import memory_at
from .stored import step_run_of_row
from .units import ALIGNMENT, Units, each_share

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

FIRST, ROW, PARAMS, GRADS, STATES = range(5)
"""Columns of the table of places: the element of the virtual buffer where a buffer begins, the row of its
coefficients, and the addresses of its parameters, of its gradients and, from the last on, of each state and
of a copy of its parameters, if there is one."""


class Tensors(NamedTuple):
    """Buffers to be stepped together: of one dtype each, the parameters, the gradients and each state."""

    params: Array  # of no elements, as are the two below: for their dtypes, codes of 16 bits as in storage
    grads: Array
    states: tuple[Array, ...]
    units: Units  # one for each buffer that has elements; its row is that of its places
    places: Array  # int64, shape (buffers, STATES + states + copy), C-contiguous
    coefficients: Array  # shape (rows, 1 + those of the rule), C-contiguous, of the dtype of the arithmetic
    out: Array | None = None  # of no elements: the dtype of copies of the parameters, written to the nearest


def layout(sizes: Array) -> tuple[Array, Units]:
    """Return where buffers of so many elements begin in a virtual one, and their units."""
    sizes = np.asarray(sizes, np.int64)
    ends = np.cumsum(sizes + -sizes % ALIGNMENT)
    first = np.append(0, ends[:-1]) if sizes.size else ends
    units = np.stack([first, first + sizes, np.arange(sizes.size)], axis=1)
    return first, Units(units[sizes > 0])


def _make_loop(cache_key: str) -> Callable[..., None]:
    def step_tensors(
        params: Array,
        grads: Array,
        states: tuple[Array, ...],
        out: Any,
        units: Array,
        first: Array,
        places: Array,
        coefficients: Array,
        conditioning: Any,
        direction: Any,
        decay: Any,
        rule: Any,
    ) -> None:
        cache_key  # noqa: B018
        # In the serial compilation, prange is range.
        for share in prange(first.size - 1):
            for k in range(first[share], first[share + 1]):
                buffer = units[k, 2]
                start = units[k, 0] - places[buffer, FIRST]
                stop = units[k, 1] - places[buffer, FIRST]
                memory = memory_at(params, grads, states, out, places, buffer, PARAMS)
                arguments = (memory, start, stop, None, None)
                others = (conditioning, direction, rule, None)
                step_run_of_row(coefficients, places[buffer, ROW], decay, others, arguments)

    return step_tensors


serial, parallel = jit(_make_loop), jit(_make_loop, parallel=True)


def plan(tensors: Tensors, c: rules.Update) -> Callable[[], None]:
    """Return the call that advances the parameters and states of all buffers by one step, in place.

    All that could fail is done here, before anything is written.

    Parameters
    ----------
    tensors : Tensors
        No two arrays of a buffer share memory, and none that is written with any other. The tables must stay
        as they are until the call has returned.
    c : Update
        What is the same for all. Of the decay and of the rule only the types count; a decay of None is none
        for any buffer. Neither an average nor clearing is possible.
    """
    units = tensors.units
    by_numba, count = threads.shares(units.total, PARALLEL_FROM, threads.MIN_PIECE)
    loop, shares = parallel if by_numba else serial, units.shares(count)
    rest = (tensors.places, tensors.coefficients, *c[:4])
    calls = [
        partial(loop, *tensors[:3], tensors.out, shares.units, first, *rest)
        for first in ([shares.first] if by_numba else each_share(shares.first))
    ]
    return threads.all_of(calls)


def prepare(tensors: Tensors, c: rules.Update) -> None:
    """Compile, or load from the disk cache, the loop for these arguments; write nothing."""
    loop = parallel if tensors.units.total >= PARALLEL_FROM and threads.numba_is_safe() else serial
    nothing, first = np.empty((0, 3), np.int64), np.zeros(1, np.int64)
    coefficients = np.empty((0, 1 + len(c.rule)), tensors.coefficients.dtype)
    loop(*tensors[:3], tensors.out, nothing, first, tensors.places, coefficients, *c[:4])
