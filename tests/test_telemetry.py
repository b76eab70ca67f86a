"""Telemetry: every field by its definition, bit for bit; and not a bit of a step is another."""

from __future__ import annotations

import itertools

import ml_dtypes
import numba
import numpy as np
import pytest
from segment_steps import FEATURES
from telemetry_oracle import assert_same, fields, observe, plain, stepped, told, tree_of_runs
from test_phase_bits import special_values
from tolerances import assert_same_bits
from trees import literal_chunk, literal_sum

from fastadam import FusedAdam, FusedSGD, Segment
from fastadam.kernels import cpu, norms, telemetry, threads

DTYPES = ["float32", "float64"]
SIZES = [0, 1, 31, 32, 33, 64, 95, 2047, 2048, 2049, 4096 + 5, 5 * 2048 + 33]
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)
every_feature = pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)


def problem(rng, size, dtype, steps=3):
    """Parameters of which some are so large that updates vanish, and gradients."""
    params = (10.0 ** rng.uniform(-3, 9, size) * rng.standard_normal(size)).astype(dtype)
    return params, [rng.standard_normal(size).astype(dtype) for _ in range(steps)]


def mixed(size):
    """Segments that begin and end within rows and chunks, with other step sizes, some frozen."""
    edges = [3, 4, 40, 64, 96, 97, 2000, 2048, 2080, 4095, 4100, 6000, 6001, 9000, 9001, 10_000]
    edges = [edge for edge in edges if edge < size]
    kinds = [{"lr": 0.0}, {"lr": 0.5, "weight_decay": 0.0}, {"frozen": True}, {"betas": (0.3, 0.4)}, None]
    return [
        Segment(start, stop, **kinds[k % 5])
        for k, (start, stop) in enumerate(itertools.pairwise(edges))
        if kinds[k % 5] is not None
    ]


# --- Every field --------------------------------------------------------------------------------------------


@every_feature
@both_dtypes
@pytest.mark.parametrize("size", SIZES)
def test_every_field(rng, size, dtype, features):
    params, gradients = problem(rng, size, dtype)
    opt = FusedAdam(telemetry=True, **features)
    for grads, scale in zip(gradients, [None, 3.0, 1024.0], strict=True):
        last = observe(opt, params, grads, scale)
        assert last.nonfinite == 0
    if size > 1000 and dtype == "float32" and not features:
        assert last.vanished > 0


@every_feature
@both_dtypes
@pytest.mark.parametrize("size", [97, 10_001])
def test_every_field_with_segments(rng, size, dtype, features):
    params, gradients = problem(rng, size, dtype)
    segments = mixed(size)
    for start in (segment.start for segment in segments if segment.frozen):
        params[start], gradients[1][start] = np.inf, np.nan  # does not count
    opt = FusedAdam(telemetry=True, segments=segments, **features)
    for grads, scale in zip(gradients, [None, 3.0, 1024.0], strict=True):
        last = observe(opt, params, grads, scale)
        assert np.isfinite(last.param_norm)


def test_the_sums_literally(rng):
    """The oracle's sums, in turn, are those of Python floats."""
    params, (grads, *_) = problem(rng, 5 * 2048 + 33, "float32")
    opt, before, after = FusedAdam(telemetry=True), params, params.copy()
    opt.step(after, grads)
    moved = [float(a) - float(b) for a, b in zip(after, before, strict=True)]
    last = opt.last_step
    assert last.grad_norm**2 == pytest.approx(literal_sum(grads), rel=1e-15)
    assert [last.update_norm, last.param_norm] == [
        np.sqrt(literal_sum(terms)) for terms in (moved, after.tolist())
    ]


@both_dtypes
@pytest.mark.parametrize("features", [{}, FEATURES["l2"], FEATURES["all"]], ids=["plain", "l2", "all"])
def test_special_values(dtype, features):
    params, grads = special_values(dtype)
    opt = FusedAdam(telemetry=True, **features)
    for given in (grads, np.roll(grads, 1), grads):
        assert observe(opt, params, given.copy()).nonfinite == (~np.isfinite(grads)).sum()


@both_dtypes
def test_no_eps_makes_no_nan_of_the_rest_of_a_row(rng, dtype):
    """Rows that are not full are filled up with zeros, of which a step makes 0 / 0."""
    params, gradients = problem(rng, 45, dtype)
    opt = FusedAdam(telemetry=True, eps=0.0, segments=[Segment(5, 9, frozen=True), Segment(9, 40, lr=0.2)])
    for grads in gradients:
        assert np.isfinite(observe(opt, params, grads).update_norm)


