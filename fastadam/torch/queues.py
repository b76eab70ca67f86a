"""How a step reaches a CUDA device: PyTorch's current stream, and tables sent ahead in its order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastadam import backends
from fastadam.kernels.cuda import Cuda

Table = np.ndarray[Any, np.dtype[Any]]


class Queue(Protocol):
    """What a step needs of a device."""

    backend: Cuda
    """Launches kernels."""

    def stream(self) -> int:
        """Return the handle of the current stream."""

    def send(self, table: Table) -> Tensor:
        """Return a copy of bytes on the device, which is there for what the stream gets afterwards."""

    def mark(self) -> Any:
        """Return the current stream, to be joined later."""

    def join(self, marked: Sequence[tuple[Any, Tensor]]) -> None:
        """Order the current stream behind others, of which each has written a tensor that is used here."""


class CudaQueue(Queue):
    """A CUDA device of PyTorch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.backend = _backend(device)

    def stream(self) -> int:  # noqa: D102
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def send(self, table: Table) -> Tensor:  # noqa: D102
        # PyTorch hands out the pinned memory again when the copy has been made, and not before.
        return torch.from_numpy(table).pin_memory().to(self._device, non_blocking=True)

    def mark(self) -> Any:  # noqa: D102
        return torch.cuda.current_stream(self._device)

    def join(self, marked: Sequence[tuple[Any, Tensor]]) -> None:  # noqa: D102
        here = torch.cuda.current_stream(self._device)
        for other in {stream for stream, _ in marked} - {here}:
            here.wait_stream(other)
        for stream, tensor in marked:
            if stream != here:
                tensor.record_stream(here)


@cache
def queue_for(device: torch.device) -> Queue:
    """Return the queue of a device."""
    return CudaQueue(device)


def _backend(device: torch.device) -> Cuda:
    if not backends.is_installed("cupy"):
        raise ImportError(
            f"parameters on {device} need CuPy. {backends.REMEDY}, or take fastadam.torch.OffloadedAdam."
        )
    found: Cuda = backends.load("cupy")
    return found


class Sent:
    """A table on a device, sent again when it changed.

    What is sent is used on one stream only, that on which its memory was allocated: what replaces it may get
    that memory, in the order of this stream, and neither waits for another.
    """

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._stream: int | None = None
        self._of: Table | None = None

    def address(self, table: Table, stream: int, *, fixed: bool = False) -> int:
        """Return where a table lies on the device, for the current stream.

        One that is ``fixed`` never changes, and is not compared.
        """
        if not table.size:
            return 0
        content = table.reshape(-1).view(np.uint8)
        if stream != self._stream or self._of is None or not (fixed or np.array_equal(content, self._of)):
            self._of = None  # where sending fails, nothing is there
            of = content.copy()
            self._there = self._queue.send(of)
            self._stream, self._of = stream, of
        return self._there.data_ptr()
