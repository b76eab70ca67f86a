"""Schedules against PyTorch's."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.optim import lr_scheduler  # noqa: E402

from fastadam.schedules import (  # noqa: E402
    chain,
    constant,
    cosine,
    exponential,
    inverse_sqrt,
    inverse_time,
    linear,
    linear_warmup,
    piecewise,
)

STEPS = 240
EPS = float(np.finfo(np.float64).eps)


def linear_lr(opt, start, end, steps):
    return lr_scheduler.LinearLR(opt, start, end, steps)


def sequence(opt, milestones, *makes):
    return lr_scheduler.SequentialLR(opt, [make(opt) for make in makes], milestones)


def held(schedule, steps):
    """Where PyTorch's cosine rises again, ours holds."""
    return schedule, steps + 1


PYTORCH = {
    "constant": (constant(1e-3), STEPS, lambda opt: lr_scheduler.ConstantLR(opt, 1.0)),
    "cosine": (
        *held(cosine(1e-3, 200, 1e-4), 200),
        lambda opt: lr_scheduler.CosineAnnealingLR(opt, 200, 1e-4),
    ),
    "cosine-to-0": (*held(cosine(1e-3, 200), 200), lambda opt: lr_scheduler.CosineAnnealingLR(opt, 200)),
    "cosine-of-1-step": (*held(cosine(1e-3, 1), 1), lambda opt: lr_scheduler.CosineAnnealingLR(opt, 1)),
    "linear": (linear(1e-3, 200, 1e-4), STEPS, lambda opt: linear_lr(opt, 1.0, 0.1, 200)),
    "linear-up": (linear(2.5e-4, 200, 1e-3), STEPS, lambda opt: linear_lr(opt, 0.25, 1.0, 200)),
    "polynomial": (linear(1e-3, 200), STEPS, lambda opt: lr_scheduler.PolynomialLR(opt, 200)),
    "exponential": (exponential(1e-3, 0.97), STEPS, lambda opt: lr_scheduler.ExponentialLR(opt, 0.97)),
    "step": (
        exponential(1e-3, 0.5, 50, staircase=True),
        STEPS,
        lambda opt: lr_scheduler.StepLR(opt, 50, 0.5),
    ),
    "multi-step": (
        piecewise([1e-3, 1e-4, 1e-5], [100, 180]),
        STEPS,
        lambda opt: lr_scheduler.MultiStepLR(opt, [100, 180]),
    ),
    "warmup": (linear_warmup(1e-3, 50), STEPS, lambda opt: linear_lr(opt, 1 / 50, 1.0, 49)),
    "warmup-cosine": (
        *held(linear_warmup(cosine(1e-3, 150), 50), 200),
        lambda opt: sequence(
            opt,
            [50],
            lambda opt: linear_lr(opt, 1 / 50, 1.0, 49),
            lambda opt: lr_scheduler.CosineAnnealingLR(opt, 150),
        ),
    ),
    "chain": (
        chain([5e-4, linear(1e-3, 100, 1e-4), exponential(1e-3, 0.9)], [40, 160]),
        STEPS,
        lambda opt: sequence(
            opt,
            [40, 160],
            lambda opt: lr_scheduler.ConstantLR(opt, 0.5, 10**6),
            lambda opt: linear_lr(opt, 1.0, 0.1, 100),
            lambda opt: lr_scheduler.ExponentialLR(opt, 0.9),
        ),
    ),
    "inverse-time": (
        inverse_time(1e-3, 0.02),
        STEPS,
        lambda opt: lr_scheduler.LambdaLR(opt, lambda taken: 1 / (1 + 0.02 * taken)),
    ),
    "inverse-sqrt": (
        inverse_sqrt((512 * 50) ** -0.5, 50),
        STEPS,
        lambda opt: lr_scheduler.LambdaLR(
            opt, lambda taken: 1e3 * 512**-0.5 * min((taken + 1) ** -0.5, (taken + 1) * 50**-1.5)
        ),
    ),
    "inverse-sqrt-flat": (
        inverse_sqrt(0.01, 10_000, warmup=False),
        12_000,
        lambda opt: lr_scheduler.LambdaLR(opt, lambda taken: 1e3 / math.sqrt(max(taken + 1, 10_000))),
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")  # SequentialLR calls what it deprecates
@pytest.mark.parametrize("case", PYTORCH)
def test_equals_pytorch(case):
    schedule, steps, make = PYTORCH[case]
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    scheduler = make(opt)
    theirs = []
    for _ in range(steps):
        theirs.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    # PyTorch multiplies the last rate to get the next: a few roundings for each step so far.
    np.testing.assert_allclose(
        [schedule(step) for step in range(1, steps + 1)],
        theirs,
        rtol=4 * steps * EPS,
        atol=4 * steps * EPS * 1e-3,
    )
