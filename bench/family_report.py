"""The table of the family in the README."""

from __future__ import annotations

from typing import Any

from bench import tables
from bench.environment import Result
from bench.family_peers import FAMILY, STORED
from bench.units import format_size, format_time


def family(result: Result) -> str:
    """Return a row for each rule and size: the best of PyTorch's implementations is shown."""
    parts = []
    for size in dict.fromkeys(row["size"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["size"] == size]
        headings = [f"step of {format_size(size)} {result['dtype']}", "bytes", "time"]
        headings += ["over same traffic", "torch", "over torch's best", "states in bfloat16", "in 8 bits"]
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
    cells = [name, f"{ours['bytes_per_element']:g}", format_time(ours["seconds"]), _ratio(traffic)]
    stored = [_times_as_fast(by_peer.get(kind) if FAMILY[name].stored else None) for kind in STORED]
    if not theirs:
        return [*cells, "has none", "", *stored]
    best = min(theirs, key=lambda row: float(row["seconds"]))
    how = best["label"].removeprefix("torch, ")
    return [*cells, f"{format_time(best['seconds'])}, {how}", _ratio(best), *stored]


def _times_as_fast(row: dict[str, Any] | None) -> str:
    """Return how many times as fast as ours in float32 a contender is."""
    return "" if row is None else f"{row['fastadam_over_peer']['median']:.2f}x"


def _ratio(row: dict[str, Any]) -> str:
    text, target = tables.quartiles(row["fastadam_over_peer"], 3), row["target"]
    if target is None:
        return text
    return text if row["fastadam_over_peer"]["median"] <= target else f"{text} **above {target:.2f}**"
