"""Which threads run a step: Numba's, where that is safe, or our own.

Numba's parallel regions are the fastest way to start threads, but not a safe one everywhere:

- the ``workqueue`` layer aborts the process when two Python threads are in parallel regions at once,
  whichever library compiled them;
- GNU ``omp`` kills a forked child that enters a region when its parent had entered one; ``tbb`` is in an
  undefined state in a child that was forked from another than the main thread.

There, :func:`run_in_pool` splits the buffers among the threads of a pool of our own. Which threads run which
elements does not change a bit of the result.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numba

MIN_PIECE = 262_144
"""Elements below which another Python thread costs more than it saves: waking one takes about
90 us, as long as 250,000 float32 elements take (``python -m bench.scaling``)."""

ALIGNMENT = 16
"""Pieces start at multiples of this many elements, so that no two threads write to one cache line."""

_forked = False
_pool: ThreadPoolExecutor | None = None


def _after_fork_in_child() -> None:
    global _forked, _pool
    _forked = True
    _pool = None  # its threads stayed in the parent


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork_in_child)


def count() -> int:
    """Return how many threads a step of the calling thread may use (``numba.set_num_threads``)."""
    return int(numba.get_num_threads())


def layer() -> str:
    """Return the name of Numba's threading layer, starting its threads if they are not running."""
    count()
    return str(numba.threading_layer())


_numba_layer_is_safe: bool | None = None


def numba_is_safe() -> bool:
    """Return whether the calling thread may enter a parallel region of Numba."""
    global _numba_layer_is_safe
    if _forked:
        return False
    if _numba_layer_is_safe is None:
        _numba_layer_is_safe = layer() in {"tbb", "omp"}
    return _numba_layer_is_safe


def pieces(size: int, threads: int) -> list[tuple[int, int]]:
    """Split ``range(size)`` into at most ``threads`` nearly equal ``(start, stop)``."""
    wanted = max(1, min(threads, size // MIN_PIECE))
    step = -(-size // wanted)
    step += -step % ALIGNMENT
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def run_in_pool(work: Callable[[int, int], None], size: int) -> None:
    """Call ``work(start, stop)`` on pieces of ``range(size)``, one of them in the calling thread.

    ``work`` must release the GIL. Returns when all pieces are done.
    """
    global _pool
    own, *others = pieces(size, count())
    if _pool is None:
        _pool = ThreadPoolExecutor(int(numba.config.NUMBA_NUM_THREADS), thread_name_prefix="fastadam")
    futures: list[Future[None]] = []
    try:
        for start, stop in others:
            try:
                futures.append(_pool.submit(work, start, stop))
            except RuntimeError:  # the interpreter is shutting down: it starts no threads any more
                work(start, stop)
        work(*own)
    finally:
        wait(futures)
    for future in futures:
        future.result()
