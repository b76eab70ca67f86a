"""Moments in 8 bits in GPU memory without a GPU, behind the stand-in for CuPy: the bits of the CPU."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from block_cases import BLOCK_CASES, ODD, assert_same_state, gradients_of
from cuda_steps import MODES, ones
from storage_cases import DTYPES, case_id, encoded, options
from tolerances import assert_same_bits
from unit_steps import parts

import fastadam
from fastadam import FusedAdam, Segment
from fastadam.kernels.block_tables import block_tables
from fastadam.segments import Segments

N = 300


def step_both(cupy, cpu, device, params, buffer, gradients, scale=None):
    for left in gradients:
        sent = cupy.asarray(left)
        cpu.step(params, left, grad_scale=scale)
        device.step(buffer, sent, grad_scale=scale)
        assert_same_bits(buffer.host, params, "params")
        assert_same_bits(sent.host, left, "gradients")
        assert_same_state(device.state_dict(), cpu.state_dict())
        assert repr(device.last_step) == repr(cpu.last_step)  # NaN is NaN


@MODES
@pytest.mark.parametrize("case", BLOCK_CASES[::5], ids=case_id)
def test_steps(cupy, rng, case, capturable):
    flags = {**options(case), **ODD, "segments": parts(N) if case["segments"] else ()}
    params = encoded(rng.standard_normal(N).astype("f4"), case["params"])
    cpu, device = FusedAdam(backend="cpu", **flags), FusedAdam(capturable=capturable, **flags)
    gradients = gradients_of(rng, N, case["grads"])
    step_both(cupy, cpu, device, params, cupy.asarray(params), gradients, case["grad_scale"])


@MODES
def test_checkpoints_and_copies_go_on(cupy, rng, capturable):
    """From the device to the CPU and back, and between formats."""
    flags = {"state_dtype": "8bit", "amsgrad": True, **ODD}
    params, gradients = rng.standard_normal(N).astype("f4"), gradients_of(rng, N, "float32")
    cpu, device = FusedAdam(backend="cpu", **flags), FusedAdam(capturable=capturable, **flags)
    buffer = cupy.asarray(params)
    step_both(cupy, cpu, device, params, buffer, gradients[:2])
    for change in (
        copy.deepcopy,
        lambda opt: pickle.loads(pickle.dumps(opt)),
        lambda opt: loaded(FusedAdam(**flags), opt),
        lambda opt: loaded(FusedAdam(**{**flags, "state_dtype": ("bfloat16", "8bit")}), opt),
    ):
        step_both(cupy, change(cpu), change(device), params.copy(), cupy.asarray(params), gradients[2:])
    step_both(cupy, loaded(FusedAdam(**flags), device), loaded(FusedAdam(**flags), cpu), params.copy(),
              cupy.asarray(params), gradients[2:])  # fmt: skip


def loaded(opt, source):
    opt.load_state_dict(source.state_dict())
    return opt


def test_moments_are_seen_as_copies_in_cpu_memory(cupy, rng):
    opt, cpu = (FusedAdam(state_dtype="8bit") for _ in range(2))
    params, grads = rng.standard_normal((2, N)).astype("f4")
    opt.step(cupy.asarray(params), cupy.asarray(grads))
    cpu.step(params, grads)
    for name, moment in cpu.state.moments.items():
        found = opt.state.moments[name]
        assert isinstance(found, np.ndarray)
        assert not found.flags.writeable
        assert_same_bits(found, moment, name)
    assert repr(opt.state) == repr(cpu.state)


def test_a_replayed_step_draws_anew(cupy, rng):
    flags = {"state_dtype": "8bit", "skip_nonfinite": True, **ODD}
    params, gradients = rng.standard_normal(N).astype("f4"), gradients_of(rng, N, "float32", 5)
    gradients[1] = gradients[0] * np.float32(0.5)  # the others are skipped
    gradients[4] = gradients[0] * np.float32(0.25)
    opt, cpu = FusedAdam(capturable=True, **flags), FusedAdam(**flags)
    buffer, sent, stream = cupy.asarray(params), cupy.asarray(gradients[0]), cupy.cuda.Stream()
    with stream:
        opt.step(buffer, sent)
        cpu.step(params, gradients[0])
        stream.begin_capture()
        opt.step(buffer, sent)
        graph = stream.end_capture()
        for grads in gradients[1:]:
            sent.host[:] = grads
            graph.launch(stream)
            cpu.step(params, grads)
            assert_same_bits(buffer.host, params)
    assert opt.state.step == cpu.state.step == 3
    assert_same_state(opt.state_dict(), cpu.state_dict())


@pytest.mark.parametrize("stored", [("float32", "bfloat16"), ("float32", "8bit"), ("8bit", "float32")])
def test_states_do_not_overlap(cupy, rng, stored):
    """Of parameters that begin inside of a pack: each state begins at that place of a pack of its own."""
    for size in range(8, 40, 4):
        params, grads = rng.standard_normal((2, size + 3)).astype("f4")
        cpu, device = (FusedAdam(state_dtype=stored, master_params=None) for _ in range(2))
        buffer, sent = cupy.asarray(params)[3:], cupy.asarray(grads)[3:]
        for _ in range(2):
            cpu.step(params[3:], grads[3:])
            device.step(buffer, sent)
        assert_same_state(device.state_dict(), cpu.state_dict())


def test_blocks_of_units():
    segments = Segments(
        [Segment(0, 130, lr=0.1), Segment(300, 520, frozen=True), Segment(640, 700, frozen=True)]
    )
    tables = block_tables(segments.units(700), 700)
    rows = {start // 128: row for start, _, row in segments.units(700).whole.tolist()}
    assert tables.of_block.tolist() == [rows[0], -2, -3, -1, -4, -1]
    assert tables.first_piece.tolist() == [0, 2, 4, 6]
    assert tables.pieces[:, :2].tolist() == [
        [128, 130], [130, 256], [256, 300], [300, 384], [512, 520], [520, 640],
    ]  # fmt: skip
    assert (tables.pieces[:, 2] == -1).tolist() == [False, False, False, True, True, False]


@pytest.mark.parametrize("size", [0, 1, 128])
@pytest.mark.parametrize("kind", DTYPES)
def test_sizes(cupy, rng, kind, size):
    params, grads = (encoded(rng.standard_normal(size).astype("f4"), kind) for _ in range(2))
    cpu, device = (FusedAdam(state_dtype="8bit", zero_grads=True) for _ in range(2))
    step_both(cupy, cpu, device, params, cupy.asarray(params), [grads])


def test_warmup_compiles_the_step(cupy, monkeypatch):
    from fastadam import backends

    kernels = backends.load("cupy")
    seen, compiled = [], kernels.kernel
    monkeypatch.setattr(kernels, "kernel", lambda *key: seen.append(key[:2]) or compiled(*key), raising=True)
    for flags in ({}, {"capturable": True}, {"segments": [Segment(0, 3, lr=0.1)], "max_grad_norm": 1.0}):
        fastadam.warmup(backend="cupy", state_dtype="8bit", **flags)
        ready = set(seen)
        seen.clear()
        FusedAdam(state_dtype="8bit", **flags).step(ones(cupy), ones(cupy))
        assert set(seen) <= ready
