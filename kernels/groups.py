"""How the units of a step are cut where moments come in blocks, and which pieces are stepped together.

A unit is cut where blocks begin: what is left is whole blocks of one unit, or parts of one block. The parts
of a block share its scales, so they are a group, with what is kept of it: a frozen part has no
coefficients, but its codes follow when a scale changes. Whole blocks of a unit are a group of their own.
Without blocks, each unit is one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .units import Integers, Units, cut

BLOCK = 128
"""Elements that share a scale."""

KEPT = -1
"""In place of a row of coefficients: a part of a block that is not stepped."""


class Groups(NamedTuple):
    """Pieces in groups in shares: each table has the first of the next, and their number at its end."""

    pieces: Integers  # shape (p, 3): (start, stop, row) each
    first_piece: Integers  # shape (groups + 1,): of each group
    first_group: Integers  # shape (shares + 1,): of each share


class Cuts:
    """The groups of some units of a buffer.

    Parameters
    ----------
    units : Units
    size : int
        Elements of the buffer.
    """

    def __init__(self, units: Units, size: int) -> None:
        self._units, self._size, self.total = units, size, units.total
        self._last: tuple[object, Groups] | None = None

    def groups(self, count: int, places: tuple[int, ...], *, in_blocks: bool) -> Groups:
        """Return the groups in at most ``count`` shares.

        Parameters
        ----------
        count : int
        places : tuple of int
            Where units are cut, too.
        in_blocks : bool
            Whether some moments come in blocks.
        """
        key = count, places, in_blocks
        if self._last is None or self._last[0] != key:
            self._last = key, _groups(self._units, self._size, *key)
        return self._last[1]


def _groups(units: Units, size: int, count: int, places: tuple[int, ...], in_blocks: bool) -> Groups:
    edges = _edges_of_shares(units, count)
    pieces = cut(units.whole, np.unique(np.concatenate([edges, places]).astype(np.int64)))
    begins = np.ones(len(pieces), bool)
    if in_blocks:
        gaps = units.gaps(size).whole
        gaps[:, 2] = KEPT
        kept = _cut_at_blocks(gaps)
        kept = cut(kept[~_is_whole(kept, size)], np.array(places, np.int64))
        pieces = np.concatenate([_cut_at_blocks(pieces), kept])
        pieces = np.ascontiguousarray(pieces[np.argsort(pieces[:, 0], kind="stable")])
        is_part, block = ~_is_whole(pieces, size), pieces[:, 0] // BLOCK
        begins = np.ones(len(pieces), bool)
        begins[1:] = ~(is_part[1:] & is_part[:-1] & (block[1:] == block[:-1]))
    first_piece = np.append(np.flatnonzero(begins), len(pieces))
    starts = pieces[first_piece[:-1], 0]
    inner = np.searchsorted(starts, edges)
    return Groups(pieces, first_piece, np.unique(np.concatenate([[0], inner, [len(starts)]])))


def _edges_of_shares(units: Units, count: int) -> Integers:
    """Return where shares begin but the first: about equally many elements apart, where blocks begin."""
    starts, stops = units.whole[:, 0], units.whole[:, 1]
    ends = np.cumsum(stops - starts)
    wanted = units.total * np.arange(1, count) // count
    of = np.searchsorted(ends, wanted)
    places = stops[of] - (ends[of] - wanted) if len(ends) else wanted
    return np.unique(places - places % BLOCK)


def _is_whole(pieces: Integers, size: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    starts, stops = pieces[:, 0], pieces[:, 1]
    whole: np.ndarray[tuple[int], np.dtype[np.bool_]] = (starts % BLOCK == 0) & (
        (stops % BLOCK == 0) | (stops == size)
    )
    return whole


def _cut_at_blocks(units: Integers) -> Integers:
    """Cut units into the whole blocks that they have, and the parts at their ends."""
    if not len(units):
        return units
    starts, stops = units[:, 0], units[:, 1]
    return cut(units, np.unique(np.concatenate([starts + -starts % BLOCK, stops - stops % BLOCK])))
