"""``python -m bench.compare``: a step beside the steps of other libraries and the memory roofline."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench import environment, harness, oracle, roofline
from bench.environment import Result
from bench.peers import PEERS
from bench.placement import placed_copy
from bench.units import format_size, format_time, parse_dtype, parse_size

SIZES = ("1Ki", "64Ki", "1Mi", "32Mi", "64Mi")
QUICK_SIZES = ("1Ki", "64Ki")

LARGE = 2**26
LARGE_PEERS = ("fastadam", "roofline", "torch", "deepspeed")
"""Whom sizes from LARGE are for, unless peers are named: the others would take minutes and gigabytes."""


class Target(NamedTuple):
    """What fastadam promises: its time is at most this much of a peer's, in float32."""

    peer: str
    size: int
    at_most: float


TARGETS = (
    Target("roofline", 2**25, 1.03),
    Target("roofline", 2**26, 1.03),
    Target("torch", 2**25, 1.03),
    Target("deepspeed", 2**25, 1.06),
    Target("torch", 2**20, 0.75),
    Target("torch", 2**16, 0.40),
    Target("torch", 2**10, 0.20),
)


def target(peer: str, size: int, dtype: str) -> float | None:
    """Return what fastadam promises beside a peer, or None."""
    promises = [t.at_most for t in TARGETS if (t.peer, t.size) == (peer, size)]
    return promises[0] if promises and dtype == "float32" else None


def start_all(names: list[str], size: int, dtype: str, seed: int) -> dict[str, harness.Task]:
    """Start contenders on buffers of their own, in an order that the seed gives, and check them.

    Raises
    ------
    WrongUpdateError
        If one does not compute Adam.
    """
    params, grads = oracle.inputs(size, dtype, seed)
    tasks: dict[str, harness.Task] = {}
    for name in np.random.default_rng(seed).permutation(names).tolist():
        contender = PEERS[name].start(placed_copy(params), placed_copy(grads))
        if PEERS[name].is_adam:
            oracle.check_update(name, contender, params, grads)
        tasks[name] = harness.Task(contender.step, contender.before)
    return tasks


def measure(
    names: list[str], size: int, dtype: str, *, starts: int, rounds: int, blocks: harness.Blocks
) -> list[dict[str, Any]]:
    """Start, check and time contenders at one size.

    They are started several times, because of what :mod:`bench.placement` says.

    Returns
    -------
    list of dict
        One row for each contender, plain values. ``fastadam_over_peer`` are the quartiles of the time of
        fastadam over the contender's.
    """
    parts = []
    for seed in range(starts):
        tasks = start_all(names, size, dtype, seed)
        parts.append(harness.interleave(tasks, rounds=rounds, blocks=blocks, seed=seed))
        del tasks
        gc.collect()  # the libraries' reference cycles would keep gigabytes until the next start
    measured = harness.Measurement.pooled(parts)

    rows = []
    for name in names:
        seconds = measured.median(name)
        rows.append(
            {
                "size": size,
                "peer": name,
                "label": PEERS[name].name,
                "seconds": seconds,
                "gb_per_second": roofline.bytes_moved(size, dtype) / seconds * 1e-9,
                "fastadam_over_peer": measured.ratio("fastadam", over=name)._asdict(),
                "target": target(name, size, dtype),
            }
        )
    return rows


def new_table() -> Table:
    """Return the table that :func:`add_rows` fills."""
    table = Table()
    for header in ("Size", "Contender"):
        table.add_column(header, no_wrap=True)
    for header in ("Time", "GB/s", "fastadam / it", "Target"):
        table.add_column(header, no_wrap=True, justify="right")
    return table


def add_rows(table: Table, rows: list[dict[str, Any]]) -> None:
    """Show the rows of one size."""
    for row in rows:
        ratio, promised = row["fastadam_over_peer"], row["target"]
        met = promised is not None and ratio["median"] <= promised
        table.add_row(
            format_size(row["size"]),
            row["label"],
            format_time(row["seconds"]),
            f"{row['gb_per_second']:.0f}",
            f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]",
            "" if promised is None else f"{promised:.2f} " + ("[green]met" if met else "[red]missed"),
        )
    table.add_section()


app = typer.Typer(add_completion=False)


@app.command()
def main(
    size: Annotated[
        list[int] | None, typer.Option(parser=parse_size, help=f"Elements; default: {' '.join(SIZES)}.")
    ] = None,
    dtype: Annotated[str, typer.Option(parser=parse_dtype)] = "float32",
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of each contender after each start.")] = 5,
    starts: Annotated[int, typer.Option(min=1, help="Times that all start again, in new memory.")] = 5,
    peer: Annotated[
        list[str] | None, typer.Option("--peers", help=f"Of {' '.join(PEERS)}; default: all installed.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Smoke test: small sizes, 2 rounds of short blocks.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file; default: in bench/results.")] = None,
) -> None:
    """Compare a step of fastadam with the steps of other libraries and the memory roofline."""
    console = Console()
    unknown = [name for name in peer or () if name not in PEERS]
    if unknown:
        raise typer.BadParameter(f"--peers must be of {', '.join(PEERS)}; got {', '.join(unknown)}.")
    wanted = list(dict.fromkeys(["fastadam", *(peer or PEERS)]))
    skipped = {name: reason for name in wanted if (reason := PEERS[name].missing(dtype)) is not None}
    present = [name for name in wanted if name not in skipped]
    for name, reason in skipped.items():
        console.print(f"[yellow]without {PEERS[name].name}: {reason}")

    starts, rounds, blocks = (1, 2, harness.QUICK) if quick else (starts, rounds, harness.Blocks())
    table = new_table()
    rows: list[dict[str, Any]] = []
    for elements in size or map(parse_size, QUICK_SIZES if quick else SIZES):
        names = present if peer or elements < LARGE else [name for name in present if name in LARGE_PEERS]
        with console.status(f"{format_size(elements)} elements"):
            of_size = measure(names, elements, dtype, starts=starts, rounds=rounds, blocks=blocks)
        add_rows(table, of_size)
        rows += of_size
    console.print(table)

    packages = dict.fromkeys(package for name in present for package in PEERS[name].packages)
    result: Result = {
        "kind": "compare",
        "environment": environment.environment(packages),
        "dtype": dtype,
        "rounds": starts * rounds,
        "skipped": skipped,
        "rows": rows,
    }
    console.print(f"wrote {environment.save(result, output).name}")


if __name__ == "__main__":
    app()
