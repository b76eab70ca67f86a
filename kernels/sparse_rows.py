"""Some rows of a table on the CPU: the sums of their gradients, stepped; all other rows are not touched.

Gradients of the same row are added first (:mod:`fastadam.kernels.row_sums`), in a buffer of one row. Memory
traffic of Adam in float32, for each touched row of ``d`` elements: reads 12 d and 4 d for each of its
gradients, writes 12 d bytes.
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
from .compiling import JIT_OPTIONS, jit
from .cpu import PARALLEL_FROM
from .row_sums import room, sum_row, unit_at
from .rows import part_of_row
from .storage import load, store
from .touched import Touched
from .units import Integers

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_STEPPING = 3
"""Gradients that could be added in the time that it takes to step a row."""


class Table(NamedTuple):
    """Units with coefficients of their own: :mod:`fastadam.kernels.units`."""

    units: Integers
    coefficients: Array


# --- The step -----------------------------------------------------------------------------------------------


def _step_elements(params: Any, sums: Any, states: Any, start: int, stop: int, base: int, c: Any) -> None:
    # Unsigned: an index that could be negative would keep the loop scalar.
    for i in range(np.uint64(start), np.uint64(stop)):
        grad = sums[i - np.uint64(base)]
        param, state = rules.update(load(params, i), grad, load(states, i), rules.Update(*c))
        store(states, i, state)
        store(params, i, param)


@overload(_step_elements, jit_options=JIT_OPTIONS, strict=False)
def _compiled_step_elements(
    params: Any, sums: Any, states: Any, start: Any, stop: Any, base: Any, c: Any
) -> Any:
    return _step_elements


def _step_unit(
    params: Any, sums: Any, states: Any, bounds: Any, of: Any, coefficients: Any, decay: Any, others: Any
) -> None:
    """Step the elements ``bounds[0]`` to ``bounds[1]``, of a row that begins with the third of them."""
    start, stop, base = bounds
    conditioning, direction, rule, average = others
    own = part_of_row(rule, coefficients, of, 1)
    if decay is None:  # decided by the type, when compiled
        c = (conditioning, direction, None, own, average)
        _step_elements(params, sums, states, start, stop, base, c)
    elif isnan(coefficients[of, 0]):
        without = (conditioning, direction, None, own, average)
        _step_elements(params, sums, states, start, stop, base, without)
    else:
        decayed = (conditioning, direction, part_of_row(decay, coefficients, of, 0), own, average)
        _step_elements(params, sums, states, start, stop, base, decayed)


@overload(_step_unit, jit_options=JIT_OPTIONS, strict=False)
def _compiled_step_unit(
    params: Any, sums: Any, states: Any, bounds: Any, of: Any, coefficients: Any, decay: Any, others: Any
) -> Any:
    return _step_unit


def _step_row(
    params: Any, sums: Any, states: Any, bounds: Any, units: Any, coefficients: Any, decay: Any, others: Any
) -> None:
    """Step the elements ``bounds[0]`` to ``bounds[1]``, a row; for compiled loops."""
    start, stop = bounds
    if units is None:  # decided by the type, when compiled
        conditioning, direction, rule, average = others
        c = (conditioning, direction, decay, rule, average)
        _step_elements(params, sums, states, start, stop, start, c)
    else:
        unit = unit_at(units, start)
        while unit < len(units) and units[unit, 0] < stop:
            bounds_of_unit = (max(units[unit, 0], start), min(units[unit, 1], stop), start)
            of = units[unit, 2]
            _step_unit(params, sums, states, bounds_of_unit, of, coefficients, decay, others)
            unit += 1


@overload(_step_row, jit_options=JIT_OPTIONS, strict=False)
def _compiled_step_row(
    params: Any, sums: Any, states: Any, bounds: Any, units: Any, coefficients: Any, decay: Any, others: Any
) -> Any:
    return _step_row


def _make_loop(cache_key: str) -> Callable[..., None]:
    def step_rows(
        params: Array,
        grads: Array,
        states: tuple[Array, ...],
        rows: Integers,
        first: Integers,
        places: Integers,
        width: int,
        bounds: Integers,
        sums: Array,
        units: Any,
        coefficients: Any,
        conditioning: Any,
        direction: Any,
        decay: Any,
        rule: Any,
        average: Any,
    ) -> None:
        cache_key  # noqa: B018
        for share in prange(bounds.size - 1):
            row_sums = sums[share]
            for k in range(bounds[share], bounds[share + 1]):
                sum_row(row_sums, 0, grads, places, first[k], first[k + 1], width, (0, width))
                start, others = rows[k] * width, (conditioning, direction, rule, average)
                of_row = (start, start + width)
                _step_row(params, row_sums, states, of_row, units, coefficients, decay, others)

    return step_rows


serial, parallel = jit(_make_loop), jit(_make_loop, parallel=True)


# --- What threads take --------------------------------------------------------------------------------------


def _bounds(touched: Touched, count: int) -> Integers:
    """Return where shares of about equal work begin, and the number of rows."""
    first, n_rows = touched.first, touched.rows.size
    work = int(first[-1]) + _STEPPING * n_rows
    found = [0]
    for share in range(1, count):
        low, high, wanted = found[-1], n_rows, work * share // count
        while low < high:
            middle = (low + high) // 2
            if int(first[middle]) + _STEPPING * middle < wanted:
                low = middle + 1
            else:
                high = middle
        found.append(low)
    return np.array([*found, n_rows])


def runs_parallel(touched: Touched, width: int) -> bool:
    """Return whether Numba's threads take the loop: what decides, besides types, which one is compiled."""
    return threads.shares(touched.rows.size * width, PARALLEL_FROM, threads.MIN_PIECE)[0]


def plan(
    params: Array,
    grads: Array,
    states: tuple[Array, ...],
    touched: Touched,
    width: int,
    table: Table | None,
    c: rules.Update,
) -> Callable[[], None]:
    """Return the call that advances rows of ``params`` and ``states`` by one step, in place.

    All that could fail is done here, before anything is written.

    Parameters
    ----------
    params : ndarray, shape (n,)
        Rows of ``width`` elements; read and written.
    grads : ndarray, shape (k * width,)
        Numbers or codes; read.
    states : tuple of ndarray, each of shape (n,)
        Read and written.
    touched : Touched
        Of places in ``grads``.
    width : int
        Elements of a row.
    table : Table, optional
        Units of ``params`` with coefficients of their own; what is in no unit is not touched.
    c : Update
        The coefficients. With a table only the types count of the decay and of the rule.
    """
    by_numba, count = threads.shares(touched.rows.size * width, PARALLEL_FROM, threads.MIN_PIECE)
    loop, bounds, sums = (
        parallel if by_numba else serial,
        _bounds(touched, count),
        room(count, width, params.dtype),
    )
    arguments, rest = (params, grads, states, *touched, width), (*(table or (None, None)), *c)
    if by_numba or count == 1:
        return partial(loop, *arguments, bounds, sums, *rest)
    return threads.in_pool(
        [partial(loop, *arguments, bounds[k : k + 2], sums[k : k + 1], *rest) for k in range(count)]
    )


def prepare(
    params: Array,
    grads: Array,
    states: tuple[Array, ...],
    touched: Touched,
    width: int,
    table: Table | None,
    c: rules.Update,
) -> None:
    """Compile, or load from the disk cache, the loop for these arguments; write nothing."""
    loop = parallel if runs_parallel(touched, width) else serial
    nothing, sums = np.zeros(1, np.int64), room(0, width, params.dtype)
    loop(params, grads, states, *touched, width, nothing, sums, *(table or (None, None)), *c)
