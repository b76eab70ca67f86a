"""A stand-in for CuPy on machines without a GPU: the CUDA C++ kernels run as host code.

It has what :mod:`fastadam.kernels.cuda_cupy` uses of CuPy. Memory of a "device" is host memory, ``RawModule``
compiles the very source with the host's C++ compiler, and a launch calls the kernel once for each thread of
its grid. Streams run at once and keep a log; a stream in capture records instead, and its graph replays. What
CUDA refuses is refused: a stream of another device, and a wait across the border of a capture.

What it cannot show: that CUDA's compilers, the driver and real CuPy do what they say.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np

_HEADERS = "#include <barrier>\n#include <optional>\n"

_PRELUDE = """
struct Dimension { unsigned x; };
static thread_local Dimension threadIdx, blockIdx, blockDim, gridDim;
static std::optional<std::barrier<>> gate, warps[8];
extern "C" void gather(unsigned threads) {
    gate.emplace(threads);
    for (unsigned warp = 0; warp < threads / 32; ++warp) warps[warp].emplace(32);
}
static inline void __syncthreads() { gate->arrive_and_wait(); }
static inline void __syncwarp() { warps[threadIdx.x / 32]->arrive_and_wait(); }
[[maybe_unused]] static unsigned __shfl_xor_sync(unsigned, unsigned value, int apart) {
    static unsigned values[256];
    values[threadIdx.x] = value;
    __syncwarp();
    const unsigned found = values[threadIdx.x ^ apart];
    __syncwarp();
    return found;
}
#define __shared__ static
#define __global__
#define __launch_bounds__(threads, blocks)
extern "C" void place(unsigned block, unsigned thread, unsigned threads, unsigned blocks) {
    blockIdx.x = block, threadIdx.x = thread, blockDim.x = threads, gridDim.x = blocks;
}
"""


_WARNINGS = "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Werror"
_COMPILER = "g++", "-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", *_WARNINGS, "-fPIC"


def compile_for_the_host(source: str, folder: Path) -> ctypes.CDLL:
    """Compile, unless the folder has it; headers, which take as long as all else, once in each process."""
    headers = folder / f"{os.getpid()}.hpp"
    if not headers.exists():
        headers.write_text(_HEADERS)
        _compile("-x", "c++-header", "-o", f"{headers}.gch", headers)
    library = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:20]}.so"
    if not library.exists():
        code = library.with_suffix(".cpp")
        _make(code, lambda aside: aside.write_text(_PRELUDE + source))
        _make(library, lambda aside: _compile("-include", headers, "-shared", "-o", aside, code))
    return ctypes.CDLL(str(library))


def _compile(*arguments: str | Path) -> None:
    subprocess.run([*_COMPILER, *arguments], check=True)


def _make(path: Path, write: Callable[[Path], object]) -> None:
    """Write aside and rename: another process sees all of it or nothing."""
    aside = path.with_name(f"{os.getpid()}-{path.name}")
    write(aside)
    aside.replace(path)


def _c(value):
    if isinstance(value, np.float32):
        return ctypes.c_float(value)
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_longlong(value)


MEETING = {"measure", "decide", "measure_units", "sum_groups", "step_units_observed", "conclude"}
"""Kernels whose threads wait for each other: each gets a thread of its own."""
STEPS = {"step", "step_captured", "step_units", "step_across"}
"""Kernels that do where states come in blocks."""

POOL = ThreadPoolExecutor(256)


class Refused(RuntimeError):  # noqa: N818
    """What CUDA answers."""


class Graph:
    def __init__(self):
        self.calls = []

    def launch(self, _=None):
        for call in self.calls:
            call()


def make(folder: Path, devices: int = 2, resident_threads: int = 512) -> ModuleType:
    """Return a module to put in the place of ``cupy``."""
    cupy = ModuleType("cupy")
    cupy.__spec__ = ModuleSpec("cupy", None)
    cupy.log = []  # (what, device, stream, ...)
    owners = []  # (first address, end, device)
    current = SimpleNamespace(device=0, streams={})

    class Stream:
        def __init__(self, ptr=None):
            self.ptr = id(self) if ptr is None else ptr
            captures.setdefault(self.ptr, None)
            homes.setdefault(self.ptr, current.device)

        @classmethod
        def from_external(cls, stream):
            version, handle = stream.__cuda_stream__()
            assert version == 0
            return cls(handle)

        def __cuda_stream__(self):
            return 0, self.ptr

        def __enter__(self):
            current.streams.setdefault(current.device, []).append(self)

        def __exit__(self, *_):
            current.streams[current.device].pop()

        def use(self):
            stack = current.streams.setdefault(current.device, [])
            stack[-1:] = [self]
            return self

        def is_capturing(self):
            assert self.ptr not in (0, 1)
            return captures[self.ptr] is not None

        def begin_capture(self):
            captures[self.ptr] = Graph()

        def end_capture(self):
            graph, captures[self.ptr] = captures[self.ptr], None
            return graph

        def wait_event(self, event):
            if captures[self.ptr] is not event.graph:
                raise Refused("cudaErrorStreamCaptureIsolation")
            cupy.log.append(("wait", current.device, self.ptr, event.stream))

    captures, homes = {}, {}  # of streams, by handle: the graph being recorded, and the device
    Stream.null, Stream.ptds = Stream(0), Stream(2)

    class Device:
        def __init__(self, number):
            assert 0 <= number < devices
            self.number = self.id = number
            self.attributes = {"MultiProcessorCount": 1, "MaxThreadsPerMultiProcessor": resident_threads}

        def __enter__(self):
            self.before, current.device = current.device, self.number

        def __exit__(self, *_):
            current.device = self.before

    class Event:
        def __init__(self, disable_timing=False):
            assert disable_timing

        def record(self, stream):
            self.stream, self.graph = stream.ptr, captures[stream.ptr]

    def get_current_stream(device=-1):
        stack = current.streams.get(current.device if device < 0 else device)
        return stack[-1] if stack else Stream.null

    class ndarray:  # noqa: N801
        def __init__(self, host, device):
            self.host, self.device_id = host, device
            self.size, self.dtype, self.shape, self.nbytes = host.size, host.dtype, host.shape, host.nbytes
            self.data = SimpleNamespace(ptr=host.ctypes.data)

        @property
        def __cuda_array_interface__(self):
            flags = self.host.flags
            return {
                "shape": self.host.shape,
                "strides": None if flags.c_contiguous else self.host.strides,
                "typestr": self.host.dtype.str,
                "data": (self.data.ptr, not flags.writeable),
                "version": 3,
                "stream": get_current_stream().ptr or 1,
            }

        def __dlpack_device__(self):
            return 2, self.device_id

        def __getitem__(self, key):
            return ndarray(self.host[key], self.device_id)

        def __setitem__(self, key, value):
            assert value.device_id == self.device_id
            self.host[key] = value.host

        def view(self, dtype):
            return ndarray(self.host.view(dtype), self.device_id)

        def reshape(self, shape):
            return ndarray(self.host.reshape(shape), self.device_id)

        @property
        def device(self):
            return Device(self.device_id)

        @property
        def strides(self):
            return self.host.strides

        def __array__(self, *_, **__):
            raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    ndarray.__module__ = "cupy"

    def on_current_device(host):
        owners.append((host.ctypes.data, host.ctypes.data + host.nbytes, current.device))
        cupy.log.append(("allocate", current.device, get_current_stream().ptr, host.nbytes))
        return ndarray(host, current.device)

    class Kernel:
        def __init__(self, library, name, device, in_blocks):
            self.function, self.place, self.gather = library[name], library.place, library.gather
            self.name, self.device = name, device
            self.meets = name in MEETING or (in_blocks and name in STEPS)
            self.function.restype = None

        def run(self, block, threads, blocks, values, thread):
            self.place(block, thread, threads, blocks)
            self.function(*values)

        def __call__(self, grid, block, args):
            assert current.device == self.device
            if get_current_stream().ptr not in (0, 2) and homes[get_current_stream().ptr] != self.device:
                raise Refused("cudaErrorInvalidResourceHandle")
            stream, (blocks,), (threads,) = get_current_stream().ptr, grid, block
            values = [_c(value) for value in args]

            def run():
                cupy.log.append((self.name, self.device, stream, blocks))
                for number in range(blocks):
                    if self.meets:
                        self.gather(threads)
                        block = partial(self.run, number, threads, blocks, values)
                        list(POOL.map(block, range(threads)))
                        continue
                    for thread in range(threads):
                        self.run(number, threads, blocks, values, thread)

            graph = captures[stream]
            (graph.calls.append if graph else lambda call: call())(run)

    class RawModule:
        def __init__(self, *, code, options):
            assert options == ("--std=c++20",)
            self.library, self.code = compile_for_the_host(code, folder), code

        def get_function(self, name):
            assert re.search(rf'extern "C" __global__ void [^{{;]*\b{name}\(', self.code)
            return Kernel(self.library, name, current.device, "__syncwarp" in self.code)

    def pointer_attributes(pointer):
        device = next(device for first, end, device in reversed(owners) if first <= pointer < end)
        return SimpleNamespace(device=device)

    def copy(to, source, nbytes, kind, stream):
        assert kind == "device to device"

        def run():
            cupy.log.append(("copy", current.device, stream, nbytes))
            ctypes.memmove(to, source, nbytes)

        graph = captures[stream]
        (graph.calls.append if graph else lambda call: call())(run)

    def asnumpy(array):
        assert array.device_id == current.device
        return array.host.copy()

    cupy.Refused = Refused
    cupy.ndarray, cupy.RawModule, cupy.asnumpy = ndarray, RawModule, asnumpy
    cupy.zeros = lambda size, dtype=np.float64: on_current_device(np.zeros(size, dtype))
    cupy.asarray = lambda host: on_current_device(np.array(host))
    cupy.from_dlpack = lambda array: array.to_cupy()
    cupy.cuda = SimpleNamespace(
        Stream=Stream,
        Device=Device,
        Event=Event,
        get_current_stream=get_current_stream,
        runtime=SimpleNamespace(
            deviceSynchronize=lambda: cupy.log.append(("synchronize", current.device, None)),
            getDeviceCount=lambda: devices,
            getDevice=lambda: current.device,
            pointerGetAttributes=pointer_attributes,
            memcpyAsync=copy,
            memcpyDeviceToDevice="device to device",
        ),
    )
    return cupy
