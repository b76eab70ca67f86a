"""Sum of squares and count of non-finite elements of parts of a flat buffer.

Each run (a longest stretch without a gap) is a buffer of its own, with the tree of
:mod:`fastadam.kernels.norms`; the sums of the runs are added in float64, in order, from 0 on. So one run that
is the whole buffer has the sum of the plain pass, and what lies in a gap does not count and is not read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numba import prange

from . import norms, threads
from .compiling import jit
from .norms import count_nonfinite, measure_chunk, sum_of_chunks
from .tree import CHUNK
from .units import Integers

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


def _make_chunks_loop(cache_key: str) -> Callable[..., None]:
    def measure_run_chunks(grads: Array, scratch: Array, chunks: Integers, first: Integers) -> None:
        cache_key  # noqa: B018
        # In the serial compilation, prange is range.
        for share in prange(first.size - 1):
            for c in range(first[share], first[share + 1]):
                measure_chunk(grads, scratch, c, len(chunks), chunks[c, 0], chunks[c, 1])

    return measure_run_chunks


def _make_fold_loop(cache_key: str) -> Callable[..., tuple[float, int]]:
    def fold_runs(scratch: Array, first: Integers) -> tuple[float, int]:
        cache_key  # noqa: B018
        total, chunks = 0.0, first[-1]
        for run in range(first.size - 1):
            total += sum_of_chunks(scratch[first[run] : first[run + 1]])
        return total, count_nonfinite(total, scratch[chunks : 2 * chunks])

    return fold_runs


serial, parallel = jit(_make_chunks_loop), jit(_make_chunks_loop, parallel=True)
fold = jit(_make_fold_loop)


class RunNorm:
    """The pass over the gradients of some runs.

    Parameters
    ----------
    runs : ndarray of int64, shape (k, 2)
        ``(start, stop)`` each, in order, not empty, none overlapping or touching.
    """

    def __init__(self, runs: Integers) -> None:
        self._runs = runs
        self.size = int((runs[:, 1] - runs[:, 0]).sum())
        of_run = -(-(runs[:, 1] - runs[:, 0]) // CHUNK)
        self._first = np.append(0, np.cumsum(of_run))
        run = np.repeat(np.arange(len(runs)), of_run)
        starts = runs[run, 0] + CHUNK * (np.arange(len(run)) - self._first[run])
        self._chunks = np.stack([starts, np.minimum(CHUNK, runs[run, 1] - starts)], axis=1)

    @property
    def scratch_size(self) -> int:
        """Elements of ``scratch`` that :meth:`measure` needs."""
        return 2 * len(self._chunks)

    def measure(self, grads: Array, scratch: Array) -> tuple[float, int]:
        """Return what :func:`fastadam.kernels.norms.measure` does, of the runs."""
        if len(self._runs) == 1:
            start, stop = self._runs[0].tolist()
            return norms.measure(grads[start:stop], scratch)
        if self.size < norms.PARALLEL_FROM:
            serial(grads, scratch, self._chunks, self._shares(1))
        elif threads.numba_is_safe():
            parallel(grads, scratch, self._chunks, self._shares(threads.count()))
        else:
            first = self._shares(max(1, min(threads.count(), self.size // norms.MIN_PIECE)))
            threads.run_in_pool(
                [
                    partial(serial, grads, scratch, self._chunks, first[k : k + 2])
                    for k in range(first.size - 1)
                ]
            )
        return fold(scratch, self._first)  # type: ignore[no-any-return]

    def _shares(self, count: int) -> Integers:
        """Return the first chunks of ``count`` shares of about equal size, and the number of chunks."""
        ends = np.cumsum(self._chunks[:, 1])
        first = np.searchsorted(ends, self.size * np.arange(1, count) // count)
        return np.concatenate([[0], first, [len(ends)]])
