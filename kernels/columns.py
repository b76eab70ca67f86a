"""Coefficients that a GPU forms for each step, of one set of them or of a table: tables in its memory."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Numbers: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


class Formed(NamedTuple):
    """A coefficient that changes from step to step, in each row of a table."""

    place: int  # in the row
    is_over_lr: bool  # the learning rate over a number, or that number
    tables: list[Numbers]  # numbers of the steps 1, 2, ...; the last is also that of all later steps
    of_row: Integers  # shape (rows,): which of the tables


class Columns(NamedTuple):
    """What ``Column`` in ``kernels/columns.cu`` is, for each formed coefficient of each row."""

    table: Integers  # shape (rows, formed, 4): place, whether over lr, where the numbers begin, how many
    numbers: Numbers  # all tables

    def moved(self, places: int) -> Columns:
        """Return the same of rows that begin so many places later."""
        return self._replace(table=self.table + np.array([places, 0, 0, 0]))


def laid_out(formed: list[Formed], rows: int) -> Columns:
    """Return the columns of so many rows."""
    table, numbers, begin = np.empty((rows, len(formed), 4), np.int64), [np.empty(0)], 0
    for k, (place, is_over_lr, tables, of_row) in enumerate(formed):
        sizes = np.array([found.size for found in tables])
        starts = begin + np.append(0, np.cumsum(sizes)[:-1])
        table[:, k] = np.stack(np.broadcast_arrays(place, is_over_lr, starts[of_row], sizes[of_row]), axis=1)
        numbers += tables
        begin += int(sizes.sum())
    return Columns(table, np.concatenate(numbers))
