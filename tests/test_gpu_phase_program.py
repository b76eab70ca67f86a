"""The program that measures the phase on a GPU: no refill is timed, targets are judged, its tables fit."""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest

# Behind the installed package, which `bench` measures: the root of the tree holds a folder of its name.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from fake_device import FLUSH, FakeDevice
from fake_phase import NORM, WHOLE, fake_program, on_cpu, start_wrong, timed

from bench import gpu_measure, gpu_phase, gpu_phase_peers, gpu_program, gpu_targets, harness, report
from bench.gpu_contest import HELD, Contest
from bench.gpu_measure import Measured
from bench.gpu_peers import Peer
from bench.gpu_timer import MOST_WRITES, EventTimer

pytestmark = pytest.mark.filterwarnings("default")  # other libraries' would stop a comparison with them


# --- Measuring ----------------------------------------------------------------------------------------------


def measure(contest: Contest, rounds=3, size=1000):
    device = FakeDevice()
    return device, gpu_measure.measure(EventTimer(device), size, contest=contest, rounds=rounds)


def test_the_refill_is_not_timed():
    device, measured = measure(fake_program().contests[0])
    assert measured.failed == {}
    for name, seconds in (("cupy", 10e-6), ("two_passes", 9.5e-6), ("torch", 18e-6)):
        assert measured.times.seconds[name] == pytest.approx([seconds] * 3)
    calls = device.log[-2 * 4 * 3 :]  # a call, behind its refill; the last of the log
    assert calls[::2] == ["copy"] * (4 * 3)
    assert "copy" not in calls[1::2]


def test_what_does_not_clear_is_not_refilled():
    device, measured = measure(fake_program().contests[1])
    assert measured.times.seconds["cupy"] == pytest.approx([2e-6] * 3)
    assert "copy" not in device.log


def test_a_call_that_is_repeated_is_refilled_again():
    log, device = [], FakeDevice()

    def call():
        log.append("call")
        device.queue("it", 1e-6, 10 * FLUSH)

    EventTimer(device)(call, lambda: log.append("refill"))
    assert log == ["refill", "call"] * 5  # 16 writes hide what takes as long as ten
    assert MOST_WRITES > 16


def test_wrong_contenders_fail_and_are_never_timed():
    wrong = Peer("fastadam CuPy, 1 call", partial(start_wrong, lr=1.1e-3), ())
    _, measured = measure(fake_program(cupy=wrong).contests[0], rounds=2)
    assert "must clip, step, average and clear" in measured.failed["cupy"]
    assert list(measured.moved) == ["two_passes", "torch"]
    assert [row["met"] for row in gpu_targets.of_bits([measured])] == [False]


def test_an_average_begins_with_the_first_parameters():
    """Also where another contender has stepped before."""
    pytest.importorskip("torch")
    torch = Peer("torch, 4 calls", gpu_phase_peers.start_torch, ())
    _, measured = measure(fake_program(torch=torch).contests[0], rounds=1)
    assert measured.failed == {}


def test_room_is_counted_with_the_refill():
    size = 2**20
    free = 2**30 + 12 * size + 2 * 12 * size  # parameters, gradients and their source; the states of two
    peers = {name: Peer(name, on_cpu, (), WHOLE.peers["cupy"].needs) for name in "abc"}
    chosen, left_out = gpu_measure.plan(WHOLE._replace(peers=peers), peers, size, free)
    assert chosen == ["a", "b"]
    assert left_out == {"c": "does not fit: needs 12.0 MiB of 0 B"}


def test_contenders_are_those_that_were_asked_for():
    assert list(WHOLE.peers) == [
        "cupy",
        "two_passes",
        "torch",
        "cupy_graph",
        "torch_graph",
        "numba",
        "numba_graph",
    ]
    assert set(NORM.peers) == {"cupy", "one_read", "torch", "numba"}
    for contest in (WHOLE, NORM):
        assert {target.over for target in contest.targets} <= set(contest.references) <= set(contest.peers)
        assert next(name for name, peer in contest.peers.items() if peer.is_ours) == HELD


