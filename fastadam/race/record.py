"""``race.json``: what was asked for, with which versions, and what came out."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from math import isfinite
from pathlib import Path
from typing import Any

import fastadam
from fastadam.race.results import Entry, Result, Run, Standing
from fastadam.race.settings import Settings

_LIBRARIES = ("numpy", "numba", "scipy", "scikit-learn", "matplotlib")


def versions() -> dict[str, str | None]:
    """Return the versions of what takes part; None of what is not installed."""
    found: dict[str, str | None] = {"fastadam": fastadam.__version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def arguments(settings: Settings) -> dict[str, Any]:
    """Return what was asked for."""
    return {**vars(settings), "tune": str(settings.tune)}


def of(result: Result) -> dict[str, Any]:
    """Return all of a race as JSON has it.

    Floats are written so that they are read with the same bits; inf and NaN are null. But for the values
    named ``seconds_per_step`` it is the same for the same settings on the same machine.
    """
    return {
        "versions": versions(),
        "machine": platform.machine(),
        "arguments": arguments(result.settings),
        "problems": {standing.problem.name: _standing(standing) for standing in result.standings},
    }


def save(result: Result, path: Path) -> None:
    """Write it; a file there is replaced."""
    path.write_text(json.dumps(of(result), allow_nan=False) + "\n", encoding="utf-8")


def _standing(standing: Standing) -> dict[str, Any]:
    problem = standing.problem
    steps = standing.entries[0].trials[0].runs[0].steps
    return {
        "title": problem.title,
        "parameters": problem.dims,
        "steps": standing.steps,
        "target": problem.target,
        "recorded_after": steps.tolist(),
        "optimizers": {entry.entrant.name: _entry(entry, problem.target) for entry in standing.entries},
    }


def _entry(entry: Entry, target: float) -> dict[str, Any]:
    chosen = entry.chosen
    return {
        "class": f"fastadam.{entry.entrant.rule}" if entry.entrant.is_tuned else "scipy: L-BFGS-B",
        "arguments": entry.arguments,
        "lr": chosen.lr if entry.entrant.is_tuned else None,
        "best": _number(chosen.best),
        "final": _number(chosen.final),
        "steps_to_target": _number(chosen.steps_to(target)),
        "seconds_per_step": _number(entry.seconds),
        "runs": [_run(run, target) for run in chosen.runs],
        "trials": [
            {
                "lr": trial.lr if entry.entrant.is_tuned else None,
                "finals": [_number(value) for value in trial.finals],
                "diverged_at": [run.diverged_at for run in trial.runs],
            }
            for trial in entry.trials
        ],
    }


def _run(run: Run, target: float) -> dict[str, Any]:
    return {
        "seed": run.seed,
        "best": _number(run.best),
        "final": _number(run.final),
        "steps_to_target": _number(run.steps_to(target)),
        "diverged_at": run.diverged_at,
        "losses": [_number(loss) for loss in run.losses.tolist()],
    }


def _number(value: float) -> float | None:
    return value if isfinite(value) else None
