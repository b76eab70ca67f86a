"""Chunks of the runs of a buffer: where sums over it are cut, and how they are put together again.

A run is a longest stretch without a gap. Each is cut into chunks as a buffer of its own by the tree of
:mod:`fastadam.kernels.norms`, and the sums of the runs are summed by that tree, too, in order. So one run
that is the whole buffer has the sum of the plain pass; what lies in a gap does not count and is not read.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from .tree import CHUNK
from .units import Integers, Units, cut

Levels: TypeAlias = list[Integers]


class RunChunks:
    """The chunks of the runs of some units.

    Parameters
    ----------
    units : Units

    Attributes
    ----------
    size : int
        Elements of all runs.
    bounds : ndarray of int64, shape (m, 2)
        ``(start, stop)`` of each chunk, in elements of the buffer, in order.
    first_of_run : ndarray of int64, shape (k + 1,)
        Run ``r`` has the chunks from ``first_of_run[r]`` up to, without, ``first_of_run[r + 1]``.
    """

    def __init__(self, units: Units) -> None:
        self._units = units
        self.size = units.total
        self.bounds, self.first_of_run = _chunks(units.runs)
        self._shares = 0, self.first_of_run

    @cached_property
    def pieces(self) -> Integers:
        """The units, cut where chunks begin: ``(start, stop, row)`` each, shape (p, 3)."""
        return cut(self._units.whole, self.bounds[:, 0])

    @cached_property
    def first_piece(self) -> Integers:
        """Chunk ``c`` has the pieces from ``first_piece[c]`` up to, without, ``first_piece[c + 1]``."""
        return np.append(np.searchsorted(self.pieces[:, 0], self.bounds[:, 0]), len(self.pieces))

    @cached_property
    def levels(self) -> Levels:
        """Tables of groups, ``(start, stop)`` each: a group is summed to one of the values of the next table.

        The values of the first are the sums of the chunks; the last leaves one sum for each run. Empty where
        that is so from the first, and for a single run, of which the plain tree makes one.
        """
        levels, first = [], self.first_of_run
        while len(first) > 2 and np.diff(first).max() > 1:
            groups, first = _chunks(np.stack([first[:-1], first[1:]], axis=1))
            levels.append(groups)
        return levels

    def shares(self, count: int) -> Integers:
        """Return the first chunks of ``count`` shares of about equal size, and the number of chunks."""
        formed = self._shares
        if count != formed[0]:
            ends = np.cumsum(self.bounds[:, 1] - self.bounds[:, 0])
            first = np.searchsorted(ends, self.size * np.arange(1, count) // count)
            formed = self._shares = count, np.concatenate([[0], first, [len(ends)]])
        return formed[1]


def _chunks(ranges: Integers) -> tuple[Integers, Integers]:
    """Cut ranges, ``(start, stop)`` each; return the chunks, and the first of each range and their number."""
    of_range = -(-(ranges[:, 1] - ranges[:, 0]) // CHUNK)
    first: np.ndarray[Any, np.dtype[np.int64]] = np.append(0, np.cumsum(of_range))
    place = np.repeat(np.arange(len(ranges)), of_range)
    starts = ranges[place, 0] + CHUNK * (np.arange(len(place)) - first[place])
    return np.stack([starts, np.minimum(starts + CHUNK, ranges[place, 1])], axis=1), first