# --- Targets and report -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "ours", "expected"),
    [
        (2**26, 1.00, [True, True]),  # 1.5 times torch's speed, all of two passes'
        (2**26, 1.01, [False, True]),
        (2**26, 1.09, [False, False]),
        (2**28, 0.99, [True, True]),
        (2**20, 9.00, []),
    ],
)
def test_targets_are_judged(size, ours, expected):
    seconds = {"cupy": ours, "two_passes": 1.0, "torch": 1.5}
    times = harness.Measurement({name: [s] * 3 for name, s in seconds.items()})
    measured = Measured(size, times, dict.fromkeys(seconds, 44 * size), contest=WHOLE)
    assert [row["met"] for row in gpu_targets.of_device(measured)] == expected


def run(tmp_path, program, sizes=(2**10, 2**20), budget=math.inf):
    result, path = gpu_program.run(program, FakeDevice(), sizes, program.names(), 2, budget, tmp_path)
    assert path == tmp_path / "gpu_phase-fake-gpu-1.json"
    assert json.loads(path.read_text(encoding="utf-8")) == result
    return result


def test_the_report_shows_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr(report.tables, "origin", lambda _: "<sub>origin</sub>\n")
    readme = "<!-- results:gpu_phase:begin (x) -->\n<!-- results:gpu_phase:end -->\n"
    assert report.NOT_MEASURED in report.updated(readme, [])
    whole = fake_program().contests[0]._replace(targets=(gpu_phase.TARGETS[0]._replace(from_size=2**20),))
    program = fake_program()._replace(contests=(whole, fake_program().contests[1]))
    run(tmp_path, program)
    text = report.updated(readme, report.load(tmp_path))
    assert text == (
        "<!-- results:gpu_phase:begin (x) -->\n\n"
        "| whole phase, float32 | 1Ki | 1Mi |\n"
        "| --- | --: | --: |\n"
        "| fastadam CuPy, 1 call | 10.0 us | 10.0 us |\n"
        "| two passes | 9.50 us | 9.50 us |\n"
        "| torch, 4 calls | 18.0 us | 18.0 us |\n"
        "\n"
        "| whole phase, GB/s (of two passes, of torch) | 1Mi |\n"
        "| --- | --: |\n"
        "| fastadam CuPy, 1 call | 4614 (95 %, 180 %) |\n"
        "| two passes | 4857 (100 %, 189 %) |\n"
        "| torch, 4 calls | 2563 (53 %, 100 %) |\n"
        "\n"
        "| fastadam CuPy, eager | at least | measured |  |\n"
        "| --- | --: | --: | --: |\n"
        "| speed over torch, 4 calls, 1Mi | 1.50 | 1.800 (1.800 to 1.800) | met |\n"
        "| bits of the CPU at all sizes, fastadam CuPy, 1 call | 2 | 2 | met |\n"
        "\n"
        "| norm alone, float32 | 1Ki | 1Mi |\n"
        "| --- | --: | --: |\n"
        "| fastadam CuPy | 2.00 us | 2.00 us |\n"
        "| torch vector_norm | 3.00 us | 3.00 us |\n"
        "\n"
        "| norm alone, GB/s (of one read, of torch) | 1Mi |\n"
        "| --- | --: |\n"
        "| fastadam CuPy | 2097 (150 %) |\n"
        "| torch vector_norm | 1398 (100 %) |\n"
        "\n"
        "| fastadam CuPy, eager | at least | measured |  |\n"
        "| --- | --: | --: | --: |\n"
        "| bits of the CPU at all sizes, fastadam CuPy | 2 | 2 | met |\n"
        "\n"
        "<sub>origin</sub>\n\n"
        "<!-- results:gpu_phase:end -->\n"
    )


def test_what_is_missing_is_named(tmp_path):
    absent = Peer("torch, 4 calls", timed("torch", 1e-6), ("no_such_module",))
    text = report.render([run(tmp_path, fake_program(torch=absent), [2**10])])
    assert "- not measured: whole phase, 1Ki: torch: not installed: no_such_module\n" in text
    result = run(tmp_path, fake_program(), budget=0)
    assert result["sizes_left_out"] == [2**20, 2**10]
    assert "- not measured: 1Mi: out of time\n" in report.render([result])


def test_the_readme_has_a_place_for_it():
    readme = report.README.read_text(encoding="utf-8")
    assert "<!-- results:gpu_phase:begin (generated by python -m bench.report) -->" in readme
