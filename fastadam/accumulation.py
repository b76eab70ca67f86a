"""Gradients that are added up over several calls, for one step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastadam import buffers, formats
from fastadam.checks import count as require_count
from fastadam.kernels.cuda import Cuda, DeviceBuffer
from fastadam.kernels.grids import PACK
from fastadam.state import plain

_KEYS = ("grad_sum", "grads_summed")


class Accumulator:
    """A sum of gradients, in the memory in which they are.

    Attributes
    ----------
    calls : int
        Gradients in the sum.
    total : Buffer or None
        The sum, shape (n,), of the dtype of the arithmetic; None before the first call.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.total: buffers.Buffer | None = None
        self._memory: Any = None
        self._kernels: Any = None

    @property
    def is_placed(self) -> bool:
        """Whether the sum is where its gradients are: not so after a checkpoint or a copy."""
        return self._kernels is not None

    def add(self, kernels: Any, grads: buffers.Buffer, *, clear: bool) -> None:
        """Add gradients that fit what is there, and set them to zero with ``clear``."""
        total = self.at(kernels, grads)
        if isinstance(grads, DeviceBuffer):
            kernels.accumulate(total, grads, clear=clear)
            self.total = total._replace(stream=grads.stream or 0)  # where the next ones and the step follow
            self.calls += 1
        else:
            kernels.prepare_accumulate(total, grads, clear=clear)
            self.calls += 1  # the loop runs to its end, whatever a signal handler raises meanwhile
            kernels.accumulate(total, grads, clear=clear)

    def at(self, kernels: Any, like: buffers.Buffer) -> Any:
        """Return the sum, moved to the memory of ``like`` if it comes from a checkpoint or a copy."""
        if self.total is None or self._kernels is not kernels:
            if isinstance(like, DeviceBuffer):
                self.total, self._memory = _on_device(kernels, like, self.total)
            elif self.total is None:
                self.total = np.zeros(like.size, formats.math_of(like.dtype))
            self._kernels = kernels
        return self.total

    def to_dict(self) -> dict[str, Any]:
        """Return the sum, in CPU memory, and how many calls it is of; nothing where there were none."""
        if not self.calls:
            return {}
        total: Any = self.total
        if isinstance(total, DeviceBuffer):
            start = total.pointer - self._kernels.address(self._memory)
            view = self._memory[start : start + total.size * total.dtype.itemsize].view(total.dtype)
            return dict(zip(_KEYS, (self._kernels.to_host(view, total.device), self.calls), strict=True))
        return dict(zip(_KEYS, (total.copy(), self.calls), strict=True))

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> Accumulator:
        """Return the accumulator that ``to_dict`` gave, and take its entries out of ``entries``."""
        accumulator = cls()
        found = [key for key in _KEYS if key in entries]
        if not found:
            return accumulator
        for key in _KEYS:
            if key not in entries:
                raise ValueError(f"state_dict must have the key {key!r} beside {found[0]!r}.")
        total, calls = (entries.pop(key) for key in _KEYS)
        label = f"state_dict['{_KEYS[0]}']"
        array = buffers.flat(total, label, writable=False, codes=False)
        buffers.require_in_cpu_memory(label, array)
        accumulator.calls = require_count(f"state_dict['{_KEYS[1]}']", plain(calls))
        accumulator.total = np.array(array)
        return accumulator

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.to_dict(),)


def _on_device(kernels: Cuda, like: DeviceBuffer, host: Any) -> tuple[DeviceBuffer, Any]:
    """Return a sum at the place of ``like`` in packs, for a step to access in packs, and its memory."""
    math, stream = formats.math_of(like.dtype), like.stream or 0
    offset, nbytes = like.pointer // like.dtype.itemsize * math.itemsize % PACK, like.size * math.itemsize
    if host is None:
        memory = kernels.zeros(nbytes + PACK, like.device, stream)
    else:
        image = np.zeros(nbytes + PACK, np.uint8)
        image[offset : offset + nbytes] = host.view(np.uint8)
        memory = kernels.to_device(image, like.device, stream)
    address = kernels.address(memory) + offset
    return DeviceBuffer(address, like.size, math, like.device, stream, memory), memory


def _restore(entries: Mapping[str, Any]) -> Accumulator:
    return Accumulator.from_dict(dict(entries))
