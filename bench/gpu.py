"""The GPU under the benchmarks: its memory, its events, its cache, its name.

All work is queued on the legacy default stream, the current stream of every library here, so the events of
one library see the work of all. The harness needs CuPy or PyTorch, whichever is there, CuPy first.
"""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

from bench.oracle import Array

_FLUSH = 2
"""What is written between two timed calls, in multiples of the L2 cache."""

_COMPARED = 2**24
"""Elements compared at once: comparing makes temporaries."""


class Device(Protocol):
    """What the harness asks of a GPU. Arrays are flat and float32."""

    library: str

    def empty(self, size: int) -> Any:
        """Return a new array."""

    def upload(self, array: Array) -> Any:
        """Return a copy of a NumPy array."""

    def download(self, array: Any) -> Array:
        """Return a copy as a NumPy array."""

    def adopt(self, array: Any) -> Any:
        """Return an array of this library in the memory of another library's array."""

    def bits(self, array: Any) -> Any:
        """Return a view as int32."""

    def copy(self, to: Any, source: Any) -> None:
        """Queue a device-to-device copy, the driver's."""

    def synchronize(self) -> None:
        """Wait for all work."""

    def flush(self) -> None:
        """Queue a write that leaves nothing of the contenders in the L2 cache."""

    def event(self) -> Any:
        """Return a new event that takes the time."""

    def is_done(self, event: Any) -> bool:
        """Return whether a recorded event was reached."""

    def seconds(self, start: Any, end: Any) -> float:
        """Wait for ``end``; return the time between two recorded events."""

    def free_bytes(self) -> int:
        """Return the free memory."""

    def release(self) -> None:
        """Give memory that libraries keep for later back to the driver."""

    def facts(self) -> dict[str, Any]:
        """Return what a result says of the GPU, plain values."""


class CupyDevice:
    """The current device of CuPy."""

    library = "cupy"

    def __init__(self) -> None:
        self._cupy = import_module("cupy")
        self._runtime = self._cupy.cuda.runtime
        self._properties = self._runtime.getDeviceProperties(self._runtime.getDevice())
        self._scratch = self.empty(_FLUSH * max(self._properties["l2CacheSize"], 2**20) // 4)

    def empty(self, size: int) -> Any:  # noqa: D102
        return self._cupy.empty(size, np.float32)

    def upload(self, array: Array) -> Any:  # noqa: D102
        return self._cupy.array(array)

    def download(self, array: Any) -> Array:  # noqa: D102
        return np.asarray(self._cupy.asnumpy(array))

    def adopt(self, array: Any) -> Any:  # noqa: D102
        return self._cupy.asarray(array)

    def bits(self, array: Any) -> Any:  # noqa: D102
        return array.view(np.int32)

    def copy(self, to: Any, source: Any) -> None:  # noqa: D102
        to.data.copy_from_device_async(source.data, source.nbytes)

    def synchronize(self) -> None:  # noqa: D102
        self._runtime.deviceSynchronize()

    def flush(self) -> None:  # noqa: D102
        self._scratch.fill(1.0)

    def event(self) -> Any:  # noqa: D102
        return self._cupy.cuda.Event()

    def is_done(self, event: Any) -> bool:  # noqa: D102
        return bool(event.done)

    def seconds(self, start: Any, end: Any) -> float:  # noqa: D102
        end.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(start, end)) * 1e-3

    def free_bytes(self) -> int:  # noqa: D102
        return int(self._runtime.memGetInfo()[0])

    def release(self) -> None:  # noqa: D102
        _release_others()
        self._cupy.get_default_memory_pool().free_all_blocks()

    def facts(self) -> dict[str, Any]:  # noqa: D102
        found = self._properties
        return _facts(
            found["name"].decode(),
            (found["major"], found["minor"]),
            found["multiProcessorCount"],
            found["totalGlobalMem"],
            found["l2CacheSize"],
            _version(self._runtime.driverGetVersion()),
            _version(self._runtime.runtimeGetVersion()),
        )


