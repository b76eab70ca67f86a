"""The Markdown of GPU results. Needs nothing but Python: it also runs on the machine that measures.

``python -m bench.gpu_report FILE...`` prints results, those of the CPU too where typer is installed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench import tables
from bench.environment import Result
from bench.units import format_size, format_time

_WIDE_FROM = 2**20
"""Elements from which bandwidth says more than time."""

_MANY = 0.1
"""The share of calls from which the host may be in a time."""

_WAITED = "- \\*: the device waited for the host, whose time is in this one\n"

_PHASE_REFERENCES = {
    "whole phase": (("two_passes", "two passes"), ("torch", "torch")),
    "norm alone": (("one_read", "one read"), ("torch", "torch")),
}
"""Work -> contenders, and what they are called beside a share of their bandwidth."""


def _by_label(
    rows: list[dict[str, Any]], sizes: list[int], cell: Callable[[dict[str, Any]], str]
) -> list[list[str]]:
    labels = dict.fromkeys(row["label"] for row in rows)
    cells = {(row["label"], row["size"]): cell(row) for row in rows}
    return [[label, *(cells.get((label, size), "") for size in sizes)] for label in labels]


def _time(row: dict[str, Any]) -> str:
    waited = " *" if row["late_share"] > _MANY else ""
    return format_time(row["seconds"]["median"]) + waited


def _bandwidth(references: tuple[str, ...], row: dict[str, Any]) -> str:
    over = row["speed_over"]
    percents = [f"{100 * over[name]['median']:.0f} %" for name in references if name in over]
    return (
        f"{row['gb_per_second']:.0f} ({', '.join(percents)})" if percents else f"{row['gb_per_second']:.0f}"
    )


def _measured(value: Any) -> str:
    return tables.quartiles(value, 3) if isinstance(value, dict) else str(value)


def _targets(targets: list[dict[str, Any]]) -> str:
    rows = (
        [
            row["promise"],
            f"{row['at_least']:.2f}" if isinstance(row["at_least"], float) else str(row["at_least"]),
            _measured(row["measured"]),
            "met" if row["met"] else "**missed**",
        ]
        for row in targets
    )
    return tables.table(["fastadam CuPy, eager", "at least", "measured", ""], rows)


def _host(result: Result) -> str:
    rows = (
        [row["label"], format_time(row["seconds"]["median"]), tables.quartiles(row["of_torch_fused"], 2)]
        if row["of_torch_fused"]
        else [row["label"], format_time(row["seconds"]["median"]), ""]
        for row in result["host"]
    )
    return tables.table(["host, 1Ki", "time of a call", "of torch fused's"], rows)


def _absent(result: Result) -> str:
    """Say what was not measured, and why, and what is no device time."""
    several = len({at["work"] for at in result["sizes"]}) > 1
    lines = [
        f"{at['work'] + ', ' if several else ''}{format_size(at['size'])}: {name}: {reason}"
        for at in result["sizes"]
        for name, reason in {**at["left_out"], **at["failed"]}.items()
    ]
    lines += [f"host: {name}: {reason}" for name, reason in result.get("host_failed", {}).items()]
    lines += [f"{format_size(size)}: out of time" for size in result["sizes_left_out"]]
    text = "".join(f"- not measured: {line}\n" for line in lines)
    waited = any(row["late_share"] > _MANY for row in result["rows"])
    return text + (_WAITED if waited else "")


def _device(rows: list[dict[str, Any]], heading: str, speeds: str, references: tuple[str, ...]) -> list[str]:
    """Return device times, and bandwidths with their shares of those of references."""
    sizes = sorted({row["size"] for row in rows})
    wide = [size for size in sizes if size >= _WIDE_FROM]
    bandwidth = partial(_bandwidth, references)
    return [
        tables.table([heading, *map(format_size, sizes)], _by_label(rows, sizes, _time)),
        tables.table([speeds, *map(format_size, wide)], _by_label(rows, wide, bandwidth)),
    ]


def gpu(result: Result) -> str:
    """Return device times, bandwidths, host times and targets."""
    speeds, references = "GB/s (of copy, of same traffic)", ("copy", "same_traffic")
    parts = [
        *_device(result["rows"], "device, float32", speeds, references),
        _host(result),
        _targets(result["targets"]),
        _absent(result),
    ]
    return "\n".join(part for part in parts if part)


def phase(result: Result) -> str:
    """Return device times, bandwidths and targets of each work."""
    parts = []
    for work in dict.fromkeys(at["work"] for at in result["sizes"]):
        rows = [row for row in result["rows"] if row["work"] == work]
        targets = [row for row in result["targets"] if row["work"] == work]
        speeds = f"{work}, GB/s (of {', of '.join(label for _, label in _PHASE_REFERENCES[work])})"
        references = tuple(name for name, _ in _PHASE_REFERENCES[work])
        parts += _device(rows, f"{work}, {result['dtype']}", speeds, references)
        parts.append(_targets(targets) if targets else "")
    return "\n".join(part for part in (*parts, _absent(result)) if part)


def launch(result: Result) -> str:
    """Return the sweep over launches."""
    rows = (
        [
            f"{format_size(row['size'])}, {row['block']} threads",
            str(row["waves"]),
            format_time(row["seconds"]["median"]),
            tables.quartiles(row["speed_over_chosen"], 3),
        ]
        for row in result["rows"]
    )
    return tables.table(["step", "waves", "time", f"speed over {result['chosen']}"], rows)


def torch(result: Result) -> str:
    """Return the times of lists of tensors, those of the device and of the host."""
    rows = (
        [
            row["model"],
            row["label"],
            _time(row),
            f"{row['gb_per_second']:.0f}",
            tables.quartiles(row["fastadam_over_peer"], 2),
            format_time(row["host_seconds"]),
            tables.quartiles(row["host_fastadam_over_peer"], 2),
        ]
        for row in result["rows"]
    )
    headings = ["tensors", "", "device", "GB/s", "fastadam's / this", "host", "fastadam's / this"]
    waited = any(row["late_share"] > _MANY for row in result["rows"])
    return tables.table(headings, rows) + (f"\n{_WAITED}" if waited else "")


RENDERERS: dict[str, Callable[[Result], str]] = {
    "gpu": gpu,
    "gpu_phase": phase,
    "gpu_launch": launch,
    "gpu_torch": torch,
}


def main(paths: list[str]) -> None:
    """Print files of results."""
    renderers = RENDERERS
    try:
        from bench import report
    except ImportError as error:
        print(f"GPU results only: {error}\n")
    else:
        renderers = report.RENDERERS
    for path in paths:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        if result.get("kind") in renderers:
            print(f"## {result['kind']}\n\n{renderers[result['kind']](result)}\n{tables.origin(result)}")


if __name__ == "__main__":
    main(sys.argv[1:])
