"""``python -m bench.embedding``: the step inside other people's loops, beside what it takes the place of.

``fastadam.numba`` beside calls of ``FusedAdam.step``, both some steps at a time; ``fastadam.jax`` beside a
step in place, and optax's Adam compiled by JAX; ``fastadam.thinc`` beside ``thinc.api.Adam``. Contenders take
turns in one process (:mod:`bench.harness`), after a first step that is checked.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import typer
from numba import njit
from rich.console import Console

import fastadam.numba
from bench import environment, harness
from bench.environment import Result
from bench.oracle import WrongUpdateError
from fastadam import FusedAdam

LR = 1e-3

Array: TypeAlias = Any

Start: TypeAlias = Callable[[Array, Array], Callable[[], object]]
"""Takes the parameters and a gradient; returns the call that is timed, after a first step is checked."""

app = typer.Typer(add_completion=False)


def require_first_step(name: str, before: Array, after: Array, grads: Array) -> None:
    """Raise WrongUpdateError unless a first step is Adam's: lr times the sign of the gradient."""
    large = np.abs(grads) > 1e-2  # where it does not matter how eps is added
    off = np.abs(np.asarray(after) - (before - LR * np.sign(grads)))[large]
    if not (off < 2e-6).all():
        raise WrongUpdateError(f"{name} must take Adam's first step; it does not.")


# --- Numba --------------------------------------------------------------------------------------------------


@njit
def _serial_steps(params: Array, grads: Array, adam: Any, count: int) -> None:
    for _ in range(count):
        fastadam.numba.step(params, grads, adam)


@njit
def _parallel_steps(params: Array, grads: Array, adam: Any, count: int) -> None:
    for _ in range(count):
        fastadam.numba.step_parallel(params, grads, adam)


PARALLEL_FROM = 16_384
"""Elements from which a user would take ``step_parallel``."""


