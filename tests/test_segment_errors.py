"""Bad segments: the whole message of every error, and that the call changed nothing."""

from __future__ import annotations

import numpy as np
import pytest
from test_errors import assert_raises_and_changes_nothing, f32

from fastadam import FusedAdam, Segment

BAD_SEGMENTS = [
    ({"start": 1.0}, TypeError, "start must be an integer; got float."),
    ({"start": True}, TypeError, "start must be an integer; got bool."),
    ({"start": -1}, ValueError, "start must be in [0, 2**53); got -1."),
    ({"stop": "8"}, TypeError, "stop must be an integer; got str."),
    ({"stop": 2**53}, ValueError, "stop must be in [1, 2**53); got 9007199254740992."),
    ({"start": 3, "stop": 3}, ValueError, "stop must be greater than start (3); got 3."),
    ({"start": 3, "stop": 2}, ValueError, "stop must be greater than start (3); got 2."),
    ({"lr": -1.0}, ValueError, "lr must be at least 0; got -1.0."),
    ({"lr": "a"}, TypeError, "lr must be a real number; got str."),
    ({"weight_decay": -1.0}, ValueError, "weight_decay must be at least 0; got -1.0."),
    ({"betas": (0.9, 1.0)}, ValueError, "betas[1] must be in [0, 1); got 1.0."),
    ({"betas": 0.9}, TypeError, "betas must be a pair of real numbers; got float."),
    ({"eps": float("nan")}, ValueError, "eps must be finite; got nan."),
    ({"frozen": 1}, TypeError, "frozen must be True or False; got int."),
]


@pytest.mark.parametrize(("values", "error", "message"), BAD_SEGMENTS, ids=lambda value: str(value)[:40])
def test_bad_segment(values, error, message):
    with pytest.raises(error) as caught:
        Segment(**{"start": 0, "stop": 8, **values})
    assert str(caught.value) == message


def test_a_segment_cannot_be_changed():
    with pytest.raises(AttributeError):
        Segment(0, 1).lr = 0.1


BAD_LISTS = [
    (3, TypeError, "segments must be a sequence of Segment; got int."),
    (None, TypeError, "segments must be a sequence of Segment; got NoneType."),
    ("ab", TypeError, "segments must be a sequence of Segment; got str."),
    (Segment(0, 1), TypeError, "segments must be a sequence of Segment; got Segment."),
    ([Segment(0, 1), (1, 2)], TypeError, "segments[1] must be a Segment; got tuple."),
    (
        [Segment(5, 9), Segment(20, 30), Segment(0, 6)],
        ValueError,
        "segments[2] must not overlap segments[0]; got elements 0 to 6 and 5 to 9.",
    ),
    (
        [Segment(0, 10), Segment(3, 4, frozen=True)],
        ValueError,
        "segments[1] must not overlap segments[0]; got elements 3 to 4 and 0 to 10.",
    ),
    (
        [Segment(2, 3), Segment(2, 3)],
        ValueError,
        "segments[1] must not overlap segments[0]; got elements 2 to 3 and 2 to 3.",
    ),
]


@pytest.mark.parametrize(("segments", "error", "message"), BAD_LISTS, ids=lambda value: str(value)[:40])
def test_bad_segments(segments, error, message):
    with pytest.raises(error) as caught:
        FusedAdam(segments=segments)
    assert str(caught.value) == message
    opt = FusedAdam(segments=[Segment(0, 1)])
    with pytest.raises(error) as caught:
        opt.segments = segments
    assert str(caught.value) == message
    assert opt.segments == (Segment(0, 1),)


def test_segments_may_touch():
    FusedAdam(segments=[Segment(4, 8), Segment(0, 4)]).step(f32(), f32())


