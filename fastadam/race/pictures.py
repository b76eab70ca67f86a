"""The pictures of a race, each with what it says: loss curves, seeds, learning rates, paths."""

from __future__ import annotations

from typing import NamedTuple

from fastadam.race import drawing
from fastadam.race.results import Entry, Standing
from fastadam.race.tables import loss_text


class Picture(NamedTuple):
    """A drawn picture.

    Parameters
    ----------
    name : str
        What it is of: ``"curves"``, ``"seeds"``, ``"learning-rates"`` or ``"paths"``.
    caption : str
        How it is to be read.
    alt : str
        What can be seen in it, for who cannot.
    png : bytes
    """

    name: str
    caption: str
    alt: str
    png: bytes


def draw(standing: Standing) -> list[Picture]:
    """Return the pictures of a problem; the paths only where there are two parameters, or one."""
    problem, best, last = standing.problem, standing.ranked[0], standing.ranked[-1]
    floor = f" Losses below {problem.floor:g} are drawn there." if problem.in_logs else ""
    ends = f"{_said(best)} is lowest, {_said(last)} highest"
    pictures = [
        Picture(
            "curves",
            "Loss by step, each with its best learning rate: the median of the seeds. The legend is in the"
            f" order of the final losses.{floor}",
            f"Loss curves on {problem.title}. In the end {ends}.",
            drawing.png(drawing.curves(standing)),
        ),
        Picture(
            "seeds",
            "The same, one by one: the median, a band from the lowest to the highest of the seeds, and the"
            " medians of the others in grey.",
            f"Loss curves with the band of their seeds on {problem.title}, one panel for each of"
            f" {len(standing.entries)} optimizers. {_spreads(standing)}",
            drawing.png(drawing.seeds(standing)),
        ),
        Picture(
            "learning-rates",
            "Final loss by learning rate: the median of the seeds. A cross at the upper edge is a learning"
            f" rate with which most seeds diverged.{floor}",
            f"Final loss by learning rate on {problem.title}. {_widths(standing)}",
            drawing.png(drawing.learning_rates(standing)),
        ),
    ]
    if standing.entries[0].chosen.runs[0].path is not None:
        plane = problem.dims == 2
        kind = "over the contours of the loss" if plane else "by step"
        pictures.append(
            Picture(
                "paths",
                f"Where the parameters go, {kind}, each optimizer with its best learning rate, one line for"
                " each seed." + (" Stars are minima; a dot is where a run ends." if plane else ""),
                f"Paths on {problem.title}, one panel for each of {len(standing.entries)} optimizers, {kind}."
                f" In the end the loss of {ends}.",
                drawing.png(drawing.paths(standing)),
            )
        )
    return pictures


def _said(entry: Entry) -> str:
    return f"{entry.entrant.title} ({loss_text(entry.chosen.final)})"


def _spreads(standing: Standing) -> str:
    """Say how far apart the seeds end."""
    said = [
        f"{entry.entrant.name} {loss_text(min(entry.chosen.finals))} to {loss_text(max(entry.chosen.finals))}"
        for entry in standing.ranked
    ]
    return f"Final losses of the seeds: {'; '.join(said)}."


def _widths(standing: Standing) -> str:
    """Say with how many of its learning rates each optimizer arrives."""
    target = standing.problem.target
    said = [
        f"{entry.entrant.name} {sum(trial.final <= target for trial in entry.trials)} of {len(entry.trials)}"
        for entry in standing.entries
        if entry.entrant.is_tuned
    ]
    return f"Learning rates whose final loss is at most {target:g}: {'; '.join(said)}." if said else ""
