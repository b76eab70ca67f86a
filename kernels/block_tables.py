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
    across: int  # so many of these, the first, have elements of more than one chunk


def block_tables(units: Units, size: int, chunks: Integers | None = None) -> BlockTables:
    """Return the tables of some units of a buffer.

    With ``chunks``, ``(start, stop)`` each, in order, units are cut where they begin.
    """
    begins = np.empty(0, np.int64) if chunks is None else chunks[:, 0]
    groups = Cuts(units, size).groups(1, tuple(begins.tolist()), in_blocks=True)
    counts = np.diff(groups.first_piece)
    is_cut = counts > 1
    of_block = np.full(-(-size // BLOCK), KEPT, np.int32)
    start, stop, row = groups.pieces[groups.first_piece[:-1]].T
    first, behind = start // BLOCK, -(-stop // BLOCK)
    for a, b, value in zip(
        first[~is_cut].tolist(), behind[~is_cut].tolist(), row[~is_cut].tolist(), strict=True
    ):
        of_block[a:b] = value
    blocks, of_chunks = first[is_cut], _across(chunks)
    order = np.argsort(~np.isin(blocks, of_chunks), kind="stable")
    of_block[blocks[order]] = KEPT - 1 - np.arange(len(blocks))
    lengths, begin = counts[is_cut][order], groups.first_piece[:-1][is_cut][order]
    first_piece = np.append(0, np.cumsum(lengths)).astype(np.int64)
    pieces = groups.pieces[np.repeat(begin - first_piece[:-1], lengths) + np.arange(first_piece[-1])]
    return BlockTables(pieces, first_piece, of_block, len(of_chunks))


def _across(chunks: Integers | None) -> Integers:
    """Return the blocks of which more than one chunk has elements."""
    if chunks is None:
        return np.empty(0, np.int64)
    last, first = (chunks[:-1, 1] - 1) // BLOCK, chunks[1:, 0] // BLOCK
    return np.unique(last[last == first])