class TorchDevice:
    """The current device of PyTorch, for where CuPy is not."""

    library = "torch"

    def __init__(self) -> None:
        self._torch = import_module("torch")
        self._properties = self._torch.cuda.get_device_properties(self._torch.cuda.current_device())
        self._scratch = self.empty(_FLUSH * max(self._properties.L2_cache_size, 2**20) // 4)

    def empty(self, size: int) -> Any:  # noqa: D102
        return self._torch.empty(size, dtype=self._torch.float32, device="cuda")

    def upload(self, array: Array) -> Any:  # noqa: D102
        return self._torch.tensor(array, device="cuda")

    def download(self, array: Any) -> Array:  # noqa: D102
        return np.asarray(array.detach().cpu().numpy())

    def adopt(self, array: Any) -> Any:  # noqa: D102
        return self._torch.as_tensor(array, device="cuda")

    def bits(self, array: Any) -> Any:  # noqa: D102
        return array.view(self._torch.int32)

    def copy(self, to: Any, source: Any) -> None:  # noqa: D102
        to.copy_(source)

    def synchronize(self) -> None:  # noqa: D102
        self._torch.cuda.synchronize()

    def flush(self) -> None:  # noqa: D102
        self._scratch.fill_(1.0)

    def event(self) -> Any:  # noqa: D102
        return self._torch.cuda.Event(enable_timing=True)

    def is_done(self, event: Any) -> bool:  # noqa: D102
        return bool(event.query())

    def seconds(self, start: Any, end: Any) -> float:  # noqa: D102
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def free_bytes(self) -> int:  # noqa: D102
        return int(self._torch.cuda.mem_get_info()[0])

    def release(self) -> None:  # noqa: D102
        _release_others()

    def facts(self) -> dict[str, Any]:  # noqa: D102
        found, driver = self._properties, ctypes.c_int(0)
        _driver_library().cuDriverGetVersion(ctypes.byref(driver))
        return _facts(
            found.name,
            (found.major, found.minor),
            found.multi_processor_count,
            found.total_memory,
            found.L2_cache_size,
            _version(driver.value),
            str(self._torch.version.cuda),
        )


def _release_others() -> None:
    """Free what PyTorch and Numba, if loaded, keep besides CuPy."""
    gc.collect()  # the libraries' reference cycles hold arrays
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if (cuda := sys.modules.get("numba.cuda")) is not None:
        context = cuda.current_context()
        for owner in (context.memory_manager, context):  # of arrays, and of modules and events
            pending = getattr(owner, "deallocations", None)  # another memory manager may keep none
            if pending is not None:
                pending.clear()


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _facts(
    name: str, capability: tuple[int, int], sms: int, memory: int, l2: int, driver: str, runtime: str
) -> dict[str, Any]:
    return {
        "name": name,
        "compute_capability": f"{capability[0]}.{capability[1]}",
        "multiprocessors": int(sms),
        "memory_gib": round(memory / 2**30),
        "l2_mib": round(l2 / 2**20),
        "driver": _driver_package(),
        "cuda_driver": driver,
        "cuda_runtime": runtime,
    }


def _driver_package() -> str | None:
    """Return the version of the installed driver, which only NVIDIA's tool knows, or None."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def _driver_library() -> Any:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def missing() -> str | None:
    """Return why nothing can be measured here, or None. Loads the driver only: a skip must be quick."""
    try:
        driver = _driver_library()
    except OSError:
        return "no CUDA driver"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "no CUDA GPU"
    if not any(find_spec(library) for library in ("cupy", "torch")):
        return "neither CuPy nor PyTorch is installed"
    return None


def open_device() -> Device:
    """Return the GPU; :func:`missing` must be None."""
    return CupyDevice() if find_spec("cupy") else TorchDevice()


def fill(array: Any, period: Any) -> None:
    """Repeat a shorter array over a longer one, both on the device."""
    filled = min(len(period), len(array))
    array[:filled] = period[:filled]
    while filled < len(array):
        more = min(filled, len(array) - filled)
        array[filled : filled + more] = array[:more]
        filled += more


def same_bits(device: Device, array: Any, period: Array) -> bool:
    """Return whether all of an array on the device repeats the bits of a NumPy array."""
    size = len(array)
    pattern = device.empty(min(size, max(_COMPARED // len(period), 1) * len(period)))
    fill(pattern, device.upload(period))
    pieces: Sequence[int] = range(0, size, len(pattern))
    bits, expected = device.bits(array), device.bits(pattern)
    return all(
        bool((bits[a : a + len(pattern)] == expected[: min(len(pattern), size - a)]).all()) for a in pieces
    )
