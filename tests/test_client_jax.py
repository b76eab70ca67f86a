"""A network in JAX: flat NumPy buffers, gradients by ``jax.grad``, beside optax."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from clients import Nudges, assert_finds_a_defect, assert_trains_as_its_own

from fastadam import FusedAdam

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = pytest.importorskip("jax.numpy")
ravel_pytree = pytest.importorskip("jax.flatten_util").ravel_pytree

STEPS, SIZES = 60, (2, 16, 16, 1)

BETAS = 0.875, 1 - 2.0**-6
"""Of few bits: optax forms ``1 - beta ** step`` in float32, at 0.999 6e-5 off in the first steps."""


@cache
def problem():
    """A surface to be fitted, and the gradient of the loss of flat parameters."""
    points = np.random.default_rng(0).uniform(-1, 1, (128, 2)).astype(np.float32)
    heights = np.sin(3 * points[:, :1]) * np.cos(2 * points[:, 1:])

    def start(seed):
        rng = np.random.default_rng(seed)
        return [
            (rng.normal(0, fan_in**-0.5, (fan_in, fan_out)).astype(np.float32), np.zeros(fan_out, np.float32))
            for fan_in, fan_out in pairwise(SIZES)
        ]

    _, unravel = ravel_pytree(start(0))

    @jax.jit
    @jax.value_and_grad
    def loss_and_grad(flat_params):
        *hidden, last = unravel(flat_params)
        x = points
        for weight, bias in hidden:
            x = jnp.tanh(x @ weight + bias)
        return ((x @ last[0] + last[1] - heights) ** 2).mean()

    return start, loss_and_grad


def train(kind, seed):
    start, loss_and_grad = problem()
    first, _ = ravel_pytree(start(seed))
    flat_params = np.array(first)
    opt = FusedAdam(lr=1e-2, betas=BETAS)
    own = optax.adam(1e-2, *BETAS)
    state = own.init(first)
    nudge, losses = Nudges(seed), []
    for _ in range(STEPS):
        loss, grads = loss_and_grad(jnp.array(flat_params))  # a copy: what is computed is computed later
        losses.append(float(loss))
        if kind == "fused":
            opt.step(flat_params, grads)
            continue
        before = flat_params
        updates, state = own.update(grads, state)
        flat_params = np.array(optax.apply_updates(jnp.array(before), updates))
        if kind == "nudged":
            nudge(flat_params, before)
    return np.array(losses)


def test_curve_is_that_of_optax():
    assert_trains_as_its_own(train)


def test_a_defect_is_found(monkeypatch):
    assert_finds_a_defect(train, monkeypatch)
