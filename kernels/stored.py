"""Steps on the CPU of arrays in any storage: the loop of :mod:`fastadam.kernels.cpu` with codes and masters.

Memory traffic per element: 2 bytes in place of 4 for what is stored in 16 bits, each way; a master is read
and written (4 bytes each, or 2 where it is split), a copy of the parameters written (4 or 2).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numba import prange

from . import rules, threads
from .compiling import jit, writable_and_not
from .cpu import PARALLEL_FROM, step_element
from .formats import WEYL_OF_HIGH
from .rounding import Rounding, Storage

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

BLOCK = 2**32
"""Elements, by their index in the whole buffer, that share a key: a call does not go across."""


def _make_loop(cache_key: str) -> Callable[..., None]:
    def step_stored(
        params: Array,
        grads: Array,
        states: tuple[Array, ...],
        conditioning: Any,
        direction: Any,
        decay: Any,
        rule: Any,
        average: Any,
        clear: Any,
        rounding: Any,
        master: Any,
        out: Any,
    ) -> None:
        cache_key  # noqa: B018
        # In the serial compilation, prange is range.
        for i in prange(params.size):
            c = (conditioning, direction, decay, rule, average)
            step_element(params, grads, states, i, c, clear, rounding, master, out)

    return step_stored


serial, parallel = jit(_make_loop), jit(_make_loop, parallel=True)


def from_element(storage: Storage, a: int, b: int) -> Storage:
    """Return the storage of the elements ``a`` up to, without, ``b``."""
    rounding, master, out = storage
    if rounding is not None and (a or rounding.first >= BLOCK):
        first = int(rounding.first) + a
        of_block = first // BLOCK * WEYL_OF_HIGH
        keys = [np.uint32(int(key) + of_block & 0xFFFFFFFF) for key in rounding[:2]]
        rounding = Rounding(keys[0], keys[1], np.uint64(first))
    return Storage(rounding, *(None if array is None else array[a:b] for array in (master, out)))


def borders(rounding: Rounding | None, size: int) -> list[int]:
    """Return the elements inside of a buffer where another key begins."""
    if rounding is None:
        return []
    return list(range(-int(rounding.first) % BLOCK or BLOCK, size, BLOCK))


def _in_blocks(rounding: Rounding | None, pieces: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Cut pieces, in order, at :func:`borders`."""
    places = borders(rounding, size)
    if not places:
        return pieces
    edges = sorted({*places, *(edge for piece in pieces for edge in piece)})
    return list(pairwise(edges))


def plan(
    params: Array,
    grads: Array,
    states: tuple[Array, ...],
    c: rules.Update,
    clear: rules.Clear | None,
    storage: Storage,
) -> Callable[[], None]:
    """Return the call that advances ``params`` and ``states`` by one step, in place.

    All that could fail is done here, before anything is written.

    Parameters
    ----------
    params, grads, states : ndarray, tuple of ndarray
        As for :func:`fastadam.kernels.cpu.plan`, each float32, float64, or codes of float16 (uint16) or
        bfloat16 (int16). The average of the parameters is of the dtype in which the rule computes.
    c, clear
        As there.
    storage : Storage
        How they are rounded, a master of the parameters, and where a copy of them goes.
    """
    size, (conditioning, direction, decay, rule, average) = params.size, c
    coefficients = (conditioning, direction, decay, rule, average, clear)
    if size < PARALLEL_FROM and not borders(storage.rounding, size):  # where each call counts
        more = from_element(storage, 0, size)
        return partial(serial, params, grads, states, *coefficients, *more)
    many = size >= PARALLEL_FROM and threads.numba_is_safe()
    split = [(0, size)]
    if size >= PARALLEL_FROM and not many:
        split = threads.pieces(size, threads.count())
    calls: list[Callable[[], None]] = []
    for a, b in _in_blocks(storage.rounding, split, size):
        arrays = params[a:b], grads[a:b], tuple(state[a:b] for state in states)
        more = from_element(storage, a, b)
        calls.append(partial(parallel if many else serial, *arrays, *coefficients, *more))
    if len(calls) == 1:
        return calls[0]
    # In another thread, which no signal handler interrupts between two of them.
    return threads.in_pool([partial(_one_by_one, calls)] if many else calls)


def _one_by_one(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()


def prepare(
    params: Array,
    grads: Array,
    states: tuple[Array, ...],
    c: rules.Update,
    clear: rules.Clear | None,
    storage: Storage,
) -> None:
    """Compile, or load from the disk cache, the loop for these arguments; write nothing."""
    loop = parallel if params.size >= PARALLEL_FROM and threads.numba_is_safe() else serial
    _call_with_nothing(loop, params, grads, states, c, clear, storage)


def warmup(
    params: Array,
    states: tuple[Array, ...],
    c: rules.Update,
    clear: rules.Clear | None,
    storage: Storage,
) -> None:
    """Compile, or load from the disk cache, all loops for arrays without elements."""
    for grads in writable_and_not(params.dtype) if clear is None else (params,):
        for loop in (serial, parallel) if threads.numba_is_safe() else (serial,):
            _call_with_nothing(loop, params, grads, states, c, clear, storage)


def _call_with_nothing(
    loop: Any,
    params: Array,
    grads: Array,
    states: tuple[Array, ...],
    c: rules.Update,
    clear: rules.Clear | None,
    storage: Storage,
) -> None:
    empty = tuple(state[:0] for state in states)
    loop(params[:0], grads[:0], empty, *c, clear, *from_element(storage, 0, 0))
