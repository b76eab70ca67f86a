"""The Numba-CUDA kernels of a step of moments of which some come in blocks, as ``kernels/blocks.cu`` does it.

A warp takes a block at a time, and every lane forms the same scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from .bounds import are_finite, limited
from .cuda import KernelTypes
from .cuda_block_elements import Elements
from .cuda_block_limits import ALL, make_limits, make_of_source, make_piece_at
from .cuda_block_views import scales_of_states, set_scales, views_after
from .cuda_loop import make_update, pick
from .cuda_stored_loop import TOGETHER, make_rounding, make_stage, use_of
from .device_storage import StoredTypes
from .grids import BLOCK as THREADS
from .groups import BLOCK, KEPT
from .tree import LANES
from .views import checks_of, views_before

_WARPS = THREADS // LANES


@cuda.jit(device=True)
def _all_bits_of_warp(value: Any) -> Any:
    apart = 1
    while apart < LANES:
        value = np.uint32(value | np.uint32(cuda.shfl_xor_sync(ALL, np.int32(value), apart)))
        apart *= 2
    return value


# --- Blocks -------------------------------------------------------------------------------------------------


def make_first(*, observed: bool) -> Any:
    """Return the device function: where a piece begins, and its chunk -> the first element of the lane.

    Of what is observed, a lane has every 32nd element from the beginning of the chunk.
    """

    def of_piece(start: int, origin: int) -> Any:
        return start + cuda.threadIdx.x % LANES

    def of_chunk(start: int, origin: int) -> Any:
        return start + ((cuda.threadIdx.x % LANES - (start - origin)) & (LANES - 1))

    return cuda.jit(device=True)(of_chunk if observed else of_piece)


def make_step_block(kinds: KernelTypes, of: Elements, *, units: bool) -> tuple[Any, Any]:
    """Return device functions that step a block: one whole, finite and of one row, if it is so, and any.

    They take where the chunk begins and what was seen, and return that and more: the first behind whether
    the block is so. Of a whole block a lane has four neighbours, or, observed, its elements of the chunk.
    """
    states_of, step_one, step, keep, largest = of.states_of, of.step_one, of.step, of.keep, of.largest
    limits_of_whole, limits_of_any, extents_of = make_limits(kinds, of, units=units)
    piece_at = make_piece_at(units=units)
    stride, first_of = LANES if of.observed else 1, make_first(observed=of.observed)
    at_lane = 1 if of.observed else TOGETHER
    load_stage, store_stage = make_stage(use_of(kinds, kinds.stored), stride)  # type: ignore[arg-type]

    @cuda.jit(device=True)
    def step_whole(c: Any, arguments: Any) -> Any:
        arrays, scales, block, rounding, origin, seen = arguments
        lane = cuda.threadIdx.x % LANES
        i = block * BLOCK + at_lane * (first_of(block * BLOCK, origin) - block * BLOCK)
        stage = load_stage(arrays, i)
        states = states_of(stage)
        before = views_before(states, scales, block)
        bounds, extents = limits_of_whole(stage, before, scales, block, c)
        if not are_finite(states, scales, block, bounds):
            return False, seen
        views = views_after(states, before, bounds, extents, True)
        seen = step_one(stage, 0, i, c, rounding, views, None, seen)
        seen = step_one(stage, 1, i + stride, c, rounding, views, None, seen)
        seen = step_one(stage, 2, i + 2 * stride, c, rounding, views, None, seen)
        seen = step_one(stage, 3, i + 3 * stride, c, rounding, views, None, seen)
        store_stage(arrays, i, stage)
        cuda.syncwarp()
        if lane == 0:
            set_scales(states, scales, block, bounds, views, np.uint32(0))
        return True, seen

    @cuda.jit(device=True)
    def step_piece(c: Any, arguments: Any) -> Any:
        arrays, i, stop, rounding, views, checks, seen = arguments
        return step(arrays, i, stop, c, rounding, views, checks, seen)

    step_whole_of, step_of = (
        make_of_source(kinds, function, units=units) for function in (step_whole, step_piece)
    )

    @cuda.jit(device=True)
    def step_any(
        arrays: Any,
        scales: Any,
        block: Any,
        source: Any,
        pieces: Any,
        rounding: Any,
        origin: int,
        seen: Any,
    ) -> Any:
        number, start, stop = block
        table, row, begin, end = pieces
        states, lane = states_of(arrays), cuda.threadIdx.x % LANES
        before = views_before(states, scales, number)
        bounds, least = limits_of_any(arrays, before, scales, block, source, pieces, False)
        is_finite = are_finite(states, scales, number, bounds)
        if not is_finite:
            bounds, least = limits_of_any(arrays, before, scales, block, source, pieces, True)
            bounds = limited(bounds)
        extents = extents_of(arrays, before, block, least)
        views = views_after(states, before, bounds, extents, is_finite)
        checks = checks_of(states, scales, number, is_finite)
        found = np.uint32(0)
        for k in range(begin, end):
            a, b, of_piece = piece_at(table, row, k, start, stop)
            if of_piece == KEPT:
                keep(arrays, a + lane, b, rounding, views, checks)
            else:
                i = first_of(a, origin)
                seen = step_of(source, of_piece, (arrays, i, b, rounding, views, checks, seen))
            found = np.uint32(found | largest(arrays, first_of(a, origin), b))
        found = _all_bits_of_warp(found)
        cuda.syncwarp()  # an exchange orders no accesses to memory
        if lane == 0:
            set_scales(states, scales, number, bounds, views, np.uint32(0) if is_finite else found)
        return seen

    return step_whole_of, step_any


# --- Kernels ------------------------------------------------------------------------------------------------


def make_step_in_blocks(kinds: KernelTypes, entry: str) -> Callable[..., None]:
    """Return the kernel ``step``, ``step_captured`` or ``step_units``.

    They take ``(arrays, scales, keys, ...)``: as those of :mod:`fastadam.kernels.cuda_stored_loop`, with a
    pointer to the scales of each state in blocks. ``step_units`` goes on with ``(of_block, pieces,
    first_piece, size, head, packs, rows, coefficients, count, skip)``, the tables of
    :mod:`fastadam.kernels.block_tables` first.
    """
    units = entry == "step_units"
    of = Elements(kinds)
    step_whole, step_any = make_step_block(kinds, of, units=units)
    states_of, clear = of.states_of, of.clear
    stored: StoredTypes = kinds.stored  # type: ignore[assignment]
    rounds, places = stored.rounds, tuple(range(len(kinds.coefficients)))
    rounding_of, update_of = make_rounding(stored), make_update(kinds)

    @cuda.jit(device=True)
    def step_row(
        arrays: Any, scales: Any, block: int, size: int, is_packed: bool, source: Any, row: int, rounding: Any
    ) -> None:
        stop = (block + 1) * BLOCK
        if is_packed and stop <= size:
            is_stepped, _ = step_whole(source, row, (arrays, scales, block, rounding, 0, None))
            if is_stepped:
                return
        bounds = (block, block * BLOCK, min(stop, size))
        step_any(arrays, scales, bounds, source, (arrays[0], row, 0, 1), rounding, 0, None)

    @cuda.jit(device=True)
    def step_blocks(
        arrays: Any, of_states: Any, size: int, head: int, packs: int, c: Any, rounding: Any
    ) -> None:
        scales = scales_of_states(states_of(arrays), of_states)
        block = cuda.blockIdx.x * _WARPS + cuda.threadIdx.x // LANES
        while block * BLOCK < size:
            step_row(arrays, scales, block, size, head == 0 and packs > 0, (c,), 0, rounding)
            block += cuda.gridDim.x * _WARPS

    def step(
        arrays: Any, scales: Any, keys: Any, size: int, head: int, packs: int, coefficients: Any
    ) -> None:
        rounding = rounding_of(keys[0], keys[1]) if rounds else rounding_of(0, 0)
        step_blocks(arrays, scales, size, head, packs, update_of(coefficients), rounding)

    def step_captured(
        arrays: Any,
        scales: Any,
        keys: Any,
        size: int,
        head: int,
        packs: int,
        coefficients: Any,
        count: Any,
        skip: Any,
    ) -> None:
        if skip[0] != 0:
            i = cuda.grid(1)
            while i < size:
                clear(arrays, i, i + 1)
                i += cuda.gridsize(1)
            return
        rounding = rounding_of(keys[0][0], keys[0][1]) if rounds else rounding_of(0, 0)
        step_blocks(arrays, scales, size, head, packs, update_of(pick(coefficients, places)), rounding)
        if cuda.grid(1) == 0:
            count[0] += 1

    if not units:
        return step if entry == "step" else step_captured

    @cuda.jit(device=True)
    def clear_block(arrays: Any, block: int, size: int, row: int, pieces: Any, begin: int, end: int) -> None:
        lane = cuda.threadIdx.x % LANES
        if row >= 0:
            clear(arrays, block * BLOCK + lane, min((block + 1) * BLOCK, size))
        for k in range(begin, end):
            if pieces[3 * k + 2] != KEPT:
                clear(arrays, pieces[3 * k] + lane, pieces[3 * k + 1])

    def step_units(
        arrays: Any,
        of_states: Any,
        keys: Any,
        of_block: Any,
        pieces: Any,
        first_piece: Any,
        size: int,
        head: int,
        packs: int,
        rows: Any,
        coefficients: Any,
        count: Any,
        skip: Any,
    ) -> None:
        skipped = skip[0]
        source = pick(coefficients, places), rows
        rounding = rounding_of(keys[0][0], keys[0][1]) if rounds else rounding_of(0, 0)
        scales = scales_of_states(states_of(arrays), of_states)
        block = cuda.blockIdx.x * _WARPS + cuda.threadIdx.x // LANES
        while block * BLOCK < size:
            row, begin, end = np.int64(of_block[block]), 0, 0
            if row < KEPT:
                begin, end = first_piece[KEPT - 1 - row], first_piece[KEPT - row]
            bounds = (block, block * BLOCK, min((block + 1) * BLOCK, size))
            if skipped != 0:
                clear_block(arrays, block, size, row, pieces, begin, end)
            elif row < KEPT:
                step_any(arrays, scales, bounds, source, (pieces, row, begin, end), rounding, 0, None)
            elif row > KEPT:
                is_stepped = False
                if head == 0 and packs > 0 and bounds[2] - bounds[1] == BLOCK:
                    is_stepped, _ = step_whole(source, row, (arrays, scales, block, rounding, 0, None))
                if not is_stepped:
                    step_any(arrays, scales, bounds, source, (pieces, row, 0, 1), rounding, 0, None)
            block += cuda.gridDim.x * _WARPS
        if skipped == 0 and cuda.grid(1) == 0:
            count[0] += 1

    return step_units
