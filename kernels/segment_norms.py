"""Sum of squares and count of non-finite elements of parts of a flat buffer: by chunks of its runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numba import prange
from numba.extending import overload

from . import norms, threads
from .compiling import JIT_OPTIONS, each_form, jit
from .norms import count_nonfinite, measure_chunk, sum_of_chunks
from .run_chunks import RunChunks
from .units import Integers

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


def sum_of_runs(partials: Any, first: Any) -> float:
    """Sum the partial sums of all runs, in place; for compiled loops."""
    runs = first.size - 1
    for run in range(runs):
        # In place: the sum of a run lies no further behind than its own first chunk.
        partials[run] = sum_of_chunks(partials[first[run] : first[run + 1]])
    return sum_of_chunks(partials[:runs])


@overload(sum_of_runs, jit_options=JIT_OPTIONS, strict=False)
def _compiled_sum_of_runs(partials: Any, first: Any) -> Any:
    return sum_of_runs


def _make_chunks_loop(cache_key: str) -> Callable[..., None]:
    def measure_run_chunks(grads: Array, scratch: Array, bounds: Integers, first: Integers) -> None:
        cache_key  # noqa: B018
        # In the serial compilation, prange is range.
        for share in prange(first.size - 1):
            for c in range(first[share], first[share + 1]):
                measure_chunk(grads, scratch, c, len(bounds), bounds[c, 0], bounds[c, 1] - bounds[c, 0])

    return measure_run_chunks


def _make_fold_loop(cache_key: str) -> Callable[..., tuple[float, int]]:
    def fold_runs(scratch: Array, first: Integers) -> tuple[float, int]:
        cache_key  # noqa: B018
        chunks = first[-1]
        total = sum_of_runs(scratch[:chunks], first)
        return total, count_nonfinite(total, scratch[chunks : 2 * chunks])

    return fold_runs


serial, parallel = jit(_make_chunks_loop), jit(_make_chunks_loop, parallel=True)
fold = jit(_make_fold_loop)


def prepare(dtype: np.dtype[Any]) -> None:
    """Compile, or load from the disk cache, all loops for gradients of a dtype."""
    scratch, bounds, first = np.empty(0), np.empty((0, 2), np.int64), np.zeros(1, np.int64)
    for loop, grads in each_form(threads.usable(serial, parallel), dtype):
        loop(grads, scratch, bounds, first)
    fold(scratch, first)


class RunNorm:
    """The pass over the gradients of some runs.

    Parameters
    ----------
    chunks : RunChunks
    """

    def __init__(self, chunks: RunChunks) -> None:
        self._chunks = chunks

    @property
    def scratch_size(self) -> int:
        """Elements of ``scratch`` that :meth:`measure` needs."""
        return 2 * len(self._chunks.bounds)

    def measure(self, grads: Array, scratch: Array) -> tuple[float, int]:
        """Return what :func:`fastadam.kernels.norms.measure` does, of the runs."""
        chunks = self._chunks
        if len(chunks.first_of_run) == 2:
            return norms.measure(grads[chunks.bounds[0, 0] : chunks.bounds[-1, 1]], scratch)
        by_numba, count = threads.shares(chunks.size, norms.PARALLEL_FROM, norms.MIN_PIECE)
        first = chunks.shares(count)
        if by_numba or count == 1:
            (parallel if by_numba else serial)(grads, scratch, chunks.bounds, first)
        else:
            threads.run_in_pool(
                [partial(serial, grads, scratch, chunks.bounds, first[k : k + 2]) for k in range(count)]
            )
        return fold(scratch, chunks.first_of_run)  # type: ignore[no-any-return]
