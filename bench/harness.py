"""One interleaved harness: contenders take turns in one process, and are compared turn by turn.

A machine is never quiet: its clock and its memory bandwidth drift by more than the differences that matter
here. So each contender runs in short blocks, all contenders within each round, in a new random order each
round; a ratio is formed within a round, where both sides met the same machine, and the median over rounds
is reported.

A block starts with untimed calls, for a time and not only a count: OpenMP's threads spin for some
milliseconds after the parallel region of the previous contender and would take a core from this one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

Clock = Callable[[], int]
"""Returns nanoseconds."""

Before = Callable[[], object] | None
"""Called, untimed, before each call."""

Timer = Callable[[Callable[[], object], Before], float]
"""Makes a call and returns its duration in nanoseconds: for what a clock around the call does not see."""


class Task(NamedTuple):
    """What is timed."""

    call: Callable[[], object]
    before: Before = None


class Quartiles(NamedTuple):
    """Lower quartile, median and upper quartile."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Quartiles:
        """Return the quartiles of values, linearly interpolated."""
        return cls(*(float(x) for x in np.percentile(values, (25, 50, 75))))


@dataclass(frozen=True)
class Blocks:
    """How long a block is.

    Parameters
    ----------
    warm_seconds, timed_seconds : float
        Least duration of the untimed and of the timed part.
    min_warm_calls, min_timed_calls : int
        Least number of calls in each.
    """

    warm_seconds: float = 0.010
    timed_seconds: float = 0.020
    min_warm_calls: int = 2
    min_timed_calls: int = 3


QUICK = Blocks(warm_seconds=0.0, timed_seconds=0.0)
"""For smoke tests: the numbers mean nothing."""


@dataclass(frozen=True)
class Measurement:
    """The medians of all blocks: name -> seconds per call, one for each round."""

    seconds: dict[str, list[float]]

    @classmethod
    def pooled(cls, parts: Sequence[Measurement]) -> Measurement:
        """Return one measurement of the rounds of several."""
        return cls({name: [s for part in parts for s in part.seconds[name]] for name in parts[0].seconds})

    def median(self, name: str) -> float:
        """Return the median time of a call in seconds."""
        return Quartiles.of(self.seconds[name]).median

    def ratio(self, name: str, *, over: str) -> Quartiles:
        """Return the quartiles of the ratios of times, each formed within one round."""
        pairs = zip(self.seconds[name], self.seconds[over], strict=True)
        return Quartiles.of([ours / theirs for ours, theirs in pairs])


def interleave(
    tasks: Mapping[str, Task],
    *,
    rounds: int,
    blocks: Blocks = Blocks(),
    seed: int = 0,
    clock: Clock = time.perf_counter_ns,
    timer: Timer | None = None,
) -> Measurement:
    """Time tasks in turns.

    Parameters
    ----------
    tasks : mapping
        Name -> task.
    rounds : int
        Blocks of each task.
    blocks : Blocks
        Their length.
    seed : int
        Of the order within the rounds.
    clock : callable
        Returns nanoseconds.
    timer : callable, optional
        Times a call by other means, such as events of a GPU; by default the clock does, which adds one
        reading of it to each call, about 50 ns.

    Returns
    -------
    Measurement
        Each call is timed by itself.
    """
    timed = timer or partial(_by_clock, clock)
    order = np.random.default_rng(seed)
    names = list(tasks)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for position in order.permutation(len(names)):
            name = names[position]
            seconds[name].append(_median_of_block(tasks[name], blocks, clock, timed))
    return Measurement(seconds)


def _by_clock(clock: Clock, call: Callable[[], object], before: Before) -> float:
    if before is not None:
        before()
    start = clock()
    call()
    return clock() - start


def _median_of_block(task: Task, blocks: Blocks, clock: Clock, timer: Timer) -> float:
    _repeat(task, blocks.warm_seconds, blocks.min_warm_calls, clock, timer)
    return float(np.median(_repeat(task, blocks.timed_seconds, blocks.min_timed_calls, clock, timer))) * 1e-9


def _repeat(task: Task, least_seconds: float, least_calls: int, clock: Clock, timer: Timer) -> list[float]:
    """Call a task until both leasts are met; return the duration of each call in nanoseconds."""
    durations: list[float] = []
    first = clock()
    while len(durations) < least_calls or clock() - first < least_seconds * 1e9:
        durations.append(timer(task.call, task.before))
    return durations
