"""``python -m bench.compare``: a step beside the steps of other libraries and the memory roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench import environment, harness, oracle, roofline
from bench.contest import Contest, add_rows, measure, new_table
from bench.environment import Result
from bench.peers import PEERS
from bench.units import format_size, parse_dtype, parse_size

SIZES = ("1Ki", "64Ki", "1Mi", "32Mi", "64Mi")
QUICK_SIZES = ("1Ki", "64Ki")

LARGE = 2**26
LARGE_PEERS = ("fastadam", "roofline", "torch", "deepspeed")
"""Whom sizes from LARGE are for, unless peers are named: the others would take minutes and gigabytes."""


PROMISES = {
    ("roofline", 2**25): 1.03,
    ("roofline", 2**26): 1.03,
    ("torch", 2**25): 1.03,
    ("deepspeed", 2**25): 1.06,
    ("torch", 2**20): 0.75,
    ("torch", 2**16): 0.40,
    ("torch", 2**10): 0.20,
}
"""Peer and size -> at most this much of its time fastadam promises to take, in float32."""

STEP = Contest(PEERS, oracle.check_update, roofline.bytes_moved, PROMISES)
"""A step of Adam."""

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
            of_size = measure(STEP, names, elements, dtype, starts=starts, rounds=rounds, blocks=blocks)
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
