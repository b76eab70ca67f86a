"""``python -m bench.torch_optimizer``: ``fastadam.torch.FusedAdam`` beside PyTorch's own, on models' tensors.

The same lists of tensors: many small ones, where calls count, one large one, where memory does, and those of
two well-known models. Contenders take turns in one process (:mod:`bench.harness`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from bench import contest, environment, harness
from bench.environment import Result
from bench.oracle import WrongUpdateError
from fastadam.torch import FusedAdam

LR = 1e-3

Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """Return the shapes of ResNet-50's parameters: convolutions, two vectors behind each, one matrix."""
    convolutions: Shapes = [(64, 3, 7, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            convolutions += [(4 * width, inputs, 1, 1)] if block == 0 else []
            inputs = 4 * width
    return [each for c in convolutions for each in (c, c[:1], c[:1])] + [(1000, 2048), (1000,)]


def gpt2_small() -> Shapes:
    """Return the shapes of GPT-2's 124 million parameters."""
    d = 768
    layer: Shapes = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,)]
    layer += [(d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *layer * 12, (d,), (d,)]


MODELS: dict[str, Callable[[], Shapes]] = {
    "1,000 tensors of 1,000": lambda: [(1000,)] * 1000,
    "100 tensors of 64 Ki": lambda: [(2**16,)] * 100,
    "one tensor of 32 Mi": lambda: [(2**25,)],
    "ResNet-50": resnet50,
    "GPT-2 small": gpt2_small,
}
QUICK_MODELS: dict[str, Callable[[], Shapes]] = {"20 tensors of 100": lambda: [(100,)] * 20}

OPTIMIZERS: dict[str, tuple[str, Callable[..., torch.optim.Optimizer]]] = {
    "fastadam": ("fastadam.torch", FusedAdam),
    "fused": ("torch Adam, fused", partial(torch.optim.Adam, fused=True)),
    "foreach": ("torch Adam, foreach", partial(torch.optim.Adam, foreach=True)),
}

PROMISES = {
    ("1,000 tensors of 1,000", "fused"): 0.5,
    ("one tensor of 32 Mi", "fused"): 1.03,
}
"""(model, peer) -> at most this much of the peer's time is fastadam's."""

app = typer.Typer(add_completion=False)


def start(name: str, shapes: Shapes, seed: int) -> harness.Task:
    """Make parameters with gradients, take a first step and check it.

    Raises
    ------
    WrongUpdateError
        If the first step is not Adam's: from moments of zero that is lr times the sign of the gradient.
    """
    make = torch.Generator().manual_seed(seed)
    params = [torch.randn(shape, generator=make).requires_grad_() for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=make)
    optimizer = OPTIMIZERS[name][1](params, lr=LR)
    checked = [params[0], min(params, key=torch.numel), params[-1]]
    before = [param.detach().clone() for param in checked]
    optimizer.step()
    for param, old in zip(checked, before, strict=True):
        grad = param.grad
        assert grad is not None
        # eps keeps smaller gradients from a step of lr; storing a parameter rounds by 3e-7 at most.
        wrong = (old - param.detach() - LR * grad / (grad.abs() + 1e-8)).abs() > 1e-6
        if wrong.any():
            raise WrongUpdateError(f"{name} must take Adam's first step; it does not.")
    return harness.Task(optimizer.step)


def measure(
    model: str, shapes: Shapes, names: list[str], *, starts: int, rounds: int, blocks: harness.Blocks
) -> list[dict[str, Any]]:
    """Time contenders on the tensors of a model; return a row for each, plain values."""
    parts = []
    for seed in range(starts):
        order = np.random.default_rng(seed).permutation(names).tolist()
        tasks: Mapping[str, harness.Task] = {name: start(name, shapes, seed) for name in order}
        parts.append(harness.interleave(tasks, rounds=rounds, blocks=blocks, seed=seed))
        del tasks
        gc.collect()
    measured, size = harness.Measurement.pooled(parts), sum(map(prod, shapes))
    return [
        {
            "model": model,
            "tensors": len(shapes),
            "size": size,
            "peer": name,
            "label": OPTIMIZERS[name][0],
            "seconds": measured.median(name),
            "gb_per_second": 28 * size / measured.median(name) * 1e-9,
            "fastadam_over_peer": measured.ratio("fastadam", over=name)._asdict(),
            "target": PROMISES.get((model, name)),
        }
        for name in names
    ]


@app.command()
def main(
    model: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(MODELS)}; default: all.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(OPTIMIZERS)}; default: all.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of each contender after each start.")] = 5,
    starts: Annotated[int, typer.Option(min=1, help="Times that all start again, in new memory.")] = 5,
    quick: Annotated[bool, typer.Option(help="Smoke test: small tensors, 2 rounds of short blocks.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file; default: in bench/results.")] = None,
) -> None:
    """Compare a step of all tensors of a model with PyTorch's."""
    models = QUICK_MODELS if quick else MODELS
    for option, given, known in (("model", model, models), ("peer", peer, OPTIMIZERS)):
        unknown = [name for name in given or () if name not in known]
        if unknown:
            rule = f"--{option} must be of {', '.join(known)}; got {', '.join(unknown)}."
            raise typer.BadParameter(rule)
    console = Console()
    starts, rounds, blocks = (1, 2, harness.QUICK) if quick else (starts, rounds, harness.Blocks())
    names = list(dict.fromkeys(["fastadam", *(peer or OPTIMIZERS)]))
    rows: list[dict[str, Any]] = []
    for name in model or models:
        table = contest.new_table(name)
        shapes = models[name]()
        with console.status(name):
            found = measure(name, shapes, names, starts=starts, rounds=rounds, blocks=blocks)
        contest.add_rows(table, found)
        rows += found
        console.print(table)
    result: Result = {
        "kind": "torch_optimizer",
        "environment": environment.environment(["torch"]),
        "dtype": "float32",
        "rounds": starts * rounds,
        "rows": rows,
    }
    console.print(f"wrote {environment.save(result, output).name}")


if __name__ == "__main__":
    app()
