"""``pytest bench``: a step beside the same-traffic kernel, for pytest-benchmark.

To compare two versions of fastadam: ``pytest bench --benchmark-autosave``, then
``pytest bench --benchmark-compare``. Sizes come from ``FASTADAM_BENCH_SIZES``, such as ``"1Ki 32Mi"``.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import harness, oracle
from bench.peers import FASTADAM, ROOFLINE, Peer
from bench.placement import placed_copy
from bench.roofline import bytes_moved
from bench.units import format_size, parse_size

_DEFAULT_SIZES = " ".join(format_size(2**exponent) for exponent in (10, 12, 14, 16, 18, 20, 22, 25))
SIZES = [parse_size(text) for text in os.environ.get("FASTADAM_BENCH_SIZES", _DEFAULT_SIZES).split()]
ROUNDS = 5


def _start(peer: Peer, params: oracle.Array, grads: oracle.Array) -> oracle.Contender:
    return peer.start(placed_copy(params), placed_copy(grads))


def _percent_of_roofline(step: Any, roofline: Any) -> float:
    """Time both in turns: benchmarks of their own, seconds apart, would meet another machine."""
    tasks = {"step": harness.Task(step), "roofline": harness.Task(roofline)}
    return 100 * harness.interleave(tasks, rounds=ROUNDS).ratio("roofline", over="step").median


@pytest.mark.benchmark(max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=10)
@pytest.mark.parametrize("peer", [FASTADAM, ROOFLINE], ids=["fastadam", "same_traffic"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", SIZES, ids=format_size)
def test_step(benchmark: BenchmarkFixture, size: int, dtype: str, peer: Peer) -> None:
    """Check a step, then time it."""
    params, grads = oracle.inputs(size, dtype)
    contender = _start(peer, params, grads)
    if peer.is_adam:
        oracle.check_update(peer.name, contender, params, grads)

    benchmark.group = f"{format_size(size)} {dtype}"
    moved = bytes_moved(size, dtype)
    benchmark.extra_info["bytes"] = moved
    benchmark(contender.step)
    if benchmark.stats is None:  # --benchmark-disable
        return
    benchmark.extra_info["gb_per_second"] = moved / benchmark.stats.stats.median * 1e-9
    if peer.is_adam:
        roofline = _start(ROOFLINE, params, grads)
        percent = _percent_of_roofline(contender.step, roofline.step)
        benchmark.extra_info["percent_of_roofline"] = percent
