"""The CPU backend: one loop over NumPy arrays, compiled serial and parallel.

Memory traffic in float32: reads 16 n and writes 12 n bytes; AMSGrad and the average of the parameters each
read and write 4 n more, clearing the gradients writes 4 n more. Nothing is allocated. Arrays are flat and
C-contiguous, of one size and dtype, and must not overlap: the caller checks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numba import prange
from numba.extending import overload

from . import rules, threads
from .compiling import JIT_OPTIONS, each_form, jit
from .norms import measure, scratch_size
from .norms import prepare as prepare_measure
from .storage import load, store

__all__ = [
    "PARALLEL_FROM",
    "accumulate",
    "measure",
    "name",
    "plan",
    "prepare",
    "prepare_accumulate",
    "prepare_measure",
    "scratch_size",
    "warmup",
]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

name = "cpu"
"""What users call this backend."""

PARALLEL_FROM = 16_384
"""Elements from which the parallel loop is the faster one (``python -m bench.threshold``)."""


def step_element(params: Any, grads: Any, states: Any, i: int, c: Any, clear: Any) -> None:
    """Step element ``i`` with ``c``, the parts of :class:`rules.Update`; for compiled loops."""
    param, state = rules.update(load(params, i), load(grads, i), load(states, i), rules.Update(*c))
    # The moments first: they are there before the root and the quotient are. The other way around a thread
    # takes 1.3 times as long for buffers in memory (Zen 4), unless the compiler finds that out by itself.
    store(states, i, state)
    store(params, i, param)
    if clear is not None:  # decided by the type, when compiled
        grads[i] = 0


@overload(step_element, jit_options=JIT_OPTIONS, strict=False)
def _compiled(params: Any, grads: Any, states: Any, i: Any, c: Any, clear: Any) -> Any:
    return step_element


def _make_plain(cache_key: str) -> Callable[..., None]:
    # Three arguments fewer than the other loop: 0.1 us of a call.
    def step_plain(
        params: Array, grads: Array, states: tuple[Array, ...], direction: Any, decay: Any, rule: Any
    ) -> None:
        cache_key  # noqa: B018
        # In the serial compilation, prange is range.
        for i in prange(params.size):
            step_element(params, grads, states, i, (None, direction, decay, rule, None), None)

    return step_plain


def _make_whole(cache_key: str) -> Callable[..., None]:
    def step_whole(
        params: Array,
        grads: Array,
        states: tuple[Array, ...],
        direction: Any,
        decay: Any,
        rule: Any,
        conditioning: Any,
        average: Any,
        clear: Any,
    ) -> None:
        cache_key  # noqa: B018
        for i in prange(params.size):
            c = (conditioning, direction, decay, rule, average)
            step_element(params, grads, states, i, c, clear)

    return step_whole


def _make_accumulate(cache_key: str) -> Callable[..., None]:
    def accumulate_elements(total: Array, grads: Array, clear: Any) -> None:
        cache_key  # noqa: B018
        for i in prange(total.size):
            store(total, i, load(total, i) + load(grads, i))
            if clear is not None:
                grads[i] = 0

    return accumulate_elements


serial, parallel = jit(_make_plain), jit(_make_plain, parallel=True)
whole_serial, whole_parallel = jit(_make_whole), jit(_make_whole, parallel=True)


accumulate_serial, accumulate_parallel = jit(_make_accumulate), jit(_make_accumulate, parallel=True)


def _loops(c: rules.Update, clear: rules.Clear | None) -> tuple[Any, Any, tuple[Any, ...]]:
    """Return the serial and the parallel loop for an update, and their arguments after the arrays."""
    conditioning, *rest, average = c
    if conditioning is None and average is None and clear is None:
        return serial, parallel, tuple(rest)
    return whole_serial, whole_parallel, (*rest, conditioning, average, clear)


def plan(
    params: Array, grads: Array, states: tuple[Array, ...], c: rules.Update, clear: rules.Clear | None = None
) -> Callable[[], None]:
    """Return the call that advances ``params`` and ``states`` by one step, in place.

    All that could fail is done here, before anything is written.

    Parameters
    ----------
    params : ndarray, shape (n,)
        Read and written.
    grads : ndarray, shape (n,)
        Read; written with ``clear``.
    states : tuple of ndarray, each of shape (n,)
        The moments of the rule and, with an average, that; read and written.
    c : Update
        The coefficients of the equation (:func:`fastadam.kernels.rules.update`), scalars of the dtype of
        ``params``.
    clear : Clear, optional
        Set the gradients to zero in the same pass.
    """
    size = params.size
    if size < PARALLEL_FROM and c[0] is None and c[4] is None and clear is None:  # where each call counts
        return partial(serial, params, grads, states, c[1], c[2], c[3])
    one, many, rest = _loops(c, clear)
    if size < PARALLEL_FROM:
        return partial(one, params, grads, states, *rest)
    if threads.numba_is_safe():
        return partial(many, params, grads, states, *rest)
    calls = [
        partial(one, params[a:b], grads[a:b], tuple(s[a:b] for s in states), *rest)
        for a, b in threads.pieces(size, threads.count())
    ]
    return threads.all_of(calls)


def accumulate(total: Array, grads: Array, *, clear: bool) -> None:
    """Add ``grads`` to ``total``, in place, and set them to zero with ``clear``.

    Memory traffic in float32: reads 8 n and writes 4 n bytes, or 8 n.
    """
    loop, flag = _accumulating(total), rules.Clear() if clear else None
    if loop is accumulate_parallel or total.size < PARALLEL_FROM:
        loop(total, grads, flag)
        return
    pieces = threads.pieces(total.size, threads.count())
    threads.run_in_pool([partial(loop, total[a:b], grads[a:b], flag) for a, b in pieces])


def prepare_accumulate(total: Array, grads: Array, *, clear: bool) -> None:
    """Compile, or load from the disk cache, the loop for these arguments; write nothing."""
    _accumulating(total)(total[:0], grads[:0], rules.Clear() if clear else None)


def _accumulating(total: Array) -> Any:
    parallel_pays = total.size >= PARALLEL_FROM and threads.numba_is_safe()
    return accumulate_parallel if parallel_pays else accumulate_serial


def prepare(
    params: Array, grads: Array, states: tuple[Array, ...], c: rules.Update, clear: rules.Clear | None = None
) -> None:
    """Compile, or load from the disk cache, the loop for these arguments; write nothing."""
    one, many, rest = _loops(c, clear)
    loop = many if params.size >= PARALLEL_FROM and threads.numba_is_safe() else one
    loop(params[:0], grads[:0], tuple(state[:0] for state in states), *rest)


def warmup(dtype: np.dtype[Any], n_states: int, c: rules.Update, clear: rules.Clear | None = None) -> None:
    """Compile, or load from the disk cache, all loops for buffers of a dtype."""
    empty = np.empty(0, dtype)
    one, many, rest = _loops(c, clear)
    for loop, grads in each_form(threads.usable(one, many), dtype, written=clear is not None):
        loop(empty, grads, (empty,) * n_states, *rest)
