"""Segments: one pass has the bits of separate optimizers on the slices."""

from __future__ import annotations

import itertools

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from segment_steps import FEATURES, N, assert_one_pass_is_separate_steps, norm, one_pass
from tolerances import assert_same_bits
from trees import array_tree

from fastadam import FusedAdam, Segment, schedules
from fastadam.kernels import norms, segment_norms, threads
from fastadam.kernels import segments as loops
from fastadam.kernels.run_chunks import RunChunks
from fastadam.kernels.units import Units

every_feature = pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
both_dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


@st.composite
def segmentations(draw, size=N):
    """Segments in any order, with gaps."""
    edges = sorted(draw(st.sets(st.integers(0, size), max_size=9)))
    segments = []
    for start, stop in itertools.pairwise(edges):
        if draw(st.integers(0, 4)) == 0:
            continue
        values = {
            "lr": draw(st.sampled_from([None, 0.0, 0.05, schedules.linear(0.1, steps=2)])),
            "weight_decay": draw(st.sampled_from([None, 0.0, 0.3])),
            "betas": draw(st.sampled_from([None, (0.0, 0.0), (0.3, 0.4), (0.9, 0.95)])),
            "eps": draw(st.sampled_from([None, 0.0, 1e-3])),
            "frozen": draw(st.integers(0, 4)) == 0,
        }
        segments.append(Segment(start, stop, **values))
    return draw(st.permutations(segments))


@st.composite
def problems(draw, dtype):
    """Parameters and three gradients, with all special values."""
    elements = st.floats(width=np.dtype(dtype).itemsize * 8) | st.sampled_from([0.0, -0.0, 1.0, -2.0])
    return [draw(hnp.arrays(dtype, N, elements=elements)) for _ in range(4)]


@every_feature
@both_dtypes
@given(data=st.data())
def test_one_pass_has_the_bits_of_separate_optimizers(features, dtype, data):
    params, *gradients = data.draw(problems(dtype))
    assert_one_pass_is_separate_steps(params, gradients, data.draw(segmentations()), **features)


@every_feature
@given(segments=segmentations())
def test_finite_gradients_that_are_scaled(features, segments):
    rng = np.random.default_rng(0)
    params, *gradients = rng.standard_normal((4, N)).astype(np.float32)
    assert_one_pass_is_separate_steps(params, gradients, segments, [2.0, 1024.0, 0.5], **features)


def test_decay_is_decided_segment_by_segment():
    """No decay leaves -0, inf and NaN alone; a decay of 0, by a learning rate of 0, does not."""
    params = np.tile(np.array([-0.0, np.inf, -np.inf, np.nan], np.float32), 3)
    grads = np.zeros_like(params)
    grads[::4] = -0.0
    segments = [Segment(0, 4, weight_decay=0.0), Segment(4, 8, weight_decay=0.5), Segment(8, 12, lr=0.0)]
    for features in (FEATURES["l2"], FEATURES["adamw"]):
        assert_one_pass_is_separate_steps(params, [grads] * 2, segments, **features)
    after = one_pass(params, [np.zeros_like(params)], segments, **FEATURES["adamw"])[0]
    assert np.isinf(after[[1, 2]]).all()
    assert np.isnan(after[[5, 6, 9, 10]]).all()


def uneven(rng, size, count):
    """Segments of log-uniform sizes, some frozen, with gaps."""
    sizes = np.exp(rng.uniform(0, 8, count))
    edges = np.unique((np.cumsum(sizes) / sizes.sum() * size).astype(int))
    return [
        Segment(a, b, lr=0.01 * (k % 5), weight_decay=0.1 * (k % 2), frozen=k % 11 == 0)
        for k, (a, b) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
        if k % 7
    ]


WAYS = ["serial", "1-thread", "2-threads", "pool"]


def have(monkeypatch, way):
    """Take the following steps in some way, whatever their size."""
    threshold = 10**9 if way == "serial" else 0
    monkeypatch.setattr(loops, "PARALLEL_FROM", threshold)
    monkeypatch.setattr(norms, "PARALLEL_FROM", threshold)
    monkeypatch.setattr(threads, "numba_is_safe", lambda: way != "pool")
    monkeypatch.setattr(threads, "MIN_PIECE", 3000)
    monkeypatch.setattr(norms, "MIN_PIECE", 3000)
    numba.set_num_threads(min(1 if way == "1-thread" else 2, numba.config.NUMBA_NUM_THREADS))


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["l2", "all"])
def test_any_threads(rng, monkeypatch, way, name):
    size = 150_001
    params, *gradients = rng.standard_normal((3, size)).astype(np.float32)
    segments = uneven(rng, size, 300)
    with monkeypatch.context() as patch:
        have(patch, way)
        actual, left, opt = one_pass(params, gradients, segments, **FEATURES[name])
        if way == "pool":
            assert threads._workers > 0
    have(monkeypatch, "serial")
    expected, expected_left, reference = one_pass(params, gradients, segments, **FEATURES[name])
    for a, b in zip(
        [actual, *left, *opt.state.arrays],
        [expected, *expected_left, *reference.state.arrays],
        strict=True,
    ):
        assert_same_bits(a, b)
    assert opt.last_step == reference.last_step
    monkeypatch.undo()
    assert_one_pass_is_separate_steps(params, gradients, segments, **FEATURES[name])


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize("way", WAYS)
def test_norm_between_frozen_segments(rng, monkeypatch, way):
    size = 150_001
    grads = rng.standard_normal(size).astype(np.float32)
    segments = [
        Segment(a, b, frozen=True) for a, b in [(0, 7), (2055, 2056), (9000, 50_000), (150_000, 150_001)]
    ]
    expected = norm(grads, segments)
    have(monkeypatch, way)
    opt = one_pass(np.ones_like(grads), [grads], segments, max_grad_norm=1.0)[2]
    assert opt.last_step.grad_norm == expected
    kept = np.delete(grads, np.concatenate([np.arange(s.start, s.stop) for s in segments]))
    assert expected == pytest.approx(np.linalg.norm(kept.astype(float)), rel=1e-12)


