"""What the programs that compare on a GPU share: sizes one by one, a result after each, a command line.

They need no command line library: a machine with a GPU may have nothing to download from. The result is
written after each size, so what was measured stays when the time is over.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from bench import environment, gpu, gpu_measure, gpu_report, gpu_targets
from bench.environment import Result
from bench.gpu_contest import Contest
from bench.gpu_measure import Measured
from bench.gpu_timer import EventTimer
from bench.units import format_size, parse_size

MODULES = ("cupy", "numba_cuda", "torch", "triton")
"""Whose versions a result says."""


class Program(NamedTuple):
    """A kind of result, and what is measured for it."""

    kind: str
    contests: Sequence[Contest]
    sizes: Sequence[int]
    measure_first: Callable[[gpu.Device], Result] = lambda _: {}
    """What the result says besides, where the size makes no difference."""

    def names(self) -> list[str]:
        """Return the names of all contenders."""
        return list(dict.fromkeys(name for contest in self.contests for name in contest.peers))


def in_order_of_weight(sizes: Sequence[int]) -> list[int]:
    """Return the sizes that targets speak of first, in case the time ends."""
    return sorted(sizes, key=lambda size: (size < 2**20, size))


def facts(device: gpu.Device) -> dict[str, Any]:
    """Return the environment of a result."""
    distributions = metadata.packages_distributions()
    packages = [distributions[module][0] for module in MODULES if module in distributions]
    return {**environment.environment(packages), "gpu": device.facts()}


def result_of(
    program: Program, about: dict[str, Any], first: Result, every: list[Measured], sizes_left_out: list[int]
) -> Result:
    """Return the result as it is written."""
    by_work = [
        sorted((measured for measured in every if measured.contest is contest), key=lambda at: at.size)
        for contest in program.contests
    ]
    every = [measured for of_work in by_work for measured in of_work]
    targets = [
        {"work": contest.work, **row}
        for contest, of_work in zip(program.contests, by_work, strict=True)
        for rows in (*map(gpu_targets.of_device, of_work), gpu_targets.of_bits(of_work))
        for row in rows
    ]
    return {
        "kind": program.kind,
        "environment": about,
        "dtype": "float32",
        "rounds": max((len(s) for m in every for s in m.times.seconds.values()), default=0),
        "rows": [row for measured in every for row in measured.rows()],
        **first,
        "targets": [*targets, *first.get("targets", [])],
        "sizes": [
            {"work": m.contest.work, "size": m.size, "left_out": m.left_out, "failed": m.failed}
            for m in every
        ],
        "sizes_left_out": sizes_left_out,
    }


def run(
    program: Program,
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
    first = program.measure_first(device)
    every: list[Measured] = []
    left_out = in_order_of_weight(sizes)
    while True:
        result = result_of(program, about, first, every, left_out)
        path = environment.save(result, output)
        if not left_out or time.monotonic() > deadline:
            return result, path
        size = left_out[0]
        for contest in program.contests:
            taking_part = [name for name in contest.peers if name in names]
            every.append(
                gpu_measure.measure(
                    timer, size, taking_part, contest=contest, rounds=rounds, deadline=deadline
                )
            )
            left = deadline - time.monotonic()
            print(f"{format_size(size)}, {contest.work}: {', '.join(every[-1].moved)} ({left:.0f} s left)")
        del left_out[0]


def main(program: Program, name: str, description: str | None, arguments: Sequence[str] | None) -> int:
    """Measure; return 1 if a contender failed, 2 without a GPU."""
    names = program.names()
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description)
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=list(program.sizes))
    parser.add_argument("--peers", nargs="+", choices=names, default=names)
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
        program,
        gpu.open_device(),
        options.sizes,
        options.peers,
        options.rounds,
        options.budget_seconds,
        options.output,
    )
    print(f"\n{gpu_report.RENDERERS[program.kind](result)}\nwrote {path.name}")
    failed = [at["failed"] for at in result["sizes"] if at["failed"]]
    return 1 if failed or result.get("host_failed") else 0