def steps_of(size: int) -> int:
    """Return how many steps a call takes: some milliseconds of them, at least one."""
    return max(1, min(1000, 2**20 // size))


def start_compiled(params: Array, grads: Array) -> Callable[[], object]:
    """Take steps in a compiled loop."""
    loop = _parallel_steps if params.size >= PARALLEL_FROM else _serial_steps
    before, context = params.copy(), fastadam.numba.compiled(FusedAdam(LR), params)
    adam = context.__enter__()  # for as long as the call is kept
    loop(params, grads, adam, 1)
    require_first_step("fastadam.numba", before, params, grads)
    kept = partial(loop, params, grads, adam, steps_of(params.size))
    kept.context = context  # type: ignore[attr-defined]
    return kept


def start_calls(params: Array, grads: Array) -> Callable[[], object]:
    """Call ``FusedAdam.step``."""
    before, opt, count = params.copy(), FusedAdam(LR), steps_of(params.size)
    opt.step(params, grads)
    require_first_step("FusedAdam.step", before, params, grads)

    def steps() -> None:
        for _ in range(count):
            opt.step(params, grads)

    return steps


# --- JAX ----------------------------------------------------------------------------------------------------


def start_jax(params: Array, grads: Array) -> Callable[[], object]:
    """Make new arrays of JAX with each step."""
    import jax

    import fastadam.jax

    of_jax, of_grads = jax.numpy.asarray(params), jax.numpy.asarray(grads)
    held = [of_jax, fastadam.jax.init(of_jax, lr=LR)]

    def step() -> None:
        held[0], held[1] = fastadam.jax.step(held[0], of_grads, held[1])
        held[0].block_until_ready()

    step()
    require_first_step("fastadam.jax", params, held[0], grads)
    return step


def start_optax(params: Array, grads: Array) -> Callable[[], object]:
    """Optax's Adam and the update, compiled as one."""
    import jax
    import optax

    adam = optax.adam(LR)

    @partial(jax.jit, donate_argnums=(0, 1))
    def advance(params: Any, state: Any, grads: Any) -> Any:
        updates, state = adam.update(grads, state)
        return optax.apply_updates(params, updates), state

    of_jax, of_grads = jax.numpy.array(params), jax.numpy.array(grads)
    held = [of_jax, adam.init(of_jax)]

    def step() -> None:
        held[0], held[1] = advance(held[0], held[1], of_grads)
        held[0].block_until_ready()

    step()
    require_first_step("optax", params, held[0], grads)
    return step


# --- thinc --------------------------------------------------------------------------------------------------


def _start_thinc(optimizer: Any, params: Array, grads: Array) -> Callable[[], object]:
    before = params.copy()

    def step() -> None:
        optimizer((0, "W"), params, grads.copy())  # which it clears

    step()
    require_first_step(type(optimizer).__name__, before, params, grads)
    return step


def start_our_thinc(params: Array, grads: Array) -> Callable[[], object]:
    """Take ``fastadam.thinc.FusedAdam``."""
    import fastadam.thinc

    return _start_thinc(fastadam.thinc.FusedAdam(LR, L2=0.0, grad_clip=0.0), params, grads)


def start_thinc(params: Array, grads: Array) -> Callable[[], object]:
    """Thinc's own."""
    from thinc.api import Adam

    return _start_thinc(Adam(LR, L2=0.0, grad_clip=0.0), params, grads)


PLACES: dict[str, tuple[dict[str, tuple[str, Start]], tuple[int, ...]]] = {
    "numba": (
        {"fastadam": ("fastadam.numba", start_compiled), "calls": ("FusedAdam.step", start_calls)},
        (64, 1024, 65_536, 2**20, 2**24),
    ),
    "jax": (
        {
            "fastadam": ("fastadam.jax", start_jax),
            "in_place": ("FusedAdam.step, in place", start_calls),
            "optax": ("optax.adam, in jax.jit", start_optax),
        },
        (10, 2**21),
    ),
    "thinc": (
        {"fastadam": ("fastadam.thinc", start_our_thinc), "thinc": ("thinc.api.Adam", start_thinc)},
        (1000, 100_000, 1_000_000),
    ),
}
"""Where a step is embedded: who takes part, and the sizes."""

QUICK_SIZE = 100


def measure(
    place: str, size: int, *, starts: int, rounds: int, blocks: harness.Blocks
) -> list[dict[str, Any]]:
    """Time all who take part at a size; return a row for each, plain values."""
    contenders, parts = PLACES[place][0], []
    for seed in range(starts):
        rng = np.random.default_rng(seed)
        order = rng.permutation(list(contenders)).tolist()
        tasks: Mapping[str, harness.Task] = {
            name: harness.Task(
                contenders[name][1](
                    rng.standard_normal(size).astype(np.float32), rng.standard_normal(size).astype(np.float32)
                )
            )
            for name in order
        }
        parts.append(harness.interleave(tasks, rounds=rounds, blocks=blocks, seed=seed))
        del tasks
        gc.collect()
    measured = harness.Measurement.pooled(parts)
    return [
        {
            "place": place,
            "size": size,
            "peer": name,
            "label": label,
            "seconds": measured.median(name) / (steps_of(size) if _counts(start) else 1),
            "fastadam_over_peer": _scaled(measured, name, contenders, size),
            "target": None,
        }
        for name, (label, start) in contenders.items()
    ]


def _counts(start: Start) -> bool:
    """Return whether a call takes :func:`steps_of` steps."""
    return start in {start_compiled, start_calls}


def _scaled(
    measured: harness.Measurement, peer: str, contenders: Mapping[str, Any], size: int
) -> dict[str, float]:
    """Return the ratio of the times of one step."""
    ours, theirs = (steps_of(size) if _counts(contenders[name][1]) else 1 for name in ("fastadam", peer))
    found = measured.ratio("fastadam", over=peer)
    return {name: value * theirs / ours for name, value in found._asdict().items()}


@app.command()
def main(
    place: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PLACES)}; default: all.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of each contender after each start.")] = 5,
    starts: Annotated[int, typer.Option(min=1, help="Times that all start again, in new memory.")] = 5,
    quick: Annotated[bool, typer.Option(help="Smoke test: few elements, 2 rounds of short blocks.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file; default: in bench/results.")] = None,
) -> None:
    """Compare a step inside other people's loops with what it takes the place of."""
    unknown = [name for name in place or () if name not in PLACES]
    if unknown:
        raise typer.BadParameter(f"--place must be of {', '.join(PLACES)}; got {', '.join(unknown)}.")
    console = Console()
    starts, rounds, blocks = (1, 2, harness.QUICK) if quick else (starts, rounds, harness.Blocks())
    rows: list[dict[str, Any]] = []
    for name in place or PLACES:
        for size in (QUICK_SIZE,) if quick else PLACES[name][1]:
            with console.status(f"{name}, {size:,}"):
                found = measure(name, size, starts=starts, rounds=rounds, blocks=blocks)
            rows += found
            for row in found[1:]:
                ratio = row["fastadam_over_peer"]["median"]
                console.print(f"{name}, {size:,} elements: {ratio:.3f} of the time of {row['label']}")
    result: Result = {
        "kind": "embedding",
        "environment": environment.environment(["jax", "optax", "thinc"]),
        "dtype": "float32",
        "rounds": starts * rounds,
        "rows": rows,
    }
    console.print(f"wrote {environment.save(result, output).name}")


if __name__ == "__main__":
    app()
