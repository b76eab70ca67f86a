"""Every kind of buffer that shares its memory is stepped in place; nothing is copied."""

from __future__ import annotations

import array
import ctypes
import mmap

import numpy as np
import pytest

from fastadam import FusedAdam

N = 48
START = np.linspace(-1, 1, N, dtype=np.float32)
GRADS = np.cos(np.arange(N, dtype=np.float32))


def expected():
    params = START.copy()
    FusedAdam().step(params, GRADS)
    return params


class ArrayInterface:
    """The least that exposes memory: no buffer protocol, no DLPack."""

    def __init__(self, base):
        self.base = base
        self.__array_interface__ = base.__array_interface__


class DLPack:
    def __init__(self, base):
        self.base = base

    def __dlpack__(self, **arguments):
        return self.base.__dlpack__(**arguments)

    def __dlpack_device__(self):
        return self.base.__dlpack_device__()


def as_torch(base):
    return pytest.importorskip("torch").from_numpy(base)


BUFFERS = {
    "flat": lambda base, _: base,
    "matrix": lambda base, _: base.reshape(6, 8),
    "transposed-fortran": lambda _, __: np.empty((8, 6), np.float32, order="F").T,
    "4-d": lambda base, _: base.reshape(2, 3, 4, 2),
    "memmap": lambda _, path: np.memmap(path / "params", np.float32, "w+", shape=N),
    "array.array": lambda _, __: array.array("f", bytes(4 * N)),
    "ctypes": lambda _, __: (ctypes.c_float * N)(),
    "memoryview": lambda _, __: memoryview(bytearray(4 * N)).cast("f"),
    "mmap": lambda _, __: memoryview(mmap.mmap(-1, 4 * N)).cast("f"),
    "array-interface": lambda base, _: ArrayInterface(base),
    "dlpack": lambda base, _: DLPack(base),
    "torch": lambda base, _: as_torch(base),
    "torch-matrix": lambda base, _: as_torch(base.reshape(6, 8)),
    "torch-detached-parameter": lambda base, _: as_torch(base).requires_grad_().detach(),
}


def contents(buffer):
    """A NumPy view of the buffer's memory, made without fastadam."""
    if isinstance(buffer, (ArrayInterface, DLPack)):
        return buffer.base
    return buffer.numpy().reshape(-1) if hasattr(buffer, "numpy") else np.asarray(buffer).reshape(-1)


@pytest.mark.parametrize("kind", BUFFERS)
def test_steps_in_place(kind, tmp_path):
    buffer = BUFFERS[kind](np.empty(N, np.float32), tmp_path)
    view = contents(buffer)
    assert np.may_share_memory(view, np.asarray(view))
    view[:] = START
    opt = FusedAdam()
    opt.step(buffer, GRADS)
    np.testing.assert_array_equal(contents(buffer), expected())
    np.testing.assert_array_equal(view, expected())


@pytest.mark.parametrize("kind", BUFFERS)
def test_gradients_of_every_kind(kind, tmp_path):
    buffer = BUFFERS[kind](np.empty(N, np.float32), tmp_path)
    contents(buffer)[:] = GRADS
    params = START.copy()
    FusedAdam().step(params, buffer)
    np.testing.assert_array_equal(params, expected())


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.frombuffer(GRADS.tobytes(), np.float32),
        lambda: np.broadcast_to(GRADS, (1, N))[0],
        lambda: memoryview(GRADS.tobytes()).cast("f"),
        lambda: pytest.importorskip("jax.numpy").asarray(GRADS),
    ],
    ids=["bytes", "read-only-view", "read-only-memoryview", "jax"],
)
def test_gradients_may_be_read_only(make):
    params = START.copy()
    FusedAdam().step(params, make())
    np.testing.assert_array_equal(params, expected())


def test_a_memmap_reaches_its_file(tmp_path):
    params = np.memmap(tmp_path / "params", np.float32, "w+", shape=N)
    params[:] = START
    FusedAdam().step(params, GRADS)
    params.flush()
    np.testing.assert_array_equal(np.fromfile(tmp_path / "params", np.float32), expected())


@pytest.mark.parametrize("shape", [(0,), (0, 3), ()])
def test_empty_and_zero_dimensional(shape):
    params = np.ones(shape, np.float32)
    opt = FusedAdam(lr=0.5)
    opt.step(params, np.ones(shape, np.float32))
    assert opt.state.step == 1
    assert opt.state.exp_avg.shape == (params.size,)
    assert (params < 0.6).all()


def test_neighbours_in_memory_are_not_touched(rng):
    memory = rng.standard_normal(300).astype(np.float32)
    before = memory.copy()
    FusedAdam().step(memory[100:203], np.ones(103, np.float32))
    np.testing.assert_array_equal(memory[:100], before[:100])
    np.testing.assert_array_equal(memory[203:], before[203:])
    assert (memory[100:203] != before[100:203]).all()


def test_adjacent_buffers_do_not_overlap():
    memory = np.ones(2 * N, np.float32)
    FusedAdam().step(memory[:N], memory[N:])
    assert (memory[N:] == 1).all()
