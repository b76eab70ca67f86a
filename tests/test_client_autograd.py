"""A network in autograd, in float64: the loop of ``autograd.misc.optimizers.adam``, and ours."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from clients import Nudges, assert_finds_a_defect, assert_trains_as_its_own

from fastadam import FusedAdam

autograd = pytest.importorskip("autograd")
anp = pytest.importorskip("autograd.numpy")
flatten = pytest.importorskip("autograd.misc").flatten
adam = pytest.importorskip("autograd.misc.optimizers").adam

STEPS, SIZES, LR = 60, (1, 12, 12, 1), 2e-2

POINTS = np.linspace(-1, 1, 64)[:, None]
HEIGHTS = np.sin(4 * POINTS)


def start(seed):
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(0, fan_in**-0.5, (fan_in, fan_out)), np.zeros(fan_out))
        for fan_in, fan_out in pairwise(SIZES)
    ]


def train(kind, seed):
    flat_params, unflatten = flatten(start(seed))

    def loss(flat):
        *hidden, last = unflatten(flat)
        x = POINTS
        for weight, bias in hidden:
            x = anp.tanh(anp.dot(x, weight) + bias)
        return anp.mean((anp.dot(x, last[0]) + last[1] - HEIGHTS) ** 2)

    loss_and_grad = autograd.value_and_grad(loss)
    losses, before, nudge = [], [], Nudges(seed)

    def grad(flat, _step=None):
        if kind == "nudged":  # what autograd has just stepped; this is its own array
            if before:
                nudge(flat, before.pop())
            before.append(flat.copy())
        value, grads = loss_and_grad(flat)
        losses.append(float(value))
        return grads

    if kind == "fused":
        opt = FusedAdam(lr=LR)
        for _ in range(STEPS):
            opt.step(flat_params, grad(flat_params))
    else:
        adam(grad, flat_params, num_iters=STEPS, step_size=LR)
    return np.array(losses)


def test_curve_is_that_of_autograd():
    assert_trains_as_its_own(train)


def test_a_defect_is_found(monkeypatch):
    assert_finds_a_defect(train, monkeypatch)
