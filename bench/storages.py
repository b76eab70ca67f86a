"""How the contenders of ``bench.storage`` store what a step reads and writes, and what bytes that takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from bench.oracle import BETAS, EPS, LR, Array, Contender
from bench.placement import placed_copy
from fastadam import FusedAdam

BYTES = {"float32": 4.0, "bfloat16": 2.0, "split": 2.0, "8bit": 2.0625 / 2}
"""Per element and array; 8-bit moments come with a float32 scale for each 128 elements."""

SPACING = {"float32": 0.0, "bfloat16": 2**-7, "8bit": 2**-3}
"""Between neighbours of a format, at most, relative to the number: 7 and at least 3 bits of mantissa."""


class Storage(NamedTuple):
    """Formats of the buffers and of the state, and how the state is rounded."""

    params: str = "float32"
    grads: str = "float32"
    state: tuple[str, str] = ("float32", "float32")
    master: str | None = None
    rounding: str = "stochastic"

    @property
    def written(self) -> tuple[float, ...]:
        """Bytes per element of each array that a step reads and writes."""
        arrays = (self.params, *self.state, *([self.master] if self.master else []))
        return tuple(BYTES[kind] for kind in arrays)

    @property
    def bytes_moved(self) -> float:
        """Bytes per element that a step reads and writes."""
        return BYTES[self.grads] + 2 * sum(self.written)

    @property
    def bytes_kept(self) -> float:
        """Bytes per element of the state."""
        return sum(self.written[1:])

    @property
    def most_bytes_kept(self) -> float:
        """What that may be, with all that goes with it: 2.1 bytes for two moments of 8 bits, 1 % for others.

        Padding, and gaps between large arrays, are kept too.
        """
        kinds = (*self.state, *([self.master] if self.master else []))
        return sum(1.05 if kind == "8bit" else 1.01 * BYTES[kind] for kind in kinds)

    def optimizer(self) -> FusedAdam:
        """Return a new optimizer with everyone's defaults, or raise ValueError where there is no such one."""
        first, second = self.state
        state: Any = first if first == second else (first, second)
        return FusedAdam(LR, BETAS, EPS, state_dtype=state, master_params=self.master, rounding=self.rounding)

    def refused(self) -> str | None:
        """Return why there is no such optimizer here, or None."""
        if "bfloat16" in (self.params, self.grads) and find_spec("ml_dtypes") is None:
            return "not installed: ml_dtypes"
        try:
            self.optimizer()
        except ValueError as error:
            return str(error)
        return None


_BF16, _8BIT = ("bfloat16", "bfloat16"), ("8bit", "8bit")
_HALF = Storage("bfloat16", "bfloat16", _BF16)

STORAGES = {
    "float32": Storage(),
    "bfloat16": Storage(state=_BF16),
    "bfloat16, 8bit": Storage(state=("bfloat16", "8bit")),
    "8bit": Storage(state=_8BIT),
    "bfloat16, float32 master": _HALF._replace(master="float32"),
    "bfloat16, split master": _HALF._replace(master="split"),
    "bfloat16, no master": _HALF,
    "8bit, split master": _HALF._replace(state=_8BIT, master="split"),
}
"""By what the state is made of; masters are of bfloat16 parameters."""


def numpy_dtype(kind: str) -> Any:
    """Return the dtype of a buffer; that of bfloat16 needs ml_dtypes."""
    if kind == "bfloat16":
        from ml_dtypes import bfloat16

        return np.dtype(bfloat16)
    return np.dtype(kind)


def stored(array: Array, kind: str) -> Array:
    """Return float32 numbers in a buffer of their own, or the same one where it is of that kind already."""
    return array if kind == "float32" else placed_copy(array.astype(numpy_dtype(kind)))


def start(params: Array, grads: Array, *, storage: Storage) -> Contender:
    """``FusedAdam.step`` on buffers that are stored so."""
    optimizer = storage.optimizer()
    own, given = stored(params, storage.params), stored(grads, storage.grads)

    def write_grads(new: Array) -> None:
        given[...] = new.astype(given.dtype)

    return Contender(partial(optimizer.step, own, given), reader(own, optimizer, storage.master), write_grads)


def reader(params: Array, optimizer: FusedAdam, master: str | None) -> Callable[[], Array]:
    """Return what gives the parameters in float32, as exactly as they are kept."""

    def read() -> Array:
        kept = optimizer.state.param_master if master == "float32" else None
        remainder = optimizer.state.param_remainder if master == "split" else None
        if kept is not None:
            return np.array(kept)
        if remainder is not None:
            bits = params.view(np.int16).astype(np.int32) << 16
            bits += remainder
            return bits.view(np.float32)
        return params if params.dtype == np.float32 else params.astype(np.float32)

    return read
