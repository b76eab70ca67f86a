"""``python -m bench.family``: every rule beside a kernel of its own traffic, and beside PyTorch's best."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench import environment, harness
from bench.contest import add_rows, measure, new_table
from bench.environment import Result
from bench.family_peers import FAMILY, contest, missing
from bench.units import format_size, parse_size

SIZES, QUICK_SIZES = ("32Mi",), ("64Ki",)

app = typer.Typer(add_completion=False)


@app.command()
def main(
    size: Annotated[
        list[int] | None, typer.Option(parser=parse_size, help=f"Elements; default: {' '.join(SIZES)}.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of each contender after each start.")] = 5,
    starts: Annotated[int, typer.Option(min=1, help="Times that all start again, in new memory.")] = 5,
    rule: Annotated[list[str] | None, typer.Option(help=f"Of: {'; '.join(FAMILY)}. Default: all.")] = None,
    quick: Annotated[bool, typer.Option(help="Smoke test: small sizes, 2 rounds of short blocks.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file; default: in bench/results.")] = None,
) -> None:
    """Compare a step of every rule with its memory roofline and with PyTorch."""
    console = Console()
    unknown = [name for name in rule or () if name not in FAMILY]
    if unknown:
        raise typer.BadParameter(f"--rule must be of {'; '.join(FAMILY)}; got {'; '.join(unknown)}.")
    starts, rounds, blocks = (1, 2, harness.QUICK) if quick else (starts, rounds, harness.Blocks())
    skipped: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    for name in rule or FAMILY:
        relative = FAMILY[name]
        reason = missing(relative)
        if reason is not None:
            skipped[name] = reason
            console.print(f"[yellow]without {name}: {reason}", highlight=False)
            continue
        found, table = contest(relative), new_table(name)
        for elements in size or map(parse_size, QUICK_SIZES if quick else SIZES):
            with console.status(f"{name}, {format_size(elements)} elements"):
                of_size = measure(
                    found, [*found.peers], elements, "float32", starts=starts, rounds=rounds, blocks=blocks
                )
            for row in of_size:
                moved = relative.bytes_per_element(row["peer"])
                row |= {"bytes_per_element": moved, "gb_per_second": moved * elements / row["seconds"] * 1e-9}
            add_rows(table, of_size)
            rows += [{"rule": name, **row} for row in of_size]
        console.print(table)

    result: Result = {
        "kind": "family",
        "environment": environment.environment(() if "Adam" in skipped else ("torch",)),
        "dtype": "float32",
        "rounds": starts * rounds,
        "skipped": skipped,
        "rows": rows,
    }
    console.print(f"wrote {environment.save(result, output).name}")


if __name__ == "__main__":
    app()
