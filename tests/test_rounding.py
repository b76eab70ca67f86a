"""Stochastic rounding: unbiased, without memory, and what it is for: averages that never freeze."""

from __future__ import annotations

import ml_dtypes
import numba
import numpy as np
import pytest

from fastadam import FusedAdam
from fastadam.kernels import formats
from fastadam.kernels.compiling import JIT_OPTIONS
from fastadam.rounding import rounding, splitmix64

BF16 = ml_dtypes.bfloat16

SIGMAS = 5.0
"""How far the mean of independent draws may be from its expected value, in standard deviations.

All bounds here are that. A Gaussian is further off once in 1.7 million cases; seeds are fixed, and about
10,000 values looked at, most of them counts in bins.
"""

N = 2**16


def test_splitmix64():
    """The first outputs of the reference implementation for seed 0, which adds its constant to the state."""
    constant = 0x9E3779B97F4A7C15
    found = [splitmix64(k * constant % 2**64) for k in range(3)]
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    keys = {rounding(seed, step, 0)[:2] for seed in range(50) for step in range(1, 50)}
    assert len(keys) == 50 * 49
    assert rounding(1, 2, 3).first == 3


@numba.njit(**JIT_OPTIONS)
def words(key, first, out):
    for i in range(out.size):
        out[i] = formats.random_bits(key, first, i)


def uniforms(seed, step, word, half, first=0):
    """Return the 16 random bits that each element rounds by, as numbers in [0, 1) of variance 1 / 12."""
    out = np.empty(N, np.uint32)
    words(rounding(seed, step, 0)[word], np.uint64(first), out)
    return (out >> (16 * half) & 0xFFFF) / 2.0**16 + 2.0**-17