def test_cleared_gradients_are_counted_before():
    params, grads = np.ones(5000, np.float32), np.ones(5000, np.float32)
    grads[[0, 2048, 4999]] = np.inf, np.nan, -np.inf
    last = observe(FusedAdam(telemetry=True, zero_grads=True), params, grads)
    assert last.nonfinite == 3
    assert not grads.any()


def test_a_square_that_overflows_is_finite():
    params, grads = np.ones(100), np.ones(100)
    grads[7], grads[9] = 1e200, np.inf
    assert observe(FusedAdam(telemetry=True), params, grads).nonfinite == 1


# --- Vanished -----------------------------------------------------------------------------------------------


def test_vanished_updates_are_counted():
    params, grads = np.full(5000, 1e8, np.float32), np.ones(5000, np.float32)
    params[:10], grads[10:30] = 0.0, 0.0  # moved; no moment
    opt = FusedAdam(lr=1.0, telemetry=True)
    assert observe(opt, params, grads).vanished == 4970
    opt.lr = 100.0
    assert observe(opt, params, grads).vanished == 0
    opt.lr = 0.0
    assert observe(opt, params, grads).vanished == 0
    opt.lr = 1e-3
    grads[:] = 0
    assert observe(opt, params, grads).vanished == 4970, "the moments are still there"


def test_frozen_elements_and_those_without_a_rate_do_not_vanish():
    params, grads = np.full(100, 1e8, np.float32), np.ones(100, np.float32)
    segments = [Segment(0, 30, frozen=True), Segment(50, 70, lr=0.0), Segment(70, 80, lr=100.0)]
    assert observe(FusedAdam(telemetry=True, segments=segments), params, grads).vanished == 40


# --- Skipped, clipped, accumulated --------------------------------------------------------------------------


def test_a_skipped_step_tells_why():
    params, grads = np.ones(5000, np.float32), np.ones(5000, np.float32)
    opt = FusedAdam(skip_nonfinite=True, telemetry=True)
    observe(opt, params, grads)
    grads[[1, 4000]] = np.nan
    opt.step(params, grads)
    assert opt.last_step.skipped
    expected = {"nonfinite": 2, "update_norm": None, "param_norm": None, "vanished": None}
    assert_same(fields(opt.last_step, tuple(expected)), expected)
    assert np.isnan(opt.last_step.grad_norm)
    observe(opt, params, np.ones_like(params))


@both_dtypes
def test_the_norm_is_that_of_clipping(rng, dtype):
    params, gradients = problem(rng, 10_001, dtype)
    segments = mixed(10_001)
    for scale in (None, 7.0):
        clipped = stepped(params, gradients, scale, max_grad_norm=0.5, segments=segments)[1]
        told = stepped(params, gradients, scale, telemetry=True, segments=segments)[1]
        both = stepped(params, gradients, scale, telemetry=True, max_grad_norm=0.5, segments=segments)[1]
        assert clipped.grad_norm == told.grad_norm == both.grad_norm
        assert clipped.clip_factor == both.clip_factor < 1 == told.clip_factor


@pytest.mark.parametrize("segments", [[], mixed(5000)], ids=["whole", "segments"])
@pytest.mark.parametrize("scale", [None, 8.0])
def test_accumulated_gradients(rng, segments, scale):
    params, gradients = problem(rng, 5000, "float32")
    opt, before = FusedAdam(telemetry=True, segments=segments), params.copy()
    for round_ in range(2):
        for grads in gradients[round_:]:
            opt.accumulate(grads)
        before[:] = params
        opt.step(params, grad_scale=scale)
        total = np.zeros_like(params)
        for grads in gradients[round_:]:
            total += grads
        divisor = (3 - round_) * (1.0 if scale is None else scale)
        expected = told(before, params, total, opt.state.exp_avg, segments, scale=divisor)
        assert_same(fields(opt.last_step), expected)
    assert not opt._accumulator.total.any()


# --- The bits of a step are the same ------------------------------------------------------------------------


@every_feature
@both_dtypes
@pytest.mark.parametrize("size", SIZES)
def test_a_step_has_the_bits_that_it_has_without(rng, size, dtype, features):
    params, gradients = problem(rng, size, dtype)
    for segments in ([], mixed(size)):
        for scale in (None, 3.0):
            options = {"segments": segments, **features}
            actual, last = stepped(params, gradients, scale, telemetry=True, **options)
            expected, without = stepped(params, gradients, scale, **options)
            for one, other in zip(actual, expected, strict=True):
                assert_same_bits(one, other)
            assert plain(last) == plain(without)


