"""Rows of a table that a step touches: in order, each once, with the places where its gradients stand.

A stable radix sort, as many passes as the largest row has digits: its time follows the number of rows that
are given, not that of rows there are, and equal rows stay in the order in which they were given. That order
is the one in which gradients are added, so the sums do not depend on threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .compiling import jit

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

MOST_BITS = 11
"""Of a digit: 2,048 counts lie in the nearest cache."""


class Touched(NamedTuple):
    """Rows that a step touches."""

    rows: Integers  # ascending, each once
    first: Integers  # row k has the places from first[k] up to, without, first[k + 1]
    places: Integers  # where its gradients stand, in the order in which they were given


def _make_sort(cache_key: str) -> Callable[..., tuple[int, Integers, Integers, Integers]]:
    def sort_rows(rows: Integers, n_rows: int) -> tuple[int, Integers, Integers, Integers]:
        cache_key  # noqa: B018
        size, largest, before, ascends = rows.size, 0, -1, True
        for k in range(size):
            row = rows[k]
            if row < 0 or row >= n_rows:
                return k, rows[:0], rows[:0], rows[:0]
            ascends = ascends and row >= before
            before = row
            largest = max(largest, row)

        keys, places = rows, np.arange(size)
        if not ascends:
            digit = 1
            while digit < MOST_BITS and size >> digit:  # few rows: short passes, if more of them
                digit += 1
            counts, mask, shift = np.empty(1 << digit, np.int64), (1 << digit) - 1, 0
            other_keys, other_places = np.empty_like(keys), np.empty_like(places)
            while largest >> shift:
                counts[:] = 0
                for k in range(size):
                    counts[(keys[k] >> shift) & mask] += 1
                total = 0
                for d in range(counts.size):
                    count = counts[d]
                    counts[d] = total
                    total += count
                for k in range(size):
                    d = (keys[k] >> shift) & mask
                    to = counts[d]
                    counts[d] = to + 1
                    other_keys[to], other_places[to] = keys[k], places[k]
                keys, other_keys = other_keys, keys
                places, other_places = other_places, places
                shift += digit

        touched, first = np.empty_like(keys), np.empty(size + 1, np.int64)
        found, before = 0, -1
        for k in range(size):
            if keys[k] != before:
                before = keys[k]
                touched[found], first[found] = before, k
                found += 1
        first[found] = size
        return -1, touched[:found], first[: found + 1], places

    return sort_rows


sort = jit(_make_sort)


def touched(rows: Integers, n_rows: int) -> tuple[int, Touched]:
    """Return the place of the first row that is not in ``[0, n_rows)``, -1 if all are, and the rows in order.

    Parameters
    ----------
    rows : ndarray of int64, shape (k,)
        In any order, C-contiguous; memory for the sort, too.
    n_rows : int
    """
    wrong, *found = sort(rows, n_rows)
    return wrong, Touched(*found)