def test_norm_with_nothing_frozen_is_that_of_the_buffer(rng):
    params, grads = rng.standard_normal((2, 30_000)).astype(np.float32)
    plain = one_pass(params, [grads], [], max_grad_norm=1.0)[2]
    segments = [Segment(k, k + 777, lr=0.1) for k in range(0, 29_000, 777)]
    assert one_pass(params, [grads], segments, max_grad_norm=1.0)[2].last_step == plain.last_step


def test_norm_with_all_frozen():
    params = np.ones(4, np.float32)
    after, _, opt = one_pass(params, [params], [Segment(0, 4, frozen=True)], max_grad_norm=1.0)
    assert opt.last_step.grad_norm == 0.0
    assert opt.state.step == 1
    assert_same_bits(after, params)


def test_the_norm_counts_by_chunks_of_runs():
    """Non-finite elements, whether or not the sum overflows."""
    grads = np.ones(10_000)
    grads[[1, 5000, 5001, 9999]] = np.nan, np.inf, 1e200, -np.inf
    pass_ = segment_norms.RunNorm(chunks_of([[0, 1], [2, 6000], [6001, 9999]]))
    assert pass_.measure(grads, np.empty(pass_.scratch_size)) == (np.inf, 1)


def chunks_of(runs):
    return RunChunks(Units(np.array([[start, stop, 0] for start, stop in runs])))


def test_sums_of_runs_are_summed_by_the_tree(rng):
    runs = [[3 * k, 3 * k + 2] for k in range(2500)]
    grads = rng.standard_normal(7500)
    pass_ = segment_norms.RunNorm(chunks_of(runs))
    expected = array_tree([array_tree(grads[a:b] ** 2) for a, b in runs])
    assert pass_.measure(grads, np.empty(pass_.scratch_size)) == (expected, 0)


# --- Frozen segments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_frozen_segments_are_not_touched(rng, bad):
    params = rng.standard_normal(N).astype(np.float32)
    params[10:20] = bad
    gradients = [rng.standard_normal(N).astype(np.float32) for _ in range(3)]
    for grads in gradients:
        grads[10:20] = bad
    features = {**FEATURES["all"], "skip_nonfinite": True}
    after, left, opt = one_pass(params, gradients, [Segment(10, 20, lr=1.0, frozen=True)], **features)
    assert_same_bits(after[10:20], params[10:20])
    assert (after[:10] != params[:10]).any()
    for name, moment in opt.state.moments.items():
        assert_same_bits(moment[10:20], params[10:20] if name == "param_ema" else np.zeros(10, np.float32))
    for grads, before in zip(left, gradients, strict=True):
        assert_same_bits(grads[10:20], before[10:20])
        assert not np.delete(grads, np.arange(10, 20)).any()
    assert opt.state.step == 3


def test_a_skipped_step_clears_what_is_not_frozen():
    params, grads = np.ones(8, np.float32), np.ones(8, np.float32)
    grads[0] = np.nan
    segments = [Segment(2, 4, frozen=True), Segment(4, 6, lr=0.1)]
    after, (left,), opt = one_pass(params, [grads], segments, skip_nonfinite=True, zero_grads=True)
    assert opt.last_step.skipped
    assert opt.state.step == 0
    assert left.tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    assert_same_bits(after, params)


def test_a_thawed_segment_goes_on_with_the_step_number(rng):
    params, *gradients = rng.standard_normal((4, N)).astype(np.float32)
    opt, actual = FusedAdam(segments=[Segment(0, 9, frozen=True)]), params.copy()
    opt.step(actual, gradients[0])
    opt.segments = ()
    opt.step(actual, gradients[1])
    late = FusedAdam()
    late.load_state_dict(
        {**late.state_dict(), "step": 1, "exp_avg": np.zeros(9, np.float32)}
        | {"exp_avg_sq": np.zeros(9, np.float32)}
    )
    expected = params[:9].copy()
    late.step(expected, gradients[1][:9])
    assert_same_bits(actual[:9], expected)
