"""The CuPy backend: kernels in CUDA C++ (:mod:`fastadam.kernels.cuda_source`), compiled by NVRTC at run time.

CuPy compiles once for each kind of kernel and architecture, and keeps the result in its cache on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

import cupy
import numpy as np

from . import cuda_source
from .cuda import LEGACY_STREAM, Array, Cuda, Event, Kernel, KernelTypes

_PER_THREAD_STREAM = 2


class _Handle:
    """A stream of somebody else's, in CUDA's stream protocol."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


@lru_cache(maxsize=64)
def _stream(handle: int, device: int) -> Any:
    if handle in LEGACY_STREAM:
        return cupy.cuda.Stream.null
    if handle == _PER_THREAD_STREAM:
        return cupy.cuda.Stream.ptds
    if hasattr(cupy.cuda.Stream, "from_external"):  # from CuPy 14 on
        return cupy.cuda.Stream.from_external(_Handle(handle))
    return cupy.cuda.ExternalStream(handle, device)


@contextmanager
def _on(device: int, handle: int) -> Iterator[None]:
    """Make a device and a stream current, and restore both, a stream that was set by ``use()`` too."""
    with cupy.cuda.Device(device):
        before = cupy.cuda.get_current_stream()
        if before.ptr == handle or (before.ptr in LEGACY_STREAM and handle in LEGACY_STREAM):
            yield
            return
        _stream(handle, device).use()
        try:
            yield
        finally:
            before.use()


@cache
def _resident_threads(device: int) -> int:
    attributes = cupy.cuda.Device(device).attributes
    return int(attributes["MultiProcessorCount"] * attributes["MaxThreadsPerMultiProcessor"])


@cache
def _kernel(entry: str, types: KernelTypes, device: int) -> Kernel:
    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=cuda_source.source_of(entry, types), options=cuda_source.OPTIONS)
        return module.get_function(entry)


class CuPy(Cuda):
    """Steps by CuPy."""

    name = "cupy"

    def kernel(self, entry: str, types: KernelTypes, device: int) -> Kernel:
        return _kernel(entry, types, device)

    def launch(
        self, kernel: Kernel, blocks: int, threads: int, args: tuple[Any, ...], device: int, stream: int
    ) -> None:
        with _on(device, stream):
            kernel((blocks,), (threads,), args)

    def event(self, device: int) -> Event:
        with cupy.cuda.Device(device):
            return cupy.cuda.Event(disable_timing=True)

    def order(self, first: int, then: int, event: Event, device: int) -> None:
        with cupy.cuda.Device(device):
            event.record(_stream(first, device))
            _stream(then, device).wait_event(event)

    def is_capturing(self, stream: int, device: int) -> bool:
        # The legacy stream cannot be captured, and asking for it fails while another stream is.
        if stream in LEGACY_STREAM:
            return False
        with cupy.cuda.Device(device):
            return bool(_stream(stream, device).is_capturing())

    def zeros(self, nbytes: int, device: int, stream: int) -> Array:
        with _on(device, stream):
            return cupy.zeros(nbytes, np.uint8)

    def to_device(self, array: np.ndarray[Any, Any], device: int, stream: int) -> Array:
        with _on(device, stream):
            return cupy.asarray(array)

    def to_host(self, array: Array, device: int) -> np.ndarray[Any, Any]:
        with cupy.cuda.Device(device):
            cupy.cuda.runtime.deviceSynchronize()
            host: np.ndarray[Any, Any] = cupy.asnumpy(array)
            return host

    def copy(self, to: int, source: int, nbytes: int, device: int, stream: int) -> None:
        with cupy.cuda.Device(device):
            runtime = cupy.cuda.runtime
            runtime.memcpyAsync(to, source, nbytes, runtime.memcpyDeviceToDevice, stream)

    def from_dlpack(self, array: object) -> Array:
        """View an array that exports nothing but DLPack."""
        return cupy.from_dlpack(array)

    def address(self, array: Array) -> int:
        return int(array.data.ptr)

    def device_of(self, pointer: int) -> int:
        return int(cupy.cuda.runtime.pointerGetAttributes(pointer).device)

    def device_count(self) -> int:
        return int(cupy.cuda.runtime.getDeviceCount())

    def current_device(self) -> int:
        return int(cupy.cuda.runtime.getDevice())

    def resident_threads(self, device: int) -> int:
        return _resident_threads(device)


backend = CuPy()
