"""Sum of squares and count of non-finite elements of a flat buffer: the pass before clipping.

Memory traffic: reads the gradients once (4 n bytes in float32, 2 n in 16 bits), writes 16 bytes per chunk;
nothing is allocated.

The sum is in float64 over a fixed tree, so that it has the same bits for every number of threads, split,
vector width and alignment, and on a GPU:

1. A buffer is cut into chunks of ``CHUNK`` = 2048 elements; the last may be shorter.
2. A chunk has ``LANES`` = 32 accumulators in float64 that begin at 0. Lane ``l`` adds, for ``r`` = 0, 1, ...
   in turn, the square of element ``32 r + l`` of the chunk: the element as a float64 times itself, rounded to
   float64 (exact for all but float64).
3. The lanes are folded: for ``width`` = 16, 8, 4, 2, 1, every lane ``l < width`` adds lane ``l + width``.
   Lane 0 is then the partial sum of the chunk.
4. The partial sums are summed by the same tree, themselves in place of squares, level by level, until one
   value is left.

The sum of no elements is 0. A NaN is any NaN: its payload is not part of the contract.

The count costs nothing where all is finite. Squares do not cancel, so the partial sum of a chunk with a
non-finite element is not finite, and only such chunks, just read and in cache, are looked through. (In
float64 the square of a large finite element overflows, too: such a look may find nothing.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import isfinite
from typing import Any, TypeAlias

import numpy as np
from numba import prange
from numba.extending import overload

from . import threads
from .chunks import sum_of_squares, sum_of_values
from .compiling import JIT_OPTIONS, each_form, jit
from .storage import load
from .tree import CHUNK

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

PARALLEL_FROM = 131_072
"""Elements from which the parallel loop is the faster one: the crossing lies at 48 Ki with threads that spin
(omp) and later with threads that must be woken (tbb). As many bytes as the step's own threshold."""

MIN_PIECE = 1_048_576
"""Elements below which another thread of our own pool costs more than it saves: waking one takes 20 to 90 us,
and one thread sums as many from the cache in 70 us."""


def nonfinite_of_chunk(total: float, grads: Any, start: int, size: int) -> int:
    """Count what is not finite, where the sum of squares says that there may be any; for compiled loops."""
    nonfinite = 0
    if not isfinite(total):
        elements = grads[start : start + size]
        for i in range(elements.size):  # vectorised; a loop over the elements themselves is not
            nonfinite += not isfinite(load(elements, i))
    return nonfinite


@overload(nonfinite_of_chunk, jit_options=JIT_OPTIONS, strict=False)
def _compiled_nonfinite_of_chunk(total: Any, grads: Any, start: Any, size: Any) -> Any:
    return nonfinite_of_chunk


def measure_chunk(grads: Any, scratch: Any, chunk: int, chunks: int, start: int, size: int) -> None:
    """Write the sum of squares and the count of one chunk of ``chunks``; for compiled loops."""
    scratch[chunk] = sum_of_squares(grads, start, size)
    scratch[chunks + chunk] = nonfinite_of_chunk(scratch[chunk], grads, start, size)


@overload(measure_chunk, jit_options=JIT_OPTIONS, strict=False)
def _compiled_measure_chunk(grads: Any, scratch: Any, chunk: Any, chunks: Any, start: Any, size: Any) -> Any:
    return measure_chunk


def sum_of_chunks(partials: Any) -> float:
    """Sum the partial sums of one buffer, in place; for compiled loops."""
    left = partials.size
    while left > 1:
        # In place: chunk c was read when its sum is written to c, and c lies in no later chunk.
        sums = (left + CHUNK - 1) // CHUNK
        for c in range(sums):
            partials[c] = sum_of_values(partials, c * CHUNK, min(CHUNK, left - c * CHUNK))
        left = sums
    return partials[0] if partials.size else 0.0


@overload(sum_of_chunks, jit_options=JIT_OPTIONS, strict=False)
def _compiled_sum_of_chunks(partials: Any) -> Any:
    return sum_of_chunks


def count_nonfinite(total: float, counts: Any) -> int:
    """Sum the counts of the chunks, where the total says that there may be any; for compiled loops."""
    nonfinite = 0
    if not isfinite(total):
        for count in counts:
            nonfinite += int(count)
    return nonfinite


@overload(count_nonfinite, jit_options=JIT_OPTIONS, strict=False)
def _compiled_count_nonfinite(total: Any, counts: Any) -> Any:
    return count_nonfinite


def _make_chunks_loop(cache_key: str) -> Callable[..., None]:
    def measure_chunks(grads: Array, scratch: Array, first: int, stop: int) -> None:
        cache_key  # noqa: B018
        chunks = (grads.size + CHUNK - 1) // CHUNK
        # In the serial compilation, prange is range.
        for c in prange(first, stop):
            start = c * CHUNK
            measure_chunk(grads, scratch, c, chunks, start, min(CHUNK, grads.size - start))

    return measure_chunks


def _make_fold_loop(cache_key: str) -> Callable[..., tuple[float, int]]:
    def fold_partials(scratch: Array, chunks: int) -> tuple[float, int]:
        cache_key  # noqa: B018
        total = sum_of_chunks(scratch[:chunks])
        return total, count_nonfinite(total, scratch[chunks : 2 * chunks])

    return fold_partials


serial = jit(_make_chunks_loop)
parallel = jit(_make_chunks_loop, parallel=True)
fold = jit(_make_fold_loop)


def scratch_size(size: int) -> int:
    """Return the elements of ``scratch`` that :func:`measure` needs for ``size`` gradients."""
    return 2 * -(-size // CHUNK)


def measure(grads: Array, scratch: Array) -> tuple[float, int]:
    """Return the sum of squares of the gradients, and how many of them are infinite or NaN.

    Parameters
    ----------
    grads : ndarray, shape (n,)
        float32, float64 or codes (:mod:`fastadam.kernels.formats`), C-contiguous; read.
    scratch : ndarray, shape (m,)
        float64, C-contiguous and at least :func:`scratch_size` elements; written. Must not overlap ``grads``.

    Returns
    -------
    sum_of_squares : float
        By the tree of this module. Finite for all finite float32 gradients; not finite where ``nonfinite``
        is not 0.
    nonfinite : int
        Exact.
    """
    size = grads.size
    chunks = -(-size // CHUNK)
    if size < PARALLEL_FROM:
        serial(grads, scratch, 0, chunks)
    elif threads.numba_is_safe():
        parallel(grads, scratch, 0, chunks)
    else:
        pieces = threads.pieces(chunks, threads.count(), min_piece=MIN_PIECE // CHUNK)
        calls = [partial(serial, grads, scratch, first, stop) for first, stop in pieces]
        calls[0]() if len(calls) == 1 else threads.run_in_pool(calls)
    return fold(scratch, chunks)  # type: ignore[no-any-return]


def prepare(dtype: np.dtype[Any]) -> None:
    """Compile, or load from the disk cache, all loops for gradients of a dtype."""
    scratch = np.empty(0, np.float64)
    for loop, grads in each_form(threads.usable(serial, parallel), dtype):
        loop(grads, scratch, 0, 0)
    fold(scratch, 0)