AT_THE_STEP = [
    (
        {"segments": [Segment(0, 9), Segment(9, 10)]},
        "segments[1].stop must be at most the size of flat_params (8); got 10.",
    ),
    (
        {"segments": [Segment(7, 9, frozen=True), Segment(0, 1)]},
        "segments[0].stop must be at most the size of flat_params (8); got 9.",
    ),
    (
        {"segments": [Segment(0, 1), Segment(1, 2, lr=1e39)]},
        "segments[1].lr must be at most 3.402823e+38 for float32 buffers; got 1e+39.",
    ),
    (
        {"segments": [Segment(0, 1, lr=1e38)]},
        "segments[0].lr / (1 - betas[0]) must be at most 3.402823e+38 for float32 buffers; got 1e+39.",
    ),
    (
        {"segments": [Segment(0, 1, betas=(1 - 2**-33, 0.9))], "lr": 1e30},
        "segments[0].lr / (1 - betas[0]) must be at most 3.402823e+38 for float32 buffers; got 8.589935e+39.",
    ),
    (
        {"segments": [Segment(0, 1, eps=1e-50)]},
        "segments[0].eps must be 0 or at least 1.401298e-45 for float32 buffers; got 1e-50.",
    ),
    (
        {"segments": [Segment(0, 1, weight_decay=1e39)]},
        "segments[0].weight_decay must be at most 3.402823e+38 for float32 buffers; got 1e+39.",
    ),
    (
        {"segments": [Segment(0, 1, weight_decay=1e20)], "lr": 1e20, "decoupled_weight_decay": True},
        "segments[0].lr * weight_decay must be at most 3.402823e+38 for float32 buffers; got 1e+40.",
    ),
    (
        {"segments": [Segment(0, 1), Segment(3, 4, lr=lambda step: -step)]},
        "segments[1].lr(1) must be at least 0; got -1.0.",
    ),
    (
        {"segments": [Segment(0, 1, lr=lambda _: 1e-50)]},
        "segments[0].lr must be 0 or at least 1.401298e-45 for float32 buffers; got 1e-50.",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), AT_THE_STEP, ids=lambda value: str(value)[-50:])
def test_bad_segments_at_the_step(arguments, message):
    grads = f32()
    opt = FusedAdam(zero_grads=True, ema_decay=0.5, **arguments)
    assert_raises_and_changes_nothing(opt, f32(), grads, ValueError, message)
    opt.segments = [Segment(0, 1, frozen=True)]
    opt.step(f32(), grads)


def test_frozen_segments_may_hold_what_float32_has_no_room_for():
    FusedAdam(segments=[Segment(0, 1, lr=1e39, eps=1e-50, frozen=True)]).step(f32(), f32())


def test_a_schedule_that_fails_at_a_later_step():
    opt, params = FusedAdam(segments=[Segment(0, 4, lr=lambda step: 2.0 - step)]), f32()
    opt.step(params, f32())
    opt.step(params, f32())
    message = "segments[0].lr(3) must be at least 0; got -1.0."
    assert_raises_and_changes_nothing(opt, params, f32(), ValueError, message)


BAD_ARRAYS = [
    ([[0, 1]], TypeError, "state_dict['segments'] must be a float64 array; got list."),
    (f32(2, 8), TypeError, "state_dict['segments'] must be a float64 array; got float32."),
    (np.ones(8), ValueError, "state_dict['segments'] must have shape (n, 8); got (8,)."),
    (np.ones((2, 7)), ValueError, "state_dict['segments'] must have shape (n, 8); got (2, 7)."),
    (
        np.array([[np.nan, *[1.0] * 7]]),
        ValueError,
        "state_dict['segments'][:, 0] must be integers; got nan.",
    ),
    (
        np.array([[0.0, 1.5, *[0.0] * 6]]),
        ValueError,
        "state_dict['segments'][:, 1] must be integers; got 1.5.",
    ),
    (
        np.array([[0.0, 1.0, *[0.0] * 5, 2.0]]),
        ValueError,
        "state_dict['segments'][:, 7] must be 0 or 1; got 2.0.",
    ),
    (
        np.array([[0.0, 1.0, -1.0, *[0.0] * 5]]),
        ValueError,
        "lr must be at least 0; got -1.0.",
    ),
    (
        np.array([[0.0, 1.0, *[0.0] * 6]] * 2),
        ValueError,
        "segments[1] must not overlap segments[0]; got elements 0 to 1 and 0 to 1.",
    ),
]


@pytest.mark.parametrize(("array", "error", "message"), BAD_ARRAYS, ids=lambda value: str(value)[:60])
def test_bad_array_in_a_state_dict(array, error, message):
    opt = FusedAdam(segments=[Segment(0, 1)])
    opt.step(f32(), f32())
    before = opt.state_dict()
    with pytest.raises(error) as caught:
        opt.load_state_dict({**before, "lr": 0.5, "segments": array})
    assert str(caught.value) == message
    np.testing.assert_equal(opt.state_dict(), before)
