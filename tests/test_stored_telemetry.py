"""Telemetry of any storage: every field by its definition; and not a bit of a step is another."""

from __future__ import annotations

import ml_dtypes
import numba
import numpy as np
import pytest
from telemetry_oracle import assert_same, fields, told
from tolerances import assert_same_bits

from fastadam import FusedAdam, Segment
from fastadam.kernels import stored, stored_telemetry, telemetry, threads
from fastadam.kernels.groups import KEPT, Cuts
from fastadam.kernels.run_chunks import RunChunks
from fastadam.kernels.tree import CHUNK
from fastadam.segments import Segments

F32, F16, BF16 = np.float32, np.float16, ml_dtypes.bfloat16

STORAGES = {
    "out": (F32, F32, BF16, {}),
    "bfloat16": (BF16, BF16, None, {"state_dtype": "bfloat16", "weight_decay": 0.1}),
    "8bit": (F32, F32, None, {"state_dtype": "8bit", "max_grad_norm": 5.0, "zero_grads": True}),
    "split": (BF16, BF16, F16, {"state_dtype": "8bit", "master_params": "split", "zero_grads": True}),
    "master": (
        F16,
        BF16,
        None,
        {"state_dtype": ("bfloat16", "8bit"), "master_params": "float32", "amsgrad": True, "ema_decay": 0.9},
    ),
    "nearest": (
        F16,
        F32,
        None,
        {"state_dtype": ("8bit", "float32"), "rounding": "nearest", "maximize": True},
    ),
}
"""Parameters, gradients, a copy of the parameters, and what the optimizer is made with."""

LR = 1e-4
every_storage = pytest.mark.parametrize("name", STORAGES)


def problem(rng, size, name, steps=2):
    """Parameters of which some are so large that updates vanish, and gradients, some of them 0."""
    params = (10.0 ** rng.uniform(-3, 4, size) * rng.standard_normal(size)).astype(STORAGES[name][0])
    gradients = []
    for _ in range(steps):
        grads = rng.standard_normal(size) * 10.0 ** rng.uniform(-7, 0, size)  # some too small for their block
        grads[::7] = 0
        gradients.append(grads.astype(STORAGES[name][1]))
    return params, gradients


def mixed(size):
    """Segments that leave runs in the same block, and runs of many chunks that begin anywhere."""
    frozen = [(0, 3), (10, 12), (20, 21), (30, 50), (127, 129), (300, 351), (6001, 6002), (6010, 6200)]
    others = [(60, 64, {"lr": 0.0}), (2000, 2048, {"lr": 0.5}), (4099, 4105, {"betas": (0.3, 0.4)})]
    parts = [(a, b, {"frozen": True}) for a, b in frozen] + others
    return [Segment(a, b, **own) for a, b, own in parts if b <= size]


