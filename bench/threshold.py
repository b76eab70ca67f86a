"""``python -m bench.threshold``: the serial beside the parallel kernel, to choose ``cpu.PARALLEL_FROM``.

Calls follow each other closely, so the threads of the parallel kernel are awake: what it costs at least.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench import environment, harness, oracle
from bench.environment import Result
from bench.oracle import Array, Contender
from bench.units import format_size, format_time
from fastadam.adam import AdamHyperparameters
from fastadam.coefficients import Coefficients
from fastadam.kernels import cpu

SIZES = tuple(2**exponent for exponent in range(10, 19))
QUICK_SIZES = (2**10, 2**15)
LOOPS: dict[str, Callable[..., None]] = {"serial": cpu.serial, "parallel": cpu.parallel}

app = typer.Typer(add_completion=False)


def start(loop: Callable[..., None], params: Array, grads: Array, moments: tuple[Array, Array]) -> Contender:
    """Return a loop as a contender, without the work of the optimizer around it."""
    coefficients = Coefficients(AdamHyperparameters(oracle.LR, oracle.BETAS, oracle.EPS), params.dtype)
    checked = map(coefficients.rule, range(1, len(oracle.GRAD_FACTORS) + 1))
    rules = chain(checked, repeat(coefficients.rule(1000)))

    def step() -> None:
        loop(params, grads, moments, None, None, next(rules))

    return Contender(step, lambda: params, lambda new: np.copyto(grads, new))


def measure(size: int, rounds: int, blocks: harness.Blocks) -> dict[str, Any]:
    """Check both loops, then time them on the same buffers: they compute the same bits."""
    params, grads = oracle.inputs(size, np.float32)
    moments = np.zeros_like(params), np.zeros_like(params)
    for name, loop in LOOPS.items():
        new = params.copy(), grads.copy(), (moments[0].copy(), moments[1].copy())
        oracle.check_update(name, start(loop, *new), params, grads)
    tasks = {name: harness.Task(start(loop, params, grads, moments).step) for name, loop in LOOPS.items()}
    measured = harness.interleave(tasks, rounds=rounds, blocks=blocks)
    return {
        "size": size,
        "serial_seconds": measured.median("serial"),
        "parallel_seconds": measured.median("parallel"),
        "parallel_over_serial": measured.ratio("parallel", over="serial")._asdict(),
    }


def crossing(rows: list[dict[str, Any]]) -> int | None:
    """Return the least size from which the parallel loop is the faster one at all measured sizes, or None."""
    found = None
    for row in reversed(rows):
        if row["parallel_over_serial"]["median"] >= 1:
            break
        found = int(row["size"])
    return found


@app.command()
def main(
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of each loop.")] = 21,
    quick: Annotated[bool, typer.Option(help="Smoke test: two sizes, 2 rounds of short blocks.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file; default: in bench/results.")] = None,
) -> None:
    """Find the size from which the parallel kernel is the faster one."""
    rounds, blocks, sizes = (2, harness.QUICK, QUICK_SIZES) if quick else (rounds, harness.Blocks(), SIZES)
    rows = [measure(size, rounds, blocks) for size in sizes]

    table = Table("Size", "Serial", "Parallel", "Parallel / serial")
    for row in rows:
        ratio = row["parallel_over_serial"]
        table.add_row(
            format_size(row["size"]),
            format_time(row["serial_seconds"]),
            format_time(row["parallel_seconds"]),
            f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]",
        )
    console = Console()
    console.print(table)
    found = crossing(rows)
    where = "at none of these sizes" if found is None else f"from {format_size(found)}"
    console.print(f"parallel is faster {where}; PARALLEL_FROM is {format_size(cpu.PARALLEL_FROM)}")

    result: Result = {
        "kind": "threshold",
        "environment": environment.environment(),
        "rounds": rounds,
        "parallel_from": cpu.PARALLEL_FROM,
        "crossing": found,
        "rows": rows,
    }
    console.print(f"wrote {environment.save(result, output).name}")


if __name__ == "__main__":
    app()
