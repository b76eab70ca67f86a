"""The table of a problem, as text: what a terminal and a report show."""

from __future__ import annotations

from math import isfinite, isnan

from fastadam.race.results import Entry, Standing

COLUMNS = (
    "optimizer",
    "learning rate",
    "best loss",
    "final loss",
    "of all seeds",
    "steps to target",
    "time per step",
    "runs that diverged",
)
RANGE = COLUMNS.index("of all seeds")
TIME = COLUMNS.index("time per step")
"""The only column that differs between two races of the same settings."""

NOTE = (
    "Medians over the seeds, with the learning rate of the lowest final loss; that is the median of the last"
    " tenth of the recorded losses. Runs that diverged are counted over all learning rates."
)


def loss_text(value: float) -> str:
    """Return a loss to three digits; inf is what a run that diverged has."""
    return f"{value:.3g}" if isfinite(value) else "diverged"


def caption(standing: Standing) -> str:
    """Return the line above a table."""
    problem = standing.problem
    return f"{problem.title}: {standing.steps} steps, target {problem.target:g}"


def rows(standing: Standing) -> list[tuple[str, ...]]:
    """Return a line of :data:`COLUMNS` for each optimizer, best first."""
    return [_row(entry, standing.problem.target) for entry in standing.ranked]


def _row(entry: Entry, target: float) -> tuple[str, ...]:
    chosen = entry.chosen
    steps = chosen.steps_to(target)
    return (
        entry.entrant.name,
        f"{chosen.lr:g}" if entry.entrant.is_tuned else "-",
        loss_text(chosen.best),
        loss_text(chosen.final),
        f"{loss_text(min(chosen.finals))} to {loss_text(max(chosen.finals))}",
        f"{steps:g}" if isfinite(steps) else "never",
        "-" if isnan(entry.seconds) else f"{entry.seconds * 1e6:.1f} us",
        f"{entry.diverged} of {entry.runs}",
    )
