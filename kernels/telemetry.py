"""Telemetry on the CPU: the loop of :mod:`fastadam.kernels.segments`, with norms and counts of what it did.

Memory traffic is that of the loop over segments, and 40 bytes for each chunk of 2,048 elements: all that is
looked at passes through registers (:mod:`fastadam.kernels.observed`). Sums are those of the tree of
:mod:`fastadam.kernels.norms`, over the chunks of the runs, which are stepped one after the other: they have
the same bits for any number of threads. What the step writes has the bits that it has without.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import isnan
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numba import prange
from numba.extending import overload

from . import rules, threads
from .compiling import JIT_OPTIONS, each_form, jit
from .cpu import PARALLEL_FROM
from .norms import nonfinite_of_chunk
from .observed import SUMS, WORK, step_part, step_rows, sum_of_lanes
from .rows import part_of_row
from .run_chunks import RunChunks
from .segment_norms import sum_of_runs
from .segments import Table
from .tree import LANES
from .units import Integers

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class Observed(NamedTuple):
    """What a step did."""

    squares: float  # sums of squares: of the gradients as given,
    nonfinite: int  # how many of them are inf or NaN,
    update_squares: float  # of what the step added to the parameters,
    param_squares: float  # of the parameters after it
    vanished: int  # updates that rounded to nothing


VALUES = len(Observed._fields)
"""Of each chunk, in the scratch: chunk by chunk the first, then chunk by chunk the next."""


# --- One piece of a chunk -----------------------------------------------------------------------------------


def _step_part(
    params: Any, grads: Any, states: Any, work: Any, start: int, size: int, c: Any, lane: int
) -> Any:
    return step_part(params, grads, states, work, start, size, c, lane)


@overload(_step_part, jit_options=JIT_OPTIONS, strict=False)
def _compiled_step_part(
    params: Any, grads: Any, states: Any, work: Any, start: Any, size: Any, c: Any, lane: Any
) -> Any:
    return _step_part


def _step_elements(params: Any, grads: Any, states: Any, work: Any, bounds: Any, c: Any) -> Any:
    """Step elements whose chunk begins at ``bounds[2]``; return how many updates vanished."""
    start, stop, first = bounds
    vanished, lane = 0, (start - first) % LANES
    if lane > 0:
        size = min(LANES - lane, stop - start)
        vanished += _step_part(params, grads, states, work, start, size, c, lane)
        start += size
    rows = (stop - start) // LANES
    vanished += step_rows(params, grads, states, work, start, rows, c)
    start += LANES * rows
    if start < stop:
        vanished += _step_part(params, grads, states, work, start, stop - start, c, 0)
    return vanished


@overload(_step_elements, jit_options=JIT_OPTIONS, strict=False)
def _compiled_step_elements(params: Any, grads: Any, states: Any, work: Any, bounds: Any, c: Any) -> Any:
    return _step_elements


def _step_piece(
    params: Any,
    grads: Any,
    states: Any,
    work: Any,
    bounds: Any,
    coefficients: Any,
    row: int,
    decay: Any,
    others: Any,
) -> Any:
    conditioning, direction, rule, average = others
    rule_of_row = part_of_row(rule, coefficients, row, 1)
    if decay is None:  # decided by the type, when compiled
        c = (conditioning, direction, None, rule_of_row, average)
        return _step_elements(params, grads, states, work, bounds, c)
    if isnan(coefficients[row, 0]):
        without = (conditioning, direction, None, rule_of_row, average)
        return _step_elements(params, grads, states, work, bounds, without)
    decayed = (conditioning, direction, part_of_row(decay, coefficients, row, 0), rule_of_row, average)
    return _step_elements(params, grads, states, work, bounds, decayed)


@overload(_step_piece, jit_options=JIT_OPTIONS, strict=False)
def _compiled_step_piece(
    params: Any,
    grads: Any,
    states: Any,
    work: Any,
    bounds: Any,
    coefficients: Any,
    row: Any,
    decay: Any,
    others: Any,
) -> Any:
    return _step_piece


# --- The loop -----------------------------------------------------------------------------------------------


def _make_loop(cache_key: str) -> Callable[..., None]:
    def step_observed(
        params: Array,
        grads: Array,
        states: tuple[Array, ...],
        pieces: Integers,
        first_piece: Integers,
        first: Integers,
        coefficients: Array,
        work: Array,
        scratch: Array,
        conditioning: Any,
        direction: Any,
        decay: Any,
        rule: Any,
        average: Any,
        clear: Any,
    ) -> None:
        cache_key  # noqa: B018
        chunks = first_piece.size - 1
        # In the serial compilation, prange is range.
        for share in prange(first.size - 1):
            work_of_share = work[share]
            for c in range(first[share], first[share + 1]):
                start, stop = pieces[first_piece[c], 0], pieces[first_piece[c + 1] - 1, 1]
                work_of_share[: SUMS * LANES] = 0
                vanished = 0
                for k in range(first_piece[c], first_piece[c + 1]):
                    bounds = (pieces[k, 0], pieces[k, 1], start)
                    others = (conditioning, direction, rule, average)
                    vanished += _step_piece(
                        params,
                        grads,
                        states,
                        work_of_share,
                        bounds,
                        coefficients,
                        pieces[k, 2],
                        decay,
                        others,
                    )
                squares = sum_of_lanes(work_of_share, 0)
                scratch[c] = squares
                scratch[chunks + c] = nonfinite_of_chunk(squares, grads, start, stop - start)
                scratch[2 * chunks + c] = sum_of_lanes(work_of_share, 1)
                scratch[3 * chunks + c] = sum_of_lanes(work_of_share, 2)
                scratch[4 * chunks + c] = vanished
                if clear is not None:  # only now: they were counted
                    grads[start:stop] = 0

    return step_observed


def _make_fold_loop(cache_key: str) -> Callable[..., tuple[float, int, float, float, int]]:
    def fold_observed(scratch: Array, first: Integers) -> tuple[float, int, float, float, int]:
        cache_key  # noqa: B018
        chunks = first[-1]
        nonfinite, vanished = 0, 0
        for c in range(chunks):
            nonfinite += int(scratch[chunks + c])
            vanished += int(scratch[4 * chunks + c])
        squares = sum_of_runs(scratch[:chunks], first)
        update_squares = sum_of_runs(scratch[2 * chunks : 3 * chunks], first)
        param_squares = sum_of_runs(scratch[3 * chunks : 4 * chunks], first)
        return squares, nonfinite, update_squares, param_squares, vanished

    return fold_observed


serial, parallel = jit(_make_loop), jit(_make_loop, parallel=True)
fold = jit(_make_fold_loop)


# --- As for segments ----------------------------------------------------------------------------------------


class Telemetry:
    """Steps of some runs that report what they did.

    Parameters
    ----------
    chunks : RunChunks
    """

    def __init__(self, chunks: RunChunks) -> None:
        self._chunks = chunks

    def scratch(self) -> Array:
        """Return what a step fills, for :meth:`read`."""
        return np.empty(VALUES * len(self._chunks.bounds))

    def plan(
        self,
        params: Array,
        grads: Array,
        states: tuple[Array, ...],
        table: Table,
        scratch: Array,
        c: rules.Update,
        clear: rules.Clear | None = None,
    ) -> Callable[[], None]:
        """Return the call that takes a step; what :func:`fastadam.kernels.segments.plan` is without.

        Parameters
        ----------
        params, grads, states, table, c, clear
            As there.
        scratch : ndarray
            From :meth:`scratch`; written.
        """
        chunks = self._chunks
        by_numba, count = threads.shares(chunks.size, PARALLEL_FROM, threads.MIN_PIECE)
        loop, shares, work = parallel if by_numba else serial, chunks.shares(count), np.empty((count, WORK))
        each = [(shares, work)]
        if not by_numba:
            each = [(shares[k : k + 2], work[k : k + 1]) for k in range(count)]
        arrays = (params, grads, states, chunks.pieces, chunks.first_piece)
        calls = [
            partial(loop, *arrays, first, table.coefficients, own, scratch, *c, clear) for first, own in each
        ]
        return threads.all_of(calls)

    def prepare(
        self,
        params: Array,
        grads: Array,
        states: tuple[Array, ...],
        c: rules.Update,
        clear: rules.Clear | None = None,
    ) -> None:
        """Compile, or load from the disk cache, the loops for these arguments; write nothing."""
        parallel_pays = self._chunks.size >= PARALLEL_FROM and threads.numba_is_safe()
        _call_with_nothing(parallel if parallel_pays else serial, params, grads, states, c, clear)

    def read(self, scratch: Array) -> Observed:
        """Return what the step did that filled ``scratch``, which is not changed."""
        return Observed(*fold(scratch.copy(), self._chunks.first_of_run))


def warmup(dtype: np.dtype[Any], n_states: int, c: rules.Update, clear: rules.Clear | None = None) -> None:
    """Compile, or load from the disk cache, all loops for buffers of a dtype."""
    empty = np.empty(0, dtype)
    for loop, grads in each_form(threads.usable(serial, parallel), dtype, written=clear is not None):
        _call_with_nothing(loop, empty, grads, (empty,) * n_states, c, clear)


def _call_with_nothing(
    loop: Any, params: Array, grads: Array, states: tuple[Array, ...], c: rules.Update, clear: Any
) -> None:
    pieces, first = np.empty((0, 3), np.int64), np.zeros(1, np.int64)
    coefficients, values = np.empty((0, 1 + len(c.rule)), params.dtype), np.empty((0, WORK))
    loop(params, grads, states, pieces, first, first, coefficients, values, values.ravel(), *c, clear)
    fold(values.ravel(), first)
