"""``python -m bench.rows``: a step of some rows of a table, beside PyTorch's SparseAdam and a dense step.

The rows are drawn at random, some twice. The gradient of PyTorch is made in the timed call, as backward makes
it: a sparse tensor whose rows are not yet sorted, and whose duplicates are not yet added.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench import environment, harness
from bench.environment import Result
from bench.harness import Task
from bench.units import format_size, format_time, parse_size
from fastadam import FusedAdam

COUNTS = ("1000", "10000", "100000")
QUICK_COUNTS = ("10", "100")
LR = 1e-3

Array = np.ndarray[Any, np.dtype[Any]]
Step = Callable[[Array, Array], object]
"""Takes rows, and their gradients."""

app = typer.Typer(add_completion=False)


def check(before: Array, after: Array, rows: Array, grads: Array) -> None:
    """Raise AssertionError unless a first step of Adam was taken: ``lr`` against the sign of each sum."""
    used, places = np.unique(rows, return_inverse=True)
    sums = np.zeros((used.size, grads.shape[1]))
    np.add.at(sums, places, grads)
    counts = np.abs(sums) > 1e-3  # where eps does not, nor where SparseAdam adds it
    error = (after[used] - before[used] + LR * np.sign(sums))[counts]
    assert np.abs(error).max() < 2e-3 * LR
    others = np.delete(np.arange(len(before)), used)[:1000]
    assert np.array_equal(after[others], before[others])


def of_fastadam(params: Array) -> Step:
    """Return the step of some rows."""
    opt = FusedAdam(lr=LR)

    def step(rows: Array, grads: Array) -> None:
        opt.step_rows(params, rows, grads)

    return step


def of_torch(params: Array) -> Step:
    """Return the step of SparseAdam."""
    import torch

    tensor = torch.nn.Parameter(torch.from_numpy(params))
    opt = torch.optim.SparseAdam([tensor], lr=LR)

    def step(rows: Array, grads: Array) -> None:
        indices, values = torch.from_numpy(rows)[None], torch.from_numpy(grads)
        tensor.grad = torch.sparse_coo_tensor(indices, values, params.shape, check_invariants=False)
        opt.step()

    return step


def of_all_rows(params: Array) -> Step:
    """Return the dense step, with gradients of its own."""
    opt, grads = FusedAdam(lr=LR), np.full_like(params, 0.5)

    def step(*_: Array) -> None:
        opt.step(params, grads)

    return step


def measure(
    n_rows: int, width: int, counts: list[int], *, with_torch: bool, rounds: int, blocks: harness.Blocks
) -> list[dict[str, Any]]:
    """Time all contenders; return one dict for each number of rows and contender."""
    rng = np.random.default_rng(0)
    makers = {"fastadam": of_fastadam, **({"torch": of_torch} if with_torch else {})}
    given = {k: (rng.integers(0, n_rows, k), rng.standard_normal((k, width), np.float32)) for k in counts}
    original = rng.standard_normal((n_rows, width), np.float32)
    steps = {}
    for name, make in makers.items():
        params = original.copy()
        steps[name] = make(params)
        steps[name](*given[counts[0]])
        check(original, params, *given[counts[0]])
    steps["all rows"] = of_all_rows(original)
    found = []
    for k in counts:
        tasks = {name: Task(lambda step=step, k=k: step(*given[k])) for name, step in steps.items()}  # type: ignore[misc]
        measured = harness.interleave(tasks, rounds=rounds, blocks=blocks)
        found += [
            {
                "rows": k,
                "name": name,
                "seconds": measured.median(name),
                "fastadam_over": measured.ratio("fastadam", over=name)._asdict(),
            }
            for name in tasks
        ]
    return found


@app.command()
def main(
    table_rows: Annotated[int, typer.Option(parser=parse_size, help="Rows of the table.")] = "1Mi",  # type: ignore[assignment]
    width: Annotated[int, typer.Option(min=1, help="Elements of a row.")] = 64,
    count: Annotated[
        list[int] | None,
        typer.Option(parser=parse_size, help=f"Rows of a step; default: {' '.join(COUNTS)}."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of each contender.")] = 15,
    quick: Annotated[bool, typer.Option(help="Smoke test: a small table, 2 rounds of short blocks.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file; default: in bench/results.")] = None,
) -> None:
    """Compare a step of some rows with PyTorch's, and with a step of all rows."""
    console, with_torch = Console(), find_spec("torch") is not None
    if quick:
        table_rows, rounds = 1024, 2
    counts = count or list(map(parse_size, QUICK_COUNTS if quick else COUNTS))
    blocks = harness.QUICK if quick else harness.Blocks()
    with console.status(f"{format_size(table_rows)} rows of {width}"):
        rows = measure(table_rows, width, counts, with_torch=with_torch, rounds=rounds, blocks=blocks)
    table = Table("rows", "contender", "time", "fastadam / it")
    for row in rows:
        ratio = "{low:.3f} {median:.3f} {high:.3f}".format(**row["fastadam_over"])
        table.add_row(str(row["rows"]), row["name"], format_time(row["seconds"]), ratio)
    console.print(table)
    result: Result = {
        "kind": "rows",
        "environment": environment.environment(("torch",) if with_torch else ()),
        "dtype": "float32",
        "table": [table_rows, width],
        "rounds": rounds,
        "skipped": {} if with_torch else {"torch": "torch is not installed"},
        "rows": rows,
    }
    console.print(f"wrote {environment.save(result, output).name}")


if __name__ == "__main__":
    app()
