"""What the GPU contenders are given and what they give back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from bench import gpu
from bench.gpu import Device
from bench.oracle import Array, Contender, inputs

PERIOD = 2**20
"""Elements after which parameters and gradients repeat: made on the host once, compared on the device."""


@dataclass(frozen=True)
class Buffers:
    """What all contenders share.

    Parameters
    ----------
    device : Device
        Where.
    params, grads : array
        Arrays of the device's library, n elements.
    host_params, host_grads : ndarray
        What they repeat.
    source : array, optional
        Where the gradients come from before each call, if calls clear them.
    """

    device: Device
    params: Any
    grads: Any
    host_params: Array
    host_grads: Array
    source: Any = None

    @classmethod
    def new(cls, device: Device, size: int, *, refilled: bool = False) -> Buffers:
        """Return buffers with values that are never zero."""
        host = inputs(min(size, PERIOD), np.float32)
        params, grads = device.empty(size), device.empty(size)
        buffers = cls(device, params, grads, *host, device.empty(size) if refilled else None)
        buffers.restore()
        return buffers

    @staticmethod
    def needs(size: int, *, refilled: bool) -> int:
        """Return the bytes of such buffers."""
        return (12 if refilled else 8) * size

    def restore(self) -> None:
        """Write the initial values again."""
        gpu.fill(self.params, self.device.upload(self.host_params))
        self.write_grads(self.host_grads)
        if self.before is not None:
            self.before()

    def write_grads(self, period: Array) -> None:
        """Write other gradients."""
        gpu.fill(self.grads if self.source is None else self.source, self.device.upload(period))

    @property
    def before(self) -> Callable[[], object] | None:
        """What comes before each call, untimed: the gradients again, for all contenders alike."""
        return None if self.source is None else self._refill

    def _refill(self) -> None:
        self.device.copy(self.grads, self.source)

    def read(self, array: Any) -> Array:
        """Return the first period of an array of the device."""
        return self.device.download(array[: self.host_params.size])

    @cached_property
    def grad_norm(self) -> float:
        """The global norm of all gradients, in float64."""
        squares = self.host_grads.astype(np.float64) ** 2
        repeats, rest = divmod(len(self.grads), squares.size)
        return float(np.sqrt(repeats * squares.sum() + squares[:rest].sum()))


class Running(NamedTuple):
    """A started contender."""

    step: Callable[[], object]
    moved: int
    """Bytes that a call must read and write."""
    moments: Callable[[], tuple[Any, ...]] | None = None
    """Returns those whose bits are promised, as arrays of the device's library."""
    average: Callable[[], Any] | None = None
    """Returns that of the parameters, where it keeps one, in the same way."""
    norm: Callable[[], float] | None = None
    """Reads what the last call found, where it tells."""

    def contender(self, buffers: Buffers) -> Contender:
        """Return what the oracles of the CPU benchmarks check: the first period."""
        average = self.average

        def step() -> float | None:
            self.step()
            return None if self.norm is None else self.norm()

        return Contender(
            step,
            lambda: buffers.read(buffers.params),
            buffers.write_grads,
            buffers.before,
            None if average is None else lambda: buffers.read(average()),
            lambda: buffers.read(buffers.grads),
        )