STREAMS = [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("seed", [0, 1, 2**53 - 1])
def test_random_bits_are_uniform(seed):
    """Means and variances of all streams, and each of 256 bins, a binomial count."""
    for step in (1, 2, 1000):
        for stream in STREAMS:
            draws = uniforms(seed, step, *stream)
            assert abs(draws.mean() - 0.5) <= SIGMAS * np.sqrt(1 / 12 / N)
            # Of (u - 1/2)^2: mean 1/12, variance 1/80 - 1/144.
            assert abs(((draws - 0.5) ** 2).mean() - 1 / 12) <= SIGMAS * np.sqrt((1 / 80 - 1 / 144) / N)
            bins = np.bincount((draws * 256).astype(int), minlength=256)
            assert np.abs(bins - N / 256).max() <= SIGMAS * np.sqrt(N / 256 * (1 - 1 / 256))


def test_random_bits_are_not_correlated():
    """Products of two centred uniforms have the variance 1 / 144: streams, steps, seeds and neighbours."""
    base = uniforms(0, 1, 0, 0) - 0.5
    others = [uniforms(0, 1, *stream) for stream in STREAMS[1:]]
    others += [uniforms(0, step, 0, 0) for step in (2, 3, 1001)] + [uniforms(1, 1, 0, 0)]
    others += [np.roll(uniforms(0, 1, 0, 0), lag) for lag in (1, 2, 3, 5, 8, 13, 16, 21, 64, 144, 2048, 4181)]
    for k, other in enumerate(others):
        assert abs((base * (other - 0.5)).mean()) <= SIGMAS / np.sqrt(144 * N), k
    assert abs((base * base).mean()) > SIGMAS / np.sqrt(144 * N)  # it could fail


# --- Of whole steps -----------------------------------------------------------------------------------------


def deviations(stored, exact):
    """Return the mean error of stored values over its standard deviation, that of Bernoulli draws."""
    stored, exact = stored.astype(np.float64), exact.astype(np.float64)
    unit = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
    share = np.abs(exact) / unit % 1
    assert np.abs(stored - exact).max() < unit.max()
    return (stored - exact).sum() / np.sqrt((unit**2 * share * (1 - share)).sum())


@pytest.mark.parametrize("seed", range(4))
def test_a_step_is_unbiased(rng, seed):
    params = rng.standard_normal(N).astype(BF16)
    gradients = [rng.uniform(0.5, 2, N).astype(np.float32) for _ in range(2)]
    exact = params.astype(np.float32)
    opt = FusedAdam(0.01, state_dtype="bfloat16", amsgrad=True, seed=seed)
    plain = FusedAdam(0.01, amsgrad=True)
    opt.step(params, gradients[0])
    plain.step(exact, gradients[0])
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert abs(deviations(getattr(opt.state, name), getattr(plain.state, name))) <= SIGMAS
    assert abs(deviations(params, exact)) <= SIGMAS

    nearest = FusedAdam(0.01, state_dtype="bfloat16", rounding="nearest")
    values = np.full(N, 1 + 2**-9, np.float32) / np.float32(0.1)
    nearest.step(rng.standard_normal(N).astype(BF16), values)
    exact_avg = np.float32(1) * values * np.float32(1 - 0.9)
    assert abs(deviations(nearest.state.exp_avg, exact_avg)) > 10 * SIGMAS  # the test can tell


def test_seeds_steps_and_offsets_draw_anew(rng):
    params, grads = (rng.standard_normal(1000).astype(np.float32) for _ in range(2))

    def first_moment(**flags):
        opt = FusedAdam(state_dtype="bfloat16", **flags)
        opt.step(params.copy(), grads)
        return opt.state.exp_avg.astype(np.float32)

    one = first_moment()
    assert (one == first_moment()).all()
    for flags in ({"seed": 1}, {"offset": 1}, {"seed": 2**53 - 1, "offset": 2**40}):
        assert 0.1 < (one != first_moment(**flags)).mean() < 0.6


# --- It never freezes ---------------------------------------------------------------------------------------


def test_it_never_freezes():
    """One step takes at most 0.1 % from a second moment, less than half an ulp: to the nearest, nothing."""
    size, steps = 512, 3000
    rng = np.random.default_rng(5)
    stochastic = FusedAdam(state_dtype="bfloat16")
    nearest = FusedAdam(state_dtype="bfloat16", rounding="nearest")
    exact = FusedAdam()
    optimizers = [(opt, np.zeros(size, np.float32)) for opt in (stochastic, nearest, exact)]

    def ratios(scale):
        for _ in range(steps):
            grads = (scale * rng.standard_normal(size)).astype(np.float32)
            for opt, params in optimizers:
                opt.step(params, grads)
        wanted = exact.state.exp_avg_sq.astype(np.float64)
        values = (opt.state.exp_avg_sq.astype(np.float64) for opt in (stochastic, nearest))
        return [(value.mean() / wanted.mean(), np.abs(value / wanted - 1).mean()) for value in values]

    ratios(1.0)  # warm up
    (mean, error), (frozen, _) = ratios(0.1)
    assert abs(mean - 1) <= 0.1
    assert error <= 0.1
    assert frozen > 10  # what is stored stays where it was
    (mean, error), _ = ratios(1.0)
    assert abs(mean - 1) <= 0.1
    assert error <= 0.1


def test_parameters_follow_tiny_updates():
    """By 1e-4 of themselves: to the nearest they stay for ever, at random they arrive on average."""
    grads = np.ones(4096, np.float32)
    found = {}
    for how in ("stochastic", "nearest"):
        params = np.ones(4096, BF16)
        opt = FusedAdam(1e-4, rounding=how)
        for _ in range(1000):
            opt.step(params, grads)
        found[how] = params.astype(np.float64)
    assert (found["nearest"] == 1).all()
    # 1,000 updates of 1e-4, each rounded to at most 2**-8: a variance of at most 2**-16 / 4 each.
    assert abs(found["stochastic"].mean() - 0.9) <= SIGMAS * np.sqrt(1000 * 2.0**-18 / 4096)
