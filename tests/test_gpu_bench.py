"""The GPU benchmarks: on a fake device everywhere, and on a GPU where there is one."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

# Behind the installed package, which `bench` measures: the root of the tree holds a folder of its name.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from fake_device import FLUSH, FakeDevice, adam, use_fake_peers

from bench import (
    gpu,
    gpu_graphs,
    gpu_measure,
    gpu_peers,
    gpu_program,
    gpu_references,
    gpu_targets,
)
from bench.gpu_buffers import PERIOD, Buffers
from bench.gpu_peers import Peer
from bench.gpu_timer import MOST_WRITES, EventTimer

pytestmark = pytest.mark.filterwarnings("default")  # other libraries' would stop a comparison with them


@pytest.fixture
def peers(monkeypatch):
    return use_fake_peers(monkeypatch)


# --- Timer --------------------------------------------------------------------------------------------------


def call(device, device_seconds, host_seconds):
    return lambda: device.queue("it", device_seconds, host_seconds)


@pytest.mark.parametrize("host_seconds", [1e-6, 70e-6, 500e-6])
def test_timer_hides_the_host(host_seconds):
    device = FakeDevice()
    timer, it = EventTimer(device), call(device, 3e-6, host_seconds)
    assert timer(it) == pytest.approx(3e3)
    assert timer.late[it] == 0


def test_timer_says_when_it_cannot_hide_the_host():
    device = FakeDevice()
    timer, it = EventTimer(device), call(device, 3e-6, 2 * MOST_WRITES * FLUSH)
    assert timer(it) > 3e3
    assert timer.late[it] == 1


def test_timer_flushes_before_every_call_and_alike_for_all():
    device = FakeDevice()
    timer = EventTimer(device)
    slow, quick = call(device, 1e-6, 70e-6), call(device, 1e-6, 1e-6)
    timer(slow)
    for it in (slow, quick):
        before = device.flushes
        timer(it)
        assert device.flushes - before == 4  # the first power of two of 20 us beyond 70 us


# --- Buffers and checks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "period"), [(1, 1), (10, 3), (1000, 1000), (5, 8), (100, 7)])
def test_fill_repeats_and_same_bits_looks_everywhere(size, period, monkeypatch):
    monkeypatch.setattr(gpu, "_COMPARED", 20)
    device, pattern = FakeDevice(), np.arange(1, period + 1, dtype=np.float32)
    array = device.empty(size)
    gpu.fill(array, pattern)
    assert np.array_equal(array, np.resize(pattern, size))
    if period > size:
        return
    assert gpu.same_bits(device, array, pattern)
    for wrong in range(size):
        changed = array.copy()
        changed[wrong] = np.nextafter(changed[wrong], np.float32(np.inf))
        assert not gpu.same_bits(device, changed, pattern)


def test_zeros_of_both_signs_are_not_the_same_bits():
    zeros = np.zeros(4, np.float32)
    assert not gpu.same_bits(FakeDevice(), -zeros, zeros)


def test_shared_buffers_hold_no_zeros_and_are_restored():
    buffers = Buffers.new(FakeDevice(), PERIOD + 5)
    before = buffers.params.copy()
    assert before.all()
    assert buffers.grads.all()
    assert np.array_equal(before[PERIOD:], before[:5])
    buffers.params[...] += 1
    buffers.write_grads(2 * buffers.host_grads)
    assert np.array_equal(buffers.grads[PERIOD:], 2 * buffers.host_grads[:5])
    buffers.restore()
    assert np.array_equal(buffers.params, before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (adam("it", 1e-6, 1e-6, lr=1.1e-3), "must take the steps of Adam"),
        (adam("it", 1e-6, 1e-6, lr=1.0001e-3), "must have the bits of the CPU"),  # within the tolerance
    ],
)
def test_wrong_contenders_fail_and_are_never_timed(peers, wrong, message):
    peers["cupy"] = Peer("fastadam CuPy", wrong, ())
    device = FakeDevice()
    measured = gpu_measure.measure(EventTimer(device), 1000, rounds=2, names=list(peers))
    assert message in measured.failed["cupy"]
    assert "cupy" not in measured.moved
    assert {"torch_fused", "copy"} <= measured.moved.keys()
    assert [row["met"] for row in gpu_targets.of_bits([measured]) if "CuPy" in row["promise"]] == [False]


def test_copy_checks_itself_and_is_capped():
    device = FakeDevice()
    running = gpu_references.start_copy(Buffers.new(device, 1000))
    assert running.moved == 28_000
    assert gpu_references.copy_needs(2**30) == 2 * gpu_references.MOST_COPIED


def test_the_fastest_reference_is_taken():
    device = FakeDevice()
    calls = [call(device, seconds, 1e-6) for seconds in (5e-6, 3e-6, 4e-6)]
    assert gpu_references.fastest(calls, EventTimer(device)) is calls[1]


# --- Measuring ----------------------------------------------------------------------------------------------


def test_contenders_take_turns_and_times_are_the_device_s(peers):
    device = FakeDevice()
    measured = gpu_measure.measure(EventTimer(device), 1000, rounds=7, names=list(peers))
    expected = {"cupy": 10e-6, "same_traffic": 9.6e-6, "copy": 4.7e-6, "torch_fused": 12e-6}
    for name, seconds in expected.items():
        assert measured.times.seconds[name] == pytest.approx([seconds] * 7)
    assert measured.late == dict.fromkeys(expected, 0.0)
    rounds = device.log[-6 * 16 :]  # the last six rounds: four contenders, each once untimed and three times
    orders = [tuple(dict.fromkeys(rounds[i : i + 16])) for i in range(0, len(rounds), 16)]
    assert all(sorted(order) == sorted(expected) for order in orders)
    assert len(set(orders)) > 1


def test_rows_say_bandwidth_and_its_share(peers):
    measured = gpu_measure.measure(EventTimer(FakeDevice()), 1000, rounds=2, names=list(peers))
    row = next(row for row in measured.rows() if row["peer"] == "cupy")
    assert row["gb_per_second"] == pytest.approx(28_000 / 10e-6 * 1e-9)
    assert row["speed_over"]["same_traffic"]["median"] == pytest.approx(0.96)
    assert row["speed_over"]["copy"]["median"] == pytest.approx(2 * 4.7 / 10)  # it moves half the bytes
    assert row["speed_over"]["torch_fused"]["median"] == pytest.approx(1.2)


def test_no_time_keeps_some_rounds(peers):
    measured = gpu_measure.measure(
        EventTimer(FakeDevice()), 1000, rounds=30, names=list(peers), deadline=-math.inf
    )
    assert {len(seconds) for seconds in measured.times.seconds.values()} == {5}


def test_what_does_not_fit_is_left_out_with_a_reason(peers):
    size = 2**20
    free = 2**30 + 8 * size + 2 * 8 * size  # parameters, gradients, and the moments of two
    measured = gpu_measure.measure(EventTimer(FakeDevice(free)), size, rounds=1, names=list(peers))
    assert list(measured.moved) == ["cupy", "same_traffic"]
    assert measured.left_out["torch_fused"] == "does not fit: needs 8.00 MiB of 0 B"
    nothing = gpu_measure.measure(EventTimer(FakeDevice(0)), size, rounds=1, names=list(peers))
    assert nothing.left_out.keys() == peers.keys()
    assert nothing.rows() == []


def test_what_is_not_installed_is_left_out_with_a_reason(peers):
    peers["cupy"] = Peer("fastadam CuPy", adam("cupy", 1e-6, 1e-6), ("no_such_module",))
    measured = gpu_measure.measure(EventTimer(FakeDevice()), 1000, rounds=1, names=list(peers))
    assert measured.left_out == {"cupy": "not installed: no_such_module"}


def test_host_cost_is_per_call_and_of_steps_only(peers):
    times, failed = gpu_measure.host_cost(FakeDevice(), rounds=3)
    assert failed == {}
    assert times.seconds.keys() == {"cupy", "torch_fused"}
    assert 0 < times.median("cupy") < 1e-3


def test_sizes_of_targets_come_first():
    order = gpu_program.in_order_of_weight([2**10, 2**30, 2**17, 2**20])
    assert order == [2**20, 2**30, 2**10, 2**17]


class FakeStream:
    """Writes what a capture does to a list."""

    def __init__(self, log):
        self.log = log

    def __enter__(self):
        self.log.append("enter")

    def __exit__(self, *_):
        self.log.append("exit")

    def synchronize(self):
        self.log.append("wait")

    def begin_capture(self):
        self.log.append("begin")

    def end_capture(self):
        self.log.append("end")
        return SimpleNamespace(launch=lambda: self.log.append("replay"))


def fake_cupy(log):
    runtime = SimpleNamespace(deviceSynchronize=lambda: log.append("wait"))
    return SimpleNamespace(cuda=SimpleNamespace(Stream=lambda **_: FakeStream(log), runtime=runtime))


def fake_torch(log):
    cuda = SimpleNamespace(
        synchronize=lambda: log.append("wait"),
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: log.append("replay")),
        graph=lambda _: FakeStream(log),
    )
    return SimpleNamespace(cuda=cuda)


def test_a_graph_is_captured_after_an_eager_step(monkeypatch):
    log = []
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(log))
    step = gpu_graphs.by_cupy(lambda: log.append("step"))
    for _ in range(3):
        step()
    eager, captured = ["wait", "enter", "step", "wait"], ["begin", "step", "end", "exit"]
    assert log == [*eager, *captured, "replay", "replay"]

    log = []
    monkeypatch.setitem(sys.modules, "torch", fake_torch(log))
    step = gpu_graphs.by_torch(lambda: log.append("step"))
    for _ in range(3):
        step()
    assert log == ["step", "wait", "enter", "step", "exit", "replay", "replay"]


def test_a_capture_that_fails_is_closed(monkeypatch):
    log = []

    def fails_in_capture():
        log.append("step")
        if "begin" in log:
            raise MemoryError

    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(log))
    with pytest.raises(MemoryError):
        gpu_graphs.by_cupy(fails_in_capture)()
    assert log[-3:] == ["step", "end", "exit"]


# --- Releasing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manager", [{}, {"deallocations": None}, {"deallocations": ["an array"]}], ids=str)
def test_memory_that_numba_keeps_for_later_is_freed(monkeypatch, manager):
    memory_manager = SimpleNamespace(**manager)
    context = SimpleNamespace(deallocations=["a module"], memory_manager=memory_manager)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "numba.cuda", SimpleNamespace(current_context=lambda: context))
    gpu._release_others()
    assert context.deallocations == []
    assert not getattr(memory_manager, "deallocations", None)


def test_numba_keeps_pending_memory_there():
    pytest.importorskip("numba_cuda", reason="needs numba-cuda", exc_type=ImportError)
    from numba.cuda.cudadrv import driver

    pending = driver.NumbaCUDAMemoryManager(context=None).deallocations
    pending.clear()
    assert len(pending) == 0


# --- On a GPU -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timer():
    if (reason := gpu.missing()) is not None:
        pytest.skip(reason)
    return EventTimer(gpu.open_device())


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2**10, PERIOD + 4])
def test_every_contender_is_right_on_a_gpu(timer, size):
    measured = gpu_measure.measure(timer, size, rounds=1)
    assert measured.failed == {}
    assert measured.moved.keys() | measured.left_out.keys() == gpu_peers.PEERS.keys()
    assert all(0 < measured.times.median(name) < 0.1 for name in measured.moved)


@pytest.mark.gpu
def test_device_times_grow_with_the_size(timer):
    sizes = (2**20, 2**22, 2**24, 2**26)
    measured = [gpu_measure.measure(timer, size, ["cupy", "copy"], rounds=3) for size in sizes]
    for name in measured[0].moved:
        times = [at.times.median(name) for at in measured]
        assert all(larger > 2 * smaller for smaller, larger in pairwise(times))


@pytest.mark.gpu
def test_events_see_the_work_of_every_library(timer):
    """Between two events stands the work of each, not only of the library that owns the events."""
    size = 2**26
    measured = gpu_measure.measure(timer, size, rounds=1)
    limit = 10e12  # bytes per second; no GPU moves them faster
    assert all(at["gb_per_second"] * 1e9 < limit for at in measured.rows())
