"""``python -m bench.gpu_launch``: a step by launch, which sets the constants of ``kernels/grids.py``.

Every launch computes the same bits, so all are checked alike and timed in turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

from bench import environment, gpu, gpu_contest, gpu_measure, gpu_program, gpu_report, harness
from bench.environment import Result
from bench.gpu_buffers import Buffers
from bench.gpu_peers import PEERS
from bench.gpu_timer import EventTimer
from bench.units import format_size, parse_size
from fastadam.kernels import cuda_source, grids

SIZES = (2**20, 2**26)
BLOCKS = (64, 128, 256, 512, 1024)
WAVES = (1, 2, 4, 8, 32)
ROUNDS = 15


def use(block: int, waves: int) -> None:
    """Set the launch of the next steps; each block has kernels of its own, which are compiled for it."""
    vars(grids).update(BLOCK=block, WAVES=waves)
    vars(_cupy_kernels())["_kernel"] = _kernels_of(block)


def _cupy_kernels() -> Any:
    return import_module("fastadam.kernels.cuda_cupy")  # which needs CuPy


@cache
def _compile() -> Callable[..., Any]:
    compiled: Callable[..., Any] = _cupy_kernels()._kernel.__wrapped__
    return compiled


@cache
def _kernels_of(block: int) -> Callable[..., Any]:
    original = _compile()

    def kernel(*key: Any) -> Any:
        cuda_source.source.cache_clear()  # its text names the block
        return original(*key)

    return cache(kernel)


def label(block: int, waves: int) -> str:
    """Return the name of a launch."""
    return f"{block} threads, {waves} waves"


def measure(
    timer: EventTimer, size: int, launches: Sequence[tuple[int, int]], rounds: int
) -> list[dict[str, Any]]:
    """Check one optimizer for each launch, then time them in turns.

    Each has moments of its own, as a backend may keep what it made of a launch with an optimizer. Those
    that do not fit are left out.
    """
    device, peer = timer.device, PEERS["cupy"]
    chosen = grids.BLOCK, grids.WAVES
    room = device.free_bytes() - 2**30 - 8 * size
    fitting = [chosen, *(launch for launch in launches if launch != chosen)][
        : max(room // peer.needs(size), 0)
    ]
    buffers = Buffers.new(device, size)
    tasks: dict[str, harness.Task] = {}
    try:
        for launch in fitting:
            use(*launch)
            running = peer.start(buffers)
            gpu_contest.check_step(peer, running, buffers)
            tasks[label(*launch)] = harness.Task(running.step, before=partial(use, *launch))
        buffers.restore()
        times = harness.interleave(tasks, rounds=rounds, blocks=gpu_measure.BLOCKS, timer=timer)
    finally:
        use(*chosen)
        timer.late.clear()
    return [
        {
            "size": size,
            "block": launch[0],
            "waves": launch[1],
            "seconds": harness.Quartiles.of(times.seconds[label(*launch)])._asdict(),
            "speed_over_chosen": times.ratio(label(*chosen), over=label(*launch))._asdict(),
        }
        for launch in sorted(fitting)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_launch", description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, help="file or folder; default: bench/results")
    options = parser.parse_args(arguments)
    reason = gpu.missing() or PEERS["cupy"].missing()
    if reason is not None:
        print(f"nothing to measure: {reason}", file=sys.stderr)
        return 2
    device = gpu.open_device()
    timer = EventTimer(device)
    rows: list[dict[str, Any]] = []
    for size in options.sizes:
        rows += measure(timer, size, list(product(BLOCKS, WAVES)), options.rounds)
        device.release()
        of_size = [row for row in rows if row["size"] == size]
        if not of_size:
            print(f"{format_size(size)}: does not fit")
            continue
        best = max(of_size, key=lambda row: row["speed_over_chosen"]["median"])
        print(f"{format_size(size)}: fastest with {label(best['block'], best['waves'])}")
    result: Result = {
        "kind": "gpu_launch",
        "environment": gpu_program.facts(device),
        "rounds": options.rounds,
        "chosen": label(grids.BLOCK, grids.WAVES),
        "rows": rows,
    }
    path = environment.save(result, options.output)
    print(f"\n{gpu_report.launch(result)}\nwrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
