"""Segments in GPU memory behind the stand-in for CuPy: what is queued, in which order, and captured."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_steps import MODES, Exported, ones, problem
from tolerances import assert_same_bits
from unit_steps import Pair, parts

from fastadam import FusedAdam, Segment, backends, warmup
from fastadam.kernels.tree import CHUNK


def queued(cupy, since):
    return [entry[0] for entry in cupy.log[since:]]


@pytest.mark.parametrize(
    ("flags", "launches"),
    [
        ({}, ["form_coefficients", "form_rows", "step_units"]),
        ({"max_grad_norm": 1.0}, ["measure_units", "decide", "form_rows", "step_units"]),
        ({"telemetry": True}, ["form_coefficients", "form_rows", "step_units_observed", "conclude"]),
    ],
)
@MODES
def test_later_steps_allocate_copy_and_wait_for_nothing(cupy, flags, launches, capturable):
    opt = FusedAdam(capturable=capturable, segments=[Segment(3, 5, lr=0.1)], **flags)
    buffer, grads = ones(cupy, 65), ones(cupy, 65)
    opt.step(buffer, grads)
    before = len(cupy.log)
    opt.step(buffer, grads)
    opt.step(buffer, grads)
    assert queued(cupy, before) == 2 * launches


def test_runs_of_many_chunks_take_a_launch_for_each_level(cupy, rng):
    params, (grads,) = problem(rng, 3 * CHUNK, steps=1)
    segments = [Segment(CHUNK + 5, CHUNK + 6, frozen=True)]
    pair = Pair(cupy, params, segments=segments, max_grad_norm=1.0, telemetry=True)
    before = len(cupy.log)
    pair.step(grads)
    found = [name for name in queued(cupy, before) if name not in {"allocate", "synchronize"}]
    measured, taken = ["measure_units", "sum_groups", "decide", "form_rows"], ["step_units_observed"]
    assert found == [*measured, *taken, "sum_groups", "conclude"]


@MODES
def test_streams(cupy, capturable):
    """All on that of the parameters, after what fills the gradients, and before what fills them next."""
    ours, filling = cupy.cuda.Stream(), cupy.cuda.Stream()
    opt = FusedAdam(capturable=capturable, telemetry=True, segments=[Segment(0, 1)], max_grad_norm=1.0)
    for _ in range(2):
        before = len(cupy.log)
        with ours:
            params, grads = ones(cupy), Exported(ones(cupy), stream=filling.ptr)
            opt.step(params, grads)
    found = [entry for entry in cupy.log[before:] if entry[0] != "allocate"]
    assert found[0] == ("wait", 0, ours.ptr, filling.ptr)
    assert found[-2] == ("wait", 0, filling.ptr, ours.ptr)
    assert found[-1][:3] == ("conclude", 0, ours.ptr)  # reads no gradients
    assert {entry[2] for entry in found[1:-2]} == {ours.ptr}
    assert len(found) == 2 + 5


@pytest.mark.parametrize("telemetry", [False, True])
def test_a_replay(cupy, rng, telemetry):
    params, gradients = problem(rng, 2 * CHUNK + 70, steps=6)
    gradients[3][9] = np.nan
    flags = {"max_grad_norm": 1.0, "skip_nonfinite": True, "zero_grads": True, "weight_decay": 0.1}
    pair = Pair(cupy, params, segments=parts(params.size), capturable=True, telemetry=telemetry, **flags)
    sent, stream = cupy.asarray(gradients[0]), cupy.cuda.Stream()
    scale = cupy.asarray(np.full(1, 2.0, np.float32))
    with stream:
        pair.device.step(pair.buffer, sent, grad_scale=scale)
        stream.begin_capture()
        before = len(cupy.log)
        pair.device.step(pair.buffer, sent, grad_scale=scale)
        assert cupy.log[before:] == []
        graph = stream.end_capture()
        pair.cpu.step(pair.params, gradients[0].copy(), grad_scale=2.0)
        for k, grads in enumerate(gradients[1:]):
            pair.device.lr = pair.cpu.lr = 0.01 * (k + 1)
            sent.host[:], scale.host[:] = grads, k + 1
            left = grads.copy()
            graph.launch(stream)
            pair.cpu.step(pair.params, left, grad_scale=k + 1.0)
            assert_same_bits(sent.host, left)
            pair.compare()
    assert pair.device.state.step == 5


@pytest.mark.parametrize("telemetry", [False, True])
@MODES
def test_warmup_compiles_all_that_a_step_needs(cupy, monkeypatch, capturable, telemetry):
    flags = {
        "capturable": capturable,
        "telemetry": telemetry,
        "max_grad_norm": 1.0,
        "segments": [Segment(0, 1, weight_decay=0.5), Segment(1, 2, frozen=True)],
    }
    warmup(backend="cupy", **flags)
    buffer, sent = ones(cupy), ones(cupy)
    monkeypatch.setattr(cupy, "RawModule", None)
    FusedAdam(**flags).step(buffer, sent)


@MODES
def test_a_launch_that_cuda_refuses_took_no_step(cupy, rng, monkeypatch, capturable):
    kernels = backends.load("cupy")
    params, gradients = problem(rng, 65)
    pair = Pair(cupy, params, segments=parts(65), max_grad_norm=1.0, telemetry=True, capturable=capturable)
    launch = kernels.launch
    for k, grads in enumerate(gradients):
        for refused in range(4):  # measure_units, decide, form_rows, and the step
            calls = []

            def failing(*arguments, calls=calls, refused=refused):
                calls.append(arguments)
                if len(calls) > refused:
                    raise cupy.Refused("no")
                launch(*arguments)

            monkeypatch.setattr(kernels, "launch", failing)
            with pytest.raises(cupy.Refused):
                pair.device.step(pair.buffer, cupy.asarray(grads))
            monkeypatch.setattr(kernels, "launch", launch)
            assert pair.device.state.step == k
            assert_same_bits(pair.buffer.host, pair.params)
        pair.step(grads)


@MODES
@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
def test_a_report_that_cuda_refuses_leaves_a_step_that_is_counted(cupy, monkeypatch, capturable, first):
    """The launch behind the step fails: the step was taken, and the sum is spent."""
    kernels = backends.load("cupy")
    opt, params = FusedAdam(telemetry=True, capturable=capturable), ones(cupy)
    cpu, copied = FusedAdam(), np.ones(8, np.float32)
    if not first:
        opt.step(params, ones(cupy))
        cpu.step(copied, np.ones(8, np.float32))
    for _ in range(2):
        opt.accumulate(ones(cupy))
    launch = kernels.launch

    def failing(kernel, *arguments):
        if kernel.name == "conclude":
            raise cupy.Refused("no")
        launch(kernel, *arguments)

    monkeypatch.setattr(kernels, "launch", failing)
    with pytest.raises(cupy.Refused):
        opt.step(params)
    monkeypatch.setattr(kernels, "launch", launch)
    cpu.step(copied, np.ones(8, np.float32), grad_scale=1.0)
    assert opt.state.step == cpu.state.step
    assert_same_bits(params.host, copied)
    opt.accumulate(ones(cupy))
    opt.step(params)
    cpu.step(copied, np.ones(8, np.float32), grad_scale=1.0)
    assert_same_bits(params.host, copied)


# --- Sums of gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("telemetry", [False, True])
@MODES
def test_the_whole_sum_is_cleared(cupy, rng, capturable, telemetry):
    """What frozen segments have added up, too, and where the step is skipped."""
    params, gradients = problem(rng, CHUNK + 70, steps=8)
    gradients[5][1] = np.inf
    segments = [Segment(3, 60, frozen=True), Segment(CHUNK, CHUNK + 70, frozen=True), Segment(0, 2, lr=0.5)]
    pair = Pair(
        cupy, params, segments=segments, skip_nonfinite=True, capturable=capturable, telemetry=telemetry
    )
    for k, grads in enumerate(gradients):
        for opt, put in zip(pair.both, (np.array, cupy.asarray), strict=True):
            opt.accumulate(put(grads))
        if k % 2:
            pair.cpu.step(pair.params, grad_scale=3.0)
            pair.device.step(pair.buffer, grad_scale=3.0)
            pair.compare()
            total = pair.device._accumulator
            assert not total._memory.host.any()