def exact(opt, params):
    """The parameters as they are kept."""
    if opt.state.step and opt.master_params == "float32":
        return opt.state.param_master.copy()
    if opt.state.step and opt.master_params == "split":
        bits = (params.view(np.int16).astype(np.int64) << 16) + opt.state.param_remainder
        return (bits & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
    return params.astype(np.float32)


def observe(opt, params, grads, scale=None, out=None):
    """Step, and assert that all of it is told."""
    before, given = exact(opt, params), grads.astype(np.float32)
    opt.step(params, grads, grad_scale=scale, out=out)
    exp_avg = np.asarray(opt.state.exp_avg).astype(np.float32)
    expected = told(before, exact(opt, params), given, exp_avg, opt.segments, opt.lr, scale)
    assert_same(fields(opt.last_step), expected)
    return opt.last_step


def copy_for(params, name):
    kind = STORAGES[name][2]
    return None if kind is None else np.zeros(params.size, kind)


def written(params, gradients, name, scales=(None, 3.0), **flags):
    """Return all that steps have written, and what the last of them told."""
    opt, params = FusedAdam(LR, **STORAGES[name][3], **flags), params.copy()
    gradients, out = [grads.copy() for grads in gradients], copy_for(params, name)
    for grads, scale in zip(gradients, scales, strict=True):
        opt.step(params, grads, grad_scale=scale, out=out)
    arrays = [params, *gradients, *opt.state.arrays, *([] if out is None else [out])]
    return [np.asarray(array).astype(np.float32) for array in arrays], opt.last_step


# --- Every field --------------------------------------------------------------------------------------------


@every_storage
@pytest.mark.parametrize("size", [0, 1, 127, 129, CHUNK, CHUNK + 1, 3 * CHUNK + 77])
def test_every_field(rng, name, size):
    for segments in ([], mixed(size)):
        params, gradients = problem(rng, size, name)
        opt = FusedAdam(LR, telemetry=True, segments=segments, **STORAGES[name][3])
        for grads, scale in zip(gradients, (None, 3.0), strict=True):
            last = observe(opt, params, grads, scale, copy_for(params, name))
            assert last.nonfinite == 0
        if size > CHUNK:
            assert 0 < last.vanished < size


@every_storage
def test_a_step_has_the_bits_that_it_has_without(rng, name):
    for size in (130, 3 * CHUNK + 77):
        params, gradients = problem(rng, size, name)
        for segments in ([], mixed(size), [Segment(0, 100, frozen=True)]):
            found, _ = written(params, gradients, name, telemetry=True, segments=segments)
            expected, _ = written(params, gradients, name, segments=segments)
            for one, other in zip(found, expected, strict=True):
                assert_same_bits(one, other)


@pytest.mark.parametrize("segments", [False, True])
def test_plain_arrays_have_the_report_of_the_loop_for_them(rng, segments):
    size = 3 * CHUNK + 77
    params, gradients = problem(rng, size, "out")
    reports = []
    for out in (None, np.empty(size, F32)):
        opt = FusedAdam(LR, telemetry=True, segments=mixed(size) if segments else [])
        here = params.copy()
        for grads in gradients:
            opt.step(here, grads, out=out)
        reports.append(opt.last_step)
    assert reports[0] == reports[1]
    assert reports[0].vanished > 0


# --- What is not finite, skipped, accumulated ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["8bit", "split", "bfloat16"])
def test_what_is_not_finite_is_counted_before_it_is_cleared(rng, name):
    size = 2 * CHUNK + 500
    params, (grads, other) = problem(rng, size, name)
    opt = FusedAdam(LR, telemetry=True, segments=[Segment(0, 50, frozen=True)], **STORAGES[name][3])
    for k in (3, 60, 127, 128, 50 + CHUNK, size - 1):  # the first counts for nothing
        grads[k] = np.nan if k % 2 else np.inf
    out = copy_for(params, name)
    assert observe(opt, params, grads, out=out).nonfinite == 5
    assert observe(opt, params, other, out=out).nonfinite == 0
    assert np.isnan(opt.last_step.param_norm)


@pytest.mark.parametrize("name", ["8bit", "split"])
def test_a_skipped_step_tells_why(rng, name):
    params, (grads, other) = problem(rng, 300, name)
    opt = FusedAdam(LR, telemetry=True, skip_nonfinite=True, **STORAGES[name][3])
    out = copy_for(params, name)
    observe(opt, params, other, out=out)
    before = params.copy()
    grads[[1, 200]] = np.nan
    opt.step(params, grads, out=out)
    last = opt.last_step
    assert (last.skipped, last.nonfinite, opt.state.step) == (True, 2, 1)
    assert (last.update_norm, last.param_norm, last.vanished) == (None, None, None)
    assert_same_bits(params.astype(F32), before.astype(F32))


@pytest.mark.parametrize("name", ["8bit", "split"])
@pytest.mark.parametrize("segments", [[], [Segment(5, 140, frozen=True)]], ids=["whole", "segments"])
def test_accumulated_gradients(rng, name, segments):
    params, gradients = problem(rng, 3000, name)
    opt = FusedAdam(LR, telemetry=True, segments=segments, **STORAGES[name][3])
    total = sum(grads.astype(F32) for grads in gradients)
    before = exact(opt, params)
    for grads in gradients:
        opt.accumulate(grads)
    opt.step(params, out=copy_for(params, name))
    exp_avg = np.asarray(opt.state.exp_avg).astype(F32)
    expected = told(before, exact(opt, params), total, exp_avg, segments, LR, 2.0)
    assert_same(fields(opt.last_step), expected)
    assert not opt._accumulator.total.any()


def test_telemetry_may_be_switched(rng):
    params, gradients = problem(rng, 300, "8bit")
    opt = FusedAdam(LR, state_dtype="8bit")
    opt.step(params, gradients[0])
    assert opt.last_step.param_norm is None
    opt.telemetry = True
    observe(opt, params, gradients[1])
    told_before = opt.last_step
    opt.telemetry = False
    opt.step(params, gradients[0])
    assert opt.last_step.param_norm is None
    assert told_before.param_norm is not None


def test_what_vanishes_is_what_is_stored():
    """Without a master the 16-bit parameter, with one the master."""
    grads = np.ones(1000, F32)
    for master, vanished in ((None, 1000), ("float32", 0), ("split", 0)):
        params = np.full(1000, 1, BF16)  # the next below is 1/256 away
        opt = FusedAdam(1e-4, telemetry=True, master_params=master, rounding="nearest")
        assert observe(opt, params, grads).vanished == vanished
        assert (opt.last_step.update_norm == 0) == (master is None)


# --- Threads ------------------------------------------------------------------------------------------------

WAYS = ["1-thread", "2-threads", "pool"]


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["split", "bfloat16"])
def test_any_threads(rng, monkeypatch, way, name):
    """With blocks and without: loops of each kind, of which one or the other cuts its shares.

    They take long to compile: with a scale one of them, without the other.
    """
    size, scales = 50_001, [3.0 if name == "split" else None] * 2
    params, gradients = problem(rng, size, name)
    for segments in ([], mixed(size), [Segment(0, 100, frozen=True)]):
        with monkeypatch.context() as patch:
            for module in (telemetry, stored, stored_telemetry):
                patch.setattr(module, "PARALLEL_FROM", 10**9)
            expected = written(params, gradients, name, scales, telemetry=True, segments=segments)
        with monkeypatch.context() as patch:
            for module in (telemetry, stored, stored_telemetry):
                patch.setattr(module, "PARALLEL_FROM", 0)
            patch.setattr(threads, "numba_is_safe", lambda: way != "pool")
            patch.setattr(threads, "MIN_PIECE", 3000)
            numba.set_num_threads(min(1 if way == "1-thread" else 2, numba.config.NUMBA_NUM_THREADS))
            found = written(params, gradients, name, scales, telemetry=True, segments=segments)
        for one, other in zip(found[0], expected[0], strict=True):
            assert_same_bits(one, other)
        assert found[1] == expected[1]


