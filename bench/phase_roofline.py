"""The memory roofline of the optimizer phase: two passes with its traffic and next to no arithmetic.

The first reads the gradient. The second reads parameter, gradient, two moments and average, and writes all
five. Together 44 bytes per float32 element: the norm must be known before the first element is clipped, so
the gradient is read twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import numpy as np

from bench.oracle import Array, Contender, WrongUpdateError
from fastadam.kernels import cpu, norms, threads

_CHUNK = 2**14
"""Elements that are summed to one number."""


def _sum_chunks(grads: Array, sums: Array) -> None:
    for c in numba.prange(sums.size):
        chunk = grads[c * _CHUNK : (c + 1) * _CHUNK]
        total = grads[0] * 0
        for i in range(chunk.size):
            total += chunk[i]
        sums[c] = total


def _move(params: Array, grads: Array, exp_avg: Array, exp_avg_sq: Array, average: Array) -> None:
    for i in numba.prange(params.size):
        grad = grads[i]
        exp_avg[i] += grad
        exp_avg_sq[i] += grad
        params[i] += grad
        average[i] += grad
        grads[i] = 0


# The order of a sum is free here, so that the compiler may use all lanes.
_READ = [numba.njit(_sum_chunks, nogil=True, parallel=p, fastmath={"reassoc"}) for p in (False, True)]
_MOVE = [numba.njit(_move, nogil=True, parallel=p) for p in (False, True)]


def bytes_moved(size: int, dtype: Any) -> int:
    """Return what the phase must read and write."""
    return 11 * size * int(np.dtype(dtype).itemsize)


def bytes_read(size: int, dtype: Any) -> int:
    """Return what a norm must read."""
    return size * int(np.dtype(dtype).itemsize)


def read(grads: Array, sums: Array) -> None:
    """Read the gradients, on the threads that a norm would use: sum each chunk of them."""
    serial, parallel = _READ
    if grads.size < norms.PARALLEL_FROM:
        serial(grads, sums)
    elif threads.numba_is_safe():
        parallel(grads, sums)
    else:
        each = -(-sums.size // threads.count())
        starts = range(0, sums.size, each)
        threads.run_in_pool([partial(serial, grads[a * _CHUNK :], sums[a : a + each]) for a in starts])


def move(*arrays: Array) -> None:
    """Add the gradient to four arrays and clear it, on the threads that a step would use."""
    serial, parallel = _MOVE
    size = arrays[0].size
    if size < cpu.PARALLEL_FROM:
        serial(*arrays)
    elif threads.numba_is_safe():
        parallel(*arrays)
    else:
        pieces = threads.pieces(size, threads.count())
        threads.run_in_pool([partial(serial, *(array[a:b] for array in arrays)) for a, b in pieces])


def new_sums(size: int, dtype: Any) -> Array:
    """Return what :func:`read` writes to."""
    return np.zeros(-(-size // _CHUNK), dtype)


def two_passes(*arrays: Array, sums: Array) -> None:
    """Do what :func:`read` and then what :func:`move` does."""
    read(arrays[1], sums)
    move(*arrays)


def start_read(params: Array, grads: Array) -> Contender:
    """Return the first pass as a contender; it has checked itself."""
    sums = new_sums(grads.size, grads.dtype)
    check_read(read, grads, sums)
    return Contender(partial(read, grads, sums), lambda: params, partial(np.copyto, grads))


def check_read(kernel: Callable[[Array, Array], object], grads: Array, sums: Array) -> None:
    """Raise WrongUpdateError unless a kernel reads everything."""
    kernel(grads, sums)
    wide = grads.astype(np.float64)
    error = abs(float(sums.sum(dtype=np.float64)) - float(wide.sum()))
    # Each addition rounds by at most half of eps, relative to a sum of at most one chunk's magnitudes.
    if not error <= _CHUNK * float(np.finfo(grads.dtype).eps) * float(np.abs(wide).sum()):
        raise WrongUpdateError("the reading kernel must sum all gradients; it does not.")


def check_move(kernel: Callable[..., object], params: Array, grads: Array) -> None:
    """Raise WrongUpdateError unless a kernel adds the gradient to four arrays and clears it."""
    arrays = [params.copy(), grads.copy(), *(np.full_like(params, k) for k in range(3))]
    expected = [arrays[0] + grads, np.zeros_like(grads), *(array + grads for array in arrays[2:])]
    kernel(*arrays)
    if not all(np.array_equal(array, right) for array, right in zip(arrays, expected, strict=True)):
        raise WrongUpdateError(
            "the moving kernel must add the gradient to four arrays and clear it; it does not."
        )
