"""A GPU of which the memory is the host's, and the kernels are PTX that NumPy runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from cuda_builds import Build, ptx_of
from ptx import Memory, Program

from fastadam.coefficients import Coefficients
from fastadam.hyperparameters import Hyperparameters
from fastadam.kernels import grids
from fastadam.kernels.cuda import Cuda, DeviceBuffer
from fastadam.kernels.cuda_clock import Clock


@cache
def program(build: Build) -> Program:
    """Return the kernel of a build, to be run."""
    return Program(ptx_of(build))


class HostGpu(Cuda):
    """A backend for one dtype and variant.

    Parameters
    ----------
    build : Build
        Of any entry.
    programs : callable
        Gives the program of a build.
    """

    GRID = 2, 2
    """Blocks, and threads of each: few, so that they loop. No grid affects the bits."""

    WARPS = 2, 256
    """The same of kernels that take threads in whole warps."""

    OF_WARPS = "step_units", "clear_units"
    """Kernels that need whole warps, of which the threads do not wait for each other."""

    def __init__(self, build: Build, programs: Callable[[Build], Program] = program) -> None:
        self.name = build.backend
        self.memory = Memory()
        self._build, self._programs, self._of_warps = build, programs, []

    def buffer(self, values: np.ndarray, offset: int) -> DeviceBuffer:
        """Return a copy whose first element lies so many elements behind a 16-byte boundary."""
        memory = np.zeros(values.nbytes + 2 * grids.PACK, np.uint8)
        start = -memory.ctypes.data % grids.PACK + offset * values.itemsize
        array = memory[start : start + values.nbytes].view(values.dtype)
        array[:] = values
        return DeviceBuffer(self.memory.add(array), array.size, array.dtype, 0, 0, array)

    def kernel(self, entry, types, _device):
        build = self._build._replace(entry=entry)
        assert types == build.types
        kernel = self._programs(build)
        if entry in self.OF_WARPS:
            self._of_warps.append(kernel)
        return kernel

    def launch(self, kernel, blocks, threads, args, _device, _stream):
        whole = threads == 1 or kernel.waits or kernel in self._of_warps
        grid = (blocks, threads) if whole else self.WARPS if kernel.exchanges else self.GRID
        passed = [np.float64(argument) if type(argument) is float else argument for argument in args]
        kernel.launch(*grid, passed, self.memory)

    def event(self, _device):
        return None

    def order(self, _first, _then, _event, _device):
        pass

    def is_capturing(self, _stream, _device):
        return False

    def zeros(self, nbytes, device, stream):
        return self.to_device(np.zeros(nbytes, np.uint8), device, stream)

    def to_device(self, array, _device, _stream):
        copy = array.copy()
        self.memory.add(copy)
        return copy

    def to_host(self, array, _device):
        return array

    def copy(self, to, source, nbytes, _device, _stream):
        for k in range(nbytes // 4):
            self.memory.store(to + 4 * k, np.uint32, *self.memory.load(source + 4 * k, 1, np.uint32))

    def address(self, array):
        return array.ctypes.data

    def device_of(self, _pointer):
        return 0

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def resident_threads(self, _device):
        return 1


def make_clock(gpu: HostGpu, build: Build, h: Hyperparameters) -> Clock:
    """Return a clock before its first step."""
    types = build.types
    c = Coefficients(h, types.dtype)
    update = c.update(1, grad_scale=1.0 if build.unscales else None)
    return Clock(
        gpu,
        device=0,
        stream=0,
        types=types,
        step=0,
        lrs=[h.lr],
        weight_decay=h.weight_decay,
        coefficients=[value for part in update if part for value in part],
        columns=c.columns(),
    )
