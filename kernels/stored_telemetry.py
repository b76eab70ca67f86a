"""Telemetry on the CPU of arrays in any storage: steps of :mod:`fastadam.kernels.stored`, and what they did.

What it looks at are the parameters as they are kept: their masters, where they have some. Chunk by chunk, a
thread copies them in float32, takes the steps as they are, and forms differences and sums while all of it is
in the cache: the sums of :mod:`fastadam.kernels.telemetry`, to the bit. In memory that is 40 bytes for each
chunk of 2,048 elements, and 16 KiB for each thread.

Chunks begin where runs do, blocks of 8-bit moments at multiples of 128 elements. So a block may lie across
the border of two chunks, or of many small ones. Such blocks are stepped first, by themselves, and what their
parameters were is kept until their chunks come: 512 bytes each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numba import prange, types
from numba.extending import overload

from . import rules, threads
from .chunks import squares_of_step, sum_of_squares
from .compiling import JIT_OPTIONS, called, each_form, jit
from .cpu import PARALLEL_FROM
from .distinct import memory_of, moved
from .groups import BLOCK, KEPT, Cuts, Groups
from .norms import nonfinite_of_chunk
from .rounding import Storage
from .run_chunks import RunChunks
from .storage import load, load_param
from .stored import spans, step_group
from .telemetry import fold
from .tree import CHUNK
from .units import Integers, Units

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class Tables(NamedTuple):
    """What is stepped, and where it counts."""

    pieces: Integers  # shape (p, 3): (start, stop, row) each, as they are stepped
    across: Integers  # shape (s, 2): groups of pieces, (first, behind the last) each, of blocks across chunks
    groups: Integers  # shape (g, 2): the other groups, in order
    first_group: Integers  # shape (chunks + 1,): of each chunk, and their number
    edges: Integers  # shape (chunks, 2): which of ``across`` has its first elements, which its last, or -1
    counted: Integers  # shape (q, 3): (start, stop, row) of what counts
    first_counted: Integers  # shape (chunks + 1,): of each chunk, and their number


def tables(chunks: RunChunks, groups: Groups) -> Tables:
    """Return which groups lie in one chunk, and which across borders.

    Parameters
    ----------
    chunks : RunChunks
    groups : Groups
        Of the same units, cut where chunks begin.
    """
    pieces, first, number = groups.pieces, groups.first_piece, np.arange(len(chunks.bounds))
    stepped = np.flatnonzero(pieces[:, 2] != KEPT)  # there are some in each group
    chunk = np.searchsorted(chunks.bounds[:, 0], pieces[stepped, 0], side="right") - 1
    of_group = np.searchsorted(stepped, first)
    begin, end = chunk[of_group[:-1]], chunk[of_group[1:] - 1]
    within, bounds = begin == end, np.stack([first[:-1], first[1:]], axis=1)
    first_group = np.searchsorted(begin[within], np.append(number, len(number)))
    begin, end = np.append(begin[~within], len(number)), end[~within]
    head, tail = np.searchsorted(end, number), np.searchsorted(begin, number)
    edges = np.stack([np.where(begin[head] < number, head, -1), np.where(begin[tail] == number, tail, -1)], 1)
    return Tables(
        pieces, bounds[~within], bounds[within], first_group, edges, chunks.pieces, chunks.first_piece
    )


# --- What a chunk was and is --------------------------------------------------------------------------------


@called
def _keep(memory: Any, start: int, size: int, kept: Any, place: int) -> None:
    """Copy parameters, exactly, to ``kept[place:]``."""
    params, _, _, master, _ = moved(memory, start)
    to = kept[place : place + size]
    for j in range(to.size):
        i: Any = np.uint64(j)
        to[i] = load_param(params, master, i)


@called
def _recall(kept: Any, across: int, start: int, stop: int, before: Any, place: int) -> None:
    """Copy parameters of a block that was stepped first to ``before[place:]``.

    Not as one slice to another: the message for slices of other sizes, of which Numba makes machine code,
    takes a process 2 s to compile.
    """
    first = across * BLOCK + start % BLOCK
    to, source = before[place : place + stop - start], kept[first : first + stop - start]
    for j in range(to.size):
        i: Any = np.uint64(j)
        to[i] = source[i]


def _moment(exp_avg: Any, i: int) -> Any:
    """Return what is zero if the moment is: of 8 bits the magnitude, without its scale."""
    return load(exp_avg, i)


@overload(_moment, jit_options=JIT_OPTIONS, strict=False)
def _compiled_moment(exp_avg: Any, i: Any) -> Callable[..., Any]:
    if exp_avg.dtype == types.int8:
        return lambda exp_avg, i: exp_avg[i] & 127
    return _moment


def _first_of(memory: Any, average: Any) -> Any:
    """Return where stands what is 0 where there is no update: the first moment, or the gradient without."""
    return memory[2][0] if len(memory[2]) > (average is not None) else memory[1]


@overload(_first_of, jit_options=JIT_OPTIONS, strict=False)
def _compiled_first_of(memory: Any, average: Any) -> Callable[..., Any]:
    if len(memory[2]) > (not isinstance(average, types.NoneType)):
        return lambda memory, average: memory[2][0]  # noqa: ARG005
    return lambda memory, average: memory[1]  # noqa: ARG005


@called
def _vanished(memory: Any, start: int, before: Any, after: Any, step_size: Any, average: Any) -> int:
    moment = _first_of(moved(memory, start), average)
    vanished = 0
    for j in range(before.size):
        i: Any = np.uint64(j)
        vanished += rules.vanishes(before[i], after[i], _moment(moment, i), step_size)
    return vanished


# --- The loop -----------------------------------------------------------------------------------------------


@called
def _step(
    params: Any,
    grads: Any,
    states: Any,
    scales: Any,
    pieces: Any,
    group: Any,
    coefficients: Any,
    c: Any,
    rounding: Any,
    master: Any,
    out: Any,
) -> None:
    """Step a group: gradients are cleared later, when they were counted."""
    conditioning, direction, decay, rule, average = c
    others = (conditioning, direction, rule, average)
    step_group(
        params, grads, states, scales, pieces, group, coefficients, decay, others, None, rounding, master, out
    )


def _make_loop(cache_key: str) -> Callable[..., None]:
    def step_stored_observed(
        params: Array,
        grads: Array,
        states: tuple[Array, ...],
        places: Tables,
        first_across: Integers,
        first: Integers,
        coefficients: Array,
        kept: Array,
        rows: Array,
        scratch: Array,
        conditioning: Any,
        direction: Any,
        decay: Any,
        rule: Any,
        average: Any,
        clear: Any,
        rounding: Any,
        master: Any,
        out: Any,
        scales: tuple[Array, ...] | None,
    ) -> None:
        cache_key  # noqa: B018
        pieces, across, groups, first_group, edges, counted, first_counted = places
        chunks = len(edges)
        # In the serial compilation, prange is range.
        if scales is not None:  # decided by the type, when compiled
            for part in prange(first_across.size - 1):
                for k in range(first_across[part], first_across[part + 1]):
                    memory = memory_of(params, grads, states, master, out)
                    start = pieces[across[k, 0], 0] // BLOCK * BLOCK
                    _keep(memory, start, min(BLOCK, params.size - start), kept, k * BLOCK)
                    group, c = (across[k, 0], across[k, 1]), (conditioning, direction, decay, rule, average)
                    _step(
                        params, grads, states, scales, pieces, group, coefficients, c, rounding, master, out
                    )
        for share in prange(first.size - 1):
            before, after = rows[share, 0], rows[share, 1]
            for k in range(first[share], first[share + 1]):
                memory = memory_of(params, grads, states, master, out)
                start, stop = counted[first_counted[k], 0], counted[first_counted[k + 1] - 1, 1]
                size, c = stop - start, (conditioning, direction, decay, rule, average)
                squares = sum_of_squares(grads, start, size)
                scratch[k] = squares
                scratch[chunks + k] = nonfinite_of_chunk(squares, grads, start, size)
                _keep(memory, start, size, before, 0)
                if edges[k, 0] >= 0:
                    end = min(stop, start - start % BLOCK + BLOCK)
                    _recall(kept, edges[k, 0], start, end, before, 0)
                if edges[k, 1] >= 0:
                    begin = max(start, (stop - 1) // BLOCK * BLOCK)
                    _recall(kept, edges[k, 1], begin, stop, before, begin - start)
                for g in range(first_group[k], first_group[k + 1]):
                    group = (groups[g, 0], groups[g, 1])
                    _step(
                        params, grads, states, scales, pieces, group, coefficients, c, rounding, master, out
                    )
                _keep(memory, start, size, after, 0)
                vanished = 0
                for p in range(first_counted[k], first_counted[k + 1]):
                    a, b, step_size = counted[p, 0], counted[p, 1], coefficients[counted[p, 2], 1]
                    both = before[a - start : b - start], after[a - start : b - start]
                    vanished += _vanished(memory, a, both[0], both[1], step_size, average)
                scratch[2 * chunks + k], scratch[3 * chunks + k] = squares_of_step(after, before, size)
                scratch[4 * chunks + k] = vanished
                if clear is not None:
                    grads[start:stop] = 0

    return step_stored_observed


serial, parallel = jit(_make_loop), jit(_make_loop, parallel=True)


# --- As for telemetry ---------------------------------------------------------------------------------------


class StoredTelemetry:
    """Steps of arrays in any storage that report what they did.

    Parameters
    ----------
    chunks : RunChunks
    units : Units
        Of which these are the chunks.
    size : int
        Elements of the buffer.
    """

    def __init__(self, chunks: RunChunks, units: Units, size: int) -> None:
        self._chunks, self._units, self._size = chunks, units, size
        self._tables: tuple[object, Tables, Array] | None = None

    def _tables_for(self, places: tuple[int, ...], *, in_blocks: bool) -> tuple[Tables, Array]:
        """Return tables, and room for parameters of blocks across chunks."""
        key = places, in_blocks
        if self._tables is None or self._tables[0] != key:
            begins = tuple(self._chunks.bounds[:, 0].tolist())
            groups = Cuts(self._units, self._size).groups(1, (*begins, *places), in_blocks=in_blocks)
            formed = tables(self._chunks, groups)
            self._tables = key, formed, np.empty(BLOCK * len(formed.across), np.float32)
        return self._tables[1:]

    def plan(
        self,
        params: Array,
        grads: Array,
        states: tuple[Array, ...],
        coefficients: Array,
        scratch: Array,
        c: rules.Update,
        clear: rules.Clear | None,
        storage: Storage,
    ) -> Callable[[], None]:
        """Return the call that takes a step; what :func:`fastadam.kernels.stored.plan` is without.

        Parameters
        ----------
        params, grads, states, coefficients, c, clear, storage
            As there.
        scratch : ndarray
            From :meth:`fastadam.kernels.telemetry.Telemetry.scratch`, which reads it, too; written.
        """
        in_blocks = storage.scales is not None
        places, kept = self._tables_for(spans(storage.rounding, params.size), in_blocks=in_blocks)
        by_numba, count = threads.shares(self._chunks.size, PARALLEL_FROM, threads.MIN_PIECE)
        across = len(places.across)
        if across and not by_numba:
            count = 1  # what is stepped first must be done before all else, and nothing may come between
        loop, shares = parallel if by_numba else serial, self._chunks.shares(count)
        first_across = across * np.arange(count + 1) // count
        rows = np.empty((count, 2, CHUNK), np.float32)
        each = [(shares, rows)]
        if not by_numba:
            each = [(shares[k : k + 2], rows[k : k + 1]) for k in range(count)]
        arrays = (params, grads, states, places, first_across)
        calls = [
            partial(loop, *arrays, first, coefficients, kept, own, scratch, *c, clear, *storage)
            for first, own in each
        ]
        return threads.all_of(calls)

    def prepare(
        self,
        params: Array,
        grads: Array,
        states: tuple[Array, ...],
        c: rules.Update,
        clear: rules.Clear | None,
        storage: Storage,
    ) -> None:
        """Compile, or load from the disk cache, the loops for these arguments; write nothing."""
        parallel_pays = self._chunks.size >= PARALLEL_FROM and threads.numba_is_safe()
        _call_with_nothing(parallel if parallel_pays else serial, params, grads, states, c, clear, storage)


def warmup(
    params: Array, states: tuple[Array, ...], c: rules.Update, clear: rules.Clear | None, storage: Storage
) -> None:
    """Compile, or load from the disk cache, all loops for arrays without elements."""
    loops = threads.usable(serial, parallel)
    for loop, grads in each_form(loops, params.dtype, written=clear is not None):
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
    first, pairs, pieces = np.zeros(1, np.int64), np.empty((0, 2), np.int64), np.empty((0, 3), np.int64)
    places = Tables(pieces, pairs, pairs, first, pairs, pieces, first)
    coefficients, scratch = np.empty((0, 1 + len(c.rule)), c.rule[0].dtype), np.empty(0)
    kept, rows = np.empty(0, np.float32), np.empty((0, 2, CHUNK), np.float32)
    arrays = (params, grads, states, places, first, first, coefficients, kept, rows, scratch)
    loop(*arrays, *c, clear, *storage)
    fold(scratch, first)
