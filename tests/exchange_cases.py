"""What tests of exchanged state share: gradients, a run of our own, and the comparison."""

from __future__ import annotations

import numpy as np
from tolerances import exchange_tolerance

SHAPES = {"b": (4, 3), "a": (3,), "c": (3, 2)}
SIZES = [12, 3, 6]
SIZE, STEPS = sum(SIZES), 8


def start(rng, dtype=np.float32):
    """Parameters, and gradients for three runs; none so small that an update is all rounding."""
    params = rng.standard_normal(SIZE).astype(dtype)
    gradients = rng.choice([-1, 1], (3 * STEPS, SIZE)) * rng.uniform(0.5, 2, (3 * STEPS, SIZE))
    return params, gradients.astype(dtype)


def split(flat):
    """Views of a buffer, by name."""
    ends = np.cumsum(SIZES)
    parts = np.split(flat, ends[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}


def run(opt, params, gradients, before=lambda: None):
    for grads in gradients:
        before()
        opt.step(params, grads)


def assert_close(ours, theirs, gradients, *, lr, beta2=0.999, what="params", most=1.0):
    """Compare, and see that it is not because nothing happens: updates are far larger than the tolerance."""
    bound = exchange_tolerance(gradients, lr, beta2, 2 * max(abs(theirs).max(), 1), ours.dtype)[what]
    assert bound < 0.01 * lr or what != "params"
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=most * bound)
