"""``python -m bench.startup``: what a new process pays: the import, and the first step.

Each run is a process of its own; the clock starts after ``import numpy`` and stops after the import or the
step, so that a first step includes the import of Numba. The disk cache is one of our own: warm from a run
before, or an empty folder. Python's byte code and the files of the libraries are warm: of a machine in use.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import environment
from bench.environment import Result
from bench.harness import Quartiles
from bench.units import format_time

_IMPORT = """
import time, numpy
start = time.perf_counter()
import fastadam
print(time.perf_counter() - start)
"""

_FIRST_STEP = """
import time, numpy
params, grads = numpy.ones({size}, numpy.float32), numpy.ones({size}, numpy.float32)
start = time.perf_counter()
from fastadam import FusedAdam
FusedAdam(lr=1e-3).step(params, grads)
print(time.perf_counter() - start)
assert abs(params - 0.999).max() < 1e-6
"""


class Case(NamedTuple):
    """One start of a process.

    Parameters
    ----------
    name : str
        What tables call it.
    program : str
        Prints the seconds.
    cold : bool
        Whether the disk cache is empty.
    at_most : float
        What we promise, in seconds.
    """

    name: str
    program: str
    cold: bool
    at_most: float


CASES = (
    Case("import fastadam", _IMPORT, cold=False, at_most=0.030),
    Case("first step, 1Ki, warm cache", _FIRST_STEP.format(size=2**10), cold=False, at_most=0.7),
    Case("first step, 1Mi, warm cache", _FIRST_STEP.format(size=2**20), cold=False, at_most=0.7),
    Case("first step, 1Ki, cold cache", _FIRST_STEP.format(size=2**10), cold=True, at_most=3.0),
    Case("first step, 1Mi, cold cache", _FIRST_STEP.format(size=2**20), cold=True, at_most=3.0),
)

app = typer.Typer(add_completion=False)


def run(program: str, cache: str) -> float:
    """Run a program in a new process; return the seconds that it prints."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=cache,  # not the repository: the installed package is measured
        env=inherited | {"NUMBA_CACHE_DIR": cache},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return float(done.stdout)


def measure(
    runs: int, start: Callable[[str, str], float] = run, cases: tuple[Case, ...] = CASES
) -> list[dict[str, Any]]:
    """Run all cases in turns; return one row for each."""
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    with tempfile.TemporaryDirectory() as warm:
        for case in cases:
            start(case.program, warm)
        for _ in track(range(runs), "new processes", transient=True):
            for case in cases:
                if case.cold:
                    with tempfile.TemporaryDirectory() as empty:
                        seconds[case.name].append(start(case.program, empty))
                else:
                    seconds[case.name].append(start(case.program, warm))
    return [
        {
            "name": case.name,
            "seconds": Quartiles.of(seconds[case.name])._asdict(),
            "target": case.at_most,
        }
        for case in cases
    ]


@app.command()
def main(
    runs: Annotated[int, typer.Option(min=1, help="Processes of each kind.")] = 11,
    quick: Annotated[bool, typer.Option(help="Smoke test: one process of each kind.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file; default: in bench/results.")] = None,
) -> None:
    """Time the import and the first step in new processes."""
    runs = 1 if quick else runs
    rows = measure(runs)
    table = Table("What", "Time", "Quartiles", "Target")
    for row in rows:
        seconds = row["seconds"]
        met = "[green]met" if seconds["median"] <= row["target"] else "[red]missed"
        table.add_row(
            row["name"],
            format_time(seconds["median"]),
            f"{format_time(seconds['low'])} to {format_time(seconds['high'])}",
            f"{format_time(row['target'])} {met}",
        )
    console = Console()
    console.print(table)
    result: Result = {
        "kind": "startup",
        "environment": environment.environment(),
        "rounds": runs,
        "rows": rows,
    }
    console.print(f"wrote {environment.save(result, output).name}")


if __name__ == "__main__":
    app()
