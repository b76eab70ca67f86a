"""What the GPU contenders are given and what they give back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    """

    device: Device
    params: Any
    grads: Any
    host_params: Array
    host_grads: Array

    @classmethod
    def new(cls, device: Device, size: int) -> Buffers:
        """Return buffers with values that are never zero."""
        host = inputs(min(size, PERIOD), np.float32)
        buffers = cls(device, device.empty(size), device.empty(size), *host)
        buffers.restore()
        return buffers

    def restore(self) -> None:
        """Write the initial values again."""
        gpu.fill(self.params, self.device.upload(self.host_params))
        self.write_grads(self.host_grads)

    def write_grads(self, period: Array) -> None:
        """Write other gradients."""
        gpu.fill(self.grads, self.device.upload(period))

    def read_params(self) -> Array:
        """Return the first period."""
        return self.device.download(self.params[: self.host_params.size])


class Running(NamedTuple):
    """A started contender."""

    step: Callable[[], object]
    moved: int
    """Bytes that a call must read and write."""
    moments: Callable[[], tuple[Any, Any]] | None = None
    """Reads those whose bits are promised."""

    def contender(self, buffers: Buffers) -> Contender:
        """Return what the oracle of the CPU benchmarks checks."""
        return Contender(self.step, buffers.read_params, buffers.write_grads)
