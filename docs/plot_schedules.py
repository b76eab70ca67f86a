"""Draw the plots of ``docs/schedules.md`` from the examples that stand above them.

python docs/plot_schedules.py

Each plot holds its numbers, too, for a test to compare with what the schedules give.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from fastadam import schedules

DOCS = Path(__file__).parent
STEPS = range(1, 241)

_EXAMPLE = re.compile(r"```python\nlr = (.*)\n```\n\n!\[.*\]\(images/(\w+)\.svg\)")


def examples() -> dict[str, schedules.Schedule]:
    """Return the schedules of the page by the names of their plots."""
    page = (DOCS / "schedules.md").read_text(encoding="utf-8")
    return {
        name: eval(code, {"schedules": schedules})  # noqa: S307 - our own page
        for code, name in _EXAMPLE.findall(page)
    }


def numbers(schedule: schedules.Schedule) -> list[float]:
    """Return what is plotted: the learning rates of :data:`STEPS`, to six digits."""
    return [float(f"{schedule(step):.6g}") for step in STEPS]


def draw(schedule: schedules.Schedule, path: Path) -> None:
    """Save the plot of a schedule as an SVG, the same bytes from one version of Matplotlib."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({"svg.hashsalt": "fastadam", "svg.fonttype": "none", "path.simplify": False})
        # Figure without pyplot: no window system, no global state.
        figure = Figure(figsize=(5.6, 2.1), layout="constrained", facecolor="white")
        axes = figure.subplots()
        axes.plot(STEPS, numbers(schedule), color="#2563eb", linewidth=1.8, gid="schedule")
        axes.set_xlabel("step")
        axes.set_ylabel("lr")
        axes.set_xlim(0, len(STEPS))
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        metadata = {"Date": None, "Description": json.dumps(numbers(schedule))}
        figure.savefig(path, format="svg", metadata=metadata)


def main(folder: Path = DOCS / "images") -> None:
    """Draw all plots."""
    folder.mkdir(exist_ok=True)
    for name, schedule in examples().items():
        draw(schedule, folder / f"{name}.svg")


if __name__ == "__main__":
    main()
