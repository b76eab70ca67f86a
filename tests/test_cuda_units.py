"""Segments in GPU memory without a GPU, behind the stand-in for CuPy: the bits of the CPU."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
from cuda_steps import DTYPES, MODES, ones, problem
from phase_cases import CASES, case_id, options
from phase_cases import problem as phase_problem
from tolerances import assert_same_bits
from unit_steps import KINDS, Pair, parts, take

from fastadam import FusedAdam, Segment, schedules
from fastadam.kernels import grids
from fastadam.kernels.tree import CHUNK

SIZES = [40, 2 * CHUNK + 5]


@MODES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_the_cpu(cupy, rng, dtype, kind, capturable):
    flags = {**KINDS[kind], "capturable": capturable}
    if capturable and callable(flags.get("lr")):
        flags["lr"] = 0.1
    for size in SIZES:
        params, gradients = problem(rng, size, dtype)
        if flags.get("skip_nonfinite"):
            gradients[1][2] = np.inf
        pair = Pair(cupy, params, segments=parts(size), **flags)
        take(pair, gradients, [None, 3.0, 3.0])


@pytest.mark.parametrize("telemetry", [False, True], ids=["segments", "telemetry"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_all_pairs_of_features(cupy, rng, case, telemetry):
    params, gradients = phase_problem(rng, case, size=70, steps=4)
    segments = () if telemetry and case["amsgrad"] else parts(70)
    flags = {**options(case), "telemetry": telemetry}
    pair = Pair(cupy, params, segments=segments, **flags)
    take(pair, gradients, [case["grad_scale"]] * 4)


@pytest.mark.parametrize("telemetry", [False, True], ids=["segments", "telemetry"])
@MODES
@pytest.mark.parametrize(
    "segments",
    [
        [Segment(0, 33, frozen=True)],
        [Segment(0, 33, lr=0.5)],
        [Segment(0, 16, frozen=True), Segment(17, 33, frozen=True)],
        [Segment(k, k + 1, frozen=True) for k in range(0, 33, 2)],
        [Segment(k, k + 1, lr=k / 100, weight_decay=k % 3) for k in range(33)],
        [Segment(0, 33, lr=0.0)],
    ],
    ids=["all-frozen", "one", "one-element", "every-other-frozen", "each", "still"],
)
def test_extremes(cupy, rng, segments, capturable, telemetry):
    params, gradients = problem(rng, 33)
    gradients[1][16] = np.nan
    flags = {"max_grad_norm": 1.0, "skip_nonfinite": True, "zero_grads": True, "ema_decay": 0.9}
    pair = Pair(cupy, params, segments=segments, capturable=capturable, telemetry=telemetry, **flags)
    take(pair, gradients)


@MODES
def test_empty_buffers(cupy, capturable):
    for flags in ({"telemetry": True}, {"telemetry": True, "max_grad_norm": 1.0}):
        pair = Pair(cupy, np.empty(0, np.float32), capturable=capturable, **flags)
        take(pair, [np.empty(0, np.float32)] * 2)
        assert pair.device.state.step == 2


def test_ten_thousand_segments(cupy, rng):
    bounds = np.sort(rng.choice(30_000, 10_001, replace=False)).tolist()
    segments = [
        Segment(a, b, lr=k % 7 / 10, weight_decay=k % 2 / 10, betas=(k % 5 / 5, 0.9), frozen=k % 11 == 0)
        for k, (a, b) in enumerate(itertools.pairwise(bounds))
    ]
    params, gradients = problem(rng, 30_000, steps=2)
    take(Pair(cupy, params, segments=segments, telemetry=True, max_grad_norm=1.0), gradients)


def test_more_rows_than_threads(cupy, rng, monkeypatch):
    monkeypatch.setattr(grids, "WAVES", 0)  # one block of 64 threads
    params, gradients = problem(rng, 300)
    segments = [Segment(k, k + 2, lr=k / 300) for k in range(0, 300, 2)]
    take(Pair(cupy, params, segments=segments), gradients)


# --- Learning rates -----------------------------------------------------------------------------------------


def test_schedules_of_segments_with_skipped_steps(cupy, rng):
    """The device alone knows which step is next; learning rates are sent ahead, more than once."""
    shared = schedules.linear_warmup(schedules.cosine(0.1, 350), 20)
    segments = [
        Segment(0, 1, lr=shared),
        Segment(1, 2, lr=lambda step: 1 / step),
        Segment(3, 4, lr=shared, weight_decay=0.1),
    ]
    params, gradients = problem(rng, 5, steps=400)
    for grads in gradients[::3]:
        grads[1] = np.nan
    flags = {"skip_nonfinite": True, "decoupled_weight_decay": True}
    take(Pair(cupy, params, segments=segments, **flags), gradients)


def test_a_schedule_that_ends(cupy, rng):
    """It is asked for steps ahead, but not held to them."""
    rates = [0.1, 0.2, 0.3]
    segments = [Segment(0, 2, lr=lambda step: rates[step - 1])]
    params, gradients = problem(rng, 5, steps=4)
    pair = take(Pair(cupy, params, segments=segments), gradients[:3])
    before = pair.buffer.host.copy()
    for _ in range(2):
        with pytest.raises(IndexError):
            pair.device.step(pair.buffer, cupy.asarray(gradients[3]))
    assert pair.device.state.step == 3
    assert_same_bits(pair.buffer.host, before)
    for opt in pair.both:
        opt.segments = [Segment(0, 2, lr=0.5)]
    pair.step(gradients[3])


@MODES
def test_lr_is_that_of_what_has_none_of_its_own(cupy, rng, capturable):
    """Set between steps, without a wait; also where a segment has the same number."""
    params, gradients = problem(rng, 40, steps=5)
    segments = [*parts(40), Segment(4, 5, lr=0.1)]
    pair = Pair(cupy, params, segments=segments, lr=0.1, weight_decay=0.1, capturable=capturable)
    for k, grads in enumerate(gradients):
        pair.step(grads)
        before = len(cupy.log)
        for opt in pair.both:
            opt.lr = 0.01 * (k + 1)
        assert [entry[0] for entry in cupy.log[before:]] == ["set_lr"]


def test_an_lr_that_fits_only_the_optimizer(cupy):
    """It is refused where it is set: a step could not be."""
    opt = FusedAdam(segments=[Segment(0, 1, betas=(0.999, 0.9))])
    opt.step(ones(cupy), ones(cupy))
    with pytest.raises(ValueError, match="segments") as caught:
        opt.lr = 1e37
    message = "segments[0].lr / (1 - betas[0]) must be at most 3.402823e+38 for float32 buffers; got 1e+40."
    assert str(caught.value) == message
    assert opt.lr == 1e-3
    opt.lr = 0.5
    opt.step(ones(cupy), ones(cupy))
    assert opt.last_step.lr == 0.5


# --- Changes ------------------------------------------------------------------------------------------------


def test_changes_between_steps(cupy, rng):
    def change(k, opt):
        if k == 0:
            opt.segments = [Segment(3, 9, lr=0.5, weight_decay=0.2)]
        elif k == 1:
            opt.lr, opt.segments = schedules.exponential(0.1, 0.9), parts(40)
        elif k == 2:
            opt.segments = ()
        elif k == 3:
            opt.segments, opt.betas, opt.max_grad_norm = [Segment(0, 7, frozen=True)], (0.5, 0.6), 1.0
        elif k == 4:
            opt.lr, opt.segments = 0.2, [Segment(0, 7, lr=lambda step: 0.1 / step), Segment(8, 9)]
        elif k == 5:
            opt.lr = 0.3

    params, gradients = problem(rng, 40, steps=8)
    pair = Pair(cupy, params)
    for k, grads in enumerate(gradients):
        pair.step(grads)
        for opt in pair.both:
            change(k, opt)


def test_a_copy_with_other_segments_shares_the_moments(cupy, rng):
    params, gradients = problem(rng, 40, steps=4)
    pair = take(Pair(cupy, params, segments=[Segment(0, 3, lr=0.5)]), gradients[:1])
    twin = copy.copy(pair)
    twin.cpu, twin.device = map(copy.copy, pair.both)
    for opt in twin.both:
        opt.segments = parts(40)
    for one, grads in zip((pair, twin, pair), gradients[1:], strict=True):
        one.step(grads)


def test_a_checkpoint_moves_between_cpu_and_gpu(cupy, rng):
    params, gradients = problem(rng, 40, steps=6)
    pair = take(Pair(cupy, params, segments=parts(40), weight_decay=0.1, telemetry=True), gradients[:3])
    there, back = FusedAdam(), FusedAdam(capturable=True)
    there.load_state_dict(pair.device.state_dict())
    back.load_state_dict(pair.cpu.state_dict())
    buffer, rest, twin = cupy.asarray(pair.params), pair.params.copy(), copy.deepcopy(pair.device)
    other = cupy.asarray(pair.params)
    for grads in gradients[3:]:
        pair.step(grads)
        there.step(rest, grads.copy())
        back.step(buffer, cupy.asarray(grads))
        twin.step(other, cupy.asarray(grads))
    for found in (rest, buffer.host, other.host):
        assert_same_bits(found, pair.params)
    assert back.segments == pair.device.segments
    assert twin.last_step == pair.device.last_step


def test_reset(cupy, rng):
    params, gradients = problem(rng, 40)
    pair = take(Pair(cupy, params, segments=parts(40), capturable=True), gradients)
    for opt in pair.both:
        opt.reset()
        opt.segments = [Segment(0, 1, frozen=True)]
    take(pair, gradients)
