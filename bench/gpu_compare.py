"""``python -m bench.gpu_compare``: a step on a GPU beside other libraries', a copy and the roofline.

Needs no command line library: a machine with a GPU may have nothing to download from. The result is written
after each size, so what was measured stays when the time is over.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import environment, gpu, gpu_measure, gpu_report, gpu_targets, harness
from bench.environment import Result
from bench.gpu_measure import Measured
from bench.gpu_peers import ON_TENSORS, PEERS
from bench.gpu_timer import EventTimer
from bench.units import format_size, parse_size

MODULES = ("cupy", "numba_cuda", "torch", "triton")
"""Whose versions a result says."""


def in_order_of_weight(sizes: Sequence[int]) -> list[int]:
    """Return the sizes that targets speak of first, in case the time ends."""
    return sorted(sizes, key=lambda size: (size < 2**20, size))


def facts(device: gpu.Device) -> dict[str, Any]:
    """Return the environment of a result."""
    distributions = metadata.packages_distributions()
    packages = [distributions[module][0] for module in MODULES if module in distributions]
    return {**environment.environment(packages), "gpu": device.facts()}


def host_rows(times: harness.Measurement) -> list[dict[str, Any]]:
    """Return what a call costs the host, one row for each contender."""
    labels = {name: peer.label for name, peer in {**PEERS, **ON_TENSORS}.items()}
    has_torch = "torch_fused" in times.seconds
    return [
        {
            "peer": name,
            "label": labels[name],
            "size": gpu_measure.HOST_SIZE,
            "seconds": harness.Quartiles.of(seconds)._asdict(),
            "of_torch_fused": times.ratio(name, over="torch_fused")._asdict() if has_torch else None,
        }
        for name, seconds in times.seconds.items()
    ]


def result_of(
    about: dict[str, Any],
    every: list[Measured],
    host: harness.Measurement,
    host_failed: dict[str, str],
    sizes_left_out: list[int],
) -> Result:
    """Return the result as it is written."""
    every = sorted(every, key=lambda measured: measured.size)
    return {
        "kind": "gpu",
        "environment": about,
        "dtype": "float32",
        "rounds": max((len(s) for m in every for s in m.times.seconds.values()), default=0),
        "rows": [row for measured in every for row in measured.rows()],
        "host": host_rows(host),
        "host_failed": host_failed,
        "targets": [
            *(row for measured in every for row in gpu_targets.of_device(measured)),
            *gpu_targets.of_host(host),
            *gpu_targets.of_bits(every),
        ],
        "sizes": [{"size": m.size, "left_out": m.left_out, "failed": m.failed} for m in every],
        "sizes_left_out": sizes_left_out,
    }


def run(
    device: gpu.Device,
    sizes: Sequence[int],
    names: Sequence[str],
    rounds: int,
    budget: float,
    output: Path | None,
) -> tuple[Result, Path]:
    """Measure, and write the result after each size."""
    deadline = time.monotonic() + budget
    about, timer = facts(device), EventTimer(device)
    host, host_failed = gpu_measure.host_cost(device)
    every: list[Measured] = []
    left_out = in_order_of_weight(sizes)
    while True:
        result = result_of(about, every, host, host_failed, left_out)
        path = environment.save(result, output)
        if not left_out or time.monotonic() > deadline:
            return result, path
        size = left_out[0]
        every.append(gpu_measure.measure(timer, size, names, rounds=rounds, deadline=deadline))
        del left_out[0]
        print(f"{format_size(size)}: {', '.join(every[-1].moved)} ({deadline - time.monotonic():.0f} s left)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return 1 if a contender failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_compare", description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=list(gpu_measure.SIZES))
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=gpu_measure.ROUNDS)
    parser.add_argument(
        "--budget-seconds", type=float, default=math.inf, help="then stop, and say what is left out"
    )
    parser.add_argument("--output", type=Path, help="file or folder; default: bench/results")
    options = parser.parse_args(arguments)
    if (reason := gpu.missing()) is not None:
        print(f"nothing to measure: {reason}", file=sys.stderr)
        return 2
    result, path = run(
        gpu.open_device(),
        options.sizes,
        options.peers,
        options.rounds,
        options.budget_seconds,
        options.output,
    )
    print(f"\n{gpu_report.gpu(result)}\nwrote {path.name}")
    failed = [at["failed"] for at in result["sizes"] if at["failed"]]
    return 1 if failed or result["host_failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
