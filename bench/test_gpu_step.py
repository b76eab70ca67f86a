"""``pytest bench/test_gpu_step.py``: a step on a GPU beside its peers, for pytest-benchmark.

pytest-benchmark runs one benchmark to its end and then the next, but contenders must take turns: clocks and
temperature of a GPU drift. So all contenders of a size are measured together, in turns, by
:mod:`bench.gpu_measure`; then the benchmark of each plays its recorded times back through a clock of its
own. The statistics and the JSON are those of the device times, one value for each round. Whichever
benchmarks are selected, all contenders of their sizes run.

Sizes come from ``FASTADAM_GPU_SIZES``, such as ``"1Ki 64Mi"``, rounds from ``FASTADAM_GPU_ROUNDS``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import gpu, gpu_compare, gpu_measure, harness
from bench.gpu_measure import Measured
from bench.gpu_peers import ON_TENSORS, PEERS
from bench.gpu_timer import EventTimer
from bench.units import format_size, parse_size

_SIZES = os.environ.get("FASTADAM_GPU_SIZES", " ".join(map(format_size, gpu_measure.SIZES)))
SIZES = [parse_size(text) for text in _SIZES.split()]
ROUNDS = int(os.environ.get("FASTADAM_GPU_ROUNDS", str(gpu_measure.ROUNDS)))

# Warnings are errors in the tests of fastadam; those of other libraries would stop a comparison with them.
pytestmark = pytest.mark.filterwarnings("default")

_played = 0.0


def played_time() -> float:
    """Return the time of the playback: it passes only while :func:`play` runs."""
    return _played


def play(benchmark: BenchmarkFixture, seconds: Sequence[float]) -> None:
    """Give a benchmark the recorded duration of each round."""
    recorded = iter(seconds)

    def take() -> None:
        global _played
        _played += next(recorded, 0.0)  # pytest-benchmark may call once more than it times

    benchmark.pedantic(take, rounds=len(seconds), iterations=1)


@pytest.fixture(scope="module")
def timer() -> EventTimer:
    """Return the clock of the device, which all benchmarks share."""
    reason = gpu.missing()
    if reason is not None:
        pytest.skip(reason)
    return EventTimer(gpu.open_device())


@pytest.fixture(scope="module")
def rounds(request: pytest.FixtureRequest) -> int:
    """Return the rounds of each contender: one where benchmarks are disabled and only checked."""
    return 1 if request.config.getoption("benchmark_disable") else ROUNDS


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest, timer: EventTimer, rounds: int) -> Measured:
    """Check and time all contenders of a size, in turns."""
    return gpu_measure.measure(timer, request.param, rounds=rounds)


@pytest.fixture(scope="module")
def host(timer: EventTimer, rounds: int) -> Iterator[tuple[harness.Measurement, dict[str, str]]]:
    """Time what a call costs the host, all contenders in turns."""
    yield gpu_measure.host_cost(timer.device, rounds=rounds)
    timer.device.release()


@pytest.mark.benchmark(timer=played_time)
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("measured", SIZES, ids=format_size, indirect=True)
def test_device_time(benchmark: BenchmarkFixture, measured: Measured, peer: str) -> None:
    """The time on the device, with data that is not in the cache."""
    if peer in measured.left_out:
        pytest.skip(measured.left_out[peer])
    assert peer not in measured.failed, measured.failed[peer]
    benchmark.group = f"device, {format_size(measured.size)} float32"
    row = next(row for row in measured.rows() if row["peer"] == peer)
    of = {f"percent_of_{name}": 100 * ratio["median"] for name, ratio in row["speed_over"].items()}
    benchmark.extra_info |= {key: row[key] for key in ("bytes", "gb_per_second", "late_share")} | of
    play(benchmark, measured.times.seconds[peer])


@pytest.mark.benchmark(timer=played_time)
@pytest.mark.parametrize("peer", [*(name for name, peer in PEERS.items() if peer.is_adam), *ON_TENSORS])
def test_host_time(
    benchmark: BenchmarkFixture, host: tuple[harness.Measurement, dict[str, str]], peer: str
) -> None:
    """The time until a call returns; the device is not waited for."""
    times, failed = host
    if (absent := {**PEERS, **ON_TENSORS}[peer].missing()) is not None:
        pytest.skip(absent)
    assert peer not in failed, failed[peer]
    benchmark.group = f"host, {format_size(gpu_measure.HOST_SIZE)} float32"
    benchmark.extra_info |= next(row for row in gpu_compare.host_rows(times) if row["peer"] == peer)
    play(benchmark, times.seconds[peer])
