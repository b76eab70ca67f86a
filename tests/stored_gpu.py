"""Optimizers whose kernels are PTX that NumPy runs, of buffers of any storage in the memory of the host."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import sass
from cuda_builds import SM_90, _numba, compile_cuda, text
from host_gpu import HostGpu
from ptx import Memory, Program, entries

from fastadam.kernels import cuda_source


def ptx_of(backend, entry, types):
    """Return the PTX of a kernel for any types."""
    if backend == "cupy":
        return entries(compile_cuda(cuda_source.source_of(entry, types))[0])[entry]
    (only,) = entries(text(_numba(entry, types, SM_90, "-ptx"))).values()
    return only


def kernel_of(backend, entry, types, capability):
    """Return the machine code of a kernel for any types."""
    if backend == "cupy":
        return sass.kernels(compile_cuda(cuda_source.source_of(entry, types), capability)[1])[entry]
    (kernel,) = sass.kernels(_numba(entry, types, capability)).values()
    return kernel


@cache
def program(backend, entry, types):
    """Return a kernel, to be run."""
    return Program(ptx_of(backend, entry, types))


class StoredGpu(HostGpu):
    """A backend for all dtypes and variants.

    Parameters
    ----------
    backend : str
        Whose kernels it runs.
    programs : callable
        Gives the program of a backend, an entry and types.
    """

    def __init__(self, backend, programs=program):
        self.name, self.memory = backend, Memory()
        self._programs, self._of_warps = programs, []
        self.launched = []
        """Kernels, in the order in which they ran."""

    def kernel(self, entry, types, _device):
        kernel = self._programs(self.name, entry, types)
        if entry in self.OF_WARPS:
            self._of_warps.append(kernel)
        self.launched.append(entry)
        return kernel

    def put(self, array, offset=0):
        """Return a copy of an array as one in GPU memory, so many elements behind a boundary of 16 bytes."""
        buffer = self.buffer(array, offset)
        return _Array(buffer.owner.view(array.dtype))


class _Array:
    def __init__(self, host):
        self.host, self.dtype = host, host.dtype

    @property
    def __cuda_array_interface__(self):
        data = (self.host.ctypes.data, False)
        return {"shape": self.host.shape, "typestr": self.host.dtype.str, "data": data, "version": 3}

    def __dlpack_device__(self):
        return 2, 0


def use(monkeypatch, gpu):
    """Let optimizers step on it."""
    from fastadam import backends

    load = backends.load
    monkeypatch.setattr(backends, "load", lambda name: gpu if name == gpu.name else load(name))
    monkeypatch.setattr(backends, "cuda", lambda: gpu.name)
    return SimpleNamespace(gpu=gpu)
