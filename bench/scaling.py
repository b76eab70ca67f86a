"""``python -m bench.scaling``: a step by number of threads, of Numba's threading layer and of our own pool.

All run on one optimizer and its buffers, which whatever threads leave with the same bits: where the buffers
lie is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numba
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench import environment, harness, oracle, peers
from bench.environment import Result
from bench.placement import placed_copy
from bench.units import format_size, format_time, parse_size
from fastadam.kernels import threads

SIZES = ("1Mi", "32Mi")
QUICK_SIZES = ("64Ki",)
CHECKED = 2**20
"""Elements of the check, at most: it needs an optimizer for each number of threads."""

app = typer.Typer(add_completion=False)


def thread_counts(available: int) -> list[int]:
    """Return the powers of two below the available threads, and those."""
    return [2**k for k in range(available.bit_length()) if 2**k < available] + [available]


@contextmanager
def restored() -> Iterator[None]:
    """Undo what :func:`use` does."""
    count, choice = numba.get_num_threads(), threads.numba_is_safe
    try:
        yield
    finally:
        numba.set_num_threads(count)
        vars(threads)["numba_is_safe"] = choice


def use(count: int, choice: Callable[[], bool]) -> None:
    """Set the threads of the next steps, and whether they are Numba's."""
    numba.set_num_threads(count)
    vars(threads)["numba_is_safe"] = choice


def variants() -> dict[tuple[str, int], Callable[[], None]]:
    """Return (who runs the threads, how many) -> what makes the next step run so."""
    counts = thread_counts(int(numba.config.NUMBA_NUM_THREADS))
    layers: dict[str, Callable[[], bool]] = {"own pool": lambda: False}
    if threads.numba_is_safe():  # else a step runs on our own pool whatever it is asked for
        layers = {f"numba {threads.layer()}": threads.numba_is_safe, **layers}
    return {(name, n): partial(use, n, choice) for name, choice in layers.items() for n in counts}


def measure(size: int, rounds: int, blocks: harness.Blocks) -> list[dict[str, Any]]:
    """Check a step with all variants, then time it."""
    chosen = variants()
    names = {f"{layer}, {count}": (layer, count) for layer, count in chosen}
    with restored():
        params, grads = oracle.inputs(min(size, CHECKED), np.float32)
        for name, key in names.items():
            contender = peers.start_fastadam(params.copy(), grads.copy())
            oracle.check_update(name, contender._replace(before=chosen[key]), params, grads)

        shared = peers.start_fastadam(*map(placed_copy, oracle.inputs(size, np.float32)))
        tasks = {name: harness.Task(shared.step, before=chosen[key]) for name, key in names.items()}
        measured = harness.interleave(tasks, rounds=rounds, blocks=blocks)
    alone = next(iter(names))
    return [
        {
            "size": size,
            "layer": layer,
            "threads": count,
            "seconds": measured.median(name),
            "speedup": measured.ratio(alone, over=name)._asdict(),
        }
        for name, (layer, count) in names.items()
    ]


@app.command()
def main(
    size: Annotated[
        list[int] | None, typer.Option(parser=parse_size, help=f"Elements; default: {' '.join(SIZES)}.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of each number of threads.")] = 21,
    quick: Annotated[bool, typer.Option(help="Smoke test: one size, 2 rounds of short blocks.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file; default: in bench/results.")] = None,
) -> None:
    """Time a step with one to all threads."""
    console = Console()
    rounds, blocks = (2, harness.QUICK) if quick else (rounds, harness.Blocks())
    table = Table("Size", "Layer", "Threads", "Time", "Speed over one thread")
    rows: list[dict[str, Any]] = []
    for elements in size or map(parse_size, QUICK_SIZES if quick else SIZES):
        with console.status(f"{format_size(elements)} elements"):
            of_size = measure(elements, rounds, blocks)
        for row in of_size:
            speed = row["speedup"]
            table.add_row(
                format_size(elements),
                row["layer"],
                str(row["threads"]),
                format_time(row["seconds"]),
                f"{speed['median']:.2f} [{speed['low']:.2f}, {speed['high']:.2f}]",
            )
        table.add_section()
        rows += of_size
    console.print(table)

    result: Result = {
        "kind": "scaling",
        "environment": environment.environment(),
        "rounds": rounds,
        "rows": rows,
    }
    console.print(f"wrote {environment.save(result, output).name}")


if __name__ == "__main__":
    app()
