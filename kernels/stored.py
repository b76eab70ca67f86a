"""Steps on the CPU of arrays in any storage: codes, masters, a copy, blocks; with or without segments.

Memory traffic per element: 2 bytes or 1 in place of 4 for what is stored in 16 or 8 bits, each way; a
master is read and written (4 bytes each, or 2 where it is split), a copy of the parameters written (4 or
2), and 1/16 byte of scales moved for each state in 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import isnan
from typing import Any, TypeAlias

import numpy as np
from numba import prange, types
from numba.extending import overload

from . import rules, threads
from .bounds import (
    are_finite,
    larger_magnitude,
    limited,
    no_bounds,
    no_extents,
    with_extents,
    with_kept,
    with_left,
    with_new,
    with_step,
)
from .compiling import INLINED, called, each_form, inlined, jit
from .cpu import PARALLEL_FROM
from .distinct import memory_of, moved, pointers_to, prefetch
from .draws import draws_after, draws_at, word_for_param
from .elements import keep_states, load_states, store_states
from .groups import BLOCK, KEPT, Cuts
from .relatives import FORESEEN
from .rounding import Rounding, Storage
from .rows import part_of_row
from .storage import at_element, load, load_param, store, store_param
from .units import Integers, each_share
from .views import checks_of, set_scales, views_before, views_of

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

SPAN = 2**32
"""Elements, by their index in the whole buffer, that share a key: a piece does not go across."""


# --- Elements -----------------------------------------------------------------------------------------------
#
# Memory is (params, grads, states, master, out), from some element on.


@inlined
def _peak(c: Any, memory: Any, size: int, finite_only: bool) -> Any:
    """Return the bits of the largest magnitude of the gradients as the rule gets them.

    With ``finite_only``, of those whose square is finite.
    """
    params, grads, _, master, _ = memory
    peak = np.uint32(0)
    for j in range(size):
        i: Any = np.uint64(j)
        _, grad = rules.prepared(load_param(params, master, i), load(grads, i), rules.Update(*c))
        if not finite_only or grad * grad < np.float32(np.inf):
            peak = larger_magnitude(peak, grad)
    return peak


@inlined
def _step_elements(c: Any, memory: Any, views: Any, checks: Any, size: int, clear: Any, draws: Any) -> None:
    params, grads, states, master, out = memory
    for j in range(size):
        i: Any = np.uint64(j)
        param = load_param(params, master, i)
        state = load_states(states, i, views, checks)
        param, state = rules.update(param, load(grads, i), state, rules.Update(*c))
        store_states(states, i, state, draws, views, checks)
        store_param(params, master, i, param, word_for_param(draws))
        store(out, i, param)
        if clear is not None:  # decided by the type, when compiled
            grads[i] = 0
        draws = draws_after(draws)


@inlined
def _keep_elements(states: Any, views: Any, checks: Any, size: int, draws: Any) -> None:
    """Write what is kept of a block with its new scales."""
    for j in range(size):
        i: Any = np.uint64(j)
        keep_states(states, i, draws, views, checks)
        draws = draws_after(draws)


def _is_usual(rule: Any) -> Any:
    """Return whether both averages move from their old values, not from the new ones.

    Where compilers know it, they need no branch for it in each element (:func:`rules.moving_average`). Of a
    rule without these averages it is True.
    """
    return rule.one_minus_beta1 < rule.beta1 and rule.one_minus_beta2 < rule.beta2


@overload(_is_usual, jit_options=INLINED, strict=False)
def _compiled_is_usual(rule: Any) -> Callable[..., Any]:
    fields = set(rule.fields)
    if {"beta1", "one_minus_beta1", "beta2", "one_minus_beta2"} <= fields:
        return _is_usual
    return lambda rule: True  # noqa: ARG005


@inlined
def _step_run(c: Any, memory: Any, start: int, stop: int, clear: Any, rounding: Any) -> None:
    """Step elements of which no state is in blocks."""
    if _is_usual(c[3]):
        while start + BLOCK <= stop:
            here = moved(memory, start)
            prefetch(here)
            _step_elements(c, here, None, None, BLOCK, clear, draws_at(rounding, start))
            start += BLOCK
    _step_elements(c, moved(memory, start), None, None, stop - start, clear, draws_at(rounding, start))


# --- Blocks -------------------------------------------------------------------------------------------------
#
# The limits of a block are bounds of its new states, and the least that is left: of rules that are foreseen
# the least share of old second moments, of others the extents of the new states.


@inlined
def _foresee(
    c: Any, memory: Any, scales: Any, block: int, checks: Any, size: int, finite_only: bool, limits: Any
) -> Any:
    """Widen limits to what elements become, by their gradients."""
    states, rule = memory[2], c[3]
    peak = _peak(c, memory, size, finite_only)
    return with_step(limits[0], states, scales, block, peak, rule), min(limits[1], rule.beta2)


@inlined
def _compute(
    c: Any, memory: Any, scales: Any, block: int, checks: Any, size: int, finite_only: bool, limits: Any
) -> Any:
    """Widen limits to what elements become."""
    params, grads, states, master, _ = memory
    views, extents = views_before(states, scales, block), limits[1]
    for j in range(size):
        i: Any = np.uint64(j)
        state = load_states(states, i, views, checks)
        _, state = rules.update(load_param(params, master, i), load(grads, i), state, rules.Update(*c))
        extents = with_new(extents, states, state, finite_only)
    return with_extents(limits[0], states, extents), extents


@inlined
def _compute_kept(memory: Any, scales: Any, block: int, checks: Any, size: int, extents: Any) -> Any:
    states = memory[2]
    views = views_before(states, scales, block)
    for j in range(size):
        i: Any = np.uint64(j)
        extents = with_left(extents, states, load_states(states, i, views, checks))
    return extents


def _is_foreseen(rule: Any) -> bool:
    return getattr(rule, "instance_class", None) in FORESEEN


def no_limits(states: Any, rule: Any) -> Any:
    """Return the limits of no elements; for compiled loops."""


@overload(no_limits, jit_options=INLINED, strict=False)
def _compiled_no_limits(states: Any, rule: Any) -> Callable[..., Any]:
    if _is_foreseen(rule):
        return lambda states, rule: (no_bounds(states), np.float32(1))  # noqa: ARG005
    return lambda states, rule: (no_bounds(states), no_extents(states))  # noqa: ARG005


def with_stepped(
    c: Any, memory: Any, scales: Any, block: int, checks: Any, size: int, finite_only: bool, limits: Any
) -> Any:
    """Widen limits to elements that are stepped, with ``finite_only`` to what is finite; for loops."""


@overload(with_stepped, jit_options=INLINED, strict=False)
def _compiled_with_stepped(
    c: Any, memory: Any, scales: Any, block: int, checks: Any, size: int, finite_only: bool, limits: Any
) -> Callable[..., Any]:
    return _foresee if _is_foreseen(c[3]) else _compute  # type: ignore[no-any-return]


def with_frozen(memory: Any, scales: Any, block: int, checks: Any, size: int, limits: Any) -> Any:
    """Widen limits to elements that are kept as they are; for compiled loops."""


@overload(with_frozen, jit_options=INLINED, strict=False)
def _compiled_with_frozen(
    memory: Any, scales: Any, block: int, checks: Any, size: int, limits: Any
) -> Callable[..., Any]:
    if not isinstance(limits[1], types.BaseTuple):
        return lambda memory, scales, block, checks, size, limits: (  # noqa: ARG005
            with_kept(limits[0], memory[2], scales, block),
            limits[1],
        )
    return lambda memory, scales, block, checks, size, limits: (
        with_kept(limits[0], memory[2], scales, block),
        _compute_kept(memory, scales, block, checks, size, limits[1]),
    )


@inlined
def _step_blocks(c: Any, memory: Any, scales: Any, start: int, stop: int, clear: Any, rounding: Any) -> Any:
    """Step blocks from ``start`` on, while they are whole and finite; return where the others begin."""
    while start + BLOCK <= stop:
        here, block = moved(memory, start), start // BLOCK
        prefetch(here)
        states = here[2]
        limits = no_limits(states, c[3])
        bounds, least = with_stepped(c, here, scales, block, None, BLOCK, False, limits)
        if not are_finite(states, scales, block, bounds):
            break
        views = views_of(states, scales, block, bounds, BLOCK, least, True)
        _step_elements(c, here, views, None, BLOCK, clear, draws_at(rounding, start))
        set_scales(states, scales, block, bounds, views, None, BLOCK)
        start += BLOCK
    return start


@called
def _limits_of_block(
    memory: Any,
    scales: Any,
    pieces: Any,
    group: Any,
    bounds_of_block: Any,
    coefficients: Any,
    decay: Any,
    others: Any,
    finite_only: bool,
) -> Any:
    """Return the limits of all pieces of a block."""
    start, stop = bounds_of_block
    states, block, rule = moved(memory, start)[2], start // BLOCK, others[2]
    limits, checks = no_limits(states, rule), checks_of(states, scales, block, True)
    for k in range(group[0], group[1]):
        a, b, row = max(pieces[k, 0], start), min(pieces[k, 1], stop), pieces[k, 2]
        if row == KEPT:
            limits = with_frozen(moved(memory, a), scales, block, checks, b - a, limits)
        else:
            arguments = (moved(memory, a), scales, block, checks, b - a, finite_only, limits)
            limits = _limits_of_row(coefficients, row, decay, others, arguments)
    return limits


@called
def _step_block(
    memory: Any,
    scales: Any,
    pieces: Any,
    group: Any,
    bounds_of_block: Any,
    coefficients: Any,
    decay: Any,
    others: Any,
    clear: Any,
    rounding: Any,
) -> None:
    """Step the pieces of one block, or a part of a piece; they may be short, frozen, or not finite."""
    start, stop = bounds_of_block
    block, states = start // BLOCK, moved(memory, start)[2]
    bounds, least = _limits_of_block(
        memory, scales, pieces, group, bounds_of_block, coefficients, decay, others, False
    )
    is_finite = are_finite(states, scales, block, bounds)
    if not is_finite:
        bounds, least = _limits_of_block(
            memory, scales, pieces, group, bounds_of_block, coefficients, decay, others, True
        )
        bounds = limited(bounds)
    views = views_of(states, scales, block, bounds, stop - start, least, is_finite)
    checks = checks_of(states, scales, block, is_finite)
    for k in range(group[0], group[1]):
        a, b, row = max(pieces[k, 0], start), min(pieces[k, 1], stop), pieces[k, 2]
        # Parts of a block may have keys of their own.
        place, draws = moved(memory, a), draws_at(at_element(rounding, a), a)
        if row == KEPT:
            _keep_elements(place[2], views, checks, b - a, draws)
        else:
            _step_row(coefficients, row, decay, others, (place, views, checks, b - a, clear, draws))
    set_scales(states, scales, block, bounds, views, checks, stop - start)


# --- Pieces: with the coefficients of their row -------------------------------------------------------------


def _with_row(function: Callable[..., Any]) -> Any:
    """Let ``function(c, *arguments)`` be called with a row of the table of coefficients in place of ``c``."""

    def called(coefficients: Any, row: int, decay: Any, others: Any, arguments: Any) -> Any:
        conditioning, direction, rule, average = others
        rule_of_row = part_of_row(rule, coefficients, row, 1)
        if decay is None:  # decided by the type, when compiled
            return function((conditioning, direction, None, rule_of_row, average), *arguments)
        if isnan(coefficients[row, 0]):
            return function((conditioning, direction, None, rule_of_row, average), *arguments)
        decay_of_row = part_of_row(decay, coefficients, row, 0)
        return function((conditioning, direction, decay_of_row, rule_of_row, average), *arguments)

    called.__name__ = f"{function.__name__}_of_row"
    return inlined(called)


_limits_of_row, _step_row = _with_row(with_stepped), _with_row(_step_elements)
step_run_of_row, _step_blocks_of_row = _with_row(_step_run), _with_row(_step_blocks)


def step_group(
    params: Any,
    grads: Any,
    states: Any,
    scales: Any,
    pieces: Any,
    group: Any,
    coefficients: Any,
    decay: Any,
    others: Any,
    clear: Any,
    rounding: Any,
    master: Any,
    out: Any,
) -> None:
    """Step the pieces of a group."""


@overload(step_group, jit_options=INLINED, strict=False)
def _compiled_step_group(
    params: Any,
    grads: Any,
    states: Any,
    scales: Any,
    pieces: Any,
    group: Any,
    coefficients: Any,
    decay: Any,
    others: Any,
    clear: Any,
    rounding: Any,
    master: Any,
    out: Any,
) -> Callable[..., None]:
    return _step_piece if isinstance(scales, types.NoneType) else _step_pieces


def _step_piece(
    params: Any,
    grads: Any,
    states: Any,
    scales: Any,
    pieces: Any,
    group: Any,
    coefficients: Any,
    decay: Any,
    others: Any,
    clear: Any,
    rounding: Any,
    master: Any,
    out: Any,
) -> None:
    memory, first = memory_of(params, grads, states, master, out), group[0]
    start, stop, row = pieces[first, 0], pieces[first, 1], pieces[first, 2]
    keys = at_element(rounding, start)  # a piece does not go across elements with another key
    step_run_of_row(coefficients, row, decay, others, (memory, start, stop, clear, keys))


def _step_pieces(
    params: Any,
    grads: Any,
    states: Any,
    scales: Any,
    pieces: Any,
    group: Any,
    coefficients: Any,
    decay: Any,
    others: Any,
    clear: Any,
    rounding: Any,
    master: Any,
    out: Any,
) -> None:
    memory, scales_of = memory_of(params, grads, states, master, out), pointers_to(scales)
    first, are_parts = group[0], group[1] - group[0] > 1
    start, stop, row = pieces[first, 0], pieces[first, 1], pieces[first, 2]
    keys = at_element(rounding, start)
    if are_parts:  # of one block
        start -= start % BLOCK
        stop = min(start + BLOCK, params.size)
    usual = not are_parts and _is_usual(part_of_row(others[2], coefficients, row, 1))
    while start < stop:
        if usual:
            arguments = (memory, scales_of, start, stop, clear, keys)
            start = _step_blocks_of_row(coefficients, row, decay, others, arguments)
        if start < stop:
            block = (start, min(start + BLOCK, stop))
            _step_block(memory, scales_of, pieces, group, block, coefficients, decay, others, clear, rounding)
            start += BLOCK


# --- The loop -----------------------------------------------------------------------------------------------


def _make_loop(cache_key: str) -> Callable[..., None]:
    def step_stored(
        params: Array,
        grads: Array,
        states: tuple[Array, ...],
        pieces: Integers,
        first_piece: Integers,
        first_group: Integers,
        coefficients: Array,
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
        # In the serial compilation, prange is range.
        for share in prange(first_group.size - 1):
            for k in range(first_group[share], first_group[share + 1]):
                group, others = (first_piece[k], first_piece[k + 1]), (conditioning, direction, rule, average)
                step_group(
                    params,
                    grads,
                    states,
                    scales,
                    pieces,
                    group,
                    coefficients,
                    decay,
                    others,
                    clear,
                    rounding,
                    master,
                    out,
                )

    return step_stored


serial, parallel = jit(_make_loop), jit(_make_loop, parallel=True)


# --- As for segments ----------------------------------------------------------------------------------------


def spans(rounding: Rounding | None, size: int) -> tuple[int, ...]:
    """Return the elements inside of a buffer where another key begins."""
    if rounding is None:
        return ()
    return tuple(range(-int(rounding.first) % SPAN or SPAN, size, SPAN))


def plan(
    params: Array,
    grads: Array,
    states: tuple[Array, ...],
    cuts: Cuts,
    coefficients: Array,
    c: rules.Update,
    clear: rules.Clear | None,
    storage: Storage,
) -> Callable[[], None]:
    """Return the call that advances units of ``params`` and ``states`` by one step, in place.

    All that could fail is done here, before anything is written.

    Parameters
    ----------
    params, grads, states : ndarray, tuple of ndarray
        As for :func:`fastadam.kernels.cpu.plan`, each float32, or codes of float16 (uint16) or bfloat16
        (int16); moments, too, in 8 bits (int8 the first, uint8 the second). The average of the parameters is
        float32.
    cuts : Cuts
        The units.
    coefficients, c
        A row of coefficients for each unit and those that are the same for all, as for
        :func:`fastadam.kernels.segments.plan`.
    clear
        As there.
    storage : Storage
        How numbers are rounded, a master of the parameters, where a copy of them goes, scales of blocks.
    """
    by_numba, count = threads.shares(cuts.total, PARALLEL_FROM, threads.MIN_PIECE)
    in_blocks = storage.scales is not None
    groups = cuts.groups(count, spans(storage.rounding, params.size), in_blocks=in_blocks)
    loop = parallel if by_numba else serial
    calls = [
        partial(
            loop,
            params,
            grads,
            states,
            groups.pieces,
            groups.first_piece,
            first,
            coefficients,
            *c,
            clear,
            *storage,
        )
        for first in ([groups.first_group] if by_numba else each_share(groups.first_group))
    ]
    return threads.all_of(calls)


def prepare(
    params: Array,
    grads: Array,
    states: tuple[Array, ...],
    cuts: Cuts,
    c: rules.Update,
    clear: rules.Clear | None,
    storage: Storage,
) -> None:
    """Compile, or load from the disk cache, the loop for these arguments; write nothing."""
    loop = parallel if cuts.total >= PARALLEL_FROM and threads.numba_is_safe() else serial
    _call_with_nothing(loop, params, grads, states, c, clear, storage)


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
    pieces, first = np.empty((0, 3), np.int64), np.zeros(1, np.int64)
    coefficients = np.empty((0, 1 + len(c.rule)), c.rule[0].dtype)
    loop(params, grads, states, pieces, first, first, coefficients, *c, clear, *storage)
