"""Memory: what a step allocates, and buffers beyond 2^31 elements."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from oracles import interpret

from fastadam import FusedAdam
from fastadam.adam import AdamHyperparameters
from fastadam.coefficients import Coefficients
from fastadam.kernels import cpu, threads

MIB = 2**20


@pytest.mark.parametrize(("amsgrad", "bytes_per_element"), [(False, 8), (True, 12)])
def test_a_step_allocates_the_moments_and_nothing_else(amsgrad, bytes_per_element):
    n = 1 << 20
    params, grads = np.ones(n, np.float32), np.ones(n, np.float32)
    FusedAdam(amsgrad=amsgrad).step(params, grads)  # compiled from here on
    opt = FusedAdam(amsgrad=amsgrad)
    tracemalloc.start()
    try:
        opt.step(params, grads)
        first, first_peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        opt.step(params, grads)
        _, second_peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    moments = bytes_per_element * n
    assert moments <= first <= first_peak < moments + MIB
    assert second_peak - first < 64 * 1024


RESIDENT = """
import numpy as np, resource
from fastadam import FusedAdam
n = 1 << 25
params, grads = np.ones(n, np.float32), np.ones(n, np.float32)
for size in (100, 100_000):
    FusedAdam().step(np.ones(size, np.float32), np.ones(size, np.float32))
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) * 1024
before = peak()
opt = FusedAdam()
for _ in range(3):
    opt.step(params, grads)
print(peak() - before - 8 * n)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_memory():
    process = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    assert int(process.stdout) <= MIB


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="maps one memory many times")
@pytest.mark.parametrize("how", ["parallel", "serial", "pool"])
def test_more_than_2_to_the_31_elements(rng, how, monkeypatch):
    """Every index is 64 bits: the elements past 2^31 and past 2^32 bytes get their own step.

    Buffers of that size would not fit: all but the last pages of each are one small memory, mapped again and
    again. Only the last pages are compared.
    """
    n, tail = 2**31 + 5000, 4096
    arrays = [repeated_memory(n) for _ in range(4)]
    params, grads, *states = arrays
    before = [rng.random(tail, np.float32) for _ in arrays]
    for array, values in zip(arrays, before, strict=True):
        array[-tail:] = values

    h = AdamHyperparameters()
    c = Coefficients(h, params.dtype)
    if how == "serial":
        monkeypatch.setattr(cpu, "PARALLEL_FROM", n + 1)
    elif how == "pool":
        monkeypatch.setattr(threads, "numba_is_safe", lambda: False)
    cpu.plan(params, grads, tuple(states), c.update(7))()

    expected = interpret(h, before[0], before[1], tuple(before[2:]), 7)
    np.testing.assert_array_equal(params[-tail:], expected[0])
    np.testing.assert_array_equal(grads[-tail:], before[1])
    for state, new in zip(states, expected[1], strict=True):
        np.testing.assert_array_equal(state[-tail:], new)


def repeated_memory(n, unit=4 * MIB):
    """A float32 array of n elements whose memory, but for the end, is one unit again and again."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    array = np.frombuffer(mmap.mmap(-1, -(-4 * n // unit) * unit), np.float32)  # no page of it exists yet
    address = array.__array_interface__["data"][0]
    protection, map_shared, map_fixed = mmap.PROT_READ | mmap.PROT_WRITE, 0x01, 0x10
    file = os.memfd_create("unit")
    os.ftruncate(file, unit)
    for offset in range(0, array.nbytes - 2 * unit, unit):
        mapped = libc.mmap(address + offset, unit, protection, map_shared | map_fixed, file, 0)
        assert mapped == address + offset, os.strerror(ctypes.get_errno())
    os.close(file)
    return array[:n]
