"""What the tests of the race share: small races, and an optimizer that diverges."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from fastadam.race import race
from fastadam.race.settings import Settings

QUICK = Settings(
    problems=("rosenbrock", "noisy", "logistic", "reddi"),
    optimizers=("adam", "amsgrad", "lbfgs"),
    steps=30,
    seeds=2,
    trials=3,
)
"""All kinds of problems but the digits: a second, with kernels in the cache."""


@lru_cache
def quick(**changes):
    """The result of a quick race, run once."""
    return race(replace(QUICK, **changes))


class PlainSGD:
    """Steps down the gradient: it diverges where its learning rate is too high, as no Adam does."""

    def __init__(self, lr, momentum=0.0, nesterov=False):
        self.lr, self.momentum, self.nesterov = lr, momentum, nesterov
        self.buffer = 0.0

    def step(self, flat_params, flat_grads):
        self.buffer = self.momentum * self.buffer + flat_grads
        update = flat_grads + self.momentum * self.buffer if self.nesterov else self.buffer
        np.subtract(flat_params, self.lr * update, out=flat_params)


def losses(result):
    """All bits of a race: problem, optimizer, learning rate, seed -> losses as bytes."""
    return {
        (standing.problem.name, entry.entrant.name, trial.lr, run.seed): run.losses.tobytes()
        for standing in result.standings
        for entry in standing.entries
        for trial in entry.trials
        for run in trial.runs
    }
