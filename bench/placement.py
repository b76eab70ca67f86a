"""Where buffers lie.

It matters more than what is compared here. Arrays of a power of two of elements, one behind the other, put
the four streams of a step at the same place of caches and memory banks; on one machine (Zen 4) one and the
same kernel took from 18 to 60 ms on 64 Mi elements, by the distance of its arrays alone. A process keeps
its luck as long as its buffers live, and no number of rounds removes it. So buffers are placed at random,
and comparisons start several times.
"""

from __future__ import annotations

import numpy as np

from bench.oracle import Array

CACHE_LINE = 64
SPREAD = 2**21
"""Bytes: one huge page, within which virtual and physical addresses agree."""

_random = np.random.default_rng(0)


def placed_copy(array: Array) -> Array:
    """Return a copy that starts at a random cache line of a huge page, in memory of its own."""
    room = np.empty(array.nbytes + SPREAD, np.uint8)
    start = -room.ctypes.data % CACHE_LINE + CACHE_LINE * int(_random.integers(SPREAD // CACHE_LINE - 1))
    copy = room[start : start + array.nbytes].view(array.dtype)
    copy[...] = array
    return copy
