"""Telemetry of any storage in GPU memory without a GPU, behind the stand-in for CuPy: the bits of the CPU."""

from __future__ import annotations

import numpy as np
import pytest
from block_cases import ORDERS, assert_same_state, gradients_in_order
from cuda_steps import MODES, ones
from test_stored_telemetry import LR, STORAGES, copy_for, mixed, problem
from tolerances import assert_same_bits
from unit_steps import parts

import fastadam
from fastadam import FusedAdagrad, FusedAdam, Segment
from fastadam.kernels.block_tables import block_tables
from fastadam.kernels.groups import KEPT
from fastadam.kernels.run_chunks import RunChunks
from fastadam.kernels.tree import CHUNK
from fastadam.segments import Segments

ODD = {"seed": 3, "offset": 2**32 - 20}
"""Other random bits than by default, and two keys for one buffer."""


class Pair:
    """An optimizer on the CPU and one on the device, with the same parameters, and copies of them."""

    def __init__(self, cupy, params, name, *, capturable=False, **flags):
        self.cupy, flags = cupy, {"telemetry": True, **STORAGES[name][3], **ODD, **flags}
        self.cpu = FusedAdam(LR, backend="cpu", **flags)
        self.device = FusedAdam(LR, capturable=capturable, **flags)
        self.params, self.buffer = params.copy(), cupy.asarray(params)
        self.out = copy_for(params, name)
        self.there = None if self.out is None else cupy.asarray(self.out)

    def step(self, grads, scale=None):
        left, sent = grads.copy(), self.cupy.asarray(grads)
        self.cpu.step(self.params, left, out=self.out, grad_scale=scale)
        self.device.step(self.buffer, sent, out=self.there, grad_scale=scale)
        assert_same_bits(sent.host, left, "gradients")
        self.compare()

    def compare(self):
        assert_same_bits(self.buffer.host, self.params, "params")
        if self.out is not None:
            assert_same_bits(self.there.host, self.out, "out")
        assert_same_state(self.device.state_dict(), self.cpu.state_dict())
        assert repr(self.device.last_step) == repr(self.cpu.last_step)  # NaN is NaN


@pytest.mark.parametrize("name", STORAGES)
def test_what_is_seen(cupy, rng, name):
    """Of runs that begin anywhere in a block: alone there, with others, and of many chunks."""
    for size, segments in ((CHUNK + 500, ()), (3 * CHUNK + 77, mixed(3 * CHUNK + 77)), (129, mixed(129))):
        params, gradients = problem(rng, size, name)
        pair = Pair(cupy, params, name, segments=segments)
        for grads, scale in zip(gradients, (None, 3.0), strict=True):
            pair.step(grads, scale)
        if size > CHUNK:
            assert 0 < pair.device.last_step.vanished < size
            assert pair.device.last_step.update_norm > 0


@pytest.mark.parametrize("order", ORDERS)
def test_sums_are_in_the_order_of_the_tree(cupy, order):
    for opt in (FusedAdam(telemetry=True, state_dtype="8bit", backend=name) for name in ("cpu", "cupy")):
        opt.segments = [Segment(0, ORDERS[order][0], frozen=True)]
        arrays = np.ones(2300, np.float32), gradients_in_order(order)
        opt.step(*(arrays if opt.backend == "cpu" else map(cupy.asarray, arrays)))
        assert opt.last_step.grad_norm == 2**27


def test_each_code_without_a_sign_but_zero_moves(cupy, rng):
    grads = 10.0 ** rng.uniform(-2, 3, 1000).astype("f4")
    grads[::7] = 0
    opt = FusedAdagrad(telemetry=True, state_dtype="8bit")
    opt.step(cupy.asarray(np.full(1000, 1e18, np.float32)), cupy.asarray(grads))
    codes = opt.state_dict()["sum"]
    assert {0, 1, 128, 254} <= set(codes.tolist())
    assert opt.last_step.vanished == np.count_nonzero(codes)


@MODES
@pytest.mark.parametrize("name", ["8bit", "master"])
def test_what_is_not_finite(cupy, rng, name, capturable):
    """Taken, and skipped: then there is nothing to tell, and gradients are cleared all the same."""
    for skips in (False, True):
        params, (one, other) = problem(rng, 400, name)
        pair = Pair(
            cupy,
            params,
            name,
            segments=parts(400),
            skip_nonfinite=skips,
            capturable=capturable,
            zero_grads=True,
        )
        bad = one.copy()
        bad[[2, 130, 133, 200]] = np.inf, np.nan, np.nan, np.nan  # of which one is frozen
        for grads in (one, bad, other):
            pair.step(grads)
            if grads is bad:
                assert pair.device.last_step.skipped is skips
                assert pair.device.last_step.nonfinite == 3
                assert (pair.device.last_step.vanished is None) is skips


