"""How fast a step is on this machine, beside NumPy and beside the memory; what ``fastadam bench`` runs.

A machine is never quiet, so the contenders take turns in one process: a round is one block of calls of each,
a ratio is formed within a round, and the median over the rounds is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import numba
import numpy as np

from fastadam.buffers import Array
from fastadam.kernels import threads
from fastadam.kernels.cpu import PARALLEL_FROM
from fastadam.optimizer import FusedAdam
from fastadam.state import State

SIZES = (2**10, 2**16, 2**20, 2**24)
"""From the first-level cache to the main memory."""

WARM_SECONDS, TIMED_SECONDS, LEAST_CALLS = 0.01, 0.02, 3
"""A block: untimed calls, for a time as OpenMP's threads outlast the contender before; then timed calls."""

LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8  # the defaults of FusedAdam


@dataclass(frozen=True)
class Row:
    """What was measured at one size.

    Parameters
    ----------
    size : int
        Elements.
    bytes : int
        What a step must read and write.
    seconds : float
        Time of a step.
    times_numpy : float
        How many times faster than :class:`NumpyAdam`.
    of_roofline : float
        Speed relative to :func:`roofline`; 1 is all that the memory gives.
    """

    size: int
    bytes: int
    seconds: float
    times_numpy: float
    of_roofline: float

    @property
    def microseconds(self) -> float:
        """Time of a step."""
        return self.seconds * 1e6

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes moved over time, in units of 1e9."""
        return self.bytes / self.seconds * 1e-9


class NumpyAdam:
    """Adam as one writes it in NumPy: plain expressions, in place where that is as short."""

    def __init__(self, size: int, dtype: Any) -> None:
        self.exp_avg: Array = np.zeros(size, dtype)
        self.exp_avg_sq: Array = np.zeros(size, dtype)
        self.steps = 0

    def step(self, params: Array, grads: Array) -> None:
        """Advance the parameters by one step, in place."""
        self.steps += 1
        self.exp_avg *= BETA1
        self.exp_avg += (1 - BETA1) * grads
        self.exp_avg_sq *= BETA2
        self.exp_avg_sq += (1 - BETA2) * grads**2
        step_size = LR / (1 - BETA1**self.steps)
        params -= step_size * self.exp_avg / (np.sqrt(self.exp_avg_sq / (1 - BETA2**self.steps)) + EPS)


def _same_traffic(params: Array, grads: Array, exp_avg: Array, exp_avg_sq: Array) -> None:
    for i in numba.prange(params.size):
        grad = grads[i]
        exp_avg[i] += grad
        exp_avg_sq[i] += grad
        params[i] += grad


_serial = numba.njit(_same_traffic, nogil=True)
_parallel = numba.njit(_same_traffic, nogil=True, parallel=True)


def roofline(*arrays: Array) -> None:
    """Move the bytes of a step with next to no arithmetic, on the threads that a step would use."""
    size = arrays[0].size
    if size < PARALLEL_FROM:
        _serial(*arrays)
    elif threads.numba_is_safe():
        _parallel(*arrays)
    else:
        pieces = threads.pieces(size, threads.count())
        threads.run_in_pool([partial(_serial, *(array[a:b] for array in arrays)) for a, b in pieces])


def bytes_per_element(dtype: Any) -> int:
    """Return what a step moves: parameter, gradient and two moments read, all but the gradient written."""
    return 7 * int(np.dtype(dtype).itemsize)


def require_options(sizes: Sequence[int], rounds: int) -> None:
    """Raise ValueError if a size or the number of rounds is not positive."""
    for size in sizes:
        if size < 1:
            raise ValueError(f"size must be at least 1; got {size}.")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {rounds}.")


def measure(
    size: int, dtype: Any = np.float32, *, rounds: int = 9, on_round: Callable[[], object] | None = None
) -> Row:
    """Time a step of so many elements, once its update is known to be right.

    Parameters
    ----------
    size : int
        Elements, at least 1. Ten arrays of them are held, and NumPy needs two or three more.
    dtype : dtype, default float32
        float32 or float64.
    rounds : int, default 9
        Blocks of each contender, at least 1.
    on_round : callable, optional
        Called after each round.

    Returns
    -------
    Row

    Raises
    ------
    ValueError
        If the size or the number of rounds is not positive.
    AssertionError
        If the update is not NumPy's.
    """
    require_options([size], rounds)
    rng = np.random.default_rng(0)
    grads = rng.standard_normal(size).astype(dtype)
    params = (0.02 * rng.standard_normal(size)).astype(dtype)  # as large as weights are
    fused, expected = FusedAdam(LR, (BETA1, BETA2), EPS), NumpyAdam(size, dtype)
    own = [params.copy() for _ in range(2)]
    # Two steps with different gradients: under a constant one, Adam's update hardly depends on the moments.
    for step_grads in (grads[::-1].copy(), grads):
        fused.step(own[0], step_grads)
        expected.step(own[1], step_grads)
    _assert_same_update(own[0] - params, own[1] - params, params)

    # In memory as the optimizer's own: two arrays elsewhere cost up to 4 % of bandwidth.
    moments = State(("exp_avg", "exp_avg_sq"), size, dtype).arrays
    seconds = _interleave(
        {
            "fused": lambda: fused.step(own[0], grads),
            "numpy": lambda: expected.step(own[1], grads),
            "roofline": lambda: roofline(params, grads, *moments),
        },
        rounds,
        on_round or (lambda: None),
    )
    return Row(
        size,
        size * bytes_per_element(dtype),
        float(np.median(seconds["fused"])),
        float(np.median(seconds["numpy"] / seconds["fused"])),
        float(np.median(seconds["roofline"] / seconds["fused"])),
    )


def _assert_same_update(update: Array, expected: Array, params: Array) -> None:
    # Each of two steps rounds the parameter twice or less, here and there; its own update a few dozen times.
    tolerance = np.finfo(params.dtype).eps * (4 * np.abs(params) + 64 * LR)
    wrong = np.flatnonzero(~(np.abs(update - expected) <= tolerance))
    if wrong.size:
        i = int(wrong[0])
        raise AssertionError(
            f"the update must be NumPy's ({expected[i]:.9g}); got {update[i]:.9g} at element {i}."
        )


def _interleave(
    contenders: Mapping[str, Callable[[], object]], rounds: int, on_round: Callable[[], object]
) -> dict[str, Array]:
    """Return seconds per call: name -> the median of each block, shape (rounds,)."""
    seconds = {name: np.zeros(rounds) for name in contenders}
    for turn in range(rounds):
        # Every other round is backwards, so that nobody always runs after the same contender.
        for name in list(contenders)[:: 1 if turn % 2 == 0 else -1]:
            _repeat(contenders[name], WARM_SECONDS)
            seconds[name][turn] = np.median(_repeat(contenders[name], TIMED_SECONDS))
        on_round()
    return seconds


def _repeat(call: Callable[[], object], seconds: float) -> list[float]:
    """Call for so long, at least some times; return the seconds of each call."""
    durations: list[float] = []
    first = perf_counter()
    while len(durations) < LEAST_CALLS or perf_counter() - first < seconds:
        start = perf_counter()
        call()
        durations.append(perf_counter() - start)
    return durations