@pytest.mark.parametrize("segments", [False, True])
def test_loops_are_chosen_by_the_storage(segments):
    """What is not in 8 bits needs no blocks."""
    params = np.ones(300, F32)
    for state_dtype in ("float32", "bfloat16", ("float32", "8bit")):
        opt = FusedAdam(state_dtype=state_dtype, segments=mixed(300) if segments else [])
        opt.step(params, np.ones(300, F32), out=np.empty(300, F16))
        assert (opt._segmented.storage.scales is None) == ("8bit" not in state_dtype)


# --- Tables -------------------------------------------------------------------------------------------------


def tables_of(size, segments, *, in_blocks):
    units = Segments(segments).units(size)
    chunks = RunChunks(units)
    groups = Cuts(units, size).groups(1, tuple(chunks.bounds[:, 0].tolist()), in_blocks=in_blocks)
    return chunks, stored_telemetry.tables(chunks, groups)


def elements(tables, groups):
    """Of each group, the elements that are stepped."""
    return [
        np.concatenate([np.arange(a, b) for a, b, row in tables.pieces[slice(*group)] if row != KEPT])
        for group in groups
    ]


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("start", [0, 1, 100, 128, 2000])
def test_each_element_is_stepped_once_and_kept_where_its_chunk_looks(in_blocks, start):
    size = 5 * CHUNK + 33
    segments = [Segment(s.start + start, s.stop + start, frozen=s.frozen) for s in mixed(size - start)]
    if start:
        segments.append(Segment(0, start, frozen=True))
    chunks, tables = tables_of(size, segments, in_blocks=in_blocks)
    own, across = elements(tables, tables.groups), elements(tables, tables.across)
    counted = np.concatenate([np.arange(a, b) for a, b in chunks.bounds])
    assert np.array_equal(np.sort(np.concatenate([*own, *across])), counted)
    assert bool(len(across)) == in_blocks
    for k, (begin, end) in enumerate(chunks.bounds):
        of_chunk = own[tables.first_group[k] : tables.first_group[k + 1]]
        assert all(((begin <= part) & (part < end)).all() for part in of_chunk)
        missing = np.setdiff1d(np.arange(begin, end), np.concatenate([*of_chunk, []]))
        kept = [across[number] for number in set(tables.edges[k].tolist()) - {-1}]
        assert np.isin(missing, np.concatenate([*kept, []])).all()
        assert len(missing) == sum(((begin <= part) & (part < end)).sum() for part in kept)
    assert all(len(set(group // 128)) == 1 for group in across)


def test_blocks_across_chunks_are_stepped_by_one_call(monkeypatch):
    """In our own pool nothing could wait for them, and an interrupt may come between two calls."""
    monkeypatch.setattr(stored_telemetry, "PARALLEL_FROM", 0)
    monkeypatch.setattr(threads, "numba_is_safe", lambda: False)
    monkeypatch.setattr(threads, "MIN_PIECE", 3000)
    monkeypatch.setattr(threads, "count", lambda: 2)
    calls = []
    monkeypatch.setattr(threads, "in_pool", lambda given: calls.append(len(given)) or (lambda: None))
    for start in (128, 100):
        params = np.ones(50_000, F32)
        segments = [Segment(0, start, frozen=True)]
        FusedAdam(telemetry=True, state_dtype="8bit", segments=segments).step(params, params.copy())
    assert calls == [2]


# --- The checks can fail ------------------------------------------------------------------------------------


def test_another_definition_shows(rng):
    params, (grads, _) = problem(rng, 3000, "8bit")
    opt, before = FusedAdam(LR, telemetry=True, state_dtype="8bit"), params.copy()
    opt.step(params, grads)
    exp_avg = np.asarray(opt.state.exp_avg).astype(F32)
    assert fields(opt.last_step) == told(before, params, grads, exp_avg, lr=LR)
    unrounded = told(before, params, grads, grads, lr=LR)  # of the first step, 0 where the gradient is
    assert opt.last_step.vanished < unrounded["vanished"]
