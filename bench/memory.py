"""``python -m bench.memory``: what a step allocates, seen by the system and by Python (Linux).

In a new process, after both kernels ran on small buffers, so that libraries and threads have what they
need; then the growth of the peak of resident memory beyond the parameters and gradients, and of the memory
that Python and NumPy allocate during a step. And what the first step allocates and keeps, for each way to
store the state.
"""

from __future__ import annotations

import gc
import re
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench import environment, storages
from bench.environment import Result
from bench.oracle import Array
from bench.storages import Storage
from bench.units import format_bytes, format_size, parse_size
from fastadam import FusedAdam
from fastadam.kernels.cpu import PARALLEL_FROM

_STATE_BYTES = 8
"""Per float32 element: two moments."""

_STATUS = Path("/proc/self/status")

app = typer.Typer(add_completion=False)


class Growth(NamedTuple):
    """Bytes."""

    first_step: int
    second_step: int
    traced_in_step: int


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} must have {field}.")
    return int(found[1]) * 1024


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _ones(size: int, storage: Storage) -> tuple[Array, Array]:
    """Return parameters and gradients."""
    kinds = storage.params, storage.grads
    params, grads = (np.ones(size, storages.numpy_dtype(kind)) for kind in kinds)
    return params, grads


def _steps(size: int, count: int, storage: Storage) -> None:
    params, grads = _ones(size, storage)
    optimizer = storage.optimizer()
    for _ in range(count):
        optimizer.step(params, grads)


def grow(size: int) -> Growth:
    """Take steps in this process; return by how much its memory grows.

    The peak of the resident memory is reset before, and so does not count what was freed earlier.
    """
    _steps(PARALLEL_FROM // 2, 3, Storage())
    _steps(PARALLEL_FROM * 2, 3, Storage())

    params, grads = np.ones(size, np.float32), np.ones(size, np.float32)
    optimizer = FusedAdam(lr=1e-3)
    _reset_peak()
    before = _status("VmRSS")
    optimizer.step(params, grads)
    first = _status("VmHWM")
    optimizer.step(params, grads)
    second = _status("VmHWM")

    tracemalloc.start()
    optimizer.step(params, grads)
    _, traced = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    if not np.allclose(params[:: max(1, size // 1000)], 1 - 3e-3, rtol=0, atol=1e-6):
        raise AssertionError("three steps on a constant gradient must move by lr each; they do not.")
    return Growth(first - before, second - first, traced)


def kept(size: int, storage: Storage) -> int:
    """Take a step in this process; return the bytes that NumPy and Python allocate for it and that remain."""
    _steps(PARALLEL_FROM // 2, 2, storage)
    _steps(PARALLEL_FROM * 2, 2, storage)

    params, grads = _ones(size, storage)
    optimizer = storage.optimizer()
    gc.collect()
    tracemalloc.start()
    optimizer.step(params, grads)
    remaining, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    if optimizer.state.step != 1:
        raise AssertionError("one step must have been taken; it was not.")
    return remaining


def kept_rows(size: int) -> list[dict[str, Any]]:
    """Measure each way to store the state that there is; return one row for each, plain values."""
    rows: list[dict[str, Any]] = []
    for name, storage in storages.STORAGES.items():
        if storage.refused() is not None:
            continue
        bytes_kept = kept(size, storage)
        rows.append(
            {
                "name": name,
                "params": storage.params,
                "bytes": bytes_kept,
                "bytes_per_element": bytes_kept / size,
                "target": storage.most_bytes_kept,
            }
        )
    return rows


def rows_of(growth: Growth, size: int) -> list[dict[str, Any]]:
    """Return one row for each promise, plain values."""
    return [
        {
            "name": "first step",
            "bytes": growth.first_step,
            "bytes_per_element": growth.first_step / size,
            "target": _STATE_BYTES * size + 2**20,
        },
        # A few pages of the interpreter's stack and heap are no growth of the step.
        {
            "name": "second step",
            "bytes": growth.second_step,
            "bytes_per_element": growth.second_step / size,
            "target": 2**14,
        },
        {
            "name": "temporaries of a step",
            "bytes": growth.traced_in_step,
            "bytes_per_element": growth.traced_in_step / size,
            "target": 2**14,
        },
    ]


@app.command()
def main(
    size: Annotated[int | None, typer.Option(parser=parse_size, help="Elements; default: 32Mi.")] = None,
    quick: Annotated[bool, typer.Option(help="Smoke test: 1Mi elements.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file; default: in bench/results.")] = None,
) -> None:
    """Measure what a step allocates beyond parameters and gradients."""
    size = size or parse_size("1Mi" if quick else "32Mi")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        rows = rows_of(process.submit(grow, size).result(), size)
        states = process.submit(kept_rows, size).result()

    table = Table(f"{format_size(size)} float32", "Bytes", "Per element", "Target")
    for row in rows:
        met = "[green]met" if row["bytes"] <= row["target"] else "[red]missed"
        table.add_row(
            row["name"],
            format_bytes(row["bytes"]),
            f"{row['bytes_per_element']:.4f}",
            f"{format_bytes(row['target'])} {met}",
        )
    console = Console()
    console.print(table)
    table = Table("State", "Parameters", "Kept per parameter", "Target")
    for row in states:
        met = "[green]met" if row["bytes_per_element"] <= row["target"] else "[red]missed"
        kept_here, target = f"{row['bytes_per_element']:.4f}", f"{row['target']:.2f} {met}"
        table.add_row(row["name"], row["params"], kept_here, target)
    console.print(table)
    result: Result = {
        "kind": "memory",
        "environment": environment.environment(),
        "size": size,
        "rows": rows,
        "states": states,
    }
    console.print(f"wrote {environment.save(result, output).name}")


if __name__ == "__main__":
    app()
