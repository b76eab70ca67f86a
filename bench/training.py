"""``python -m bench.training``: the same networks trained with every storage of the optimizer, seed by seed.

Every storage starts from the same weights and sees the same batches as float32 does with the same seed, so
their losses are compared in pairs. Moments that are rounded at random make single steps a little longer or
shorter, and, as an update goes with one over the root of the second moment, longer on average: by 3/8 of the
variance of its relative error, 0.03 % in bfloat16 and up to 1 % in 8 bits. Hence a training loss may be lower
than float32's, as with a learning rate higher by as much, and the promise is about the loss on what is
held back: within 1 % of float32's, means over the seeds, or within the standard deviation of its seeds. A
training loss that is higher by more than both is marked.

All of it runs in one thread: the matrices are small, and then the same seed gives the same bits in every run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numba
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench import environment, tables
from bench.environment import Result
from bench.networks import NETWORKS, OPTIONS, Network, Scores, Training
from bench.training_storages import STORAGES, Storage
from fastadam import FusedAdam

SEEDS, QUICK_SEEDS = 5, 2
ALLOWED = 0.01
"""Of float32's mean loss."""

_PACKAGES = {"ml_dtypes": "ml_dtypes", "sklearn": "scikit-learn"}
"""Those that take part where they are installed: module -> distribution."""

app = typer.Typer(add_completion=False)


@contextmanager
def _one_thread() -> Iterator[None]:
    limits: Any = nullcontext()
    if find_spec("threadpoolctl") is not None:
        from threadpoolctl import threadpool_limits

        limits = threadpool_limits(limits=1, user_api="blas")
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        with limits:
            yield
    finally:
        numba.set_num_threads(before)


def train(training: Training, storage: Storage, seed: int) -> Scores:
    """Take all steps of a training; return its scores.

    Parameters
    ----------
    training : Training
        New.
    storage : Storage
        With bfloat16 parameters the network computes with copies of them in float32, and is scored so; its
        gradients are rounded to the nearest.
    seed : int
        Of stochastic rounding.
    """
    optimizer = FusedAdam(training.lr, seed=seed, **OPTIONS, **storage.options)
    params, grads = training.params, training.grads
    stored_params, stored_grads = params, grads
    if storage.bfloat16:
        from ml_dtypes import bfloat16

        stored_params, stored_grads = params.astype(bfloat16), grads.astype(bfloat16)
        params[...] = stored_params
    # A storage that does not hold shows as a loss that is inf or NaN, which is a result.
    with _one_thread(), np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        for _ in training.batches:
            if storage.bfloat16:
                stored_grads[...] = grads
            optimizer.step(stored_params, stored_grads)
            if storage.bfloat16:
                params[...] = stored_params
        return training.scores()


def row(scores: Sequence[Scores], of_float32: Sequence[Scores]) -> dict[str, Any]:
    """Return what the seeds of one storage gave, and whether float32's gave the same; plain values.

    A spread is the standard deviation of a sample. None stands for inf and NaN.
    """
    entry: dict[str, Any] = {
        "runs": [dict(zip(Scores._fields, map(_finite, one), strict=True)) for one in scores]
    }
    for name in Scores._fields:
        ours, theirs = (np.array([getattr(one, name) for one in many]) for many in (scores, of_float32))
        entry[name] = _summary(ours)
        if name.endswith("loss"):
            entry[f"{name}_over_float32"] = _summary(ours / theirs)
            entry[f"{name}_within"] = within(ours, theirs, or_lower=name == "training_loss")
    return entry


def within(ours: Any, theirs: Any, *, or_lower: bool = False) -> str | None:
    """Return within what of float32's mean loss another is: "1 %", or the "spread" of its seeds, or None.

    Parameters
    ----------
    ours, theirs : ndarray
        One loss for each seed.
    or_lower : bool
        Whether any lower loss is within.
    """
    mean = float(theirs.mean())
    difference = float(ours.mean()) - mean
    if not or_lower:
        difference = abs(difference)
    if difference <= ALLOWED * mean:
        return "1 %"
    return "spread" if difference <= _spread(theirs) else None


def _spread(values: Any) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _summary(values: Any) -> dict[str, float | None]:
    with np.errstate(invalid="ignore"):
        return {"mean": _finite(values.mean()), "spread": _finite(_spread(values))}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def compare(
    network: Network, storages: Mapping[str, Storage], seeds: int, steps: int
) -> list[dict[str, Any]]:
    """Train a network with each storage, of which the first is float32, and each seed; return plain rows."""
    rows: list[dict[str, Any]] = []
    of_float32: list[Scores] = []
    for name, storage in storages.items():
        scores = [train(network.start(seed, steps), storage, seed) for seed in range(seeds)]
        of_float32 = of_float32 or scores
        facts = {"storage": name, "label": storage.label, "promised": storage.promised}
        rows.append({"network": network.label, "steps": steps, **facts, **row(scores, of_float32)})
    return rows


@app.command()
def main(
    seeds: Annotated[int, typer.Option(min=2, help="Trainings of each network with each storage.")] = SEEDS,
    quick: Annotated[bool, typer.Option(help="Smoke test: a few steps of 2 seeds.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file; default: in bench/results.")] = None,
) -> None:
    """Train with every storage, and compare the losses with float32's."""
    console = Console()
    seeds = QUICK_SEEDS if quick else seeds
    reasons = {name: one.missing() for name, one in (NETWORKS | STORAGES).items()}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    storages = {name: storage for name, storage in STORAGES.items() if name not in skipped}
    rows: list[dict[str, Any]] = []
    for name, network in NETWORKS.items():
        if name in skipped:
            continue
        with console.status(f"{network.label}, {len(storages)} storages, {seeds} seeds"):
            of_network = compare(network, storages, seeds, network.quick_steps if quick else network.steps)
        table = Table(
            "over float32's", "training loss", "held-out loss", "the same within", title=network.label
        )
        for one in of_network[1:]:
            _, _, training, _, held_out, same, _ = tables.training_cells(one)
            table.add_row(one["storage"], *(cell.strip("*") for cell in (training, held_out, same)))
        console.print(table)
        rows += of_network
    for name, reason in skipped.items():
        console.print(f"skipped {name}: {reason}", markup=False)

    result: Result = {
        "kind": "training",
        "environment": environment.environment(
            [name for module, name in _PACKAGES.items() if find_spec(module) is not None]
        ),
        "seeds": seeds,
        "skipped": skipped,
        "rows": rows,
    }
    console.print(f"wrote {environment.save(result, output).name}")


if __name__ == "__main__":
    app()
