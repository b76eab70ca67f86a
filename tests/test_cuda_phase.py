"""The whole optimizer phase in GPU memory without a GPU: what the device decides has the bits of the CPU."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from cuda_steps import DTYPES, Exported, assert_refused, assert_same, on_cpu, ones, problem

from fastadam import FusedAdam, schedules
from fastadam.kernels.cuda_clock import REPORTS
from fastadam.kernels.tree import CHUNK

WHOLE = {
    "lr": 0.01,
    "weight_decay": 0.1,
    "decoupled_weight_decay": True,
    "max_grad_norm": 1.0,
    "skip_nonfinite": True,
    "ema_decay": 0.9,
    "zero_grads": True,
}
SIZES = [0, 1, 31, 33, CHUNK - 1, CHUNK, CHUNK + 1, 9 * CHUNK + 5]


def together(cupy, params, gradients, options, scales=None, each=None):
    """Step on the CPU and on the device with the same gradients; return both as (optimizer, parameters)."""
    cpu = FusedAdam(backend="cpu", **options), params.copy()
    device = FusedAdam(**options), cupy.asarray(params)
    for k, grads in enumerate(gradients):
        sent, scale = cupy.asarray(grads), None if scales is None else scales[k]
        cpu[0].step(cpu[1], grads.copy(), grad_scale=scale)
        device[0].step(device[1], sent, grad_scale=scale)
        assert repr(device[0].last_step) == repr(cpu[0].last_step)  # NaN is NaN
        if options.get("zero_grads"):
            assert not sent.host.any()
        if each is not None:
            each(k, cpu[0], device[0])
    return device, cpu


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_skip_average_and_clear(cupy, rng, dtype):
    for size in SIZES:
        params, gradients = problem(rng, size, dtype, steps=4)
        if size:
            gradients[1][size // 2] = np.inf
            gradients[2][-1] = np.nan
        device, cpu = together(cupy, params, gradients, WHOLE, scales=[8.0, 3.0, None, 1e-3])
        assert_same(device, cpu)
        assert cpu[0].state.step == (2 if size else 4)


@pytest.mark.parametrize("feature", ["max_grad_norm", "skip_nonfinite", "max_grad_value", "ema_decay"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_each_alone(cupy, rng, feature, amsgrad):
    value = {"skip_nonfinite": True}.get(feature, 0.5)
    params, gradients = problem(rng, 65)
    device, cpu = together(cupy, params, gradients, {feature: value, "amsgrad": amsgrad, "maximize": True})
    assert_same(device, cpu)


def test_a_large_float64_gradient_is_finite(cupy, rng):
    """Its square is not: that makes no step to skip."""
    params, gradients = problem(rng, 65, "float64")
    gradients[0][7] = 1e200
    device, cpu = together(cupy, params, gradients, {"skip_nonfinite": True})
    assert_same(device, cpu)
    assert cpu[0].state.step == 3


@pytest.mark.parametrize("capturable", [False, True], ids=["eager", "capturable"])
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_a_scale_in_device_memory(cupy, rng, scale_dtype, capturable):
    params, gradients = problem(rng, 65)
    cpu = FusedAdam(max_grad_norm=2.0), params.copy()
    device = FusedAdam(max_grad_norm=2.0, capturable=capturable), cupy.asarray(params)
    scale = cupy.asarray(np.ones((), scale_dtype))
    for k, grads in enumerate(gradients):
        scale.host[...] = 1.7 * (k + 1)
        cpu[0].step(cpu[1], grads, grad_scale=scale.host[()])
        before = len(cupy.log)
        device[0].step(device[1], cupy.asarray(grads), grad_scale=scale)
        assert "synchronize" not in {entry[0] for entry in cupy.log[before:]}
        assert repr(device[0].last_step) == repr(cpu[0].last_step)  # NaN is NaN
    assert_same(device, cpu)


def test_a_scale_on_another_stream(cupy):
    stream = cupy.cuda.Stream()
    scale = Exported(cupy.asarray(np.ones(1, np.float32)), stream=stream.ptr)
    FusedAdam().step(ones(cupy), ones(cupy), grad_scale=scale)
    assert ("wait", 0, 0, stream.ptr) in cupy.log


def test_scales_that_are_refused(cupy):
    opt, params = FusedAdam(), ones(cupy)
    opt.step(params, ones(cupy))
    assert_refused(
        opt, params, ones(cupy), ValueError, "grad_scale must have one element; got 8.", grad_scale=ones(cupy)
    )
    with cupy.cuda.Device(1):
        elsewhere = ones(cupy, 1)
    assert_refused(
        opt,
        params,
        ones(cupy),
        TypeError,
        "grad_scale must be on the device of flat_params (CUDA device 0); got CUDA device 1. Pass a copy.",
        grad_scale=elsewhere,
    )


def test_a_schedule_with_skipped_steps(cupy, rng):
    """The device alone knows which step is next; learning rates are sent ahead, more than once."""
    lr = schedules.linear_warmup(schedules.cosine(0.1, 400), 20)
    options = {"lr": lr, "skip_nonfinite": True}
    params, gradients = problem(rng, 5, steps=600)
    for grads in gradients[::3]:
        grads[1] = np.nan
    device, cpu = together(cupy, params, gradients, options)
    assert_same(device, cpu)
    assert cpu[0].state.step == 400


def test_changes_between_steps(cupy, rng):
    def change(k, *both):
        for opt in both:
            if k == 0:
                opt.lr = 0.5
            elif k == 1:
                opt.max_grad_norm = 0.1
            elif k == 2:
                opt.betas, opt.lr = (0.5, 0.6), schedules.exponential(0.1, 0.9)
            elif k == 3:
                opt.max_grad_norm, opt.skip_nonfinite, opt.lr = None, False, 0.2

    params, gradients = problem(rng, 65, steps=6)
    device, cpu = together(cupy, params, gradients, WHOLE, each=change)
    assert_same(device, cpu)


def test_a_checkpoint_and_copies(cupy, rng):
    params, gradients = problem(rng, 65, steps=6)
    gradients[1][3] = np.inf
    device, cpu = together(cupy, params, gradients[:3], WHOLE)
    loaded = FusedAdam(max_grad_norm=1.0)
    loaded.load_state_dict(device[0].state_dict())
    for opt in (loaded, copy.deepcopy(device[0])):
        assert opt.state.step == 2
        again, buffer = copy.deepcopy(cpu[0]), cupy.asarray(device[1].host)
        expected = cpu[1].copy()
        for grads in gradients[3:]:
            opt.step(buffer, cupy.asarray(grads))
            again.step(expected, grads.copy())
        assert_same((opt, buffer), (again, expected))


def test_swap_ema(cupy, rng):
    params, gradients = problem(rng, 65)
    device, cpu = together(cupy, params, gradients, {"ema_decay": 0.5})
    for _ in range(2):
        for opt, buffer in (device, cpu):
            opt.swap_ema(buffer)
        assert_same(device, cpu)


def test_swap_ema_of_a_checkpoint(cupy, rng):
    """An evaluation on a GPU needs no step there; and one may go on after it."""
    params, gradients = problem(rng, 65)
    (cpu, expected) = on_cpu(params, gradients, ema_decay=0.5)
    opt, buffer = FusedAdam(), cupy.asarray(expected)
    opt.load_state_dict(cpu.state_dict())
    for _ in range(2):
        opt.swap_ema(buffer)
        cpu.swap_ema(expected)
        assert_same((opt, buffer), (cpu, expected))
    opt.step(buffer, cupy.asarray(gradients[0]))
    cpu.step(expected, gradients[0])
    assert_same((opt, buffer), (cpu, expected))


def test_swap_ema_on_a_stream(cupy):
    opt, params = FusedAdam(ema_decay=0.5), ones(cupy)
    opt.step(params, ones(cupy))
    before, stream = len(cupy.log), cupy.cuda.Stream()
    opt.swap_ema(params, stream=stream)
    copies = [entry for entry in cupy.log[before:] if entry[0] == "copy"]
    assert [entry[2] for entry in copies] == [stream.ptr] * 3


def test_what_the_last_step_did_is_read_when_asked(cupy, rng):
    opt, params = FusedAdam(**WHOLE), ones(cupy)
    opt.step(params, ones(cupy))
    before = len(cupy.log)
    first = opt.last_step
    opt.step(params, ones(cupy))
    assert ("synchronize", 0, None) not in cupy.log[before:]
    assert first.step == 1  # its own, not the latest
    assert ("synchronize", 0, None) in cupy.log[before:]
    assert opt.last_step.step == 2
    assert opt.last_step.clip_factor == pytest.approx(1 / np.sqrt(8))
    late = opt.last_step
    for _ in range(REPORTS):
        opt.step(params, ones(cupy))
    with pytest.raises(ValueError, match="last_step") as caught:
        _ = late.step
    assert str(caught.value) == "last_step must be read within 256 steps; got one from before."


def test_a_plain_step_on_a_clock_has_no_norm(cupy):
    opt = FusedAdam(capturable=True)
    opt.step(ones(cupy), ones(cupy))
    assert opt.last_step.grad_norm is None
    assert opt.last_step.clip_factor == 1


def test_a_replay_clips_and_skips(cupy, rng):
    params, gradients = problem(rng, 65, steps=8)
    gradients[3][9], gradients[5][0] = np.nan, np.inf
    options = {**WHOLE, "skip_nonfinite": True}
    cpu = FusedAdam(backend="cpu", **options), params.copy()
    opt, buffer, sent = (
        FusedAdam(capturable=True, **options),
        cupy.asarray(params),
        cupy.asarray(gradients[0]),
    )
    scale, stream = cupy.asarray(np.full(1, 2.0, np.float32)), cupy.cuda.Stream()
    with stream:
        opt.step(buffer, sent, grad_scale=scale)
        stream.begin_capture()
        opt.step(buffer, sent, grad_scale=scale)
        graph = stream.end_capture()
        cpu[0].step(cpu[1], gradients[0].copy(), grad_scale=2.0)
        for k, grads in enumerate(gradients[1:]):
            opt.lr = cpu[0].lr = 0.01 * (k + 1)
            sent.host[:], scale.host[:] = grads, k + 1
            graph.launch(stream)
            cpu[0].step(cpu[1], grads.copy(), grad_scale=float(k + 1))
            assert not sent.host.any()
    assert_same((opt, buffer), cpu)
    assert opt.state.step == 6


def test_a_skipped_first_step(cupy, rng):
    params, gradients = problem(rng, 9, steps=3)
    gradients[0][:] = np.nan
    device, cpu = together(cupy, params, gradients, WHOLE)
    assert_same(device, cpu)


def test_betas_whose_bias_corrections_fill_the_memory(cupy):
    opt = FusedAdam(betas=(0.9, 1 - 2.0**-19), max_grad_norm=1.0)
    assert_refused(
        opt,
        ones(cupy),
        ones(cupy),
        ValueError,
        "betas[1] must be at most 0.999996185 where steps are counted on the GPU, which keeps the bias"
        " corrections of all of them; got 0.99999809265136719.",
    )


def test_a_capture_of_another_kind_of_step(cupy):
    opt, stream, params, grads = FusedAdam(capturable=True), cupy.cuda.Stream(), ones(cupy), ones(cupy)
    with stream:
        opt.step(params, grads)
        stream.begin_capture()
        with pytest.raises(ValueError, match="stream") as caught:
            opt.step(params, grads, grad_scale=2.0)
        assert stream.end_capture().calls == []
    assert str(caught.value) == (
        "stream must not be in capture: this step is compiled otherwise than the one before."
        " Take one step like it before."
    )


def test_what_the_last_step_did_outlives_its_clock(cupy):
    opt = FusedAdam(max_grad_norm=0.5)
    opt.step(ones(cupy), ones(cupy))
    opt.betas = (0.5, 0.5)
    assert opt.last_step.grad_norm == pytest.approx(np.sqrt(8))
    assert copy.deepcopy(opt).last_step == opt.last_step
