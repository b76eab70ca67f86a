"""``python -m bench.report``: the tables of the README, from the files in ``bench/results``.

A table stands between ``<!-- results:NAME:begin ... -->`` and ``<!-- results:NAME:end -->``, where NAME is
a kind of result; what stands there is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

from bench import family_report, gpu_report, storage_report, tables
from bench.environment import RESULTS, ROOT, Result
from bench.units import format_bytes, format_size, format_time

README = ROOT / "README.md"
NOT_MEASURED = "Not measured yet.\n"

_SECTION = re.compile(r"(<!-- results:(\w+):begin[^>]*-->\n).*?(<!-- results:\2:end -->)", re.DOTALL)
_BEGIN = re.compile(r"<!-- results:\w+:begin")

app = typer.Typer(add_completion=False)


def _compare(result: Result) -> str:
    rows = result["rows"]
    times = tables.times(f"step, {result['dtype']}", rows)
    return "\n".join(filter(None, (times, tables.promises(rows))))


def _phase(result: Result) -> str:
    parts = []
    for work in dict.fromkeys(row["work"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["work"] == work]
        heading = f"{work}, {result['dtype']}"
        parts += [
            tables.times(heading, rows),
            tables.promises(rows, heading=f"{work}, time of fastadam over"),
        ]
    return "\n".join(filter(None, parts))


def _threshold(result: Result) -> str:
    rows = (
        [
            format_size(row["size"]),
            format_time(row["serial_seconds"]),
            format_time(row["parallel_seconds"]),
            tables.quartiles(row["parallel_over_serial"], 2),
        ]
        for row in result["rows"]
    )
    return tables.table(["elements", "serial", "parallel", "parallel / serial"], rows)


def _scaling(result: Result) -> str:
    rows = (
        [
            f"{format_size(row['size'])}, {row['layer']}",
            str(row["threads"]),
            format_time(row["seconds"]),
            tables.quartiles(row["speedup"], 2),
        ]
        for row in result["rows"]
    )
    return tables.table(["step", "threads", "time", "speed over one thread"], rows)


def _startup(result: Result) -> str:
    rows = (
        [
            row["name"],
            format_time(row["seconds"]["median"]),
            f"{format_time(row['seconds']['low'])} to {format_time(row['seconds']['high'])}",
            format_time(row["target"]),
            tables.met(row["seconds"]["median"], row["target"]),
        ]
        for row in result["rows"]
    )
    return tables.table(["new process", "time", "quartiles", "at most", ""], rows)


def _memory(result: Result) -> str:
    rows = (
        [
            row["name"],
            format_bytes(row["bytes"]),
            f"{row['bytes_per_element']:.4f}",
            format_bytes(row["target"]),
            tables.met(row["bytes"], row["target"]),
        ]
        for row in result["rows"]
    )
    growth = tables.table(
        [f"{format_size(result['size'])} float32", "bytes", "per element", "at most", ""], rows
    )
    states = result.get("states")
    return f"{growth}\n{storage_report.states(states)}" if states else growth


def _torch_optimizer(result: Result) -> str:
    models = dict.fromkeys(row["model"] for row in result["rows"])
    cells: dict[str, dict[str, str]] = {}
    for row in result["rows"]:
        ratio = 1 / row["fastadam_over_peer"]["median"]
        own = "" if row["peer"] == "fastadam" else f" ({ratio:.2f}x)"
        cells.setdefault(row["label"], {})[row["model"]] = format_time(row["seconds"]) + own
    times = tables.table(
        ["step, float32", *models],
        ([label, *(of_label.get(model, "") for model in models)] for label, of_label in cells.items()),
    )
    promised = [
        [
            f"{row['label']}, {row['model']}",
            f"{row['target']:.2f}",
            tables.quartiles(row["fastadam_over_peer"], 3),
            tables.met(row["fastadam_over_peer"]["median"], row["target"]),
        ]
        for row in result["rows"]
        if row["target"] is not None
    ]
    if not promised:
        return times
    return f"{times}\n{tables.table(['time of fastadam over', 'at most', 'measured', ''], promised)}"


def _embedding(result: Result) -> str:
    rows = [
        [
            row["place"],
            f"{row['size']:,}",
            row["label"],
            format_time(row["seconds"]),
            "" if row["peer"] == "fastadam" else tables.quartiles(row["fastadam_over_peer"], 3),
        ]
        for row in result["rows"]
    ]
    return tables.table(["in", "elements", "step", "time", "time of fastadam over it"], rows)


def _training(result: Result) -> str:
    parts = []
    for network in dict.fromkeys(row["network"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["network"] == network]
        heading = f"{network}: {rows[0]['steps']} steps, {result['seeds']} seeds"
        parts.append(tables.table([heading, *tables.TRAINING], map(tables.training_cells, rows)))
    if result["skipped"]:
        parts.append(f"Not tried here: {', '.join(result['skipped'])}.\n")
    return "\n".join(parts)


def _rows(result: Result) -> str:
    n_rows, width = result["table"]
    names = list(dict.fromkeys(row["name"] for row in result["rows"]))
    cells: dict[int, list[str]] = {}
    for row in result["rows"]:
        ratio = 1 / row["fastadam_over"]["median"]
        own = "" if row["name"] == "fastadam" else f" ({ratio:.2f}x)"
        cells.setdefault(row["rows"], []).append(format_time(row["seconds"]) + own)
    header = [f"rows of {format_size(n_rows)}, {width} float32 each", *names]
    return tables.table(header, ([str(count), *of_count] for count, of_count in cells.items()))


RENDERERS: dict[str, Callable[[Result], str]] = {
    "compare": _compare,
    "phase": _phase,
    "storage": storage_report.storage,
    "family": family_report.family,
    "threshold": _threshold,
    "scaling": _scaling,
    "startup": _startup,
    "memory": _memory,
    "rows": _rows,
    "training": _training,
    "torch_optimizer": _torch_optimizer,
    "embedding": _embedding,
    **gpu_report.RENDERERS,
}


def render(results: Iterable[Result]) -> str:
    """Return the Markdown of results, one after the other, each with its origin."""
    parts = [f"{RENDERERS[result['kind']](result)}\n{tables.origin(result)}" for result in results]
    return "\n".join(parts) or NOT_MEASURED


def updated(text: str, results: Iterable[Result]) -> str:
    """Return a text with the results in their sections.

    Raises
    ------
    ValueError
        If there is no section, or one has no end, or its name is no kind of result.
    """
    every = list(results)

    def section(match: re.Match[str]) -> str:
        begin, kind, end = match.groups()
        if kind not in RENDERERS:
            raise ValueError(f"a section of results must be of {', '.join(RENDERERS)}; got {kind}.")
        return f"{begin}\n{render(result for result in every if result['kind'] == kind)}\n{end}"

    new, count = _SECTION.subn(section, text)
    if count == 0 or count != len(_BEGIN.findall(text)):
        raise ValueError("sections of results must stand between markers; see bench/report.py.")
    return new


def load(folder: Path) -> list[Result]:
    """Return the results of a folder, in the order of their names; other JSON files are none."""
    every = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [found for found in every if "kind" in found]


@app.command()
def main(
    check: Annotated[bool, typer.Option(help="Write nothing; exit 1 if the README is stale.")] = False,
    readme: Annotated[Path, typer.Option(help="The file with the sections.")] = README,
    results: Annotated[Path, typer.Option(help="The folder with the JSON files.")] = RESULTS,
) -> None:
    """Write the results into the README."""
    text = readme.read_text(encoding="utf-8")
    try:
        new = updated(text, load(results))
    except ValueError as error:
        raise typer.BadParameter(f"{readme.name}: {error}") from error
    if new == text:
        typer.echo(f"{readme.name} shows the results")
    elif check:
        typer.echo(f"{readme.name} is stale: run python -m bench.report", err=True)
        raise typer.Exit(1)
    else:
        readme.write_text(new, encoding="utf-8")
        typer.echo(f"wrote the results into {readme.name}")


if __name__ == "__main__":
    app()
