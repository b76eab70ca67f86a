"""How the pictures of a race are drawn."""

from __future__ import annotations

from io import BytesIO
from math import ceil, isfinite
from typing import NamedTuple

import numpy as np

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image  # comes with Matplotlib
except ModuleNotFoundError as error:
    raise ImportError('the pictures of the race need matplotlib. pip install "fastadam[race]"') from error

from fastadam.race.problem import Vector, View
from fastadam.race.results import Entry, Standing
from fastadam.race.surfaces import Surface
from fastadam.race.tables import loss_text

_DPI = 110
_GREY = "#6b7280"

_LOOKS = {
    # One hue for a family, and a line style for each of it: colors alone would not tell them apart.
    "sgd": ("#60a5fa", "-"),
    "sgd-momentum": ("#1d4ed8", "--"),
    "nesterov": ("#0e7490", "-."),
    "adagrad": ("#16a34a", "-"),
    "rmsprop": ("#65a30d", "--"),
    "adadelta": ("#14532d", "-."),
    "adam": ("#dc2626", "-"),
    "adamw": ("#f97316", "--"),
    "amsgrad": ("#be185d", "-."),
    "nadam": ("#7f1d1d", ":"),
    "radam": ("#a855f7", "-"),
    "adamax": ("#6b21a8", "--"),
    "lion": ("#ca8a04", "-"),
    "lbfgs": ("#111827", ":"),
}


def png(figure: Figure) -> bytes:
    """Return a picture in a palette of 256 colors: a third of the bytes, and no difference to be seen."""
    drawn, small = BytesIO(), BytesIO()
    figure.savefig(drawn, dpi=_DPI, format="png")
    Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
        small, "PNG", optimize=True
    )
    return small.getvalue()


def _figure() -> Figure:
    # Figure without pyplot: no window system, no global state.
    return Figure(figsize=(10, 5), layout="constrained", facecolor="white")


def _panels(standing: Standing) -> tuple[Figure, list[Axes]]:
    """Return a figure with a panel for each optimizer, titled, best first."""
    ranked = standing.ranked
    columns = min(4, len(ranked))
    lines = ceil(len(ranked) / columns)
    width, height = 2.9 * columns + 0.3, 2.6 * lines + 0.6
    # Placed by hand: to fit so many panels takes longer than to draw them.
    figure = Figure(figsize=(width, height), facecolor="white")
    edges = {
        "left": 0.6 / width,
        "right": 1 - 0.15 / width,
        "bottom": 0.35 / height,
        "top": 1 - 0.85 / height,
    }
    figure.subplots_adjust(**edges, wspace=0.1, hspace=0.3)
    figure.suptitle(standing.problem.title, fontweight="bold", x=edges["left"], ha="left")
    panels = list(figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel())
    for axes in panels[len(ranked) :]:
        axes.set_axis_off()
    for axes, entry in zip(panels, ranked, strict=False):
        axes.set_title(f"{entry.entrant.title}\n{loss_text(entry.chosen.final)}", loc="left", fontsize=9)
    return figure, panels[: len(ranked)]


def curves(standing: Standing) -> Figure:
    """Draw the median loss of all optimizers by step."""
    figure = _figure()
    axes = figure.subplots()
    for entry in standing.ranked:
        color, style = _LOOKS[entry.entrant.name]
        middle = _spread(standing, _losses(entry)).middle
        axes.plot(_steps(standing), middle, color=color, linestyle=style, linewidth=1.6, label=_label(entry))
    axes.set_title(standing.problem.title, loc="left", fontweight="bold")
    axes.set_xlabel("step")
    axes.set_xlim(0, standing.steps)
    _scale(axes, standing, [_losses(entry) for entry in standing.entries])
    _finish(axes, standing)
    return figure


def seeds(standing: Standing) -> Figure:
    """Draw the loss of each optimizer by step, with the band of its seeds."""
    figure, panels = _panels(standing)
    middles = [_spread(standing, _losses(entry)).middle for entry in standing.entries]
    for axes, entry in zip(panels, standing.ranked, strict=True):
        for middle in middles:
            axes.plot(_steps(standing), middle, color="#d1d5db", linewidth=0.6, zorder=1)
        color, _ = _LOOKS[entry.entrant.name]
        spread = _spread(standing, _losses(entry))
        axes.plot(_steps(standing), spread.middle, color=color, linewidth=1.4)
        axes.fill_between(_steps(standing), spread.lowest, spread.highest, color=color, alpha=0.2, lw=0)
        axes.set_xlim(0, standing.steps)
        _tidy(axes)
        _target(axes, standing)
    # After the last line, as the panels share their axes.
    _scale(panels[0], standing, [_losses(entry) for entry in standing.entries])
    for axes in panels:
        axes.minorticks_off()
    return figure


def learning_rates(standing: Standing) -> Figure:
    """Draw the final losses by learning rate."""
    figure = _figure()
    axes = figure.subplots()
    all_finals = []
    for entry in standing.ranked:
        rates = np.array([trial.lr for trial in entry.trials])
        finals = np.array([trial.finals for trial in entry.trials]).T
        all_finals.append(finals)
        color, style = _LOOKS[entry.entrant.name]
        if not entry.entrant.is_tuned:
            level = float(_drawn(standing, finals).min())
            axes.axhline(level, color=color, linestyle=":", label=_label(entry))
            continue
        middle = _spread(standing, finals).middle
        axes.plot(rates, middle, color=color, linestyle=style, marker="o", ms=3.5, label=_label(entry))
        lost = [trial.lr for trial in entry.trials if not isfinite(trial.final)]
        edge = axes.get_xaxis_transform()
        axes.plot(lost, [1.0] * len(lost), "x", color=color, clip_on=False, zorder=5, transform=edge)
    axes.set_title(f"{standing.problem.title}: the learning rate", loc="left", fontweight="bold")
    axes.set_xlabel("learning rate")
    axes.set_xscale("log")
    _scale(axes, standing, all_finals)
    _finish(axes, standing)
    axes.set_ylabel("final loss")
    return figure


