"""The Numba-CUDA kernels of an observed step of moments in blocks, as ``kernels/blocks_observed.cu``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda, float64

from .cuda import KernelTypes
from .cuda_block_elements import Elements
from .cuda_block_limits import make_of_source
from .cuda_block_views import scales_of_states
from .cuda_blocks_loop import make_first, make_step_block
from .cuda_loop import pick
from .cuda_seen import SHARED, sum_up
from .cuda_stored_loop import make_rounding
from .device_storage import StoredTypes
from .grids import BLOCK as THREADS
from .groups import BLOCK, KEPT
from .tree import LANES

_WARPS = THREADS // LANES


def make_step_across(kinds: KernelTypes) -> Callable[..., None]:
    """Return the kernel that steps the blocks across chunks, and keeps what their parameters were.

    It takes what ``step_units`` does, with where these are kept, how many blocks there are, and the size in
    place of the size and the layout.
    """
    of = Elements(kinds, kept=True)
    _, step_any = make_step_block(kinds, of, units=True)
    states_of, number = of.states_of, of.number
    stored: StoredTypes = kinds.stored  # type: ignore[assignment]
    rounds, places, rounding_of = stored.rounds, tuple(range(len(kinds.coefficients))), make_rounding(stored)

    def step_across(
        arrays: Any,
        of_states: Any,
        keys: Any,
        of_block: Any,
        pieces: Any,
        first_piece: Any,
        kept: Any,
        across: int,
        size: int,
        rows: Any,
        coefficients: Any,
        count: Any,
        skip: Any,
    ) -> None:
        if skip[0] != 0:
            return
        source = pick(coefficients, places), rows
        rounding = rounding_of(keys[0][0], keys[0][1]) if rounds else rounding_of(0, 0)
        scales = scales_of_states(states_of(arrays), of_states)
        k = cuda.blockIdx.x * _WARPS + cuda.threadIdx.x // LANES
        while k < across:
            begin, end = first_piece[k], first_piece[k + 1]
            block = pieces[3 * begin] // BLOCK
            start, stop = block * BLOCK, min((block + 1) * BLOCK, size)
            i = start + cuda.threadIdx.x % LANES
            while i < stop:
                kept[k * BLOCK + i - start] = number(arrays, i)
                i += LANES
            cuda.syncwarp()  # other lanes may write them
            bounds = (block, start, stop)
            step_any(arrays, scales, bounds, source, (pieces, KEPT - 1, begin, end), rounding, 0, None)
            k += cuda.gridDim.x * _WARPS

    return step_across


def make_step_in_blocks_observed(kinds: KernelTypes) -> Callable[..., None]:
    """Return the kernel ``step_units_observed``.

    It takes what ``step_across`` does, behind the size the table of chunks and their number, and at the end
    where its sums go, three arrays of pairs, and how many pairs apart these are.
    """
    of = Elements(kinds, observed=True)
    step_whole, step_any = make_step_block(kinds, of, units=True)
    states_of, see_one, clear = of.states_of, of.see_one, of.clear
    stored: StoredTypes = kinds.stored  # type: ignore[assignment]
    rounds, places, rounding_of = stored.rounds, tuple(range(len(kinds.coefficients))), make_rounding(stored)
    first_of = make_first(observed=True)

    @cuda.jit(device=True)
    def step_size(c: Any, arguments: Any) -> Any:
        return c.rule.step_size

    step_size_of = make_of_source(kinds, step_size, units=True)

    @cuda.jit(device=True)
    def see_across(arrays: Any, kept: Any, within: Any, source: Any, pieces: Any, seen: Any) -> Any:
        start, stop, number = within
        table, begin, end = pieces
        for k in range(begin, end):
            a, b, row = table[3 * k], table[3 * k + 1], table[3 * k + 2]
            if row != KEPT and start <= a < stop:
                size = step_size_of(source, row, None)
                i = first_of(a, start)
                while i < b:
                    seen = see_one(arrays, i, kept[number * BLOCK + i % BLOCK], size, seen)
                    i += LANES
                clear(arrays, first_of(a, start), b)
        return seen

    @cuda.jit(device=True)
    def step_chunk(
        arrays: Any, scales: Any, tables: Any, across: Any, size: int, within: Any, source: Any, rounding: Any
    ) -> Any:
        of_block, pieces, first_piece = tables
        kept, n_across = across
        start, stop = within
        seen = (0.0, 0.0, 0.0, 0.0, 0.0)
        block = start // BLOCK
        while block * BLOCK < stop:
            row = of_block[block]
            begin, end, is_stepped, number = 0, 1, False, KEPT - 1 - row
            if row < KEPT:
                begin, end = first_piece[number], first_piece[number + 1]
            if row < KEPT and number < n_across:
                of_chunk = (start, stop, number)
                seen = see_across(arrays, kept, of_chunk, source, (pieces, begin, end), seen)
                is_stepped = True
            if row >= 0 and (block + 1) * BLOCK <= size:
                is_stepped, seen = step_whole(source, row, (arrays, scales, block, rounding, start, seen))
            if not is_stepped:
                bounds = (block, block * BLOCK, min((block + 1) * BLOCK, size))
                some = (pieces, row, begin, end)
                seen = step_any(arrays, scales, bounds, source, some, rounding, start, seen)
            block += 1
        return seen

    def step_units_observed(
        arrays: Any,
        of_states: Any,
        keys: Any,
        of_block: Any,
        pieces: Any,
        first_piece: Any,
        kept: Any,
        across: int,
        size: int,
        bounds: Any,
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
        source = pick(coefficients, places), rows
        rounding = rounding_of(keys[0][0], keys[0][1]) if rounds else rounding_of(0, 0)
        scales = scales_of_states(states_of(arrays), of_states)
        first = cuda.blockIdx.x * _WARPS
        while first < chunks:
            chunk = first + cuda.threadIdx.x // LANES
            seen = (0.0, 0.0, 0.0, 0.0, 0.0)
            if chunk < chunks:
                start, stop = bounds[2 * chunk], bounds[2 * chunk + 1]
                if skipped != 0:
                    clear(arrays, start + cuda.threadIdx.x % LANES, stop)
                else:
                    tables, others = (of_block, pieces, first_piece), (kept, across)
                    within = (start, stop)
                    seen = step_chunk(arrays, scales, tables, others, size, within, source, rounding)
            sum_up(lanes, seen, chunk, chunks, sums, apart)
            first += cuda.gridDim.x * _WARPS
        if skipped == 0 and cuda.grid(1) == 0:
            count[0] += 1

    return step_units_observed
