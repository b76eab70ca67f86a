"""The rules are Kingma & Ba's Algorithm 1 and its variants, against the paper in float64."""

from __future__ import annotations

import numpy as np
import pytest
from oracles import FLAGS, WIDER, algorithm_1, flags_id
from tolerances import EPS, LONG_DOUBLE_IS_WIDER, ONE_STEP_ULPS, update_error

from fastadam import FusedAdam

needs_long_double = pytest.mark.skipif(not LONG_DOUBLE_IS_WIDER, reason="no type wider than float64 here")


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=needs_long_double)])
@pytest.mark.parametrize("flags", FLAGS, ids=flags_id)
def test_first_step(rng, flags, dtype):
    params = rng.standard_normal(1000).astype(dtype)
    grads = (10.0 ** rng.uniform(-4, 4, 1000) * rng.choice([-1, 1], 1000)).astype(dtype)
    paper = algorithm_1(params, lr=0.01, dtype=WIDER[params.dtype], **flags)
    paper.step(grads)
    before = params.copy()
    FusedAdam(lr=0.01, **flags).step(params, grads)
    exact = paper.theta - before
    # L2 and the decoupled decay may cancel against the update: bound the error by the larger of the parts.
    scale = np.abs(exact) + 2 * 0.01
    assert (update_error(params, before, exact) <= ONE_STEP_ULPS * EPS[params.dtype] * scale).all()


@pytest.mark.parametrize("flags", FLAGS, ids=flags_id)
def test_a_thousand_float64_steps(rng, flags):
    """In float64 nothing but rounding separates the two: 1,000 steps of at most a few eps each."""
    params = rng.standard_normal(64)
    paper = algorithm_1(params, lr=0.003, **flags)
    opt = FusedAdam(lr=0.003, **flags)
    for _ in range(1000):
        grads = rng.standard_normal(64) + 0.3
        paper.step(grads)
        opt.step(params, grads)
    np.testing.assert_allclose(params, paper.theta, rtol=0, atol=1000 * 16 * EPS[params.dtype])
    np.testing.assert_allclose(opt.state.exp_avg, paper.m, rtol=0, atol=1e-14)
    np.testing.assert_allclose(opt.state.exp_avg_sq, paper.v, rtol=1e-12)
    if flags["amsgrad"]:
        np.testing.assert_allclose(opt.state.max_exp_avg_sq, paper.v_max, rtol=1e-12)


def test_first_update_is_lr_times_the_sign():
    """Bias correction makes the first step lr * g / (|g| + eps), whatever the gradient's scale."""
    params = np.zeros(4)
    grads = np.array([1e-3, -1.0, 1e6, -1e-8])
    FusedAdam(lr=0.1).step(params, grads)
    np.testing.assert_allclose(params, -0.1 * grads / (np.abs(grads) + 1e-8), rtol=1e-12)


def test_eps_is_outside_the_root_and_after_the_correction():
    """With eps = |g| the first update is exactly half of lr; eps hat would give another factor."""
    params = np.zeros(1)
    FusedAdam(lr=0.1, eps=2.0).step(params, np.full(1, 2.0))
    np.testing.assert_allclose(params, -0.05, rtol=1e-12)


def test_l2_and_decoupled_decay_differ_as_they_should():
    """L2 alone moves a parameter by about lr; decoupled decay by exactly lr * weight_decay * param."""
    l2, decoupled = np.full(1, 8.0), np.full(1, 8.0)
    FusedAdam(lr=0.5, weight_decay=0.25).step(l2, np.zeros(1))
    FusedAdam(lr=0.5, weight_decay=0.25, decoupled_weight_decay=True).step(decoupled, np.zeros(1))
    np.testing.assert_allclose(l2, 7.5, rtol=1e-8)
    assert decoupled == 7.0


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.9), (0.4, 0.3), (0.99, 0.9999)])
def test_other_betas(rng, betas):
    params = rng.standard_normal(50)
    paper = algorithm_1(params, betas=betas)
    opt = FusedAdam(betas=betas)
    for _ in range(100):
        grads = rng.standard_normal(50)
        paper.step(grads)
        opt.step(params, grads)
    np.testing.assert_allclose(params, paper.theta, rtol=0, atol=100 * 16 * EPS[params.dtype])


def test_beta_zero_forgets_exactly():
    """With betas of 0 the moments are the last gradient and its square, whatever they were before."""
    params, opt = np.zeros(1, np.float32), FusedAdam(betas=(0.0, 0.0))
    opt.step(params, np.full(1, 1e8, np.float32))
    opt.step(params, np.full(1, 1.5, np.float32))
    assert opt.state.exp_avg == 1.5
    assert opt.state.exp_avg_sq == 2.25


def test_second_moment_is_unbiased_in_float32(rng):
    """0.999 and 0.001 rounded to float32 do not sum to 1: the second moment would be 1.3e-5 too large."""
    size, steps = 500, 6000
    params, opt = np.zeros(size, np.float32), FusedAdam(lr=0.0)
    exact = np.zeros(size)
    for _ in range(steps):
        grads = rng.standard_normal(size).astype(np.float32)
        opt.step(params, grads)
        exact = 0.999 * exact + 0.001 * grads.astype(np.float64) ** 2
    bias = np.mean(opt.state.exp_avg_sq / exact - 1)
    # Independent roundings of half an ulp, remembered for 1 / (2 * 0.001) steps, averaged over the elements.
    assert abs(bias) < 5 * 0.5 * EPS[params.dtype] * np.sqrt(500 / size)


def test_amsgrad_remembers_the_maximum():
    params, opt = np.zeros(1), FusedAdam(amsgrad=True)
    opt.step(params, np.full(1, 100.0))
    largest = opt.state.exp_avg_sq.copy()
    for _ in range(100):
        opt.step(params, np.full(1, 0.01))
    assert opt.state.max_exp_avg_sq == largest
    assert opt.state.exp_avg_sq < largest


def test_maximize_is_minimizing_the_negative(rng):
    up, down = np.ones(100, np.float32), np.ones(100, np.float32)
    ascent, descent = FusedAdam(maximize=True), FusedAdam()
    for _ in range(10):
        grads = rng.standard_normal(100).astype(np.float32)
        ascent.step(up, grads)
        descent.step(down, -grads)
    assert (up == down).all()
