"""A race: every optimizer on every problem, with every learning rate and seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastadam.race import lbfgs, runs
from fastadam.race.optimizers import Entrant
from fastadam.race.problem import Draws, Problem
from fastadam.race.problems import PROBLEMS
from fastadam.race.results import Entry, Result, Run, Standing, Trial
from fastadam.race.settings import Settings, entrants
from fastadam.race.tuning import learning_rates


def count(settings: Settings) -> int:
    """Return how many runs a race has."""
    trials = [
        len(learning_rates(entrant, PROBLEMS[name], settings))
        for entrant in entrants(settings)
        for name in settings.problems
    ]
    return sum(trials) * settings.seeds


def race(settings: Settings, on_run: Callable[[Problem, Entrant, Run], object] | None = None) -> Result:
    """Run them all.

    The same settings give the same losses, bit for bit, on the same machine; times are others.

    Parameters
    ----------
    settings : Settings
    on_run : callable, optional
        Called after each run.

    Returns
    -------
    Result

    Raises
    ------
    ImportError
        If a package is missing, before anything is run.
    """
    settings.require_packages()
    from threadpoolctl import threadpool_limits

    _warm(
        settings
    )  # before the limit, which reaches only libraries that are there: SciPy has a BLAS of its own
    # Matrices this small gain nothing from the threads of BLAS. A learning rate that is too high shows as a
    # run that diverged: warnings would only break the progress bar.
    with threadpool_limits(limits=1, user_api="blas"), np.errstate(all="ignore"):
        standings = tuple(_standing(PROBLEMS[name](), settings, on_run) for name in settings.problems)
    return Result(settings, standings)


def _standing(
    problem: Problem, settings: Settings, on_run: Callable[[Problem, Entrant, Run], object] | None
) -> Standing:
    steps = settings.steps_of(problem.name)
    draws = {seed: problem.draws(seed, steps) for seed in settings.all_seeds}  # one sequence for everybody

    def run(entrant: Entrant, lr: float, seed: int) -> Run:
        done = _run(problem, entrant, lr, seed, draws[seed])
        if on_run is not None:
            on_run(problem, entrant, done)
        return done

    entries = []
    for entrant in entrants(settings):
        trials = tuple(
            Trial(lr, tuple(run(entrant, lr, seed) for seed in settings.all_seeds))
            for lr in learning_rates(entrant, type(problem), settings)
        )
        arguments = {**entrant.arguments, **problem.arguments.get(entrant.name, {})}
        entries.append(Entry(entrant, arguments, trials))
    return Standing(problem, steps, tuple(entries))


def _run(problem: Problem, entrant: Entrant, lr: float, seed: int, draws: Draws) -> Run:
    if entrant.is_tuned:
        return runs.run(problem, entrant, lr, seed, draws)
    return lbfgs.run(problem, seed, len(draws))


def _warm(settings: Settings) -> None:
    """Compile and import everything before any clock starts."""
    for entrant in entrants(settings):
        if entrant.is_tuned:
            entrant.make(entrant.default_lr, {}).step(np.zeros(2), np.zeros(2))
        else:
            lbfgs.warm()
