"""Many buffers in one pass: the bits of a step of each, wherever it lies, however the work is shared."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from oracles import PAIRS_OF_FLAGS, flags_id, interpret
from phase_cases import pairwise
from tolerances import assert_same_bits

from fastadam.adam import AdamHyperparameters
from fastadam.coefficients import Coefficients
from fastadam.kernels import cpu, rules, tensors, threads
from fastadam.kernels.units import columns_of

SIZES = [0, 1, 2, 15, 16, 17, 127, 128, 129, 300]
LARGE = [0, 5, 40_000, 1, 17, 0, 16_384, 999, 25_001]
KINDS = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
CODES = {"float16": np.uint16, "bfloat16": np.int16}


def apart(values, align):
    """A copy that begins so many elements behind a cache line."""
    room = np.empty(values.size + 64 + align, values.dtype)
    start = -(room.ctypes.data // values.itemsize) % (64 // values.itemsize) + align
    part = room[start : start + values.size]
    part[:] = values
    return part


class Buffers:
    """Parameters, gradients and states of many buffers, and steps of all of them together."""

    def __init__(self, rng, sizes, kinds=("float32",) * 4, *, align=0, amsgrad=False):
        n_states = 3 if amsgrad else 2
        self.kinds, self.sizes = [*kinds[:2], *kinds[2:4], kinds[3]][: 2 + n_states], sizes
        make = {0: rng.standard_normal, 1: lambda n: 0.1 * rng.standard_normal(n)}
        self.arrays = [
            [apart(make.get(k, np.zeros)(n).astype(KINDS[kind]), align) for n in sizes]
            for k, kind in enumerate(self.kinds)
        ]
        self.first, self.units = tensors.layout(np.array(sizes))

    def copies(self):
        return [[array.copy() for array in arrays] for arrays in self.arrays]

    def step(self, of_rows, scale=None):
        """Step buffer k with row k % len(of_rows) of ``(hyperparameters, step)``."""
        math = np.float64 if self.kinds[0] == "float64" else np.float32
        updates = [Coefficients(h, np.dtype(math)).update(step, scale) for h, step in of_rows]
        table = np.array([[np.nan if c.decay is None else c.decay[0], *c.rule] for c in updates], math)
        assert table.shape[1] == len(columns_of(rules.Adam))
        rows = np.arange(len(self.sizes)) % len(of_rows)
        addresses = [[array.ctypes.data for array in arrays] for arrays in self.arrays]
        places = np.ascontiguousarray(np.stack([self.first, rows, *addresses], axis=1), np.int64)
        like = [np.empty(0, CODES.get(kind, KINDS[kind])) for kind in self.kinds]
        group = tensors.Tensors(like[0], like[1], tuple(like[2:]), self.units, places, table)
        decay = next((c.decay for c in updates if c.decay is not None), None)
        self.take(group, updates[0]._replace(decay=decay))

    def take(self, group, c):
        tensors.prepare(group, c)
        tensors.plan(group, c)()


def separate(buffers, of_rows, scale=None):
    """Step each buffer by itself, with NumPy scalars, and round what is stored in 16 bits."""
    wide = np.float64 if buffers.kinds[0] == "float64" else np.float32
    kinds = [KINDS[kind] for kind in buffers.kinds]
    done = []
    for k, arrays in enumerate(zip(*buffers.copies(), strict=True)):
        params, grads, *states = (array.astype(wide) for array in arrays)
        h, step = of_rows[k % len(of_rows)]
        params, states = interpret(h, params, grads, tuple(states), step, grad_scale=scale)
        done.append([a.astype(kind) for a, kind in zip((params, grads, *states), kinds, strict=True)])
    return [list(arrays) for arrays in zip(*done, strict=True)]


def assert_same(actual, expected):
    for k, (of_kind, wanted) in enumerate(zip(actual, expected, strict=True)):
        for buffer, (a, b) in enumerate(zip(of_kind, wanted, strict=True)):
            kind = f"u{a.itemsize}" if a.dtype == ml_dtypes.bfloat16 else a.dtype
            assert_same_bits(a.view(kind), b.view(kind), f"arrays {k} of buffer {buffer}")


@pytest.mark.parametrize("flags", PAIRS_OF_FLAGS, ids=flags_id)
def test_every_equation(rng, flags):
    buffers = Buffers(rng, SIZES, amsgrad=flags["amsgrad"])
    for step in (1, 2):
        rows = [(AdamHyperparameters(**flags), step)]
        expected = separate(buffers, rows)
        buffers.step(rows)
        assert_same(buffers.arrays, expected)


NARROW = ["bfloat16", "float16", "float32"]
STORAGES = [*([NARROW[i] for i in case] for case in pairwise([NARROW] * 4)), ["float64"] * 4]


@pytest.mark.parametrize("kinds", STORAGES, ids="-".join)
def test_every_storage(rng, kinds):
    buffers = Buffers(rng, [0, 1, 17, 131], kinds, align=3)
    h = AdamHyperparameters(lr=0.01, weight_decay=0.1)
    for step in (1, 2):
        expected = separate(buffers, [(h, step)])
        buffers.step([(h, step)])
        assert_same(buffers.arrays, expected)


@pytest.mark.parametrize("decoupled", [False, True], ids=["l2", "adamw"])
def test_rows_of_their_own_and_a_scale(rng, decoupled):
    """Learning rates, betas, decays or none, and counts of steps."""
    buffers = Buffers(rng, SIZES, align=1)
    rows = [
        (AdamHyperparameters(lr=0.1, weight_decay=0.1, decoupled_weight_decay=decoupled), 1),
        (AdamHyperparameters(lr=0.2, betas=(0.5, 0.6), decoupled_weight_decay=decoupled), 7),
        (AdamHyperparameters(eps=1e-3, betas=(0.0, 0.9), decoupled_weight_decay=decoupled), 3),
    ]
    expected = separate(buffers, rows, 1024.0)
    buffers.step(rows, 1024.0)
    assert_same(buffers.arrays, expected)


@pytest.mark.parametrize("way", ["one thread", "two threads", "all threads", "pool"])
def test_any_number_of_threads(rng, way, all_threads, monkeypatch):
    """Against the loop of one buffer; the pool takes pieces from 1,000 elements on, to have some."""
    import numba

    if way == "pool":
        monkeypatch.setattr(threads, "numba_is_safe", lambda: False)
        monkeypatch.setattr(threads, "MIN_PIECE", 1000)
        monkeypatch.setattr(threads, "count", lambda: 7)
    else:
        numba.set_num_threads({"one thread": 1, "two threads": min(2, all_threads)}.get(way, all_threads))
    buffers, h = Buffers(rng, LARGE, align=1), AdamHyperparameters(weight_decay=0.1)
    expected = buffers.copies()
    for step in (1, 2):
        buffers.step([(h, step)])
        c = Coefficients(h, np.dtype(np.float32)).update(step)
        for params, grads, *states in zip(*expected, strict=True):
            cpu.plan(params, grads, tuple(states), c)()
    assert_same(buffers.arrays, expected)


def test_no_buffers(rng):
    Buffers(rng, []).step([(AdamHyperparameters(), 1)])
    Buffers(rng, [0, 0]).step([(AdamHyperparameters(), 1)])


def test_buffers_begin_at_cache_lines_of_the_virtual_one():
    first, units = tensors.layout(np.array([3, 0, 16, 17, 1]))
    assert first.tolist() == [0, 16, 16, 32, 64]
    assert units.whole.tolist() == [[0, 3, 0], [16, 32, 2], [32, 49, 3], [64, 65, 4]]
