"""Steps of the phase that are refused: schedules that give no rate, and what GPUs do not have yet."""

from __future__ import annotations

import re

import numpy as np
import pytest
from cuda_steps import ones
from phase_cases import assert_changes_nothing

from fastadam import FusedAdam, schedules

INF, NAN = float("inf"), float("nan")
WHOLE = {
    "max_grad_norm": 1.0,
    "max_grad_value": 0.5,
    "skip_nonfinite": True,
    "ema_decay": 0.9,
    "zero_grads": True,
}


def f32():
    return np.linspace(1, 2, 8, dtype=np.float32)


# --- Schedules ----------------------------------------------------------------------------------------------

GARBAGE = [
    (-0.5, ValueError, "lr(3) must be at least 0; got -0.5."),
    (NAN, ValueError, "lr(3) must be finite; got nan."),
    (INF, ValueError, "lr(3) must be finite; got inf."),
    ("0.1", TypeError, "lr(3) must be a real number; got str."),
    (None, TypeError, "lr(3) must be a real number; got NoneType."),
    (True, TypeError, "lr(3) must be a real number; got bool."),
    (1e39, ValueError, "lr must be at most 3.402823e+38 for float32 buffers; got 1e+39."),
    (1e38, ValueError, "lr / (1 - betas[0]) must be at most 3.402823e+38 for float32 buffers; got 1e+39."),
]


@pytest.mark.parametrize("scale", [None, 2.0])
@pytest.mark.parametrize("flags", [{}, WHOLE], ids=["plain", "whole"])
@pytest.mark.parametrize(("value", "error", "message"), GARBAGE, ids=lambda value: str(value)[:20])
def test_a_schedule_that_returns_garbage(value, error, message, flags, scale):
    """In the first step that is scaled, too."""
    opt = FusedAdam(lr=lambda step: value if step == 3 else 0.1 / step, **flags)
    params, grads = f32(), f32()
    for _ in range(2):
        opt.step(params, f32())
    assert_changes_nothing(
        opt, [params, grads], error, message, lambda: opt.step(params, grads, grad_scale=scale)
    )
    opt.lr = 0.5
    opt.step(params, grads)
    assert (opt.last_step.step, opt.last_step.lr) == (3, 0.5)


def test_a_schedule_that_raises():
    def lr(step):
        if step == 2:
            raise RuntimeError("no such step")
        return 0.1

    opt, params, grads = FusedAdam(lr=lr, **WHOLE), f32(), f32()
    opt.step(params, f32())
    assert_changes_nothing(
        opt, [params, grads], RuntimeError, "no such step", lambda: opt.step(params, grads)
    )


CAPTURED = (
    "lr must be a number with capturable=True: a replayed step calls no schedule. Set opt.lr between replays."
)


@pytest.mark.parametrize("lr", [lambda _: 0.1, schedules.constant(0.1)], ids=["function", "fastadam"])
def test_a_schedule_cannot_be_captured(cupy, lr):
    with pytest.raises(ValueError, match=f"^{re.escape(CAPTURED)}$"):
        FusedAdam(lr=lr, capturable=True)
    opt = FusedAdam(capturable=True)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{re.escape(CAPTURED)}$"):
            opt.lr = lr
        assert opt.lr == 1e-3
        opt.step(ones(cupy), ones(cupy))


# --- On a GPU -----------------------------------------------------------------------------------------------


def test_swap_of_buffers_elsewhere(cupy):
    opt, params = FusedAdam(ema_decay=0.5), ones(cupy)
    opt.step(params, ones(cupy))
    message = "flat_params must be on the device of the state (CUDA device 0); got CPU memory. Pass a copy."
    elsewhere = f32()
    assert_changes_nothing(opt, [params.host, elsewhere], TypeError, message, lambda: opt.swap_ema(elsewhere))
