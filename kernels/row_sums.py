"""Sums of gradients of the same row, for steps of some rows: as they are needed, and their norm.

Gradients are added in the order in which they were given, in the dtype of the arithmetic, in a buffer that
stays in the cache. The norm is that of the sums, row behind row in ascending order, by the tree of
:mod:`fastadam.kernels.norms`: where all rows are touched it has the bits of the norm of a whole gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numba import prange
from numba.extending import overload

from . import norms, threads
from .compiling import JIT_OPTIONS, jit
from .norms import measure_chunk
from .storage import load
from .touched import Touched
from .tree import CHUNK
from .units import Integers

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_LINE = 16
"""Sums of two threads begin so many elements apart, or a multiple of it: no two write to one cache line."""


def sum_row(
    sums: Any, at: int, grads: Any, places: Any, first: int, stop: int, width: int, part: Any
) -> None:
    """Set ``sums`` from ``at`` on to the sums of a part of the columns of a row; for compiled loops."""
    # No slices: they would count references. Unsigned: as in the step.
    size, to = np.uint64(part[1] - part[0]), np.uint64(at)
    start: Any = np.uint64(places[first] * width + part[0])
    for i in range(size):
        sums[to + i] = load(grads, start + i)
    for k in range(first + 1, stop):
        start = np.uint64(places[k] * width + part[0])
        for i in range(size):
            sums[to + i] += load(grads, start + i)


@overload(sum_row, jit_options=JIT_OPTIONS, strict=False)
def _compiled_sum_row(
    sums: Any, at: Any, grads: Any, places: Any, first: Any, stop: Any, width: Any, part: Any
) -> Any:
    return sum_row


def unit_at(units: Any, place: int) -> int:
    """Return the first unit that ends behind a place; for compiled loops."""
    low, high = 0, len(units)
    while low < high:
        middle = (low + high) // 2
        if units[middle, 1] > place:
            high = middle
        else:
            low = middle + 1
    return low


@overload(unit_at, jit_options=JIT_OPTIONS, strict=False)
def _compiled_unit_at(units: Any, place: Any) -> Any:
    return unit_at


def _leave_out(sums: Any, at: int, start: int, stop: int, units: Any) -> None:
    """Set to zero what of the elements from ``start`` to ``stop`` is in no unit; for compiled loops."""
    if units is not None:
        unit, done = unit_at(units, start), start
        while unit < len(units) and units[unit, 0] < stop:
            sums[at + done - start : at + max(units[unit, 0], done) - start] = 0
            done = min(units[unit, 1], stop)
            unit += 1
        sums[at + done - start : at + stop - start] = 0


@overload(_leave_out, jit_options=JIT_OPTIONS, strict=False)
def _compiled_leave_out(sums: Any, at: Any, start: Any, stop: Any, units: Any) -> Any:
    return _leave_out


def _make_measure(cache_key: str) -> Callable[..., None]:
    def measure_rows(
        grads: Array,
        rows: Integers,
        first: Integers,
        places: Integers,
        width: int,
        bounds: Integers,
        sums: Array,
        units: Any,
        scratch: Array,
    ) -> None:
        cache_key  # noqa: B018
        size = rows.size * width
        chunks = (size + CHUNK - 1) // CHUNK
        # In the serial compilation, prange is range.
        for share in prange(bounds.size - 1):
            chunk = sums[share]
            for c in range(bounds[share], bounds[share + 1]):
                start, stop = c * CHUNK, min((c + 1) * CHUNK, size)
                at = start
                while at < stop:
                    k, column = at // width, at % width
                    end = min(width, column + stop - at)
                    sum_row(chunk, at - start, grads, places, first[k], first[k + 1], width, (column, end))
                    base = rows[k] * width
                    _leave_out(chunk, at - start, base + column, base + end, units)
                    at += end - column
                measure_chunk(chunk, scratch, c, chunks, 0, stop - start)

    return measure_rows


serial, parallel = jit(_make_measure), jit(_make_measure, parallel=True)


def room(shares: int, size: int, dtype: np.dtype[Any]) -> Array:
    """Return memory for the sums of some shares, each of ``size`` elements."""
    return np.empty((shares, -(-size // _LINE) * _LINE), dtype)


def measure(
    grads: Array,
    touched: Touched,
    width: int,
    units: Integers | None,
    dtype: np.dtype[Any],
    scratch: Array,
) -> tuple[float, int]:
    """Return what :func:`fastadam.kernels.norms.measure` does, of the sums, without what is in no unit.

    Parameters
    ----------
    grads, touched, width
        As for :func:`fastadam.kernels.sparse_rows.plan`.
    units : ndarray of int64, shape (m, 3), optional
        All elements without.
    dtype : dtype
        Of the sums.
    scratch : ndarray, shape (m,)
        float64, at least ``norms.scratch_size(rows * width)`` elements; written.
    """
    size = touched.rows.size * width
    chunks = -(-size // CHUNK)
    by_numba, count = threads.shares(size, norms.PARALLEL_FROM, norms.MIN_PIECE)
    bounds, sums = np.arange(count + 1) * chunks // count, room(count, CHUNK, dtype)
    arguments = (grads, *touched, width)
    if by_numba or count == 1:
        loop = parallel if by_numba else serial
        loop(*arguments, bounds, sums, units, scratch)
    else:
        threads.run_in_pool(
            [
                partial(serial, *arguments, bounds[k : k + 2], sums[k : k + 1], units, scratch)
                for k in range(count)
            ]
        )
    return norms.fold(scratch, chunks)  # type: ignore[no-any-return]
