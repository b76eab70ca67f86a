"""The memory roofline of a step with other storage: its bytes, in float32 words, and next to no arithmetic.

Of each chunk of elements the gradient is read and summed, and the sum is added to all that a step writes.
"""

from __future__ import annotations

from functools import partial
from math import ceil
from typing import Any

import numba
import numpy as np

from bench.oracle import Array, Contender, WrongUpdateError
from bench.placement import placed_copy
from bench.storages import BYTES, Storage
from fastadam.kernels import threads
from fastadam.kernels.cpu import PARALLEL_FROM

_CHUNK = 2048
"""Elements: their float32 words fit the first-level cache, four arrays of them."""

_CHECKED = 2**18
"""Elements of the check, at most: enough for the parallel loop."""


# The order of a sum is free here, so that the compiler may use all lanes.
@numba.njit(nogil=True, fastmath={"reassoc"})  # type: ignore[untyped-decorator]
def _sum(source: Array) -> Any:
    total = source[0]
    for i in range(1, source.size):
        total += source[i]
    return total


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _add(part: Array, total: Any) -> None:
    for i in range(part.size):
        part[i] += total


def _move(grads: Array, written: tuple[Array, ...], widths: tuple[int, ...], width: int) -> None:
    for c in numba.prange((grads.size + width - 1) // width):
        total = _sum(grads[c * width : (c + 1) * width])
        for k in range(len(widths)):
            _add(written[k][c * widths[k] : (c + 1) * widths[k]], total)


_serial = numba.njit(_move, nogil=True)
_parallel = numba.njit(_move, nogil=True, parallel=True)


def words(size: int, width: float) -> int:
    """Return the float32 words that hold an array."""
    return ceil(size * width / 4)


class Traffic:
    """The buffers of a step that stores so, as float32 words.

    Parameters
    ----------
    storage : Storage
    grads : ndarray
        Float32, at least as many words as the gradients have.
    size : int
        Elements of the step.
    """

    def __init__(self, storage: Storage, grads: Array, size: int) -> None:
        self.size = size
        self.width = words(_CHUNK, BYTES[storage.grads])
        self.widths = tuple(words(_CHUNK, width) for width in storage.written)
        self.grads = placed_copy(grads[: words(size, BYTES[storage.grads])])
        zero = np.zeros(1, np.float32)
        self.written = tuple(
            placed_copy(np.broadcast_to(zero, words(size, width))) for width in storage.written
        )

    def move(self) -> None:
        """Add the sum of each chunk of gradients to what is written, on the threads of a step."""
        if self.size < PARALLEL_FROM:
            _serial(self.grads, self.written, self.widths, self.width)
        elif threads.numba_is_safe():
            _parallel(self.grads, self.written, self.widths, self.width)
        else:
            chunks = -(-self.grads.size // self.width)
            each = -(-chunks // threads.count())
            threads.run_in_pool([partial(self._part, a, a + each) for a in range(0, chunks, each)])

    def _part(self, first: int, last: int) -> None:
        written = tuple(
            array[first * width : last * width]
            for array, width in zip(self.written, self.widths, strict=True)
        )
        _serial(self.grads[first * self.width : last * self.width], written, self.widths, self.width)


def check(traffic: Traffic) -> None:
    """Raise WrongUpdateError unless all words of new buffers are read and written."""
    grads = traffic.grads.astype(np.float64)
    starts = np.arange(0, grads.size, traffic.width)
    sums = np.add.reduceat(grads, starts)
    # Each addition rounds by at most half of eps, relative to a sum of at most one chunk's magnitudes.
    allowed = _CHUNK * float(np.finfo(np.float32).eps) * np.add.reduceat(np.abs(grads), starts)
    traffic.move()
    for array, width in zip(traffic.written, traffic.widths, strict=True):
        chunk = np.minimum(np.arange(array.size) // width, sums.size - 1)
        if not np.all(np.abs(array - sums[chunk]) <= allowed[chunk]):
            raise WrongUpdateError("the kernel must add the sum of a chunk to all that is written.")


def start(params: Array, grads: Array, *, storage: Storage) -> Contender:
    """Return the kernel as a contender; it has checked itself.

    Its values stay finite and normal: a sum of equal terms stops growing where the next term is below its
    rounding.
    """
    checked = min(params.size, _CHECKED)
    check(Traffic(storage, grads[:checked], checked))
    traffic = Traffic(storage, grads, params.size)
    return Contender(traffic.move, lambda: params, lambda _: None)
