"""Pieces of the Markdown that shows results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.environment import Result
from bench.units import format_size, format_time


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """Return a table, numbers to the right."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def met(value: float, target: float) -> str:
    """Say whether a value is at most its target."""
    return "met" if value <= target else "**missed**"


def quartiles(ratio: dict[str, float], digits: int) -> str:
    """Return a median and its quartiles."""
    low, median, high = (f"{ratio[key]:.{digits}f}" for key in ("low", "median", "high"))
    return f"{median} ({low} to {high})"


def times(heading: str, rows: list[dict[str, Any]]) -> str:
    """Return the times of contenders by size; in brackets, how many times as fast fastadam is."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    cells: dict[str, dict[int, str]] = {}
    for row in rows:
        ratio = 1 / row["fastadam_over_peer"]["median"]
        own = "" if row["peer"] == "fastadam" else f" ({ratio:.2f}x)"
        cells.setdefault(row["label"], {})[row["size"]] = format_time(row["seconds"]) + own
    return table(
        [heading, *map(format_size, sizes)],
        ([label, *(of_label.get(size, "") for size in sizes)] for label, of_label in cells.items()),
    )


def promises(rows: list[dict[str, Any]], heading: str = "time of fastadam over") -> str | None:
    """Return what fastadam promises and what was measured, or None where it promises nothing."""
    promised = [
        [
            f"{row['label']}, {format_size(row['size'])}",
            f"{row['target']:.2f}",
            quartiles(row["fastadam_over_peer"], 3),
            met(row["fastadam_over_peer"]["median"], row["target"]),
        ]
        for row in rows
        if row["target"] is not None
    ]
    return table([heading, "at most", "measured", ""], promised) if promised else None


def origin(result: Result) -> str:
    """Say where the numbers come from."""
    environment: dict[str, Any] = result["environment"]
    machine = environment["machine"]
    memory = f", {machine['memory_gib']} GiB" if machine["memory_gib"] else ""
    gpu = environment.get("gpu")
    facts = [
        *([_gpu(gpu)] if gpu else []),
        f"{machine['cpu']} ({machine['architecture']}), {machine['cores']} cores{memory}",
        environment["os"],
        f"Python {environment['python']}",
        ", ".join(f"{name} {version}" for name, version in environment["versions"].items()),
        f"threads: {environment['threading_layer']}",
        *([f"median of {result['rounds']} rounds, with quartiles"] if "rounds" in result else []),
        environment["date"],
        *([f"commit {environment['commit']}"] if environment["commit"] else []),
    ]
    return f"<sub>{'; '.join(facts)}.</sub>\n"


def _gpu(gpu: dict[str, Any]) -> str:
    driver = f"driver {gpu['driver']}, " if gpu["driver"] else ""
    return (
        f"{gpu['name']}, {gpu['memory_gib']} GiB, {gpu['multiprocessors']} SMs, L2 {gpu['l2_mib']} MiB,"
        f" {driver}CUDA {gpu['cuda_driver']} (runtime {gpu['cuda_runtime']})"
    )


TRAINING = ["training loss", "of float32's", "held-out loss", "of float32's", "the same within", "accuracy"]
"""The header of :func:`training_cells`, behind its first column."""


def training_cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of one storage: means over the seeds, with their spread."""
    training = held_out = within = ""
    if row["storage"] != "float32":
        training = _spread(row["training_loss_over_float32"], 3)
        training = training if row["training_loss_within"] else f"**{training}**"
        held_out = _spread(row["held_out_loss_over_float32"], 3)
        within = row["held_out_loss_within"] or ("**neither**" if row["promised"] else "neither")
    losses = (_spread(row[name], 4) for name in ("training_loss", "held_out_loss"))
    accuracy = _percent(row["held_out_accuracy"])
    return [row["label"], next(losses), training, next(losses), held_out, within, accuracy]


def _spread(value: dict[str, float | None], digits: int) -> str:
    mean, spread = value["mean"], value["spread"]
    return "not finite" if mean is None or spread is None else f"{mean:.{digits}f} ± {spread:.{digits}f}"


def _percent(value: dict[str, float | None]) -> str:
    mean, spread = value["mean"], value["spread"]
    return "not finite" if mean is None or spread is None else f"{mean:.1%} ± {spread:.1%}"
