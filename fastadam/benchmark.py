"""How fast a step is here, beside NumPy or CuPy and beside the memory; what ``fastadam bench`` runs.

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

from fastadam.adam import FusedAdam
from fastadam.buffers import Array
from fastadam.devices import CPU, Device
from fastadam.kernels import threads
from fastadam.kernels.cpu import PARALLEL_FROM
from fastadam.state import State

SIZES = (2**10, 2**16, 2**20, 2**24)
"""From the first-level cache to the main memory."""

WARM_SECONDS, TIMED_SECONDS, LEAST_CALLS = 0.01, 0.02, 3
"""A block: untimed calls, for a time as OpenMP's threads outlast the contender before; then timed calls.

Times are read after so few calls. A GPU is idle before the first of them, so the time of that one includes
its launch; the others are launched while a GPU that is slower than the caller works: the median is theirs.
"""

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
        Speed relative to :func:`roofline`, or to a copy on a GPU; 1 is all that the memory gives.
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
    """Adam as one writes it in NumPy or CuPy: plain expressions, in place where that is as short."""

    def __init__(self, size: int, dtype: Any, xp: Any = np) -> None:
        self.exp_avg: Array = xp.zeros(size, dtype)
        self.exp_avg_sq: Array = xp.zeros(size, dtype)
        self._sqrt = xp.sqrt
        self.steps = 0

    def step(self, params: Array, grads: Array) -> None:
        """Advance the parameters by one step, in place."""
        self.steps += 1
        self.exp_avg *= BETA1
        self.exp_avg += (1 - BETA1) * grads
        self.exp_avg_sq *= BETA2
        self.exp_avg_sq += (1 - BETA2) * grads**2
        step_size = LR / (1 - BETA1**self.steps)
        params -= step_size * self.exp_avg / (self._sqrt(self.exp_avg_sq / (1 - BETA2**self.steps)) + EPS)


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


def _bound(device: Device, params: Array, grads: Array) -> Callable[[], object]:
    """Return a call that moves the bytes of a step on this device."""
    if device is CPU:
        # In memory as the optimizer's own: two arrays elsewhere cost up to 4 % of bandwidth.
        moments = State(("exp_avg", "exp_avg_sq"), params.size, params.dtype).arrays
        return lambda: roofline(params, grads, *moments)
    moved_each_way = (7 * params.size + 1) // 2
    source = device.xp.concatenate([grads] * 4)[:moved_each_way]
    target = device.xp.empty_like(source)
    return lambda: device.xp.copyto(target, source)


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
    size: int,
    dtype: Any = np.float32,
    *,
    rounds: int = 9,
    on_round: Callable[[], object] | None = None,
    device: Device = CPU,
) -> Row:
    """Time a step of so many elements, once its update is known to be right.

    Parameters
    ----------
    size : int
        Elements, at least 1. Ten arrays of them are held (15 on a GPU), and NumPy needs two or three more.
    dtype : dtype, default float32
        float32 or float64.
    rounds : int, default 9
        Blocks of each contender, at least 1.
    on_round : callable, optional
        Called after each round.
    device : Device, default CPU
        Where the buffers are, and whose clock times the calls.

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
    rng, xp = np.random.default_rng(0), device.xp
    grads = xp.asarray(rng.standard_normal(size).astype(dtype))
    params = xp.asarray((0.02 * rng.standard_normal(size)).astype(dtype))  # as large as weights are
    fused, expected = FusedAdam(LR, (BETA1, BETA2), EPS), NumpyAdam(size, dtype, xp)
    own = [params.copy() for _ in range(2)]
    # Two steps with different gradients: under a constant one, Adam's update hardly depends on the moments.
    for step_grads in (grads[::-1].copy(), grads):
        fused.step(own[0], step_grads)
        expected.step(own[1], step_grads)
    _assert_same_update(own[0] - params, own[1] - params, params)

    seconds = _interleave(
        {
            "fused": lambda: fused.step(own[0], grads),
            "numpy": lambda: expected.step(own[1], grads),
            "roofline": _bound(device, params, grads),
        },
        rounds,
        on_round or (lambda: None),
        device,
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
    tolerance = float(np.finfo(params.dtype).eps) * (4 * abs(params) + 64 * LR)
    (wrong,) = (~(abs(update - expected) <= tolerance)).nonzero()
    if wrong.size:
        i = int(wrong[0])
        raise AssertionError(
            f"the update must be NumPy's ({float(expected[i]):.9g});"
            f" got {float(update[i]):.9g} at element {i}."
        )


def _interleave(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    on_round: Callable[[], object],
    device: Device = CPU,
) -> dict[str, Array]:
    """Return seconds per call: name -> the median of each block, shape (rounds,)."""
    seconds = {name: np.zeros(rounds) for name in contenders}
    for turn in range(rounds):
        # Every other round is backwards, so that nobody always runs after the same contender.
        for name in list(contenders)[:: 1 if turn % 2 == 0 else -1]:
            _repeat(contenders[name], WARM_SECONDS, device)
            seconds[name][turn] = np.median(_repeat(contenders[name], TIMED_SECONDS, device))
        on_round()
    return seconds


def _repeat(call: Callable[[], object], seconds: float, device: Device) -> list[float]:
    """Call for so long, at least some times; return the seconds of each call."""
    durations: list[float] = []
    first = perf_counter()
    while not durations or perf_counter() - first < seconds:
        marks = []
        for _ in range(LEAST_CALLS):
            start = device.mark()
            call()
            marks.append((start, device.mark()))
        durations += [device.seconds(*pair) for pair in marks]
    return durations
