"""The Numba-CUDA kernels of a step of moments of which some come in blocks, as ``kernels/blocks.cu`` does it.

A warp takes a block at a time, and every lane forms the same scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from . import formats, rules
from .bounds import are_finite, larger_magnitude, limited, no_bounds, with_kept, with_step
from .cuda import KernelTypes
from .cuda_block_views import (
    keep_states,
    largest_codes,
    load_states,
    scales_of_states,
    set_scales,
    smaller_code,
    store_states,
    views_of,
)
from .cuda_loop import make_update, pick
from .cuda_seen import make_see_stored
from .cuda_stored_loop import TOGETHER, at_place, make_rounding, make_stage, use_of
from .cuda_units_loop import make_load_row, make_updates
from .device_storage import StoredTypes
from .grids import BLOCK as THREADS
from .groups import BLOCK, KEPT
from .storage import at_element, load, load_param, store, store_param, word_of_param
from .tree import LANES
from .views import checks_of

_WARPS = THREADS // LANES
_ALL = 0xFFFFFFFF


# --- What a warp has in common ------------------------------------------------------------------------------


@cuda.jit(device=True)
def _largest_of_warp(value: Any) -> Any:
    apart = 1
    while apart < LANES:
        other = np.uint32(cuda.shfl_xor_sync(_ALL, np.int32(value), apart))
        value = other if other > value else value  # noqa: FURB136 - of 32 bits
        apart *= 2
    return value


@cuda.jit(device=True)
def _all_bits_of_warp(value: Any) -> Any:
    apart = 1
    while apart < LANES:
        value = np.uint32(value | np.uint32(cuda.shfl_xor_sync(_ALL, np.int32(value), apart)))
        apart *= 2
    return value


# --- Elements -----------------------------------------------------------------------------------------------


class Elements:
    """Device functions on the elements of a lane, for the types of a kernel.

    Those that step return what was seen, and more where the kernel is ``observed``; they set gradients to
    zero as the types say, unless they are ``kept``.
    """

    def __init__(self, kinds: KernelTypes, *, observed: bool = False, kept: bool = False) -> None:
        stored: StoredTypes = kinds.stored  # type: ignore[assignment]
        behind = 2 + len(stored.states)
        master_of = at_place(None if stored.master is None else behind)
        out_of = at_place(None if stored.out is None else behind + (stored.master is not None))
        clears, in_blocks = kinds.clear is not type(None), stored.in_blocks
        clears_stepped = clears and not kept
        see = make_see_stored(in_blocks=0 in in_blocks, observed=observed)

        def no_words(rounding: Any, i: int) -> None:
            return None

        def words(rounding: Any, i: int) -> Any:
            drawn, at = at_element(rounding, i), np.int64(i)
            first = formats.random_bits(drawn.moments, drawn.first, at)
            return first, formats.random_bits(drawn.params, drawn.first, at)

        words_of = cuda.jit(device=True)(words if stored.rounds else no_words)

        @cuda.jit(device=True)
        def states_of(arrays: Any) -> Any:
            return arrays[2:behind]

        @cuda.jit(device=True)
        def gradient(arrays: Any, k: int, c: Any) -> Any:
            param = load_param(arrays[0], master_of(arrays), k)
            return rules.prepared(param, load(arrays[1], k), c)[1]

        @cuda.jit(device=True)
        def peak(arrays: Any, i: int, stop: int, c: Any, finite_only: bool) -> Any:
            found = np.uint32(0)
            while i < stop:
                grad = gradient(arrays, i, c)
                if not finite_only or grad * grad < np.float32(np.inf):
                    found = larger_magnitude(found, grad)
                i += LANES
            return found

        @cuda.jit(device=True)
        def number(arrays: Any, k: int) -> Any:
            return load_param(arrays[0], master_of(arrays), k)

        @cuda.jit(device=True)
        def step_one(
            arrays: Any, k: int, i: int, c: Any, rounding: Any, views: Any, checks: Any, seen: Any
        ) -> Any:
            states, master = states_of(arrays), master_of(arrays)
            before, grad = load_param(arrays[0], master, k), load(arrays[1], k)
            state = load_states(states, k, views, checks)
            param, state = rules.update(before, grad, state, c)
            store_states(states, k, state, words_of(rounding, i), views, checks)
            store_param(arrays[0], master, k, param, word_of_param(at_element(rounding, i), i))
            store(out_of(arrays), k, param)
            if clears_stepped:
                arrays[1][k] = 0
            return see(seen, before, grad, arrays[0], master, states, k, c.rule.step_size)

        @cuda.jit(device=True)
        def see_one(arrays: Any, k: int, before: Any, step_size: Any, seen: Any) -> Any:
            grad, states, master = load(arrays[1], k), states_of(arrays), master_of(arrays)
            return see(seen, before, grad, arrays[0], master, states, k, step_size)

        @cuda.jit(device=True)
        def step(
            arrays: Any, i: int, stop: int, c: Any, rounding: Any, views: Any, checks: Any, seen: Any
        ) -> Any:
            while i < stop:
                seen = step_one(arrays, i, i, c, rounding, views, checks, seen)
                i += LANES
            return seen

        @cuda.jit(device=True)
        def keep(arrays: Any, i: int, stop: int, rounding: Any, views: Any, checks: Any) -> None:
            while i < stop:
                keep_states(states_of(arrays), i, words_of(rounding, i), views, checks)
                i += LANES

        @cuda.jit(device=True)
        def largest(arrays: Any, i: int, stop: int) -> Any:
            found = np.uint32(0)
            while i < stop:
                found = np.uint32(found | largest_codes(states_of(arrays), i))
                i += LANES
            return found

        @cuda.jit(device=True)
        def clear(arrays: Any, i: int, stop: int) -> None:
            if clears:
                while i < stop:
                    arrays[1][i] = 0
                    i += LANES

        def smaller_code_in(place: int) -> Any:
            at = 2 + place

            def nothing(before: Any, arrays: Any, i: int) -> Any:
                return before

            def one(before: Any, arrays: Any, i: int) -> Any:
                return smaller_code(before, arrays[at], i)

            return cuda.jit(device=True)(one if place in in_blocks else nothing)

        self.states_of, self.gradient, self.peak, self.step_one = states_of, gradient, peak, step_one
        self.step, self.keep, self.largest, self.clear = step, keep, largest, clear
        self.number, self.see_one, self.observed = number, see_one, observed
        self.smaller_codes = smaller_code_in(1), smaller_code_in(2)


# --- Coefficients: of a source, (c,) or what all rows share and the rows ------------------------------------


def make_of_source(kinds: KernelTypes, function: Any, *, units: bool) -> Any:
    """Return the device function ``f(source, row, arguments)`` that is ``function(c, arguments)``."""
    if not units:

        def of_source(source: Any, row: int, arguments: Any) -> Any:
            return function(source[0], arguments)

        return cuda.jit(device=True)(of_source)
    (decayed, undecayed), load_row = make_updates(kinds), make_load_row(kinds)
    has_decay = kinds.decay is not type(None)

    def of_row(source: Any, row: int, arguments: Any) -> Any:
        values = load_row(source[1], row)
        if has_decay and values[0] == values[0]:  # a NaN is none
            return function(decayed(source[0], values), arguments)
        return function(undecayed(source[0], values), arguments)

    return cuda.jit(device=True)(of_row)


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
    states_of, gradient, step_one = of.states_of, of.gradient, of.step_one
    peak, step, keep, largest = of.peak, of.step, of.keep, of.largest
    code1, code2 = of.smaller_codes
    stride, first_of = LANES if of.observed else 1, make_first(observed=of.observed)
    at_lane = 1 if of.observed else TOGETHER
    load_stage, store_stage = make_stage(use_of(kinds, kinds.stored), stride)  # type: ignore[arg-type]

    @cuda.jit(device=True)
    def leasts_of_warp(first: Any, second: Any) -> Any:
        # The least is 255 less the largest of what is missing to 255.
        first = np.uint32(256 - _largest_of_warp(np.uint32(255 - first)))
        return first, np.uint32(256 - _largest_of_warp(np.uint32(255 - second)))

    @cuda.jit(device=True)
    def step_whole(c: Any, arguments: Any) -> Any:
        arrays, scales, block, rounding, origin, seen = arguments
        lane = cuda.threadIdx.x % LANES
        i = block * BLOCK + at_lane * (first_of(block * BLOCK, origin) - block * BLOCK)
        stage = load_stage(arrays, i)
        states = states_of(stage)
        found = larger_magnitude(np.uint32(0), gradient(stage, 0, c))
        found = larger_magnitude(found, gradient(stage, 1, c))
        found = larger_magnitude(found, gradient(stage, 2, c))
        found = larger_magnitude(found, gradient(stage, 3, c))
        bounds = with_step(no_bounds(states), states, scales, block, _largest_of_warp(found), c.rule)
        if not are_finite(states, scales, block, bounds):
            return False, seen
        least = np.uint32(255)
        first = code1(code1(code1(code1(least, stage, 0), stage, 1), stage, 2), stage, 3)
        second = code2(code2(code2(code2(least, stage, 0), stage, 1), stage, 2), stage, 3)
        leasts = leasts_of_warp(first, second)
        views = views_of(states, scales, block, bounds, leasts, c.rule.beta2, True)
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
    def peak_of_piece(c: Any, arguments: Any) -> Any:
        arrays, i, stop, finite_only = arguments
        return peak(arrays, i, stop, c, finite_only)

    @cuda.jit(device=True)
    def rule_of_piece(c: Any, arguments: Any) -> Any:
        return c.rule

    @cuda.jit(device=True)
    def step_piece(c: Any, arguments: Any) -> Any:
        arrays, i, stop, rounding, views, checks, seen = arguments
        return step(arrays, i, stop, c, rounding, views, checks, seen)

    step_whole_of, peak_of, rule_of, step_of = (
        make_of_source(kinds, function, units=units)
        for function in (step_whole, peak_of_piece, rule_of_piece, step_piece)
    )

    def only_piece(pieces: Any, row: int, k: int, start: int, stop: int) -> Any:
        return start, stop, row

    def one_of_table(pieces: Any, row: int, k: int, start: int, stop: int) -> Any:
        if row >= 0:
            return start, stop, row
        return pieces[3 * k], pieces[3 * k + 1], pieces[3 * k + 2]

    piece_at = cuda.jit(device=True)(one_of_table if units else only_piece)

    @cuda.jit(device=True)
    def bounds_of(arrays: Any, scales: Any, block: Any, source: Any, pieces: Any, finite_only: bool) -> Any:
        number, start, stop = block
        table, row, begin, end = pieces
        states = states_of(arrays)
        bounds, beta2 = no_bounds(states), np.float32(1)
        for k in range(begin, end):
            a, b, of_piece = piece_at(table, row, k, start, stop)
            if of_piece == KEPT:
                bounds = with_kept(bounds, states, scales, number)
            else:
                first = a + cuda.threadIdx.x % LANES
                found = _largest_of_warp(peak_of(source, of_piece, (arrays, first, b, finite_only)))
                rule = rule_of(source, of_piece, None)
                beta2 = rule.beta2 if rule.beta2 < beta2 else beta2  # noqa: FURB136
                bounds = with_step(bounds, states, scales, number, found, rule)
        return bounds, beta2

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
        bounds, beta2 = bounds_of(arrays, scales, block, source, pieces, False)
        is_finite = are_finite(states, scales, number, bounds)
        if not is_finite:
            bounds, beta2 = bounds_of(arrays, scales, block, source, pieces, True)
            bounds = limited(bounds)
        first, second = np.uint32(255), np.uint32(255)
        i = start + lane
        while i < stop:
            first, second = code1(first, arrays, i), code2(second, arrays, i)
            i += LANES
        views = views_of(states, scales, number, bounds, leasts_of_warp(first, second), beta2, is_finite)
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
