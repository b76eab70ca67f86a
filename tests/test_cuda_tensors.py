"""Many buffers in one launch, with the stand-in for CuPy: the bits of a step of each, wherever it lies."""

from __future__ import annotations

import numpy as np
import pytest
from oracles import PAIRS_OF_FLAGS, flags_id
from test_tensors import SIZES, STORAGES, Buffers, assert_same, separate

from fastadam import backends
from fastadam.adam import AdamHyperparameters
from fastadam.coefficients import Coefficients
from fastadam.kernels import cpu, device_tensors, grids
from fastadam.kernels.units import Units

LARGE = [0, 5, 3 * device_tensors.PIECE + 5, 1, 17, 0, device_tensors.PIECE, 999, device_tensors.PIECE - 1]


class OnDevice(Buffers):
    """Buffers in the memory of a device, which is the host's."""

    def take(self, group, c):
        backend = backends.load("cupy")
        pieces = device_tensors.pieces(group.units)
        addresses = [table.ctypes.data for table in (pieces, group.places, group.coefficients)]
        tables = device_tensors.Tables(addresses[0], len(pieces), *addresses[1:])
        device_tensors.plan(backend, group, c, tables, 1, 0)()


@pytest.mark.parametrize("flags", PAIRS_OF_FLAGS, ids=flags_id)
def test_every_equation(cupy, rng, flags):
    buffers = OnDevice(rng, SIZES, amsgrad=flags["amsgrad"])
    for step in (1, 2):
        rows = [(AdamHyperparameters(**flags), step)]
        expected = separate(buffers, rows)
        buffers.step(rows)
        assert_same(buffers.arrays, expected)
    assert [entry[:3] for entry in cupy.log] == [("step_tensors", 1, 0)] * 2


@pytest.mark.parametrize("amsgrad", [False, True], ids=["adam", "amsgrad"])
@pytest.mark.parametrize("kinds", STORAGES, ids="-".join)
def test_every_storage(cupy, rng, kinds, amsgrad):
    for align in (0, 3):
        buffers = OnDevice(rng, [0, 1, 17, 131], kinds, align=align, amsgrad=amsgrad)
        rows = [(AdamHyperparameters(lr=0.01, weight_decay=0.1, amsgrad=amsgrad), 1)]
        expected = separate(buffers, rows, 8.0)
        buffers.step(rows, 8.0)
        assert_same(buffers.arrays, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("decoupled", [False, True], ids=["l2", "adamw"])
def test_rows_of_their_own_and_a_scale(cupy, rng, decoupled, dtype):
    """Learning rates, betas, decays or none, and counts of steps."""
    buffers = OnDevice(rng, SIZES, [dtype] * 4, align=1)
    rows = [
        (AdamHyperparameters(lr=0.1, weight_decay=0.1, decoupled_weight_decay=decoupled), 1),
        (AdamHyperparameters(lr=0.2, betas=(0.5, 0.6), decoupled_weight_decay=decoupled), 7),
        (AdamHyperparameters(eps=1e-3, betas=(0.0, 0.9), decoupled_weight_decay=decoupled), 3),
    ]
    expected = separate(buffers, rows, 1024.0)
    buffers.step(rows, 1024.0)
    assert_same(buffers.arrays, expected)


@pytest.mark.parametrize("blocks", [1, 3, 100])
@pytest.mark.parametrize("align", [0, 1, 4])
def test_more_pieces_than_one_and_any_grid(cupy, rng, blocks, align, monkeypatch):
    backend = backends.load("cupy")
    monkeypatch.setattr(backend, "resident_threads", lambda _: blocks * grids.BLOCK // grids.WAVES)
    buffers, h = OnDevice(rng, LARGE, align=align), AdamHyperparameters(weight_decay=0.1)
    expected = buffers.copies()
    for step in (1, 2):
        buffers.step([(h, step)])
        c = Coefficients(h, np.dtype(np.float32)).update(step)
        for params, grads, *states in zip(*expected, strict=True):
            cpu.plan(params, grads, tuple(states), c)()
    assert_same(buffers.arrays, expected)
    assert {entry[-1] for entry in cupy.log} == {min(blocks, 10)}  # pieces


def test_buffers_that_lie_differently(cupy, rng):
    """Of each buffer, the parameters, gradients and moments begin elsewhere in a pack, or all alike."""
    places = [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 2, 3), (3, 3, 3, 0), (2, 2, 2, 2)]
    buffers = OnDevice(rng, [133] * len(places))
    apart = [OnDevice(rng, [133] * len(places), align=align) for align in range(4)]
    for kind in range(4):
        for k, place in enumerate(places):
            there = apart[place[kind]].arrays[kind][k]
            there[:] = buffers.arrays[kind][k]
            buffers.arrays[kind][k] = there
    rows = [(AdamHyperparameters(weight_decay=0.1), 1)]
    expected = separate(buffers, rows)
    buffers.step(rows)
    assert_same(buffers.arrays, expected)


def test_no_buffers(cupy, rng):
    OnDevice(rng, []).step([(AdamHyperparameters(), 1)])
    OnDevice(rng, [0, 0]).step([(AdamHyperparameters(), 1)])
    assert cupy.log == []


def test_pieces_cover_every_unit_once(rng):
    sizes = [*rng.integers(0, 3 * device_tensors.PIECE, 50), device_tensors.PIECE]
    stops = np.cumsum(np.array(sizes) + 16)
    units = np.stack([stops - sizes, stops, np.arange(51)], axis=1)[np.array(sizes) > 0]
    pieces = device_tensors.pieces(Units(units))
    assert pieces.dtype == np.int64
    assert pieces.flags.c_contiguous
    lengths = pieces[:, 1] - pieces[:, 0]
    assert 0 < lengths.min() <= lengths.max() == device_tensors.PIECE
    for start, stop, buffer in units:
        of = pieces[pieces[:, 2] == buffer]
        assert (of[0, 0], of[-1, 1]) == (start, stop)
        assert (of[1:, 0] == of[:-1, 1]).all()
        assert ((of[:, 0] - start) % device_tensors.PIECE == 0).all()
