"""Segments in GPU memory that are refused: whole messages, and nothing has changed."""

from __future__ import annotations

import pytest
from cuda_steps import assert_refused, ones

from fastadam import FusedAdam, Segment

AT_THE_STEP = [
    (
        [Segment(0, 9), Segment(9, 10)],
        "segments[1].stop must be at most the size of flat_params (8); got 10.",
    ),
    (
        [Segment(0, 1), Segment(1, 2, lr=1e39)],
        "segments[1].lr must be at most 3.402823e+38 for float32 buffers; got 1e+39.",
    ),
    ([Segment(3, 4, lr=lambda _: -1.0)], "segments[0].lr({step}) must be at least 0; got -1.0."),
    (
        [Segment(0, 1, betas=(0.9, 0.99)), Segment(1, 2, betas=(0.9, 1 - 2.0**-19))],
        "segments[1].betas[1] must be at most 0.999996185 where steps are counted on the GPU, which keeps the"
        " bias corrections of all of them; got 0.99999809265136719.",
    ),
]


@pytest.mark.parametrize(("segments", "message"), AT_THE_STEP, ids=lambda value: str(value)[-50:])
def test_bad_segments_at_the_step(cupy, segments, message):
    params, grads = ones(cupy), ones(cupy)
    opt = FusedAdam(segments=segments)
    assert_refused(opt, params, grads, ValueError, message.format(step=1))
    opt.segments = ()
    opt.step(params, grads)
    opt.segments = segments
    assert_refused(opt, params, grads, ValueError, message.format(step=2))


def test_a_frozen_segment_needs_no_table(cupy):
    opt = FusedAdam(segments=[Segment(0, 1, betas=(0.9, 1 - 2.0**-19), frozen=True)], capturable=True)
    opt.step(ones(cupy), ones(cupy))


NOT_CAPTURABLE = [
    (
        [Segment(0, 1), Segment(1, 2, lr=lambda step: step)],
        "segments[1].lr must be a number with capturable=True: a replayed step calls no schedule. Without"
        " one, it follows opt.lr.",
    ),
    (AT_THE_STEP[-1][0], AT_THE_STEP[-1][1]),
]


@pytest.mark.parametrize(("segments", "message"), NOT_CAPTURABLE, ids=["schedule", "beta"])
def test_segments_that_cannot_be_captured(segments, message):
    opt = FusedAdam(capturable=True, segments=[Segment(0, 1, lr=0.5)])
    calls = [
        lambda: FusedAdam(capturable=True, segments=segments),
        lambda: setattr(opt, "segments", segments),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="segments") as caught:
            call()
        assert str(caught.value) == message
    assert opt.segments == (Segment(0, 1, lr=0.5),)


def test_a_loaded_beta_that_cannot_be_captured():
    segments, message = NOT_CAPTURABLE[-1]
    opt = FusedAdam(capturable=True)
    with pytest.raises(ValueError, match="segments") as caught:
        opt.load_state_dict(FusedAdam(segments=segments).state_dict())
    assert str(caught.value) == message
    assert opt.segments == ()


def test_what_a_clock_was_made_for_stays(cupy):
    opt = FusedAdam(capturable=True, segments=[Segment(0, 1)])
    opt.telemetry, opt.segments = True, [Segment(0, 2)]
    opt.step(ones(cupy), ones(cupy))
    with pytest.raises(ValueError, match="segments") as caught:
        opt.segments = [Segment(0, 1), Segment(1, 2), Segment(2, 3)]
    assert str(caught.value) == (
        "segments must stay as they are once a capturable step was taken; got 3. Only lr may change, until"
        " reset."
    )
    with pytest.raises(ValueError, match="telemetry") as caught:
        opt.telemetry = False
    assert str(caught.value) == (
        "telemetry must stay True once a capturable step was taken; got False. Only lr may change, until"
        " reset."
    )
    assert opt.segments == (Segment(0, 2),)
    assert opt.telemetry
    opt.load_state_dict(FusedAdam(segments=[Segment(3, 4)]).state_dict())
    opt.step(ones(cupy), ones(cupy))


def test_a_capture_without_capturable(cupy):
    """Whatever is decided on the device: a change would leave the graph with tables that are gone."""
    opt, stream, params, grads = (
        FusedAdam(segments=[Segment(0, 1)]),
        cupy.cuda.Stream(),
        ones(cupy),
        ones(cupy),
    )
    message = (
        "stream must not be in capture: a replay would know nothing of steps and changes since."
        " Use FusedAdam(capturable=True)."
    )
    with stream:
        opt.step(params, grads)
        stream.begin_capture()
        with pytest.raises(ValueError, match="stream") as caught:
            opt.step(params, grads)
        assert stream.end_capture().calls == []
    assert str(caught.value) == message
    assert opt.state.step == 1


@pytest.mark.parametrize("segments", [(), [Segment(0, 1)]])
def test_another_kind_of_step_than_the_captured_one(cupy, segments):
    """A graph has the addresses of what is counted with: nothing may take its place."""
    opt, stream = FusedAdam(capturable=True, segments=segments), cupy.cuda.Stream()
    params, grads = ones(cupy), ones(cupy)
    with stream:
        opt.step(params, grads)
        stream.begin_capture()
        opt.step(params, grads)
        graph = stream.end_capture()
        message = (
            "flat_params must be stepped as in the CUDA graph that holds this optimizer, with grad_scale"
            " or without, and gradients accumulated or not; got another kind of step."
            " Reset it, and capture again."
        )
        with pytest.raises(ValueError, match="flat_params") as caught:
            opt.step(params, grads, grad_scale=2.0)
        assert str(caught.value) == message
        graph.launch(stream)
        opt.step(params, grads)  # of the same kind
        assert opt.state.step == 3
        opt.reset()
        opt.step(params, grads, grad_scale=2.0)
