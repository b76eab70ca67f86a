"""The CPU backend: one loop over NumPy arrays, compiled serial and parallel.

Memory traffic in float32: reads 16 n and writes 12 n bytes (20 n and 16 n with AMSGrad); nothing is
allocated. Arrays are flat and C-contiguous, of one size and dtype, and must not overlap: the caller checks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numba import prange

from . import rules, threads
from .compiling import jit
from .storage import load, store

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

name = "cpu"
"""What users call this backend."""

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


def plan(
    params: Array,
    grads: Array,
    states: tuple[Array, ...],
    direction: rules.Maximize | None,
    decay: rules.L2Decay | rules.DecoupledDecay | None,
    rule: rules.Adam | rules.AMSGrad,
) -> Callable[[], None]:
    """Return the call that advances ``params`` and ``states`` by one step, in place.

    All that could fail is done here, before anything is written.

    Parameters
    ----------
    params : ndarray, shape (n,)
        Read and written.
    grads : ndarray, shape (n,)
        Read.
    states : tuple of ndarray, each of shape (n,)
        What the rule calls its state; read and written.
    direction, decay, rule
        The coefficients of the three parts of the equation (:func:`fastadam.kernels.rules.update`), scalars
        of the dtype of ``params``.
    """
    size = params.size
    if size < PARALLEL_FROM:
        return partial(serial, params, grads, states, direction, decay, rule)
    if threads.numba_is_safe():
        return partial(parallel, params, grads, states, direction, decay, rule)
    calls = [
        partial(serial, params[a:b], grads[a:b], tuple(s[a:b] for s in states), direction, decay, rule)
        for a, b in threads.pieces(size, threads.count())
    ]
    return calls[0] if len(calls) == 1 else threads.in_pool(calls)


def prepare(
    params: Array,
    grads: Array,
    states: tuple[Array, ...],
    direction: rules.Maximize | None,
    decay: rules.L2Decay | rules.DecoupledDecay | None,
    rule: rules.Adam | rules.AMSGrad,
) -> None:
    """Compile, or load from the disk cache, the loop for these arguments; write nothing."""
    loop = parallel if params.size >= PARALLEL_FROM and threads.numba_is_safe() else serial
    loop(params[:0], grads[:0], tuple(state[:0] for state in states), direction, decay, rule)


def warmup(dtype: np.dtype[Any], n_states: int, direction: Any, decay: Any, rule: Any) -> None:
    """Compile, or load from the disk cache, all loops for buffers of a dtype."""
    empty = np.empty(0, dtype)
    read_only = empty[:]
    read_only.flags.writeable = False
    for grads in (empty, read_only):  # two types to Numba
        for loop in (serial, parallel) if threads.numba_is_safe() else (serial,):
            loop(empty, grads, (empty,) * n_states, direction, decay, rule)
