"""What the phase remembers: the average, checkpoints, schedules."""

from __future__ import annotations

import io

import numpy as np
import pytest
from checkpoints import WAYS, resume
from oracles import FLAGS
from phase_cases import WHOLE, N, assert_same, gradients, stepped
from tolerances import assert_same_bits

from fastadam import FusedAdam, schedules

# --- The average --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_average_starts_with_the_parameters_before_the_first_step(rng, dtype):
    params = np.ones(4, dtype)
    opt = FusedAdam(lr=0.5, eps=0.0, ema_decay=0.75)
    assert opt.state.param_ema is None
    opt.step(params, np.ones(4, dtype))
    np.testing.assert_allclose(params, 0.5, rtol=1e-6)
    np.testing.assert_allclose(opt.state.param_ema, 0.75 * 1 + 0.25 * 0.5, rtol=1e-6)


def test_an_average_without_decay_is_the_parameters(rng):
    opt, params = stepped(gradients(rng, 3), ema_decay=0.0)
    assert_same_bits(opt.state.param_ema, params)


@pytest.mark.parametrize("size", [0, 1, 37, 2**16, 2**16 + 1, 3 * 2**16 - 5])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_swap_twice_is_the_identity(rng, size, dtype):
    params = rng.standard_normal((1, size)).astype(dtype)
    opt = FusedAdam(ema_decay=0.9, amsgrad=True)
    opt.step(params, rng.standard_normal(size).astype(dtype))
    before, average = params.copy(), opt.state.param_ema.copy()
    moments = [moment.copy() for moment in opt.state.arrays[:-1]]
    opt.swap_ema(params)
    assert_same_bits(params.ravel(), average)
    assert_same_bits(opt.state.param_ema, before.ravel())
    opt.swap_ema(params)
    assert_same_bits(params, before)
    assert_same_bits(opt.state.param_ema, average)
    for moment, old in zip(opt.state.arrays, moments, strict=False):
        assert_same_bits(moment, old)
    assert opt.state.step == 1


def test_swap_after_a_load(rng):
    """An evaluation of a checkpoint needs no step."""
    opt, params = stepped(gradients(rng, 3), ema_decay=0.9)
    other = FusedAdam()
    other.load_state_dict(opt.state_dict())
    average = opt.state.param_ema.copy()
    other.swap_ema(params)
    assert_same_bits(params, average)


# --- Checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("swapped", [False, True])
def test_resume_is_bit_exact(rng, dtype, how, swapped):
    """Of a run with a skipped step, and in the middle of an evaluation."""
    grads = gradients(rng, 9, dtype)
    grads[2][5] = np.nan
    whole, expected = stepped(grads, grad_scale=3.0, **WHOLE)
    first, params = stepped(grads[:4], grad_scale=3.0, **WHOLE)
    last = first.last_step
    if swapped:
        first.swap_ema(params)
    second = resume(first, how, FusedAdam(lr=99.0, max_grad_norm=7.0, ema_decay=0.5))
    assert second.last_step == (last if how in ("pickle", "deepcopy") else None)
    if swapped:
        second.swap_ema(params)
    for g in grads[4:]:
        second.step(params, g.copy(), grad_scale=3.0)
    assert_same((second, params), (whole, expected))
    assert repr(second) == repr(whole)
    assert second.last_step == whole.last_step
    assert (first.state.step, whole.state.step) == (3, 8)


@pytest.mark.parametrize("how", ["dict", "npz"])
@pytest.mark.parametrize("flags", [FLAGS[0], FLAGS[-1]])
def test_checkpoints_of_before_still_load(rng, flags, how):
    """Those of fastadam 0.1 have the seven hyperparameters of Adam, the step and the moments."""
    grads = gradients(rng, 6)
    whole, expected = stepped(grads, **flags)
    first, params = stepped(grads[:3], **flags)
    saved = first.state_dict()
    for newer in ("skip_nonfinite", "zero_grads", "telemetry", "state_dtype", "rounding", "seed", "offset"):
        del saved[newer]
    assert len(saved) == 7 + 1 + len(first.state.arrays)
    if how == "npz":
        file = io.BytesIO()
        np.savez(file, **saved)
        file.seek(0)
        saved = np.load(file)
    second = FusedAdam(max_grad_norm=1e-9, skip_nonfinite=True, zero_grads=True, ema_decay=0.5)
    second.load_state_dict(saved)
    for g in grads[3:]:
        second.step(params, g)
    assert_same((second, params), (whole, expected))
    assert repr(second) == repr(whole)


