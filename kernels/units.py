"""Units: the stretches of a flat buffer that are stepped, each with a row of coefficients, cut into shares.

A unit is ``(start, stop, row)``, in elements; units are in order, and none overlap. What no unit covers is
not touched. A share is what one thread takes, or one block of a GPU: consecutive units, of about as much work
as any other share. A unit that lies across the border of two shares is cut there.

Where units are cut does not change a bit of the result.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np

from . import rules
from .columns import Columns

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

Numbers: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


def columns_of(rule: type) -> tuple[str, ...]:
    """Return the names of the coefficients of a row; all others of an update are one for all units.

    The first is that of the weight decay, NaN where there is none: a decay of 0 is one, and changes -0, inf
    and NaN. Of Adam there are eight, so that a row of float32 is 32 bytes.
    """
    return ("decay", *rule._fields)  # type: ignore[attr-defined]


ALIGNMENT = 16
"""Units are cut at multiples of this many elements: no two threads write to one cache line, and packed access
stays within one."""

ALIGN_FROM = 4096
"""Elements from which a unit is cut where it meets a cache line: packed access across two lines costs 5 to
10 % in the cache, another unit 50 ns (one core, Zen 4)."""

UNIT_COST = 128
"""Elements that could be stepped in the time that it takes to begin a unit and to end it."""


def row_of(c: rules.Update) -> tuple[Any, ...]:
    """Return what a row of the table has of the coefficients of a step."""
    return (np.nan if c.decay is None else c.decay[0], *c.rule)


class RowTables(NamedTuple):
    """What the coefficients of all rows are formed from where steps are counted, in GPU memory."""

    coefficients: np.ndarray[Any, np.dtype[Any]]  # shape (rows, width): those that never change are right
    sources: Integers  # shape (rows,): where the learning rate comes from
    weight_decays: Numbers  # shape (rows,); NaN for none
    columns: Columns  # those that are formed
    decoupled: bool  # whether decays follow the learning rates


class Shares(NamedTuple):
    """Units in shares: share ``k`` takes the units from ``first[k]`` up to, without, ``first[k + 1]``."""

    units: Integers  # shape (m, 3)
    first: Integers  # shape (shares + 1,)


class Units:
    """Units of one buffer.

    Parameters
    ----------
    units : ndarray of int64, shape (m, 3)
        In order, not empty, none overlapping: ``(start, stop, row)`` each.

    Attributes
    ----------
    total : int
        Elements of all units.
    runs : ndarray of int64, shape (k, 2)
        The longest stretches without a gap, ``(start, stop)`` each, in order.
    whole : ndarray of int64, shape (m, 3)
        The units as they were given.
    """

    def __init__(self, units: Integers) -> None:
        starts, stops = units[:, 0], units[:, 1]
        self.whole = units
        self.total = int((stops - starts).sum())
        gap = starts[1:] != stops[:-1]  # behind each unit but the last
        ends = np.ones(len(units), bool)
        begins = ends.copy()
        begins[1:] = ends[:-1] = gap
        self.runs: Integers = np.stack([starts[begins], stops[ends]], axis=1)
        self._units = cut(units, (starts + (-starts % ALIGNMENT))[stops - starts >= ALIGN_FROM])
        self._shares: dict[int, Shares] = {}

    def gaps(self, size: int) -> Units:
        """Return what no unit covers of a buffer."""
        starts, stops = np.append(0, self.runs[:, 1]), np.append(self.runs[:, 0], size)
        gaps = np.stack([starts, stops, np.zeros_like(starts)], axis=1)
        return Units(gaps[starts < stops])

    def shares(self, count: int) -> Shares:
        """Return the units in at most ``count`` shares of about equal work."""
        if count not in self._shares:
            self._shares = {count: _share(self._units, count)}
        return self._shares[count]


def cut(units: Integers, places: Integers) -> Integers:
    """Cut units at places, in order and none twice; those that lie inside of no unit change nothing."""
    if not len(units):
        return units
    of = np.searchsorted(units[:, 0], places, side="right") - 1  # the unit that begins before a place
    inside = (of >= 0) & (units[of, 0] < places) & (places < units[of, 1])
    of, places = of[inside], places[inside]
    units = np.insert(units, of + 1, units[of], axis=0)
    behind = of + np.arange(1, len(of) + 1)
    units[behind, 0] = units[behind - 1, 1] = places
    return units


def each_share(first: Integers) -> list[Integers]:
    """Return the table of the first units of shares cut into one for each share."""
    return [first[k : k + 2] for k in range(first.size - 1)] or [first]


def _share(units: Integers, count: int) -> Shares:
    if count == 1 or not len(units):
        return Shares(units, np.array([0, len(units)]))
    # Work behind which a share ends, the unit in which that lies, and the place of its element.
    work = np.cumsum(units[:, 1] - units[:, 0] + UNIT_COST)
    wanted = work[-1] * np.arange(1, count) // count
    of = np.searchsorted(work, wanted)
    places = np.maximum(units[of, 1] - (work[of] - wanted), units[of, 0])
    places = np.unique(np.minimum(places + (-places % ALIGNMENT), units[of, 1]))
    units = cut(units, places)
    first = np.searchsorted(units[:, 0], places)
    return Shares(units, np.unique(np.concatenate([[0], first, [len(units)]])))
