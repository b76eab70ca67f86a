"""Units in blocks of elements that share a scale, as a GPU takes them: what is said of each block."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .groups import BLOCK, KEPT, Cuts
from .units import Integers, Units


class BlockTables(NamedTuple):
    """What of each block is stepped, and with which rows of coefficients."""

    pieces: Integers  # shape (p, 3): (start, stop, row) of the parts of blocks that are cut
    first_piece: Integers  # shape (cut + 1,)
    of_block: np.ndarray[
        Any, np.dtype[np.int32]
    ]  # shape (blocks,): a row, KEPT, or -2 - k for the k-th that is cut


def block_tables(units: Units, size: int) -> BlockTables:
    """Return the tables of some units of a buffer."""
    groups = Cuts(units, size).groups(1, (), in_blocks=True)
    counts = np.diff(groups.first_piece)
    is_cut = counts > 1
    of_block = np.full(-(-size // BLOCK), KEPT, np.int32)
    start, stop, row = groups.pieces[groups.first_piece[:-1]].T
    first, behind = start // BLOCK, -(-stop // BLOCK)
    for a, b, value in zip(
        first[~is_cut].tolist(), behind[~is_cut].tolist(), row[~is_cut].tolist(), strict=True
    ):
        of_block[a:b] = value
    of_block[first[is_cut]] = KEPT - 1 - np.arange(is_cut.sum())
    pieces = groups.pieces[np.repeat(is_cut, counts)]
    first_piece = np.append(0, np.cumsum(counts[is_cut])).astype(np.int64)
    return BlockTables(pieces, first_piece, of_block)