class _Spread(NamedTuple):
    """Lowest, median and highest of the seeds, as they are drawn."""

    lowest: Vector
    middle: Vector
    highest: Vector


def _spread(standing: Standing, values: Vector) -> _Spread:
    """Return it of the rows of ``values``; a median that is inf is not drawn."""
    known = np.where(np.isfinite(values), values, np.inf)
    ordered = _drawn(standing, np.sort(known, axis=0))
    middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1].mean(axis=0)
    beyond = np.isinf(ordered[-1])
    highest = np.where(beyond & np.isfinite(ordered[0]), _ceiling(standing), ordered[-1])
    return _Spread(*(np.where(np.isfinite(line), line, np.nan) for line in (ordered[0], middle, highest)))


def _steps(standing: Standing) -> Vector:
    return standing.entries[0].chosen.runs[0].steps.astype(np.float64)


def _losses(entry: Entry) -> Vector:
    """Return the losses of the seeds, a row for each."""
    return np.array([run.losses for run in entry.chosen.runs])


def _label(entry: Entry) -> str:
    return f"{entry.entrant.title}, {loss_text(entry.chosen.final)}"


def _drawn(standing: Standing, values: Vector) -> Vector:
    """Return losses as they are drawn: none below the floor, none so high that an axis could not hold it."""
    floor = standing.problem.floor if standing.problem.in_logs else -np.inf
    return np.where(np.isfinite(values), np.clip(values, floor, 100 * _ceiling(standing)), values)


def _ceiling(standing: Standing) -> float:
    """Return the highest loss that is ever drawn: a few times the first."""
    first = max(float(run.losses[0]) for entry in standing.entries for run in entry.chosen.runs)
    return first * (5 if standing.problem.in_logs else 2.2)


def _scale(axes: Axes, standing: Standing, values: list[Vector]) -> None:
    """Choose the axis of the losses: what holds all values but those beyond the ceiling."""
    problem, cap = standing.problem, _ceiling(standing)
    flat = np.concatenate([_drawn(standing, some).ravel() for some in values])
    flat = np.append(flat[np.isfinite(flat)], problem.target)
    lowest, highest = float(flat.min()), min(cap, float(flat.max()))
    if problem.in_logs:
        axes.set_yscale("log")
        axes.set_ylim(min(lowest, highest) / 2, 1.5 * highest)
    else:
        axes.set_ylim(-0.03 * highest, 1.05 * highest)


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _target(axes: Axes, standing: Standing) -> None:
    axes.axhline(standing.problem.target, color=_GREY, linewidth=0.8, linestyle=(0, (6, 4)))


def _finish(axes: Axes, standing: Standing) -> None:
    _tidy(axes)
    _target(axes, standing)
    axes.set_ylabel("loss")
    axes.annotate(
        "target",
        (1, standing.problem.target),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        color=_GREY,
        fontsize=8,
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)


def paths(standing: Standing) -> Figure:
    """Draw where the parameters of each optimizer go."""
    figure, panels = _panels(standing)
    for axes, entry in zip(panels, standing.ranked, strict=True):
        if isinstance(standing.problem, Surface):
            _contours(axes, standing.problem)
            _walk(axes, standing.problem, entry)
        else:
            _climb(axes, standing, entry)
    return figure


_LEVELS = 11
_POINTS = 81


def _contours(axes: Axes, surface: Surface) -> None:
    left, right, bottom, top = surface.view or View(-1, 1, -1, 1)
    x, y = np.meshgrid(np.linspace(left, right, _POINTS), np.linspace(bottom, top, _POINTS))
    values = surface.value(x, y)
    # Each level encloses the same share of the window, so that valleys show as well as walls.
    levels = np.unique(np.quantile(values, np.linspace(0.01, 0.97, _LEVELS)))
    axes.contour(x, y, values, levels=levels, cmap="Greys_r", linewidths=0.6, alpha=0.8)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    for goal in surface.goals:
        axes.plot(*goal, marker="*", color="#111827", markersize=9, linestyle="none")


def _walk(axes: Axes, surface: Surface, entry: Entry) -> None:
    """Draw where a run goes; what leaves the window far behind would only slow the drawing down."""
    color, _ = _LOOKS[entry.entrant.name]
    left, right, bottom, top = surface.view or View(-1, 1, -1, 1)
    far = 10 * max(right - left, top - bottom)
    for run in entry.chosen.runs:
        path = run.path
        if path is None:
            continue
        with np.errstate(invalid="ignore"):
            near = path[np.all(np.abs(path) < far, axis=1)]
        axes.plot(near[:, 0], near[:, 1], color=color, linewidth=1.1, alpha=0.8)
        axes.plot(near[-1:, 0], near[-1:, 1], marker="o", color=color, markersize=4)


def _climb(axes: Axes, standing: Standing, entry: Entry) -> None:
    """Draw the only parameter by step."""
    color, _ = _LOOKS[entry.entrant.name]
    for run in entry.chosen.runs:
        if run.path is not None:
            axes.plot(run.steps, run.path[:, 0], color=color, linewidth=1.3)
    for goal in standing.problem.goals:
        axes.axhline(goal[0], color=_GREY, linewidth=0.8, linestyle=(0, (6, 4)))
    axes.set_xlim(0, standing.steps)
    _tidy(axes)
