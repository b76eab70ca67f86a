"""How a step is laid over a GPU: which elements go in 16-byte packs, and how many threads there are.

The launch is the same for every CUDA backend. A grid never affects the bits of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MATH = np.dtype(np.float32)
"""In which a step computes with buffers of which some are stored otherwise."""

PACK = 16
"""Bytes of the widest access that every supported GPU has."""

BLOCK = 256
"""Threads of a block."""

RESIDENT = 4
"""Blocks that a multiprocessor should hold at once, at least: NVRTC then has 64 registers for a thread. Told
nothing, it takes fewer and spills (16 bytes in float64 AMSGrad on sm_90)."""

RESIDENT_WIDE = 3
"""The same for a step in float64: with 64 registers, one with the average of the parameters spills 16 to 24
bytes; it has more loads in flight, too."""

RESIDENT_STORED = 3
"""The same for a step of other than plain storage, which encodes, too: with 64 registers, one of AMSGrad with
an average, a master and a copy of the parameters has 55 instructions that spill (sm_100)."""

FEWER_CAPTURED = 1
"""So many blocks fewer for a captured step, which holds up to 13 coefficients in registers, where an eager
one has them in constant memory: for as many blocks it spills up to 32 bytes in float32, and 56 in float64
(sm_100). This is a bound: one that needs few registers, as most do on sm_90, takes few, and more of its
blocks fit."""

FEWER_OBSERVED = 2
"""The same for a step that has sums of what it sees, five to a thread: for one block more it spills 16 bytes
in float32 (sm_80)."""

WAVES = 8
"""The most blocks of a grid, in multiples of what the device holds at once; threads of a full grid loop."""


def packs(addresses: Sequence[int], itemsize: int, size: int) -> tuple[int, int]:
    """Return ``(head, packs)``: the elements before the first pack, and the packs.

    Parameters
    ----------
    addresses : sequence of int
        Of element 0 of each buffer, multiples of ``itemsize``.
    itemsize : int
        Bytes of an element.
    size : int
        Elements of each buffer.
    """
    offset = addresses[0] % PACK
    if any(address % PACK != offset for address in addresses):
        return 0, 0
    head = min(-offset % PACK // itemsize, size)
    return head, (size - head) * itemsize // PACK


def as_of(itemsize: int, addresses: Sequence[int], widths: Sequence[int]) -> tuple[int, ...]:
    """Return addresses with the same places in packs, if elements of some widths were of ``itemsize`` bytes.

    A pack of narrower elements has as many, in fewer bytes.
    """
    return tuple(address // width * itemsize for address, width in zip(addresses, widths, strict=True))


def blocks(size: int, packs: int, itemsize: int, resident_threads: int) -> int:
    """Return the number of blocks for a buffer.

    Parameters
    ----------
    size, packs : int
        Elements, and packs of them.
    itemsize : int
        Bytes of an element.
    resident_threads : int
        Threads that the whole device holds at once.
    """
    work = max(packs, size - packs * PACK // itemsize)  # iterations of the longer of the two loops
    return max(1, min(-(-work // BLOCK), WAVES * resident_threads // BLOCK))


def tree_blocks(chunks: int, resident_threads: int) -> int:
    """Return the number of blocks for a pass of which each warp sums a chunk at a time."""
    return max(1, min(-(-chunks // (BLOCK // 32)), WAVES * resident_threads // BLOCK))
