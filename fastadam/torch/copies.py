"""Copies between the host and where parameters live, while the host steps others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

Pairs: TypeAlias = Sequence[tuple[Tensor, Tensor]]
"""What is written, and what is read, of the same dtype and size."""


class Copies(Protocol):
    """Copies that are asked for, and may run later; of each direction in their order."""

    def empty(self, size: int, dtype: torch.dtype) -> Tensor:
        """Return memory of the host that copies go from and to."""

    def begin(self) -> None:
        """Order what is asked for from now on behind all that the device was asked to do before."""

    def fetch(self, pairs: Pairs) -> Any:
        """Copy to the host; return what to wait for."""

    def send(self, pairs: Pairs) -> Any:
        """Copy from the host; return what to wait for."""

    def wait(self, event: Any) -> None:
        """Return when the copies were done."""

    def end(self) -> None:
        """Order what the device is asked from now on behind all copies that were asked for."""


class HostCopies(Copies):
    """Parameters in CPU memory: done when asked for."""

    def empty(self, size: int, dtype: torch.dtype) -> Tensor:  # noqa: D102
        return torch.empty(size, dtype=dtype)

    def begin(self) -> None:  # noqa: D102
        pass

    def fetch(self, pairs: Pairs) -> Any:  # noqa: D102
        for written, read in pairs:
            written.copy_(read)

    send = fetch

    def wait(self, event: Any) -> None:  # noqa: D102
        pass

    def end(self) -> None:  # noqa: D102
        pass


class CudaCopies(Copies):
    """Parameters on a CUDA device: pinned memory, and a stream for each direction."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._fetching = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._sending = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def empty(self, size: int, dtype: torch.dtype) -> Tensor:  # noqa: D102
        return torch.empty(size, dtype=dtype, pin_memory=True)

    def begin(self) -> None:  # noqa: D102
        for stream in (self._fetching, self._sending):
            stream.wait_stream(torch.cuda.current_stream(self._device))

    def fetch(self, pairs: Pairs) -> Any:  # noqa: D102
        return self._copy(self._fetching, pairs)

    def send(self, pairs: Pairs) -> Any:  # noqa: D102
        return self._copy(self._sending, pairs)

    def _copy(self, stream: Any, pairs: Pairs) -> Any:
        with torch.cuda.stream(stream):
            for written, read in pairs:
                written.copy_(read, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        return event

    def wait(self, event: Any) -> None:  # noqa: D102
        event.synchronize()

    def end(self) -> None:  # noqa: D102
        torch.cuda.current_stream(self._device).wait_stream(self._sending)


def copies_for(device: torch.device) -> Copies:
    """Return what copies from and to a device."""
    return CudaCopies(device) if device.type == "cuda" else HostCopies()
