"""What came out: runs, the trials of a learning rate, the best of them."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite, isnan, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastadam.race.optimizers import Entrant
from fastadam.race.problem import Problem, Vector
from fastadam.race.settings import Settings

LAST_SHARE = 10
"""The final loss is the median of the last recorded ones, one in so many: a lucky last step counts little."""


@dataclass(frozen=True, eq=False)
class Run:
    """One optimizer with one learning rate, from the start of one seed.

    Parameters
    ----------
    seed : int
    steps : ndarray of int
        After which steps the loss was recorded: 0 first.
    losses : ndarray, the same shape
        NaN after the loss became inf or NaN: the run was ended there.
    path : ndarray, shape (recorded, dims), or None
        The parameters, of problems of one or two.
    diverged_at : int or None
        The step after which the loss was inf or NaN.
    seconds : float
        Time of a step of the optimizer, on average; gradients are not in it. NaN of a run of one step.
    """

    seed: int
    steps: NDArray[np.int64]
    losses: Vector
    path: Vector | None
    diverged_at: int | None
    seconds: float

    @property
    def final(self) -> float:
        """Median of the last tenth of the losses; inf if it diverged."""
        if self.diverged_at is not None:
            return inf
        taken = self.losses[1:]
        return float(np.median(taken[-max(1, len(taken) // LAST_SHARE) :]))

    @property
    def best(self) -> float:
        """The lowest loss."""
        return float(np.nanmin(self.losses))

    def steps_to(self, target: float) -> float:
        """Return after how many steps the loss was at most ``target``; inf if it never was."""
        arrived = np.flatnonzero(self.losses <= target)
        return float(self.steps[arrived[0]]) if arrived.size else inf


@dataclass(frozen=True, eq=False)
class Trial:
    """One learning rate, with every seed."""

    lr: float
    runs: tuple[Run, ...]

    @property
    def finals(self) -> list[float]:
        """The final losses, of each seed."""
        return [run.final for run in self.runs]

    @property
    def final(self) -> float:
        """Median of the final losses; inf if most diverged."""
        return median(self.finals)

    @property
    def best(self) -> float:
        """Median of the lowest losses."""
        return median([run.best for run in self.runs])

    @property
    def diverged(self) -> int:
        """How many runs diverged."""
        return sum(run.diverged_at is not None for run in self.runs)

    def steps_to(self, target: float) -> float:
        """Return the median of the steps to a loss; inf if most seeds never had it."""
        return median([run.steps_to(target) for run in self.runs])


@dataclass(frozen=True, eq=False)
class Entry:
    """An optimizer on a problem: all of its learning rates, lowest first, and what it was given."""

    entrant: Entrant
    arguments: dict[str, Any]
    trials: tuple[Trial, ...]

    @property
    def chosen(self) -> Trial:
        """The trial of the lowest final loss; of several, that of the smallest learning rate."""
        return min(self.trials, key=lambda trial: trial.final)

    @property
    def seconds(self) -> float:
        """Median time of a step, of all runs that took more than one; NaN if none did."""
        every = [run.seconds for trial in self.trials for run in trial.runs]
        return median([seconds for seconds in every if not isnan(seconds)] or [nan])

    @property
    def runs(self) -> int:
        """How many runs there were."""
        return sum(len(trial.runs) for trial in self.trials)

    @property
    def diverged(self) -> int:
        """How many of them diverged."""
        return sum(trial.diverged for trial in self.trials)


@dataclass(frozen=True, eq=False)
class Standing:
    """A problem, and how everybody did on it."""

    problem: Problem
    steps: int
    entries: tuple[Entry, ...]

    @property
    def ranked(self) -> list[Entry]:
        """Best final loss first; then the order of the list of optimizers."""
        return sorted(self.entries, key=lambda entry: entry.chosen.final)


@dataclass(frozen=True, eq=False)
class Result:
    """A whole race."""

    settings: Settings
    standings: tuple[Standing, ...]


def median(values: list[float]) -> float:
    """Return the median of numbers of which some may be inf: of an even count the upper one, then."""
    ordered = sorted(values)
    upper = ordered[len(ordered) // 2]
    lower = ordered[(len(ordered) - 1) // 2]
    return (lower + upper) / 2 if isfinite(upper) else upper
