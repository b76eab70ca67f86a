"""The Markdown of ``bench.storage``, and of the memory that each storage keeps."""

from __future__ import annotations

from typing import Any

from bench import tables
from bench.environment import Result
from bench.units import format_size, format_time


def storage(result: Result) -> str:
    """Return the tables of all works, and who was left out of them."""
    parts: list[str | None] = []
    for work in dict.fromkeys(row["work"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["work"] == work]
        if "over_reference" in rows[0]:
            parts += [_times(work, rows), _promises(work, rows)]
        else:
            parts += [tables.times(work, rows), tables.promises(rows, f"{work}, time of fastadam over")]
    parts += [_skipped(result)]
    return "\n".join(filter(None, parts))


def _column(row: dict[str, Any]) -> str:
    return format_size(row["size"]) + (", 1 thread" if row["threads"] == 1 else "")


def _times(work: str, rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(map(_column, rows)))
    cells: dict[str, dict[str, str]] = {}
    bytes_moved: dict[str, str] = {}
    for row in rows:
        bytes_moved[row["label"]] = f"{row['bytes_per_element']:.3g}"
        speed = "" if row["peer"] == "float32" else f" ({1 / row['over_reference']['median']:.2f}x)"
        cells.setdefault(row["label"], {})[_column(row)] = format_time(row["seconds"]) + speed
    return tables.table(
        [work, "bytes", *columns],
        (
            [label, bytes_moved[label], *(of_label.get(column, "") for column in columns)]
            for label, of_label in cells.items()
        ),
    )


def _promises(work: str, rows: list[dict[str, Any]]) -> str | None:
    promised = [
        [
            f"{row['label']}, {_column(row)}",
            f"{row['target']:.3f}",
            tables.quartiles(row["over_reference"], 3),
            tables.met(row["over_reference"]["median"], row["target"]),
        ]
        for row in rows
        if row["target"] is not None
    ]
    return (
        tables.table([f"{work}, time over float32's", "at most", "measured", ""], promised)
        if promised
        else None
    )


def _skipped(result: Result) -> str | None:
    reasons = {
        f"{name} ({reason})"
        for of_work in result["skipped"].values()
        for name, reason in of_work.items()
        if not name.startswith("traffic ")
    }
    return f"Not measured: {', '.join(sorted(reasons))}.\n" if reasons else None


def states(rows: list[dict[str, Any]]) -> str:
    """Return what each storage keeps per parameter."""
    return tables.table(
        ["state", "parameters", "bytes kept per parameter", "at most", ""],
        (
            [
                row["name"],
                row["params"],
                f"{row['bytes_per_element']:.4f}",
                f"{row['target']:.2f}",
                tables.met(row["bytes_per_element"], row["target"]),
            ]
            for row in rows
        ),
    )
