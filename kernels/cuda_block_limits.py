"""What the scales of a block become, found by a warp: the first look of a step of states in blocks.

As in :mod:`fastadam.kernels.stored`: of rules that are foreseen by the largest gradient, of others by their
new states, computed. What both give, and what follows, is the same: bounds, and extents, of which the least
numbers count (:mod:`fastadam.kernels.bounds`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from .bounds import (
    larger_magnitude,
    no_bounds,
    no_extents,
    with_extents,
    with_kept,
    with_left,
    with_new,
    with_step,
)
from .cuda import KernelTypes
from .cuda_block_elements import Elements
from .cuda_block_views import extents_left, extents_of_warp, load_states, smaller_code
from .cuda_units_loop import make_load_row, make_updates
from .groups import KEPT
from .relatives import FORESEEN
from .tree import LANES
from .views import checks_of

ALL = 0xFFFFFFFF
"""The lanes of a warp, as bits."""


class Limits(NamedTuple):
    """Device functions on the new states of a block."""

    of_whole: Any
    """``(stage, before, scales, block, c)`` -> bounds and extents of a whole block of one row in a stage,
    read by its views ``before``."""

    of_any: Any
    """``(arrays, before, scales, block, source, pieces, finite_only)`` -> bounds of the pieces of any block,
    with ``finite_only`` of what is finite, and what is the least that is left."""

    extents: Any
    """``(arrays, before, block, least)`` -> extents by the latter, once it is settled."""


def make_limits(kinds: KernelTypes, of: Elements, *, units: bool) -> Limits:
    """Return the limits for the rule of a kernel."""
    return (_foreseen if kinds.rule in FORESEEN else _computed)(kinds, of, units)


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


def make_piece_at(*, units: bool) -> Any:
    """Return the device function: the ``k``-th piece of a block, and the row of its coefficients."""

    def only_piece(pieces: Any, row: int, k: int, start: int, stop: int) -> Any:
        return start, stop, row

    def one_of_table(pieces: Any, row: int, k: int, start: int, stop: int) -> Any:
        if row >= 0:
            return start, stop, row
        return pieces[3 * k], pieces[3 * k + 1], pieces[3 * k + 2]

    return cuda.jit(device=True)(one_of_table if units else only_piece)


# --- Rules that are foreseen: by the largest gradient, and the least codes of second moments ----------------


@cuda.jit(device=True)
def _largest_of_warp(value: Any) -> Any:
    apart = 1
    while apart < LANES:
        other = np.uint32(cuda.shfl_xor_sync(ALL, np.int32(value), apart))
        value = other if other > value else value  # noqa: FURB136 - of 32 bits
        apart *= 2
    return value


@cuda.jit(device=True)
def _leasts_of_warp(first: Any, second: Any) -> Any:
    # The least is 255 less the largest of what is missing to 255.
    first = np.uint32(256 - _largest_of_warp(np.uint32(255 - first)))
    return first, np.uint32(256 - _largest_of_warp(np.uint32(255 - second)))


def _foreseen(kinds: KernelTypes, of: Elements, units: bool) -> Limits:
    states_of, gradient, piece_at = of.states_of, of.gradient, make_piece_at(units=units)
    in_blocks = kinds.stored.in_blocks  # type: ignore[union-attr]

    def smaller_code_in(place: int) -> Any:
        at = 2 + place

        def nothing(before: Any, arrays: Any, i: int) -> Any:
            return before

        def one(before: Any, arrays: Any, i: int) -> Any:
            return smaller_code(before, arrays[at], i)

        return cuda.jit(device=True)(one if place in in_blocks else nothing)

    code1, code2 = smaller_code_in(1), smaller_code_in(2)

    @cuda.jit(device=True)
    def of_whole(stage: Any, before: Any, scales: Any, block: int, c: Any) -> Any:
        states = states_of(stage)
        found = larger_magnitude(np.uint32(0), gradient(stage, 0, c))
        found = larger_magnitude(found, gradient(stage, 1, c))
        found = larger_magnitude(found, gradient(stage, 2, c))
        found = larger_magnitude(found, gradient(stage, 3, c))
        bounds = with_step(no_bounds(states), states, scales, block, _largest_of_warp(found), c.rule)
        least = np.uint32(255)
        first = code1(code1(code1(code1(least, stage, 0), stage, 1), stage, 2), stage, 3)
        second = code2(code2(code2(code2(least, stage, 0), stage, 1), stage, 2), stage, 3)
        return bounds, extents_left(states, before, _leasts_of_warp(first, second), c.rule.beta2)

    @cuda.jit(device=True)
    def peak_of_piece(c: Any, arguments: Any) -> Any:
        arrays, i, stop, finite_only = arguments
        found = np.uint32(0)
        while i < stop:
            grad = gradient(arrays, i, c)
            if not finite_only or grad * grad < np.float32(np.inf):
                found = larger_magnitude(found, grad)
            i += LANES
        return found

    @cuda.jit(device=True)
    def rule_of_piece(c: Any, arguments: Any) -> Any:
        return c.rule

    peak_of = make_of_source(kinds, peak_of_piece, units=units)
    rule_of = make_of_source(kinds, rule_of_piece, units=units)

    @cuda.jit(device=True)
    def of_any(
        arrays: Any, before: Any, scales: Any, block: Any, source: Any, pieces: Any, finite_only: bool
    ) -> Any:
        number, start, stop = block
        table, row, begin, end = pieces
        states, lane = states_of(arrays), cuda.threadIdx.x % LANES
        bounds, beta2 = no_bounds(states), np.float32(1)
        for k in range(begin, end):
            a, b, of_piece = piece_at(table, row, k, start, stop)
            if of_piece == KEPT:
                bounds = with_kept(bounds, states, scales, number)
            else:
                found = _largest_of_warp(peak_of(source, of_piece, (arrays, a + lane, b, finite_only)))
                rule = rule_of(source, of_piece, None)
                beta2 = rule.beta2 if rule.beta2 < beta2 else beta2  # noqa: FURB136
                bounds = with_step(bounds, states, scales, number, found, rule)
        return bounds, beta2

    @cuda.jit(device=True)
    def extents(arrays: Any, before: Any, block: Any, least: Any) -> Any:
        _, start, stop = block
        first, second = np.uint32(255), np.uint32(255)
        i = start + cuda.threadIdx.x % LANES
        while i < stop:
            first, second = code1(first, arrays, i), code2(second, arrays, i)
            i += LANES
        return extents_left(states_of(arrays), before, _leasts_of_warp(first, second), least)

    return Limits(of_whole, of_any, extents)


# --- Others: by what their states become --------------------------------------------------------------------


def _computed(kinds: KernelTypes, of: Elements, units: bool) -> Limits:
    states_of, new_state, piece_at = of.states_of, of.new_state, make_piece_at(units=units)

    @cuda.jit(device=True)
    def of_whole(stage: Any, before: Any, scales: Any, block: int, c: Any) -> Any:
        states = states_of(stage)
        extents = no_extents(states)
        extents = with_new(extents, states, new_state(stage, 0, c, before, None), False)
        extents = with_new(extents, states, new_state(stage, 1, c, before, None), False)
        extents = with_new(extents, states, new_state(stage, 2, c, before, None), False)
        extents = with_new(extents, states, new_state(stage, 3, c, before, None), False)
        extents = extents_of_warp(extents, states)
        return with_extents(no_bounds(states), states, extents), extents

    @cuda.jit(device=True)
    def stepped(c: Any, arguments: Any) -> Any:
        arrays, i, stop, before, checks, finite_only, extents = arguments
        while i < stop:
            state = new_state(arrays, i, c, before, checks)
            extents = with_new(extents, states_of(arrays), state, finite_only)
            i += LANES
        return extents

    stepped_of = make_of_source(kinds, stepped, units=units)

    @cuda.jit(device=True)
    def of_any(
        arrays: Any, before: Any, scales: Any, block: Any, source: Any, pieces: Any, finite_only: bool
    ) -> Any:
        number, start, stop = block
        table, row, begin, end = pieces
        states, lane = states_of(arrays), cuda.threadIdx.x % LANES
        checks = checks_of(states, scales, number, True)
        bounds, extents = no_bounds(states), no_extents(states)
        for k in range(begin, end):
            a, b, of_piece = piece_at(table, row, k, start, stop)
            i = a + lane
            if of_piece == KEPT:
                bounds = with_kept(bounds, states, scales, number)
                while i < b:
                    extents = with_left(extents, states, load_states(states, i, before, checks))
                    i += LANES
            else:
                some = (arrays, i, b, before, checks, finite_only, extents)
                extents = stepped_of(source, of_piece, some)
        extents = extents_of_warp(extents, states)
        return with_extents(bounds, states, extents), extents

    @cuda.jit(device=True)
    def extents_found(arrays: Any, before: Any, block: Any, least: Any) -> Any:
        return least

    return Limits(of_whole, of_any, extents_found)
