"""The CPU backend: one loop over NumPy arrays, compiled serial and parallel.

Memory traffic in float32: reads 16 n and writes 12 n bytes (20 n and 16 n with AMSGrad); nothing is
allocated. Arrays are flat and C-contiguous, of one size and dtype, and must not overlap: the caller checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numba import prange

from . import rules, threads
from .compiling import jit
from .storage import load, store

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

PARALLEL_FROM = 16_384
"""Elements from which the parallel loop is the faster one (``python -m bench.threshold``)."""


def _make_loop(cache_key: str) -> Callable[..., None]:
    def step_elements(
        params: Array,
        grads: Array,
        states: tuple[Array, ...],
        direction: Any,
        decay: Any,
        rule: Any,
    ) -> None:
        cache_key  # noqa: B018
        # In the serial compilation, prange is range.
        for i in prange(params.size):
            param, state = rules.update(
                load(params, i), load(grads, i), load(states, i), direction, decay, rule
            )
            store(params, i, param)
            store(states, i, state)

    return step_elements


serial = jit(_make_loop)
parallel = jit(_make_loop, parallel=True)


def step(
    params: Array,
    grads: Array,
    states: tuple[Array, ...],
    direction: rules.Maximize | None,
    decay: rules.L2Decay | rules.DecoupledDecay | None,
    rule: rules.Adam | rules.AMSGrad,
) -> None:
    """Advance ``params`` and ``states`` by one step, in place, by :func:`fastadam.kernels.rules.update`.

    Parameters
    ----------
    params : ndarray, shape (n,)
        Read and written.
    grads : ndarray, shape (n,)
        Read.
    states : tuple of ndarray, each of shape (n,)
        What the rule calls its state; read and written.
    direction, decay, rule
        The coefficients of the three parts of the equation, scalars of the dtype of ``params``.
    """
    if params.size < PARALLEL_FROM:
        serial(params, grads, states, direction, decay, rule)
    elif threads.numba_is_safe():
        parallel(params, grads, states, direction, decay, rule)
    else:

        def step_piece(start: int, stop: int) -> None:
            piece = tuple(state[start:stop] for state in states)
            serial(params[start:stop], grads[start:stop], piece, direction, decay, rule)

        threads.run_in_pool(step_piece, params.size)


def warmup(*arguments: Any) -> None:
    """Compile, or load from the disk cache, all that :func:`step` may run for arguments of these types."""
    serial(*arguments)
    if threads.numba_is_safe():
        parallel(*arguments)