def test_contents_of_the_state_dict(rng):
    opt, _ = stepped(gradients(rng, 1), **WHOLE)
    assert list(opt.state_dict()) == [
        *["lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "amsgrad", "maximize"],
        *["max_grad_norm", "max_grad_value", "skip_nonfinite", "ema_decay", "zero_grads", "telemetry"],
        *["state_dtype", "rounding", "seed", "offset"],
        *["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "param_ema"],
    ]


def test_repr():
    opt = FusedAdam(max_grad_norm=1, zero_grads=True, lr=schedules.constant(0.5))
    assert repr(opt) == (
        "FusedAdam(lr=constant(lr=0.5), betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0,"
        " decoupled_weight_decay=False, amsgrad=False, maximize=False, max_grad_norm=1.0, zero_grads=True)"
    )


# --- Schedules ----------------------------------------------------------------------------------------------

SCHEDULES = [
    schedules.linear_warmup(schedules.cosine(0.1, steps=6), steps=3),
    lambda step: 0.3 / step,
    lambda step: 0.0 if step % 2 else 0.125,
]


@pytest.mark.parametrize("flags", [*FLAGS[:3], WHOLE])
@pytest.mark.parametrize("lr", SCHEDULES, ids=["fastadam", "function", "zero"])
def test_a_schedule_is_lr_set_before_each_step(rng, flags, lr):
    grads = gradients(rng, 9)
    opt, params = FusedAdam(**{**flags, "lr": lr}), np.ones(N, np.float32)
    other, expected = FusedAdam(**{**flags, "lr": 7.0}), np.ones(N, np.float32)
    for number, g in enumerate(grads, start=1):
        opt.step(params, g.copy())
        other.lr = lr(number)
        other.step(expected, g.copy())
        assert opt.last_step == other.last_step
        assert opt.last_step.lr == lr(number)
        assert_same((opt, params), (other, expected))
    assert opt.lr is lr


@pytest.mark.parametrize("limit", [None, 1.0])
def test_a_schedule_is_asked_once_a_step(limit):
    asked, params = [], np.ones(8, np.float32)
    opt = FusedAdam(lr=lambda step: asked.append(step) or 0.5, max_grad_norm=limit)
    opt.step(params, np.ones(8, np.float32))
    asked.clear()
    for _ in range(3):
        opt.step(params, np.ones(8, np.float32))
    assert asked == [2, 3, 4]


def test_a_state_dict_has_the_present_rate_of_a_schedule(rng):
    lr = SCHEDULES[0]
    opt, params = stepped(gradients(rng, 4), lr=lr)
    assert opt.state_dict()["lr"] == lr(4)
    assert FusedAdam(lr=lr).state_dict()["lr"] == lr(1)
    plain = FusedAdam()
    plain.load_state_dict(opt.state_dict())
    assert plain.lr == lr(4)

    again = FusedAdam(lr=lr)
    again.load_state_dict(opt.state_dict())
    assert again.lr is lr
    twin, grads = params.copy(), gradients(rng, 1)[0]
    opt.step(params, grads)
    again.step(twin, grads)
    assert again.last_step.lr == lr(5)
    assert_same((again, twin), (opt, params))


def test_a_schedule_and_a_number_take_turns(rng):
    grads = gradients(rng, 3)
    opt, params = FusedAdam(lr=0.5), np.ones(N, np.float32)
    seen = []
    for lr, g in zip((0.5, lambda step: step / 8, 0.125), grads, strict=True):
        opt.lr = lr
        opt.step(params, g)
        seen.append(opt.last_step.lr)
    assert seen == [0.5, 0.25, 0.125]
