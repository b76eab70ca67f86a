"""The Numba-CUDA kernels of a step over units, as ``kernels/units.cu`` does it.

A warp takes a chunk of a run at a time, and each of its lanes the elements that the tree of
:mod:`fastadam.kernels.norms` gives to it, in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from numba import cuda, float64

from . import rules
from .cuda import KernelTypes
from .cuda_loop import make_part, pick, update_lane, update_lanes
from .cuda_seen import SHARED, make_see, sum_up
from .cuda_stored_loop import make_stored_piece
from .grids import BLOCK, PACK
from .storage import load, store
from .tree import LANES
from .units import columns_of

_WARPS = BLOCK // LANES

# --- Coefficients -------------------------------------------------------------------------------------------


def make_updates(kinds: KernelTypes) -> tuple[Any, Any]:
    """Return the device functions: coefficients of all, and of a row -> an update, with decay and without."""
    stops = list(accumulate(len(getattr(kind, "_fields", ())) for kind in kinds.parts))
    starts = [0, *stops[:-1]]
    conditioning, direction, _, _, average = map(make_part, kinds.parts, starts, stops)
    decay = make_part(kinds.decay, 0, 1)
    rule = make_part(kinds.rule, 1, len(columns_of(kinds.rule)))

    @cuda.jit(device=True)
    def decayed(shared: Any, row: Any) -> Any:
        return rules.Update(conditioning(shared), direction(shared), decay(row), rule(row), average(shared))

    @cuda.jit(device=True)
    def undecayed(shared: Any, row: Any) -> Any:
        return rules.Update(conditioning(shared), direction(shared), None, rule(row), average(shared))

    return decayed, undecayed


def make_load_row(kinds: KernelTypes) -> Any:
    """Return the device function: the table of rows, and the number of one -> its coefficients."""
    places = tuple(range(len(columns_of(kinds.rule))))

    @cuda.jit(device=True)
    def load_row(rows: Any, row: int) -> Any:
        return pick(rows, places, len(places) * row)

    return load_row


# --- Elements of a lane, so far apart that neighbours are a warp's: all loads before all stores -------------


def _make_some(count: int, see: Any) -> tuple[Any, Any, Any]:
    """Return the device functions that load, store and see so many elements."""
    if count == 2:

        def load_some(arrays: Any, i: int) -> Any:
            return load(arrays, i), load(arrays, i + LANES)

        def store_some(arrays: Any, i: int, values: Any) -> None:
            store(arrays, i, values[0])
            store(arrays, i + LANES, values[1])

        def see_some(seen: Any, before: Any, after: Any, c: Any) -> Any:
            return see(see(seen, before[0], after[0], c), before[1], after[1], c)

    else:

        def load_some(arrays: Any, i: int) -> Any:
            ones = load(arrays, i), load(arrays, i + LANES)
            return *ones, load(arrays, i + 2 * LANES), load(arrays, i + 3 * LANES)

        def store_some(arrays: Any, i: int, values: Any) -> None:
            store(arrays, i, values[0])
            store(arrays, i + LANES, values[1])
            store(arrays, i + 2 * LANES, values[2])
            store(arrays, i + 3 * LANES, values[3])

        def see_some(seen: Any, before: Any, after: Any, c: Any) -> Any:
            seen = see(see(seen, before[0], after[0], c), before[1], after[1], c)
            return see(see(seen, before[2], after[2], c), before[3], after[3], c)

    load_some, store_some, see_some = map(cuda.jit(device=True), (load_some, store_some, see_some))
    return load_some, store_some, see_some


# --- Kernels ------------------------------------------------------------------------------------------------


def _make_piece(kinds: KernelTypes, *, observed: bool) -> Any:
    """Return the device function that steps the elements of a lane in a piece, and returns what it saw."""
    clear = None if kinds.clear is type(None) else True
    count = PACK // kinds.dtype.itemsize
    see_element = make_see(observed=observed)
    moment_at = 1 if clear is None else 2

    def see_moment(seen: Any, before: Any, after: Any, c: Any) -> Any:
        return see_element(seen, before[0], before[1], after[0], after[moment_at], c.rule.step_size)

    def see_gradient(seen: Any, before: Any, after: Any, c: Any) -> Any:
        return see_element(seen, before[0], before[1], after[0], before[1], c.rule.step_size)

    see = cuda.jit(device=True)(see_moment if kinds.n_moments else see_gradient)
    load_some, store_some, see_some = _make_some(count, see)

    @cuda.jit(device=True)
    def step_piece(params: Any, grads: Any, states: Any, first: int, stop: int, c: Any, seen: Any) -> Any:
        read = (params, grads, *states)
        written = (params, *states) if clear is None else read
        i = first
        while i + (count - 1) * LANES < stop:
            before = load_some(read, i)
            after = update_lanes(before, c, clear)
            seen = see_some(seen, before, after, c)
            store_some(written, i, after)
            i += count * LANES
        while i < stop:
            one = load(read, i)
            new = update_lane(one, c, clear)
            seen = see(seen, one, new, c)
            store(written, i, new)
            i += LANES
        return seen

    return step_piece


def make_step_units(kinds: KernelTypes, *, observed: bool) -> Callable[..., None]:
    """Return the kernel ``step_units`` or ``step_units_observed``.

    Both take ``(params, grads, states, pieces, first_piece, chunks, rows, coefficients, count, skip)``:
    tables of what is stepped and with what, those coefficients that are the same for all units, and pointers
    as ``step_captured`` has them. ``step_units_observed`` also takes where its sums go, three arrays of
    pairs, and how many pairs apart these are. Where storage is not plain, ``states`` has all buffers behind
    the gradients, and a pointer to the keys of stochastic rounding.
    """
    places = tuple(range(len(kinds.coefficients)))
    clears = kinds.clear is not type(None)
    has_decay = kinds.decay is not type(None)
    decayed, undecayed = make_updates(kinds)
    plain = kinds.stored is None
    make_piece = _make_piece if plain else make_stored_piece
    step_piece, load_row = make_piece(kinds, observed=observed), make_load_row(kinds)

    @cuda.jit(device=True)
    def shared_of(coefficients: Any) -> Any:
        return pick(coefficients, places)

    @cuda.jit(device=True)
    def step_with_row(
        params: Any, grads: Any, states: Any, first: int, stop: int, shared: Any, row: Any, seen: Any
    ) -> Any:
        if has_decay and row[0] == row[0]:  # a NaN is none
            return step_piece(params, grads, states, first, stop, decayed(shared, row), seen)
        return step_piece(params, grads, states, first, stop, undecayed(shared, row), seen)

    @cuda.jit(device=True)
    def step_chunk(
        params: Any,
        grads: Any,
        states: Any,
        pieces: Any,
        piece: int,
        end: int,
        rows: Any,
        shared: Any,
        skip: int,
    ) -> Any:
        lane = cuda.threadIdx.x % LANES
        start = pieces[3 * piece]
        seen = (0.0, 0.0, 0.0, 0.0, 0.0)
        while piece < end:
            stop = pieces[3 * piece + 1]
            i = pieces[3 * piece] + ((lane - (pieces[3 * piece] - start)) & (LANES - 1))
            if skip == 0:
                row = load_row(rows, pieces[3 * piece + 2])
                seen = step_with_row(params, grads, states, i, stop, shared, row, seen)
            elif clears:
                while i < stop:
                    grads[i] = 0
                    i += LANES
            piece += 1
        return seen

    def step_units(
        params: Any,
        grads: Any,
        states: Any,
        pieces: Any,
        first_piece: Any,
        chunks: int,
        rows: Any,
        coefficients: Any,
        count: Any,
        skip: Any,
    ) -> None:
        skipped = skip[0]
        shared = shared_of(coefficients)
        chunk = cuda.blockIdx.x * _WARPS + cuda.threadIdx.x // LANES
        while chunk < chunks:
            piece, end = first_piece[chunk], first_piece[chunk + 1]
            step_chunk(params, grads, states, pieces, piece, end, rows, shared, skipped)
            chunk += cuda.gridDim.x * _WARPS
        if skipped == 0 and cuda.grid(1) == 0:
            count[0] += 1

    def step_units_observed(
        params: Any,
        grads: Any,
        states: Any,
        pieces: Any,
        first_piece: Any,
        chunks: int,
        rows: Any,
        coefficients: Any,
        count: Any,
        skip: Any,
        sums: Any,
        apart: int,
    ) -> None:
        lanes = cuda.shared.array(SHARED, float64)
        skipped = skip[0]
        shared = shared_of(coefficients)
        first = cuda.blockIdx.x * _WARPS
        while first < chunks:
            chunk = first + cuda.threadIdx.x // LANES
            seen = (0.0, 0.0, 0.0, 0.0, 0.0)
            if chunk < chunks:
                piece, end = first_piece[chunk], first_piece[chunk + 1]
                seen = step_chunk(params, grads, states, pieces, piece, end, rows, shared, skipped)
            sum_up(lanes, seen, chunk, chunks, sums, apart)
            first += cuda.gridDim.x * _WARPS
        if skipped == 0 and cuda.grid(1) == 0:
            count[0] += 1

    return step_units_observed if observed else step_units
