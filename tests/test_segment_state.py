"""Segments between steps: what they follow, what a step costs the host, checkpoints."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from checkpoints import WAYS, resume
from segment_steps import FEATURES, N, one_pass
from tolerances import assert_same_bits

import fastadam
from fastadam import FusedAdam, Segment, schedules
from fastadam.kernels import segment_norms
from fastadam.kernels import segments as loops

# --- Hyperparameters ----------------------------------------------------------------------------------------


def test_what_a_segment_does_not_set_follows_the_optimizer(rng):
    params, *gradients = rng.standard_normal((4, N)).astype(np.float32)
    opt, actual = FusedAdam(segments=[Segment(0, 9, lr=0.5), Segment(20, 30, eps=0.1)]), params.copy()
    apart = [(0, 9, {"lr": 0.5}), (9, 20, {}), (20, 30, {"eps": 0.1}), (30, N, {})]
    others = [(slice(start, stop), values, FusedAdam(**values)) for start, stop, values in apart]
    expected = params.copy()
    for grads, lr, weight_decay in zip(gradients, [0.1, 0.2, 0.0], [0.0, 0.3, 0.3], strict=True):
        opt.lr, opt.weight_decay = lr, weight_decay
        opt.step(actual, grads)
        for part, values, other in others:
            if "lr" not in values:
                other.lr = lr
            other.weight_decay = weight_decay
            other.step(expected[part], grads[part])
        assert_same_bits(actual, expected)


def test_segments_between_steps(rng):
    params, *gradients = rng.standard_normal((4, N)).astype(np.float32)
    opt, actual, expected = FusedAdam(), params.copy(), params.copy()
    left, right = FusedAdam(), FusedAdam()
    assert opt.segments == ()
    for grads, lr in zip(gradients, [1e-3, 0.5, 1e-3], strict=True):
        opt.segments = [] if lr == 1e-3 else (Segment(s, s + 5, lr=lr) for s in (0, 5))
        right.step(expected[10:], grads[10:])
        left.lr = lr
        left.step(expected[:10], grads[:10])
        opt.step(actual, grads)
        assert_same_bits(actual, expected)
    opt.segments = [Segment(np.int64(3), 4)]
    assert opt.segments == (Segment(3, 4),)
    assert type(opt.segments[0].start) is int


def test_schedules_are_asked_once_a_step():
    asked = []

    def schedule(step):
        asked.append(step)
        return 0.1 / step

    def never(step):
        raise AssertionError(step)

    segments = [Segment(k, k + 1, lr=schedule) for k in range(5)] + [Segment(5, 6, lr=never, frozen=True)]
    params = np.ones(6, np.float32)
    opt = FusedAdam(segments=segments)
    for _ in range(3):
        opt.step(params, np.ones(6, np.float32))
    assert asked == [1, 2, 3]
    assert params[0] == params[4] < 1
    assert opt.last_step.lr == 1e-3


def test_work_on_the_host_does_not_grow_with_the_segments():
    def calls(count):
        size = 4 * count
        params, grads = np.ones(size, np.float32), np.ones(size, np.float32)
        segments = [Segment(k, k + 3, lr=0.1, betas=(0.5 + k % 3 / 10, 0.9)) for k in range(0, size, 4)]
        opt = FusedAdam(segments=segments, max_grad_norm=1.0)
        opt.step(params, grads)
        made = []
        sys.setprofile(lambda _, event, __: made.append(event))
        opt.lr = 0.2
        opt.step(params, grads)
        opt.step(params, grads)
        sys.setprofile(None)
        return made

    assert len(calls(10)) == len(calls(1000))


def compiled():
    every = loops.serial, loops.parallel, segment_norms.serial, segment_norms.parallel, segment_norms.fold
    return [loop.signatures for loop in every]


@pytest.mark.parametrize("scale", [None, 2.0])
def test_no_recompilation(scale):
    segments = [Segment(0, 3, weight_decay=0.1), Segment(5, 6, frozen=True)]
    for features in ({}, FEATURES["all"]):
        fastadam.warmup(segments=segments, scaled=scale is not None, **features)
        before = compiled()
        for size in (8, 50_000):
            gradients = [np.ones(size, np.float32)] * 3
            one_pass(np.ones(size, np.float32), gradients, segments, [scale] * 3, **features)
        assert compiled() == before


# --- Checkpoints --------------------------------------------------------------------------------------------

SEGMENTS = [
    Segment(30, 40, lr=schedules.linear(0.1, steps=4), betas=(0.5, 0.6)),
    Segment(0, 7, weight_decay=0.0, eps=1e-3),
    Segment(7, 9, frozen=True),
    Segment(50, 60, lr=0.3),
]


@pytest.mark.parametrize("how", WAYS)
def test_resume(rng, how):
    start, *gradients = rng.standard_normal((7, N)).astype(np.float32)
    expected = one_pass(start, gradients, SEGMENTS, weight_decay=0.1)[0]
    params, _, opt = one_pass(start, gradients[:3], SEGMENTS, weight_decay=0.1)
    opt = resume(opt, how, FusedAdam(segments=[Segment(1, 2, frozen=True), SEGMENTS[0]]))
    assert opt.segments == tuple(SEGMENTS)
    for grads in gradients[3:]:
        opt.step(params, grads)
    assert_same_bits(params, expected)


def test_contents_of_the_state_dict(rng):
    gradients = rng.standard_normal((2, N)).astype(np.float32)
    opt = one_pass(gradients[0], gradients, SEGMENTS)[2]
    entries = opt.state_dict()
    flags = ["skip_nonfinite", "zero_grads", "telemetry", "state_dtype", "rounding", "seed", "offset"]
    assert list(entries)[7:] == [*flags, "segments", "step", "exp_avg", "exp_avg_sq"]
    nan = np.nan
    expected = [
        [30, 40, SEGMENTS[0].lr(2), nan, 0.5, 0.6, nan, 0],
        [0, 7, nan, 0.0, nan, nan, 1e-3, 0],
        [7, 9, nan, nan, nan, nan, nan, 1],
        [50, 60, 0.3, nan, nan, nan, nan, 0],
    ]
    np.testing.assert_array_equal(entries["segments"], np.array(expected))
    assert "segments" not in FusedAdam().state_dict()
    other = FusedAdam()
    other.load_state_dict(entries)  # the schedule is not known: the last value stays
    assert other.segments[0] == Segment(30, 40, lr=SEGMENTS[0].lr(2), betas=(0.5, 0.6))
    other.load_state_dict(FusedAdam().state_dict() | {"step": 0})
    assert other.segments == ()


def test_repr_counts_segments():
    assert repr(FusedAdam(segments=SEGMENTS)).endswith(", maximize=False, segments=<4>)")
