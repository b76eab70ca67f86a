"""It optimizes: a parabola, Rosenbrock's valley, and the problem on which Adam fails and AMSGrad does not."""

from __future__ import annotations

import numpy as np
import pytest

from fastadam import FusedAdam


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parabola(rng, dtype):
    scales = np.logspace(-2, 2, 50).astype(dtype)
    params = rng.standard_normal(50).astype(dtype)
    opt = FusedAdam(lr=0.1)
    for number in range(2000):
        opt.lr = 0.1 * (1 - number / 2000)
        opt.step(params, scales * params)
    assert np.abs(params).max() < 1e-3


def rosenbrock(x):
    return float((1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_rosenbrock(amsgrad):
    x = np.array([-1.5, 2.0])
    start = rosenbrock(x)
    opt = FusedAdam(lr=0.02, amsgrad=amsgrad)
    for _ in range(10_000):
        slope = x[1] - x[0] ** 2
        opt.step(x, np.array([-2 * (1 - x[0]) - 400 * x[0] * slope, 200 * slope]))
    np.testing.assert_allclose(x, [1, 1], atol=1e-2)
    assert rosenbrock(x) < 1e-4 < start


@pytest.mark.parametrize(("amsgrad", "end"), [(False, 1.0), (True, -1.0)], ids=["adam", "amsgrad"])
def test_reddi_counterexample(amsgrad, end):
    """Reddi, Kale & Kumar, Theorem 1: losses C x, -x, -x in turn on [-1, 1].

    Their mean decreases towards -1, where AMSGrad goes. Adam's second moment forgets the rare large gradient
    too fast: it ends at +1, the worst point.
    """
    c = 3.0
    x, opt = np.zeros(1), FusedAdam(betas=(0.0, 1 / (1 + c**2)), eps=0.0, amsgrad=amsgrad)
    tail = []
    for number in range(1, 30_001):
        opt.lr = 0.5 / np.sqrt(number)
        opt.step(x, np.array([c if number % 3 == 1 else -1.0]))
        np.clip(x, -1, 1, out=x)
        tail.append(x[0])
    assert np.mean(tail[-3000:]) == pytest.approx(end, abs=0.02)
