"""The table of the family in the README."""

from __future__ import annotations

from typing import Any

from bench import tables
from bench.environment import Result
from bench.units import format_size, format_time


def family(result: Result) -> str:
    """Return a row for each rule and size: the best of PyTorch's implementations is shown."""
    parts = []
    for size in dict.fromkeys(row["size"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["size"] == size]
        headings = [f"step of {format_size(size)} {result['dtype']}", "bytes", "time"]
        headings += ["over same traffic", "torch", "over torch's best"]
        names = dict.fromkeys(row["rule"] for row in rows)
        cells = [_cells(name, [row for row in rows if row["rule"] == name]) for name in names]
        parts.append(tables.table(headings, cells))
    if result["skipped"]:
        reasons = (f"{name} ({reason})" for name, reason in result["skipped"].items())
        parts.append(f"Not measured: {', '.join(reasons)}.\n")
    return "\n".join(parts)


def _cells(name: str, rows: list[dict[str, Any]]) -> list[str]:
    by_peer = {row["peer"]: row for row in rows}
    ours, traffic = by_peer["fastadam"], by_peer["traffic"]
    theirs = [row for peer, row in by_peer.items() if peer.startswith("torch")]
    cells = [name, str(ours["bytes_per_element"]), format_time(ours["seconds"]), _ratio(traffic)]
    if not theirs:
        return [*cells, "has none", ""]
    best = min(theirs, key=lambda row: float(row["seconds"]))
    return [*cells, f"{format_time(best['seconds'])}, {best['label'].removeprefix('torch, ')}", _ratio(best)]


def _ratio(row: dict[str, Any]) -> str:
    text, target = tables.quartiles(row["fastadam_over_peer"], 3), row["target"]
    if target is None:
        return text
    return text if row["fastadam_over_peer"]["median"] <= target else f"{text} **above {target:.2f}**"
