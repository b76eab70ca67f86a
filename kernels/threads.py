"""Which threads run a step: Numba's, where that is safe, or our own.

Numba's parallel regions are the fastest way to start threads, but not a safe one everywhere:

- the ``workqueue`` layer aborts the process when two Python threads are in parallel regions at once,
  whichever library compiled them;
- GNU ``omp`` kills a forked child that enters a region when its parent had entered one; ``tbb`` is in an
  undefined state in a child that was forked from another than the main thread.

There, :func:`run_in_pool` spreads the pieces of a step over threads of our own. Which threads run which
elements does not change a bit of the result.

The pool is not ``concurrent.futures``: an interrupt (Ctrl-C) in its ``submit`` can leave a lock held for
ever, and a ``submit`` that raises may have queued its work all the same. A step is taken once, and whole. So
here are only primitives that an interrupt cannot leave half done: ``SimpleQueue`` and ``start_new_thread``,
neither ``threading.Event`` nor ``Thread``.
"""

from __future__ import annotations

from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

import numba

from . import forks

MIN_PIECE = 262_144
"""Elements below which another Python thread costs more than it saves: waking one takes about
90 us, as long as 250,000 float32 elements take (``python -m bench.scaling``)."""

ALIGNMENT = 16
"""Pieces start at multiples of this many elements, so that no two threads write to one cache line."""

_numba_layer_is_safe: bool | None = None


def count() -> int:
    """Return how many threads a step of the calling thread may use (``numba.set_num_threads``)."""
    return int(numba.get_num_threads())


def layer() -> str:
    """Return the name of Numba's threading layer, starting its threads if they are not running."""
    count()
    return str(numba.threading_layer())


def numba_is_safe() -> bool:
    """Return whether the calling thread may enter a parallel region of Numba."""
    global _numba_layer_is_safe
    if forks.in_child:
        return False
    if _numba_layer_is_safe is None:
        _numba_layer_is_safe = layer() in {"tbb", "omp"}
    return _numba_layer_is_safe


def usable(serial: Any, parallel: Any) -> tuple[Any, ...]:
    """Return which compilations of a loop the calling thread may run."""
    return (serial, parallel) if numba_is_safe() else (serial,)


def shares(size: int, parallel_from: int, min_piece: int) -> tuple[bool, int]:
    """Return whether Numba's threads take a loop over shares of ``size`` elements, and how many pay."""
    if size < parallel_from:
        return False, 1
    if numba_is_safe():
        return True, count()
    return False, max(1, min(count(), size // min_piece))


def pieces(size: int, threads: int, *, min_piece: int = MIN_PIECE) -> list[tuple[int, int]]:
    """Split ``range(size)`` into at most ``threads`` nearly equal ``(start, stop)``, of a size that pays."""
    wanted = max(1, min(threads, size // min_piece))
    step = -(-size // wanted)
    step += -step % ALIGNMENT
    return [(start, min(start + step, size)) for start in range(0, size, step)]


class _Job:
    """Calls to be made once each, by whichever threads come."""

    def __init__(self, calls: Sequence[Callable[[], None]]) -> None:
        self.todo = deque(calls)
        self.wanted = len(calls)
        self.results: list[BaseException | None] = []
        self.finished: SimpleQueue[None] = SimpleQueue()

    @property
    def is_done(self) -> bool:
        """Whether all calls have returned."""
        return len(self.results) == self.wanted

    def work(self) -> None:
        """Make calls until none is left to begin."""
        while True:
            try:
                call = self.todo.popleft()  # atomic: nobody else gets it
            except IndexError:
                return
            error = None
            try:
                call()
            except BaseException as caught:  # passed on to the caller of run_in_pool
                error = caught
            self.results.append(error)
            if self.is_done:
                self.finished.put(None)


_jobs: SimpleQueue[_Job] = SimpleQueue()
_workers = 0


def _serve(jobs: SimpleQueue[_Job]) -> None:
    while True:
        jobs.get().work()  # no name keeps the job, and with it the buffers, alive


def _have_workers(wanted: int) -> int:
    """Start threads up to ``wanted``, as far as the system lets us; return how many there are."""
    global _workers
    while _workers < wanted:
        try:
            start_new_thread(_serve, (_jobs,))
        except RuntimeError:  # the system's limit, or the interpreter is shutting down
            break
        _workers += 1
    return min(_workers, wanted)


def _forget_workers() -> None:
    global _jobs, _workers
    _jobs, _workers = SimpleQueue(), 0


forks.on_fork(_forget_workers)  # they stayed in the parent


def in_pool(calls: Sequence[Callable[[], None]]) -> Callable[[], None]:
    """Return what :func:`run_in_pool` does, prepared: less is left where a signal may strike."""
    return partial(_run, _Job(calls))


def all_of(calls: Sequence[Callable[[], None]]) -> Callable[[], None]:
    """Return the one call that makes all of some: of several in the pool, the only one as it is."""
    return calls[0] if len(calls) == 1 else in_pool(calls)


def run_in_pool(calls: Sequence[Callable[[], None]]) -> None:
    """Make each call once, in as many threads, and return when all have returned.

    The calling thread only waits: an exception that a signal handler raises in it, such as
    ``KeyboardInterrupt``, is passed on when all calls are made. The calls should release the GIL.
    """
    _run(_Job(calls))


def _run(job: _Job) -> None:
    interrupt: BaseException | None = None
    asked = 0
    while not job.is_done:
        try:
            workers = _have_workers(job.wanted)
            if workers == 0:  # not one thread is to be had
                job.work()
                break
            while asked < workers:
                _jobs.put(job)
                asked += 1
            job.finished.get()
        except BaseException as caught:  # raised below
            interrupt = caught
    error = interrupt or next(filter(None, job.results), None)
    if error is not None:
        raise error