@pytest.mark.parametrize("name", ["8bit", "split"])
def test_accumulated_gradients(cupy, rng, name):
    params, gradients = problem(rng, 400, name)
    pair = Pair(cupy, params, name, segments=[Segment(5, 140, frozen=True), Segment(150, 151, lr=1.0)])
    for grads in gradients:
        pair.cpu.accumulate(grads.copy())
        pair.device.accumulate(cupy.asarray(grads))
    pair.cpu.step(pair.params, out=pair.out)
    pair.device.step(pair.buffer, out=pair.there)
    pair.compare()


def test_it_changes_no_bit_and_may_be_switched(cupy, rng):
    params, gradients = problem(rng, 400, "split", steps=4)
    pair = Pair(cupy, params, "split", segments=mixed(400))
    for on, grads in zip((True, False, True, False), gradients, strict=True):
        pair.device.telemetry = on
        left, sent = grads.copy(), cupy.asarray(grads)
        pair.cpu.step(pair.params, left, out=pair.out)
        pair.device.step(pair.buffer, sent, out=pair.there)
        assert_same_bits(pair.buffer.host, pair.params)
        for name, moment in pair.cpu.state.moments.items():
            found = pair.device.state.moments[name]  # of 8 bits a copy in CPU memory
            assert_same_bits(getattr(found, "host", found), moment, name)
        assert (pair.device.last_step.param_norm is not None) is on


def test_a_replay(cupy, rng):
    params, gradients = problem(rng, 400, "8bit", steps=5)
    gradients[2][7] = np.nan
    pair = Pair(cupy, params, "8bit", segments=parts(400), skip_nonfinite=True, capturable=True)
    stream = cupy.cuda.Stream()
    with stream:
        pair.step(gradients[0])
        sent = cupy.asarray(gradients[1])
        stream.begin_capture()
        pair.device.step(pair.buffer, sent)
        graph = stream.end_capture()
        for grads in gradients[1:]:
            sent.host[:] = grads
            graph.launch(stream)
            pair.cpu.step(pair.params, grads)
            pair.compare()
    assert pair.cpu.state.step == 4


def test_blocks_across_chunks_come_first():
    """Those of which two chunks have elements, and only these; a part of a block belongs to one chunk."""
    for start in (0, 1, 100, 128, 2000):
        size = 3 * CHUNK + 33 + start
        moved = [Segment(s.start + start, s.stop + start, frozen=s.frozen) for s in mixed(size - start)]
        units = Segments([Segment(0, start, frozen=True), *moved] if start else moved).units(size)
        chunks = RunChunks(units).bounds
        tables, plain = block_tables(units, size, chunks), block_tables(units, size)
        touched = [set(range(a // 128, (b - 1) // 128 + 1)) for a, b in chunks.tolist()]
        both = {k for k in range(-(-size // 128)) if sum(k in blocks for blocks in touched) > 1}
        assert {
            int(k) for k in np.flatnonzero(np.isin(KEPT - 1 - tables.of_block, range(tables.across)))
        } == both
        assert tables.across == len(both)
        assert plain.across == 0
        same = tables.of_block >= KEPT
        np.testing.assert_array_equal(tables.of_block[same], plain.of_block[same])
        for block, row in enumerate(tables.of_block.tolist()):
            if row < KEPT:
                pieces = tables.pieces[slice(*tables.first_piece[[KEPT - 1 - row, KEPT - row]])]
                assert pieces[0, 0] == 128 * block
                assert pieces[-1, 1] == min(128 * block + 128, size)
                np.testing.assert_array_equal(pieces[1:, 0], pieces[:-1, 1])
                for a, b, of_piece in pieces.tolist():
                    within = ((chunks[:, 0] <= a) & (b <= chunks[:, 1])).any()
                    assert within == (of_piece != KEPT)


def test_a_step_without_blocks_across_chunks_takes_no_launch_for_them(cupy, rng):
    for segments, count in (
        ((), 0),
        ([Segment(128, 256, frozen=True)], 0),
        ([Segment(1, 2, frozen=True)], 1),
    ):
        opt = FusedAdam(telemetry=True, state_dtype="8bit", segments=segments)
        before = len(cupy.log)
        opt.step(cupy.asarray(rng.standard_normal(300).astype("f4")), cupy.asarray(np.ones(300, "f4")))
        names = [entry[0] for entry in cupy.log[before:]]
        assert names.count("step_across") == count
        assert names.count("step_units_observed") == 1


@pytest.mark.parametrize("state_dtype", ["8bit", "bfloat16"])
def test_warmup_compiles_all_that_a_step_needs(cupy, monkeypatch, state_dtype):
    from fastadam import backends

    kernels = backends.load("cupy")
    seen, compiled = [], kernels.kernel
    monkeypatch.setattr(kernels, "kernel", lambda *key: seen.append(key[:2]) or compiled(*key), raising=True)
    flags = {"state_dtype": state_dtype, "telemetry": True, "segments": [Segment(1, 2, frozen=True)]}
    fastadam.warmup(backend="cupy", **flags)
    ready = set(seen)
    seen.clear()
    FusedAdam(**flags).step(ones(cupy), ones(cupy))
    assert set(seen) <= ready
    assert ("step_across" in {entry for entry, _ in seen}) == (state_dtype == "8bit")
