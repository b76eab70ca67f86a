"""The memory roofline of a step with other storage: its bytes, element by element, and next to no arithmetic.

As a step does, the kernel reads of each element all arrays at once, and writes all but the gradients. To take
one array after the other, chunk by chunk, takes up to twice the time in memory: nothing is fetched ahead.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numba
import numpy as np

from bench.oracle import Array, Contender, WrongUpdateError
from bench.placement import placed_copy
from bench.storages import Storage
from fastadam import eight_bit
from fastadam.kernels import threads
from fastadam.kernels.cpu import PARALLEL_FROM

_CHECKED = 2**18
"""Elements of the check, at most: enough for the parallel loop."""

# Integers of the width of each format: their sums wrap around, and round nothing.
_WORDS = {"float32": np.int32, "bfloat16": np.int16, "split": np.int16, "8bit": np.int8}


def _move_3(grads: Array, one: Array, two: Array, three: Array) -> None:
    for i in numba.prange(grads.size):
        one[i] += grads[i]
        two[i] += 1
        three[i] += 1


def _move_4(grads: Array, one: Array, two: Array, three: Array, four: Array) -> None:
    for i in numba.prange(grads.size):
        one[i] += grads[i]
        two[i] += 1
        three[i] += 1
        four[i] += 1


_serial = {3: numba.njit(_move_3, nogil=True), 4: numba.njit(_move_4, nogil=True)}
_parallel = {
    3: numba.njit(_move_3, nogil=True, parallel=True),
    4: numba.njit(_move_4, nogil=True, parallel=True),
}


class Traffic:
    """The buffers of a step that stores so, as integers of the width of each format.

    Parameters
    ----------
    storage : Storage
        Of parameters and gradients of one format.
    size : int
        Elements of the step.
    """

    def __init__(self, storage: Storage, size: int) -> None:
        def zeros(kind: str) -> Any:
            return placed_copy(np.broadcast_to(np.zeros(1, _WORDS[kind]), size))

        arrays = (storage.params, *storage.state, *([storage.master] if storage.master else []))
        self.grads = zeros(storage.grads)
        self.grads += 1
        self.written = tuple(zeros(kind) for kind in arrays)
        scales = eight_bit.blocks_of(size) * sum(kind == "8bit" for kind in storage.state)
        self.scales = placed_copy(np.zeros(scales, np.int32))

    def move(self) -> None:
        """Read all, and add to all but the gradients, on the threads of a step."""
        size, count = self.grads.size, len(self.written)
        if size < PARALLEL_FROM:
            _serial[count](self.grads, *self.written)
        elif threads.numba_is_safe():
            _parallel[count](self.grads, *self.written)
        else:
            pieces = threads.pieces(size, threads.count())
            threads.run_in_pool([partial(self._part, a, b) for a, b in pieces])
        if self.scales.size:
            self.scales += 1

    def _part(self, start: int, stop: int) -> None:
        arrays: list[Any] = [array[start:stop] for array in (self.grads, *self.written)]
        _serial[len(self.written)](*arrays)


def check(traffic: Traffic) -> None:
    """Raise WrongUpdateError unless all elements of new buffers are read and written."""
    traffic.move()
    for array in (*traffic.written, traffic.scales):
        if not np.all(array == 1):
            raise WrongUpdateError("the kernel must add one to all that is written.")


def start(params: Array, grads: Array, *, storage: Storage) -> Contender:
    """Return the kernel as a contender; it has checked itself."""
    check(Traffic(storage, min(params.size, _CHECKED)))
    return Contender(Traffic(storage, params.size).move, lambda: params, lambda _: None)
