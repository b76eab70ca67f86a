"""Segments on the CPU: the loop of :mod:`fastadam.kernels.cpu` over units, each with coefficients of its own.

Memory traffic is that of the plain loop, without the elements that no unit covers, and 24 bytes for each
unit. Beginning and ending a unit takes about 50 ns.
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
from .cpu import PARALLEL_FROM, step_element
from .rows import part_of_row
from .units import Units, each_share

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class Table(NamedTuple):
    """What is stepped, and with what."""

    units: Units
    coefficients: Array  # shape (rows, 1 + those of the rule), C-contiguous, of the dtype of the parameters


# --- The loop -----------------------------------------------------------------------------------------------


def _step_elements(
    params: Any,
    grads: Any,
    states: Any,
    bounds: Any,
    c: Any,
    clear: Any,
) -> None:
    # Not within the text of the loop over units: compilers take conditions that are the same for all elements
    # out of a loop, but of a loop in a loop they leave some inside (1.15 times the time in the cache).
    # Unsigned: an index that could be negative would keep the loop scalar.
    for i in range(np.uint64(bounds[0]), np.uint64(bounds[1])):
        step_element(params, grads, states, i, c, clear)


@overload(_step_elements, jit_options=JIT_OPTIONS, strict=False)
def _compiled_step_elements(
    params: Any,
    grads: Any,
    states: Any,
    bounds: Any,
    c: Any,
    clear: Any,
) -> Any:
    return _step_elements


def _step_unit(
    params: Any,
    grads: Any,
    states: Any,
    unit: Any,
    coefficients: Any,
    decay: Any,
    others: Any,
    clear: Any,
) -> None:
    bounds, row = (unit[0], unit[1]), unit[2]
    conditioning, direction, rule, average = others
    rule_of_row = part_of_row(rule, coefficients, row, 1)
    if decay is None:  # decided by the type, when compiled
        c = (conditioning, direction, None, rule_of_row, average)
        _step_elements(params, grads, states, bounds, c, clear)
    elif isnan(coefficients[row, 0]):
        without = (conditioning, direction, None, rule_of_row, average)
        _step_elements(params, grads, states, bounds, without, clear)
    else:
        decayed = (conditioning, direction, part_of_row(decay, coefficients, row, 0), rule_of_row, average)
        _step_elements(params, grads, states, bounds, decayed, clear)


@overload(_step_unit, jit_options=JIT_OPTIONS, strict=False)
def _compiled_step_unit(
    params: Any,
    grads: Any,
    states: Any,
    unit: Any,
    coefficients: Any,
    decay: Any,
    others: Any,
    clear: Any,
) -> Any:
    return _step_unit


def _make_loop(cache_key: str) -> Callable[..., None]:
    def step_segments(
        params: Array,
        grads: Array,
        states: tuple[Array, ...],
        units: Array,
        first: Array,
        coefficients: Array,
        conditioning: Any,
        direction: Any,
        decay: Any,
        rule: Any,
        average: Any,
        clear: Any,
    ) -> None:
        cache_key  # noqa: B018
        # In the serial compilation, prange is range.
        for share in prange(first.size - 1):
            for k in range(first[share], first[share + 1]):
                unit = (units[k, 0], units[k, 1], units[k, 2])
                others = (conditioning, direction, rule, average)
                _step_unit(params, grads, states, unit, coefficients, decay, others, clear)

    return step_segments


serial, parallel = jit(_make_loop), jit(_make_loop, parallel=True)


# --- As in the plain backend --------------------------------------------------------------------------------


def plan(
    params: Array,
    grads: Array,
    states: tuple[Array, ...],
    table: Table,
    c: rules.Update,
    clear: rules.Clear | None = None,
) -> Callable[[], None]:
    """Return the call that advances the units of ``params`` and ``states`` by one step, in place.

    All that could fail is done here, before anything is written.

    Parameters
    ----------
    params, grads, states, clear
        As for :func:`fastadam.kernels.cpu.plan`.
    table : Table
        The units, and a row of coefficients for each. They must stay as they are until the call has returned.
    c : Update
        The coefficients that are the same for all units. Of the decay and of the rule only the types count; a
        decay of None is none in any unit.
    """
    units = table.units
    by_numba, count = threads.shares(units.total, PARALLEL_FROM, threads.MIN_PIECE)
    loop, shares = parallel if by_numba else serial, units.shares(count)
    calls = [
        partial(loop, params, grads, states, shares.units, first, table.coefficients, *c, clear)
        for first in ([shares.first] if by_numba else each_share(shares.first))
    ]
    return threads.all_of(calls)


def prepare(
    params: Array,
    grads: Array,
    states: tuple[Array, ...],
    table: Table,
    c: rules.Update,
    clear: rules.Clear | None = None,
) -> None:
    """Compile, or load from the disk cache, the loop for these arguments; write nothing."""
    loop = parallel if table.units.total >= PARALLEL_FROM and threads.numba_is_safe() else serial
    _call_with_nothing(loop, params, grads, states, c, clear)


def warmup(dtype: np.dtype[Any], n_states: int, c: rules.Update, clear: rules.Clear | None = None) -> None:
    """Compile, or load from the disk cache, all loops for buffers of a dtype."""
    empty = np.empty(0, dtype)
    for loop, grads in each_form(threads.usable(serial, parallel), dtype, written=clear is not None):
        _call_with_nothing(loop, empty, grads, (empty,) * n_states, c, clear)


def _call_with_nothing(
    loop: Any, params: Array, grads: Array, states: tuple[Array, ...], c: rules.Update, clear: Any
) -> None:
    units, first = np.empty((0, 3), np.int64), np.zeros(1, np.int64)
    coefficients = np.empty((0, 1 + len(c.rule)), c.rule[0].dtype)
    loop(params, grads, tuple(state[:0] for state in states), units, first, coefficients, *c, clear)
