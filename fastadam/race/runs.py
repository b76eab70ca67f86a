"""One run: an optimizer, a learning rate, a seed."""

from __future__ import annotations

from math import isfinite, nan
from time import perf_counter

import numpy as np

from fastadam.race.optimizers import Entrant
from fastadam.race.problem import Draws, Problem, Vector
from fastadam.race.results import Run

DRAWN = 2
"""Of problems of at most so many parameters the path is kept."""


class Recorder:
    """Writes down losses and places, every so many steps.

    Parameters
    ----------
    problem : Problem
    seed, steps : int
        Of the run.
    """

    def __init__(self, problem: Problem, seed: int, steps: int) -> None:
        self._problem, self._seed, self._last = problem, seed, steps
        due = [*range(0, steps, problem.every), steps]
        self._steps = np.array(due)
        self._losses = np.full(len(due), nan)
        self._path = np.full((len(due), problem.dims), nan) if problem.dims <= DRAWN else None
        self._count = 0
        self._diverged_at: int | None = None

    def record(self, step: int, params: Vector) -> bool:
        """Write down where a step has led, if it is its turn; return whether to go on."""
        if step % self._problem.every and step != self._last:
            return True
        loss = self._problem.loss(params)
        if not isfinite(loss):
            self._diverged_at = step
            return False
        self._losses[self._count] = loss
        if self._path is not None:
            self._path[self._count] = params
        self._count += 1
        return True

    def stand_still(self, params: Vector) -> None:
        """Fill what is left of the run with its last place: it has stopped by itself."""
        if self._diverged_at is not None:
            return
        self._losses[self._count :] = self._problem.loss(params)
        if self._path is not None:
            self._path[self._count :] = params

    def run(self, seconds: float) -> Run:
        """Return what was written down."""
        return Run(self._seed, self._steps, self._losses, self._path, self._diverged_at, seconds)


def run(problem: Problem, entrant: Entrant, lr: float, seed: int, draws: Draws) -> Run:
    """Take one step for each row of ``draws``, or until the loss is inf or NaN.

    The first step allocates the optimizer's state, so it is left out of the time.
    """
    params = problem.start(seed)
    grads = np.zeros_like(params)
    optimizer = entrant.make(lr, problem.arguments.get(entrant.name, {}))
    recorder = Recorder(problem, seed, len(draws))
    recorder.record(0, params)
    seconds, timed = 0.0, 0
    for number, draw in enumerate(draws, start=1):
        problem.write_grads(params, draw, grads)
        before = perf_counter()
        optimizer.step(params, grads)
        if number > 1:
            seconds += perf_counter() - before
            timed += 1
        if problem.bounds is not None:
            np.clip(params, *problem.bounds, out=params)
        if not recorder.record(number, params):
            break
    return recorder.run(seconds / timed if timed else nan)
