"""The parts of the phase that GPUs have, behind the stand-in for CuPy: the bits of the CPU, the average."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
from cuda_steps import DTYPES, MODES, assert_same, on_cpu, on_device, ones, problem
from oracles import PHASES, flags_id
from tolerances import assert_same_bits

from fastadam import FusedAdam, warmup
from fastadam.kernels import cuda

SIZES = [1, 3, 8, 65, 1023]
SCALES = [1.0, 3.0, 2.0**16, 1e-3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [{}, {"weight_decay": 0.1, "amsgrad": True}, *PHASES[-2:]])
@pytest.mark.parametrize("scale", SCALES)
def test_bits_of_the_cpu_with_a_grad_scale(cupy, rng, flags, dtype, scale):
    for size in SIZES:
        params, gradients = problem(rng, size, dtype)
        device = on_device(cupy, params, gradients, grad_scale=scale, **flags)
        assert_same(device, on_cpu(params, gradients, grad_scale=scale, **flags))


@MODES
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_average_starts_with_the_parameters(cupy, rng, dtype, capturable):
    params, (grads,) = problem(rng, 33, dtype, steps=1)
    opt, buffer = on_device(cupy, params, [grads], capturable=capturable, ema_decay=0.5)
    _, average = on_cpu(params, [grads], ema_decay=0.5)[0].state.arrays[-2:]
    assert_same_bits(opt.state.param_ema.host, average)
    assert (average != buffer.host).any()


@MODES
@pytest.mark.parametrize("flags", PHASES[-2:], ids=flags_id)
def test_a_schedule_of_numbers(cupy, rng, flags, capturable):
    """A learning rate that is set between steps."""
    params, gradients = problem(rng, 33, steps=6)
    device = FusedAdam(capturable=capturable, **flags), cupy.asarray(params)
    cpu = FusedAdam(**flags), params.copy()
    for number, grads in enumerate(gradients, start=1):
        for (opt, buffer), sent in ((device, cupy.asarray(grads)), (cpu, grads.copy())):
            opt.lr = 0.1 / number
            opt.step(buffer, sent)
    assert_same(device, cpu)
    assert device[0].last_step == cpu[0].last_step


@pytest.mark.parametrize("flags", [{}, *PHASES[-2:]])
def test_a_schedule(cupy, rng, flags):
    def lr(step):
        return 0.1 / step

    params, gradients = problem(rng, 33, steps=6)
    device, cpu = (
        on_device(cupy, params, gradients, lr=lr, **flags),
        on_cpu(params, gradients, lr=lr, **flags),
    )
    assert_same(device, cpu)
    assert device[0].last_step == cpu[0].last_step


@MODES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [64, 2**26])
def test_swap(cupy, rng, monkeypatch, dtype, block, capturable):
    """In blocks of a size that does not divide the buffer, and in one."""
    monkeypatch.setattr(cuda, "_SWAPPED", block)
    params, gradients = problem(rng, 131, dtype)
    opt, buffer = on_device(cupy, params, gradients, capturable=capturable, **PHASES[-2])
    stepped, average = buffer.host.copy(), opt.state.param_ema.host.copy()
    others = [moment.host.copy() for moment in opt.state.arrays[:-1]]
    for params_now, average_now in ((average, stepped), (stepped, average)):
        opt.swap_ema(buffer)
        assert_same_bits(buffer.host, params_now)
        assert_same_bits(opt.state.param_ema.host, average_now)
    for moment, before in zip(opt.state.arrays, others, strict=False):
        assert_same_bits(moment.host, before)


@MODES
def test_a_checkpoint_of_the_whole_phase_moves_between_cpu_and_gpu(cupy, rng, capturable):
    params, gradients = problem(rng, 65, steps=6)
    whole = on_cpu(params, gradients, **PHASES[-1])
    opt, buffer = on_device(cupy, params, gradients[:3], capturable=capturable, **PHASES[-1])
    on, rest = FusedAdam(), buffer.host.copy()
    on.load_state_dict(opt.state_dict())
    twin, other = copy.deepcopy(opt), cupy.asarray(rest)
    for grads in gradients[3:]:
        on.step(rest, grads.copy())
        twin.step(other, cupy.asarray(grads))
    assert_same_bits(rest, whole[1])
    for resumed, uninterrupted in zip(on.state.arrays, whole[0].state.arrays, strict=True):
        assert_same_bits(resumed, uninterrupted)
    assert_same((twin, other), whole)


def test_no_allocation_copy_or_wait_after_the_first_step(cupy, rng):
    params, gradients = problem(rng, 65)
    for options in ({}, {"capturable": True}):
        opt, buffer = on_device(cupy, params, gradients[:1], **PHASES[-1], **options)
        grads = cupy.asarray(gradients[1])
        before = len(cupy.log)
        opt.step(buffer, grads)
        opt.lr = 0.1
        opt.step(buffer, grads)
        seen = {entry[0] for entry in cupy.log[before:]}
        assert seen <= {"step", "step_captured", "form_coefficients", "set_lr"}


@MODES
@pytest.mark.parametrize("scale", [None, 2.0])
def test_warmup_compiles_all_that_a_step_needs(cupy, rng, monkeypatch, capturable, scale):
    flags = {"capturable": capturable, **PHASES[-1]}
    warmup(backend="cupy", scaled=scale is not None, **flags)
    params, (grads,) = problem(rng, 9, steps=1)
    buffer, sent = cupy.asarray(params), cupy.asarray(grads)
    monkeypatch.setattr(cupy, "RawModule", None)
    FusedAdam(**flags).step(buffer, sent, grad_scale=scale)


def test_a_step_replays_the_whole_phase(cupy, rng):
    params, (grads,) = problem(rng, 17, steps=1)
    options = PHASES[-1]
    opt, buffer, sent = FusedAdam(capturable=True, **options), cupy.asarray(params), cupy.asarray(grads)
    cpu, expected = FusedAdam(**options), params.copy()
    stream = cupy.cuda.Stream()
    with stream:
        opt.step(buffer, sent)
        stream.begin_capture()
        opt.step(buffer, sent)
        graph = stream.end_capture()
    for number in range(4):
        sent.host[:] = grads
        if number:
            graph.launch()
        else:  # the first step was taken
            sent.host[:] = 0
        cpu.step(expected, grads.copy())
        assert_same_bits(sent.host, np.zeros_like(grads))
    assert_same((opt, buffer), (cpu, expected))


def test_what_a_clock_was_made_for_stays(cupy):
    opt, params = FusedAdam(capturable=True), ones(cupy)
    opt.step(params, ones(cupy))
    for name, value, now in (("zero_grads", True, False), ("max_grad_value", 0.5, None)):
        message = (
            f"{name} must stay {now} once a capturable step was taken; got {value}. Only lr may change, until"
            " reset."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            setattr(opt, name, value)
        assert getattr(opt, name) is now