@both_dtypes
@every_feature
def test_special_values_have_the_bits_that_they_have_without(dtype, features):
    params, grads = special_values(dtype)
    gradients = [grads, np.roll(grads, 1), grads]
    actual, _ = stepped(params, gradients, telemetry=True, **features)
    for one, other in zip(actual, stepped(params, gradients, **features)[0], strict=True):
        assert_same_bits(one, other)


WAYS = ["1-thread", "2-threads", "pool"]


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["l2", "all"])
def test_any_threads(rng, monkeypatch, way, name):
    size = 150_001
    params, gradients = problem(rng, size, "float32")
    for segments in ([], mixed(size)):
        options = {"telemetry": True, "segments": segments, **FEATURES[name]}
        with monkeypatch.context() as patch:
            for module in (telemetry, norms):
                patch.setattr(module, "PARALLEL_FROM", 10**9)
            expected = stepped(params, gradients, **options)
        with monkeypatch.context() as patch:
            for module in (telemetry, norms):
                patch.setattr(module, "PARALLEL_FROM", 0)
            patch.setattr(threads, "numba_is_safe", lambda: way != "pool")
            patch.setattr(threads, "MIN_PIECE", 3000)
            numba.set_num_threads(min(1 if way == "1-thread" else 2, numba.config.NUMBA_NUM_THREADS))
            actual = stepped(params, gradients, **options)
        for one, other in zip(actual[0], expected[0], strict=True):
            assert_same_bits(one, other)
        assert actual[1] == expected[1]


def test_a_large_buffer(rng):
    """As it is stepped by default: by many threads, over more than one chunk of sums."""
    size = 2048 * 2048 + 4097
    assert size > max(cpu.PARALLEL_FROM, telemetry.PARALLEL_FROM)
    params, (grads, *_) = problem(rng, size, "float32", steps=1)
    observe(FusedAdam(telemetry=True), params, grads)


@both_dtypes
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_any_alignment_and_read_only_gradients(rng, dtype, offset):
    params, gradients = problem(rng, 2500, dtype)
    expected, told_ = stepped(params, gradients, telemetry=True)
    opt, shifted = FusedAdam(telemetry=True), np.concatenate([np.zeros(offset, dtype), params])[offset:]
    for grads in gradients:
        given = np.concatenate([np.zeros(4 - offset, dtype), grads])[4 - offset :]
        given.flags.writeable = False
        opt.step(shifted, given)
    assert_same_bits(shifted, expected[0])
    assert opt.last_step == told_


# --- The checks can fail ------------------------------------------------------------------------------------


def float32_difference(before, after):
    return (after - before).astype(np.float64)


def other_lanes(terms, between):
    return sum(literal_chunk(terms[start:stop].tolist(), width=16, fold=sum) for start, stop in between)


def one_tree(terms, between):
    kept = np.concatenate([terms[start:stop] for start, stop in between])
    return tree_of_runs(kept, [(0, kept.size)])


WRONG = {
    "differences in float32": {"difference": float32_difference},
    "another tree": {"tree": other_lanes},
    "runs put together": {"tree": one_tree},
    "without a moment": {"has_vanished": lambda before, after, _, lr: (after == before) & (lr != 0)},
    "without a rate": {"has_vanished": lambda before, after, exp_avg, _: (after == before) & (exp_avg != 0)},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_another_definition_shows(rng, wrong):
    """Not of every buffer: the last roundings of two orders are often the same."""
    segments, shown = mixed(10_001), 0
    for _ in range(10):
        params, (grads, *_) = problem(rng, 10_001, "float32")
        grads[::7] = 0
        opt, before = FusedAdam(telemetry=True, segments=segments), params.copy()
        opt.step(params, grads)
        given = (before, params, grads, opt.state.exp_avg, segments)
        assert fields(opt.last_step) == told(*given)
        shown += fields(opt.last_step) != told(*given, **wrong)
    assert shown >= 2


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_an_average_is_no_update(dtype):
    """Of a rule without moments it is the first state; a gradient of zero makes no update that vanishes."""
    opt = FusedSGD(lr=1e-9, ema_decay=0.5, telemetry=True, rounding="nearest")
    params, grads = np.ones(40, dtype), np.zeros(40, dtype)
    grads[:3] = 1
    opt.step(params, grads)
    assert opt.last_step.vanished == 3
