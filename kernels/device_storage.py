"""What a step in GPU memory needs to know of storage."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class StoredTypes(NamedTuple):
    """How each buffer is stored, where not all are of the dtype of the arithmetic: float32 or 16-bit codes.

    Float16 codes are uint16 and bfloat16 codes int16, as in :mod:`fastadam.kernels.formats`; states in 8 bits
    are int8 and uint8, as in :mod:`fastadam.kernels.eight_bits`.
    """

    params: np.dtype[Any]
    grads: np.dtype[Any]
    states: tuple[np.dtype[Any], ...] = ()
    master: np.dtype[Any] | None = None  # float32, or int16 beside parameters of int16: what these lack
    out: np.dtype[Any] | None = None
    rounds: bool = False  # at random

    @property
    def in_blocks(self) -> tuple[int, ...]:
        """Which states come in blocks, with a scale for each."""
        return tuple(k for k, state in enumerate(self.states) if state.itemsize == 1)


class DeviceStorage(NamedTuple):
    """What a step of other than plain buffers works with, each None for none."""

    types: StoredTypes
    master: Any = None  # a buffer in GPU memory
    out: Any = None  # one, with the stream on which it is used
    seed: tuple[int, int] | None = None  # for keys of stochastic rounding that the device forms
    keys: tuple[int, int] | None = None  # those of the step
    scales: tuple[Any, ...] = ()  # buffers, of the states in blocks

    @property
    def beside(self) -> tuple[Any, ...]:
        """The master and the copy of the parameters: buffers of as many elements."""
        return tuple(buffer for buffer in (self.master, self.out) if buffer is not None)

    @property
    def pointers(self) -> tuple[int, ...]:
        """Where these lie, and the scales."""
        return tuple(buffer.pointer for buffer in (*self.beside, *self.scales))
