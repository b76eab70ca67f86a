"""``python -m bench.gpu_torch``: ``fastadam.torch.FusedAdam`` on a GPU beside PyTorch's, on lists of tensors.

Many small tensors, where launches and the host count, and one large one, where memory does. The device's time
is that between two events, behind writes that hold it back until all is queued; the host's is that of calls
in a row, without waiting. It needs PyTorch with CUDA, and CuPy.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from bench import environment, gpu, gpu_measure, gpu_program, gpu_report, harness
from bench.environment import Result
from bench.gpu_timer import EventTimer
from bench.oracle import WrongUpdateError

LR, ROUNDS, HOST_CALLS = 1e-3, 20, 50

Shapes = list[tuple[int, ...]]
Started = Mapping[str, Callable[[], object]]

MODELS: dict[str, Shapes] = {
    "1,000 tensors of 1,000": [(1000,)] * 1000,
    "one tensor of 32 Mi": [(2**25,)],
}
LABELS = {
    "fastadam": "fastadam.torch",
    "fused": "torch Adam, fused",
    "foreach": "torch Adam, foreach",
}


def missing() -> str | None:
    """Return why nothing can be measured here, or None."""
    reason = gpu.missing()
    if reason is None:
        absent = [module for module in ("torch", "cupy") if find_spec(module) is None]
        reason = f"not installed: {', '.join(absent)}" if absent else None
    if reason is None and not import_module("torch").cuda.is_available():
        reason = "this PyTorch sees no GPU"
    return reason


def optimizer_of(name: str, params: list[Any]) -> Any:
    """Return a contender."""
    if name == "fastadam":
        return import_module("fastadam.torch").FusedAdam(params, LR)
    return import_module("torch").optim.Adam(params, LR, **{name: True})


def start(name: str, shapes: Shapes, place: str) -> Callable[[], object]:
    """Make parameters with gradients, take three steps and check them.

    Raises
    ------
    WrongUpdateError
        If all bits of fastadam's parameters are not those of the CPU, or a peer's are far from them.
    """
    torch = import_module("torch")
    make = torch.Generator().manual_seed(0)
    values, grads = ([torch.randn(shape, generator=make) for shape in shapes] for _ in range(2))
    params = [value.to(place).clone().requires_grad_() for value in values]
    expected = [value.requires_grad_() for value in values]
    optimizer, on_host = optimizer_of(name, params), optimizer_of("fastadam", expected)
    for param, other, grad in zip(params, expected, grads, strict=True):
        param.grad, other.grad = grad.to(place), grad
    for _ in range(3):
        optimizer.step()
        on_host.step()
    for param, other in zip(params, expected, strict=True):
        found, wanted = param.detach().cpu(), other.detach()
        is_right = (
            torch.equal(found, wanted) if name == "fastadam" else (found - wanted).abs().max() < 1e-2 * LR
        )
        if not is_right:
            rule = "have the bits of the CPU" if name == "fastadam" else "take Adam's steps"
            raise WrongUpdateError(f"{LABELS[name]} must {rule}; it does not.")
    step: Callable[[], object] = optimizer.step
    return step


def _repeat(step: Callable[[], object]) -> None:
    for _ in range(HOST_CALLS):
        step()


def measure(
    timer: EventTimer, model: str, started: Started, shapes: Shapes, rounds: int
) -> list[dict[str, Any]]:
    """Time contenders in turns; return a row for each, plain values."""
    device, blocks = timer.device, gpu_measure.BLOCKS
    timer.late.clear()
    on_device = harness.interleave(
        {name: harness.Task(step) for name, step in started.items()},
        rounds=rounds,
        blocks=blocks,
        timer=timer,
    )
    calls = rounds * (blocks.min_warm_calls + blocks.min_timed_calls)
    late = {name: timer.late[step] / calls for name, step in started.items()}
    timer.late.clear()  # its keys keep the contenders and their memory
    tasks = {
        name: harness.Task(partial(_repeat, step), before=device.synchronize)
        for name, step in started.items()
    }
    once = harness.Blocks(0, 0, min_warm_calls=1, min_timed_calls=1)
    on_host = harness.interleave(tasks, rounds=rounds, blocks=once)
    device.synchronize()
    size = sum(map(prod, shapes))
    return [
        {
            "model": model,
            "tensors": len(shapes),
            "size": size,
            "peer": name,
            "label": LABELS[name],
            "seconds": harness.Quartiles.of(on_device.seconds[name])._asdict(),
            "gb_per_second": 28 * size / on_device.median(name) * 1e-9,
            "fastadam_over_peer": on_device.ratio("fastadam", over=name)._asdict(),
            "late_share": late[name],
            "host_seconds": on_host.median(name) / HOST_CALLS,
            "host_fastadam_over_peer": on_host.ratio("fastadam", over=name)._asdict(),
        }
        for name in started
    ]


def run(device: gpu.Device, models: Mapping[str, Shapes], rounds: int, place: str = "cuda") -> Result:
    """Measure all contenders on the tensors of some models."""
    timer, rows = EventTimer(device), []
    for model, shapes in models.items():
        rows += measure(timer, model, {name: start(name, shapes, place) for name in LABELS}, shapes, rounds)
        gc.collect()
        device.release()
        print(f"{model}: done")
    about = gpu_program.facts(device)
    return {"kind": "gpu_torch", "environment": about, "dtype": "float32", "rounds": rounds, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_torch", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, help="file or folder; default: bench/results")
    options = parser.parse_args(arguments)
    if (reason := missing()) is not None:
        print(f"nothing to measure: {reason}", file=sys.stderr)
        return 2
    result = run(gpu.open_device(), {name: MODELS[name] for name in options.models}, options.rounds)
    path = environment.save(result, options.output)
    print(f"\n{gpu_report.torch(result)}\nwrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
