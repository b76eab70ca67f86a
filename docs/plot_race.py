"""Draw the pictures of the race that the documentation shows, into ``docs/race/``.

python docs/plot_race.py

Some are those of ``fastadam race``; two more show what a race of learning rates does not: Adam's first steps,
and its other hyperparameters. It takes about two minutes, and needs ``pip install "fastadam[race]"``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastadam import FusedAdam
from fastadam.race import Settings, drawing, pictures, race, runs
from fastadam.race.optimizers import OPTIMIZERS
from fastadam.race.problems import PROBLEMS
from fastadam.race.results import median

FOLDER = Path(__file__).parent / "race"

SHOWN = {
    "rosenbrock": ("paths", "learning-rates"),
    "quadratic": ("curves", "paths"),
    "saddle": ("paths",),
    "noisy": ("seeds", "learning-rates"),
    "logistic": ("curves",),
    "digits": ("curves", "learning-rates"),
    "reddi": ("paths",),
}
"""Problem -> the pictures of it."""

SWEPT = {"noisy": 0.01, "logistic": 0.0316, "digits": 0.0316}
"""Problem -> a learning rate that is good for Adam."""

BETA1 = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 0.997)
BETA2 = (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)
EPS = (1e-16, 1e-12, 1e-8, 1e-4, 1e-2, 1.0, 100.0)

_COLORS = ("#2563eb", "#ea580c", "#16a34a")


def first_steps(steps: int = 200) -> dict[str, np.ndarray[Any, Any]]:
    """Return what Adam's first updates are, over the learning rate, with its bias corrections and without.

    The gradients are random and of the same distribution in each step, so that the first update tells
    nothing that the others do not; the sizes are root mean squares over many parameters.
    """
    rng = np.random.default_rng(0)
    opt = FusedAdam(lr=1.0)
    params = np.zeros(20_000)
    sizes: dict[str, list[float]] = {"with both corrections": [], "without": []}
    for _ in range(steps):
        before = params.copy()
        opt.step(params, 1.0 + rng.standard_normal(params.size))
        exp_avg, exp_avg_sq = opt.state.exp_avg, opt.state.exp_avg_sq
        assert exp_avg is not None
        assert exp_avg_sq is not None
        raw = np.asarray(exp_avg) / (np.sqrt(np.asarray(exp_avg_sq)) + opt.eps)
        sizes["with both corrections"].append(_size(params - before))
        sizes["without"].append(_size(raw))
    return {name: np.array(values) for name, values in sizes.items()}


def _size(update: Any) -> float:
    return float(np.sqrt(np.mean(np.square(update))))


def draw_first_steps() -> Figure:
    """Draw them."""
    figure = Figure(figsize=(7, 3.6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for (name, sizes), color in zip(first_steps().items(), _COLORS, strict=False):
        axes.plot(np.arange(1, len(sizes) + 1), sizes, color=color, label=name)
    axes.set_title("The size of Adam's first updates", loc="left", fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel("update / learning rate")
    axes.set_xscale("log")
    _finish(axes)
    return figure


def sweep(problem: str, seeds: int = 3, **lists: tuple[Any, ...]) -> Iterator[tuple[str, list[float]]]:
    """Give the final losses of Adam on a problem, for each list of values of an argument."""
    place = PROBLEMS[problem]()
    for name, values in lists.items():
        finals = []
        for value in values:
            adam = replace(OPTIMIZERS["adam"], arguments={name: value})
            finals.append(
                median(
                    [
                        runs.run(place, adam, SWEPT[problem], seed, place.draws(seed, place.steps)).final
                        for seed in range(seeds)
                    ]
                )
            )
        yield name, finals


def draw_hyperparameters(problems: tuple[str, ...] = tuple(SWEPT), seeds: int = 3) -> Figure:
    """Draw the final loss by beta1, beta2 and eps, each with the others at their defaults."""
    figure = Figure(figsize=(10, 3.6), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 3, sharey=True)
    xs = ([1 - beta for beta in BETA1], [1 - beta for beta in BETA2], list(EPS))
    for problem, color in zip(problems, _COLORS, strict=False):
        lines = [
            *sweep(problem, seeds, betas=tuple((beta, 0.999) for beta in BETA1)),
            *sweep(problem, seeds, betas=tuple((0.9, beta) for beta in BETA2)),
            *sweep(problem, seeds, eps=EPS),
        ]
        for axes, x, (_, finals) in zip(panels, xs, lines, strict=True):
            axes.plot(x, finals, marker="o", markersize=3.5, color=color, label=problem)
    for axes, name, default in zip(panels, ("1 - beta1", "1 - beta2", "eps"), (0.1, 1e-3, 1e-8), strict=True):
        axes.axvline(default, color="#6b7280", linewidth=0.8, linestyle=(0, (6, 4)))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(f"{name} (dashed: the default)")
        _finish(axes, legend=axes is panels[0])
    panels[0].set_title("Adam's other hyperparameters", loc="left", fontweight="bold")
    panels[0].set_ylabel("final loss")
    panels[0].set_ylim(top=20)  # without a second moment's memory, losses are beyond any scale
    return figure


def _finish(axes: Axes, *, legend: bool = True) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False)


def main(folder: Path = FOLDER, settings: Settings | None = None) -> list[Path]:
    """Draw all pictures; return their files."""
    settings = settings or Settings(problems=tuple(SHOWN))
    folder.mkdir(exist_ok=True)
    pngs = {"first-steps": drawing.png(draw_first_steps())}
    swept = tuple(name for name in SWEPT if name in settings.problems)
    if swept:
        pngs["hyperparameters"] = drawing.png(draw_hyperparameters(swept, settings.seeds))
    for standing in race(settings).standings:
        name = standing.problem.name
        for picture in pictures.draw(standing):
            if picture.name in SHOWN[name]:
                pngs[f"{name}-{picture.name}"] = picture.png
    for name, png in pngs.items():
        (folder / f"{name}.png").write_bytes(png)
    return [folder / f"{name}.png" for name in pngs]


if __name__ == "__main__":
    main()
