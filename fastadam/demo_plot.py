"""The plot of the demo: how the loss falls and the accuracy rises."""

from __future__ import annotations

import os
from pathlib import Path

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ModuleNotFoundError as error:
    raise ImportError('the plot of the demo needs matplotlib. pip install "fastadam[demo]"') from error

from fastadam.demo import Result

FORMATS = (".png", ".pdf", ".svg")

_BLUE, _ORANGE, _GREY = "#2563eb", "#ea580c", "#9ca3af"


def require_output(path: Path) -> None:
    """Raise ValueError unless a plot can be saved there."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"output must end in .png, .pdf or .svg; got {path}.")
    if not path.parent.is_dir():
        raise ValueError(f"output must be in a folder that exists; got {path}.")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"output must be a file that can be written; got {path}.")


def save(result: Result, path: Path) -> None:
    """Draw the training loss and the test accuracies over the epochs.

    Parameters
    ----------
    result : Result
        Of :func:`fastadam.demo.train`.
    path : Path
        Its ending chooses the format; a file there is replaced.
    """
    # Figure without pyplot: no window system, no global state.
    figure = Figure(figsize=(10, 4.2), layout="constrained", facecolor="white")
    figure.suptitle(
        "Handwritten digits, trained by fastadam: AdamW, clipped, scheduled, averaged", fontweight="bold"
    )
    loss, accuracy = figure.subplots(1, 2)

    _draw(loss, "Training loss", [epoch.loss for epoch in result.epochs], "{:.2g}", _BLUE)
    loss.set_ylabel("cross-entropy")
    if any(epoch.loss > 0 for epoch in result.epochs):  # not if all are NaN
        loss.set_yscale("log")

    weights = [epoch.accuracy for epoch in result.epochs]
    accuracy.plot(range(1, len(weights) + 1), weights, color=_GREY, linewidth=1.2, label="of the weights")
    averaged = [epoch.averaged_accuracy for epoch in result.epochs]
    _draw(accuracy, "Test accuracy", averaged, "{:.1%}", _ORANGE, name="of their average")
    accuracy.legend(loc="lower right", frameon=False)
    accuracy.set_ylabel("share of digits recognised")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    figure.savefig(path, dpi=150)


def _draw(
    axes: Axes, title: str, values: list[float], label: str, color: str, name: str | None = None
) -> None:
    """Draw one value per epoch, and mark the last with a label."""
    last = len(values) - 1
    axes.plot(
        range(1, len(values) + 1),
        values,
        color=color,
        linewidth=1.8,
        marker="o",
        markevery=[last],
        clip_on=False,
        label=name,
    )
    axes.annotate(
        label.format(values[last]),
        (len(values), values[last]),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        color=color,
        fontweight="bold",
    )
    axes.set_title(title, loc="left")
    axes.set_xlabel("epoch")
    axes.set_xlim(0, len(values))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
