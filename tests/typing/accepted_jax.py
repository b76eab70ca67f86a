"""Gradients of JAX, as :mod:`accepted`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fastadam import FusedAdam


def gradients() -> None:
    params = np.ones(3, np.float32)
    grads = jax.grad(lambda x: (x**2).sum())(jnp.asarray(params))
    typed: jax.Array = jnp.asarray(grads)
    FusedAdam().step(params, typed)
