"""The programs that measure on a GPU: what they write, and what they say where there is none."""

from __future__ import annotations

import ctypes
import json
import math
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest

# Behind the installed package, which `bench` measures: the root of the tree holds a folder of its name.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from fake_device import FakeDevice, adam, use_fake_peers

from bench import (
    gpu_compare,
    gpu_launch,
    gpu_measure,
    gpu_phase,
    gpu_program,
    gpu_report,
    gpu_targets,
    gpu_torch,
    harness,
    report,
)
from bench.environment import ROOT
from bench.gpu_measure import Measured
from bench.gpu_peers import Peer
from bench.gpu_timer import EventTimer
from fastadam.kernels import grids


@pytest.fixture
def peers(monkeypatch):
    return use_fake_peers(monkeypatch)


# --- Targets ------------------------------------------------------------------------------------------------


def of_times(size, **seconds):
    moved = dict.fromkeys(seconds, 28 * size)
    return Measured(size, harness.Measurement({name: [s] * 3 for name, s in seconds.items()}), moved)


@pytest.mark.parametrize(
    ("size", "ours", "expected"),
    [
        (2**26, 1.00, [True, True, True]),
        (2**26, 1.06, [False, True, False]),  # 0.943 of the same traffic, 0.943 of the copy
        (2**26, 1.10, [False, False, False]),
        (2**20, 1.10, [False]),  # only torch, and slower than it
        (2**20, 0.99, [True]),
        (2**17, 9.00, []),
    ],
)
def test_targets_are_judged(size, ours, expected):
    measured = of_times(size, cupy=ours, same_traffic=1.0, copy=1.0, torch_fused=1.0)
    assert [row["met"] for row in gpu_targets.of_device(measured)] == expected


def test_what_was_not_measured_is_not_judged():
    assert gpu_targets.of_device(of_times(2**26, same_traffic=1.0)) == []
    assert len(gpu_targets.of_device(of_times(2**26, cupy=1.0, copy=1.0))) == 1
    assert gpu_targets.of_host(harness.Measurement({"cupy": [1.0]})) == []


@pytest.mark.parametrize(("ours", "met"), [(5e-6, True), (50e-6, True), (51e-6, False)])
def test_host_target(ours, met):
    rows = gpu_targets.of_host(harness.Measurement({"cupy": [ours], "torch_fused": [50e-6]}))
    assert [row["met"] for row in rows] == [met]


# --- Programs -----------------------------------------------------------------------------------------------


def compare(tmp_path, sizes, budget=math.inf):
    program = gpu_compare.program()
    result, path = gpu_program.run(program, FakeDevice(), sizes, program.names(), 2, budget, tmp_path)
    assert path == tmp_path / "gpu-fake-gpu-1.json"
    assert json.loads(path.read_text(encoding="utf-8")) == result
    return result


def test_compare_writes_a_result_that_the_report_shows(peers, tmp_path):
    result = compare(tmp_path, [2**10, 2**20])
    assert [at["size"] for at in result["sizes"]] == [2**10, 2**20]
    assert result["sizes_left_out"] == []
    text = report.render(report.load(tmp_path))
    assert "| device, float32 | 1Ki | 1Mi |\n" in text
    assert "| fastadam CuPy | 10.0 us | 10.0 us |\n" in text
    assert "| fastadam CuPy | 2936 (99 %, 96 %) |\n" not in text  # only of 1Mi: copy moves 14 bytes of 28
    assert "| speed over torch fused, 1Mi | 1.00 | 1.200 (1.200 to 1.200) | met |\n" in text
    assert "| bits of the CPU at all sizes, fastadam CuPy | 2 | 2 | met |\n" in text
    assert "not measured" not in text
    assert "waited" not in text
    assert "<sub>Fake GPU 1, 1 GiB, 2 SMs, L2 1 MiB, driver 1.2, CUDA 3.4 (runtime 5.6); " in text


def test_compare_stops_when_the_time_is_over(peers, tmp_path):
    result = compare(tmp_path, [2**10, 2**20], budget=0)
    assert result["rows"] == []
    assert result["sizes_left_out"] == [2**20, 2**10]
    assert "- not measured: 1Mi: out of time\n" in report.render([result])


def test_report_says_who_failed_and_marks_waiting(peers, tmp_path):
    peers["cupy"] = Peer("fastadam CuPy", adam("cupy", 1e-6, 1e-6, lr=1.0), ())
    peers["torch_fused"] = Peer("torch fused", adam("torch_fused", 1e-6, 1.0), ())
    text = gpu_report.gpu(compare(tmp_path, [2**10]))
    assert "- not measured: 1Ki: cupy: WrongUpdateError: fastadam CuPy must take the steps of Adam" in text
    assert "| torch fused | 999 ms * |\n" in text
    assert "| same traffic | 9.60 us |\n" in text
    assert "the device waited for the host" in text


def test_the_readme_keeps_its_place_for_a_result():
    readme = "<!-- results:gpu:begin (x) -->\n<!-- results:gpu:end -->\n"
    assert report.NOT_MEASURED in report.updated(readme, [])


def test_other_json_files_are_no_results(tmp_path):
    (tmp_path / "gpu-pytest-benchmark.json").write_text('{"benchmarks": []}', encoding="utf-8")
    assert report.load(tmp_path) == []


def test_summary_prints_results(peers, tmp_path, capsys):
    compare(tmp_path, [2**10])
    capsys.readouterr()
    (tmp_path / "environment.json").write_text("{}", encoding="utf-8")
    gpu_report.main(sorted(map(str, tmp_path.glob("*.json"))))
    assert capsys.readouterr().out.startswith("## gpu\n\n| device, float32 | 1Ki |\n")


def test_launch_sweep_sets_and_restores_the_launch(monkeypatch):
    chosen, seen = (grids.BLOCK, grids.WAVES), []

    @lru_cache
    def original(*key):
        return grids.BLOCK

    backend = SimpleNamespace(_kernel=original)
    monkeypatch.setitem(sys.modules, "fastadam.kernels.cuda_cupy", backend)
    gpu_launch._compile.cache_clear()
    gpu_launch._kernels_of.cache_clear()

    def start(buffers):
        def note():
            seen.append((grids.BLOCK, grids.WAVES, backend._kernel("step")))

        running = adam("cupy", grids.WAVES * 1e-6, 1e-6)(buffers)
        return running._replace(step=lambda: (note(), running.step()))

    monkeypatch.setattr(gpu_launch, "PEERS", {"cupy": Peer("fastadam CuPy", start, ())})
    launches = [(64, 1), (512, 2), chosen]
    rows = gpu_launch.measure(EventTimer(FakeDevice()), 1000, launches, rounds=2)
    assert {(row["block"], row["waves"]) for row in rows} == set(launches)
    assert {(block, waves) for block, waves, _ in seen} == set(launches)
    assert all(block == kernel_block for block, _, kernel_block in seen)
    assert chosen == (grids.BLOCK, grids.WAVES)
    assert rows[0]["speed_over_chosen"]["median"] == pytest.approx(grids.WAVES)
    text = gpu_report.launch({"chosen": "256 threads, 8 waves", "rows": rows})
    assert text.count("\n") == 5
    gpu_launch._compile.cache_clear()
    gpu_launch._kernels_of.cache_clear()


# --- Without a GPU ------------------------------------------------------------------------------------------


class NoDevices:
    def __init__(self, name):
        pass

    def cuInit(self, _):  # noqa: N802
        return 100


def no_library(name):
    raise OSError(name)


@pytest.mark.parametrize(("library", "reason"), [(no_library, "no CUDA driver"), (NoDevices, "no CUDA GPU")])
@pytest.mark.parametrize("program", [gpu_compare, gpu_phase, gpu_launch, gpu_torch])
def test_programs_say_why_they_measure_nothing(monkeypatch, capsys, program, library, reason):
    monkeypatch.setattr(ctypes, "CDLL", library)
    assert program.main([]) == 2
    assert capsys.readouterr().err == f"nothing to measure: {reason}\n"


PLUGIN = """
import pytest
from fake_device import FakeDevice, fake_peers
from bench import gpu, gpu_compare, gpu_contest, gpu_measure, gpu_peers
import os
if os.environ["FAKE_GPU"] == "1":
    gpu.missing, gpu.open_device = lambda: None, FakeDevice
    gpu_peers.PEERS = gpu_contest.PEERS = fake_peers()
    for module in (gpu_peers, gpu_compare, gpu_measure):
        module.ON_TENSORS = {}
else:
    gpu.missing = lambda: "because"
"""


def run_suite(tmp_path, fake, *options):
    (tmp_path / "fake_gpu_plugin.py").write_text(PLUGIN, encoding="utf-8")
    path = os.pathsep.join(map(str, (tmp_path, ROOT / "tests", *filter(None, sys.path))))
    environment = {
        **os.environ,
        "FAKE_GPU": str(fake),
        "FASTADAM_GPU_SIZES": "1Ki 3Ki",
        "PYTHONPATH": path,
        "PYTHONSAFEPATH": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "fake_gpu_plugin", "-p", "no:cacheprovider"]
    command += ["--import-mode=importlib", str(ROOT / "bench" / "test_gpu_step.py"), *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False, text=True)


def test_suite_skips_with_the_reason(tmp_path):
    done = run_suite(tmp_path, 0)
    assert done.returncode == 0, done.stdout
    assert "because" in done.stdout
    assert "passed" not in done.stdout


def test_suite_gives_device_times_to_pytest_benchmark(tmp_path):
    output = tmp_path / "it.json"
    done = run_suite(tmp_path, 1, f"--benchmark-json={output}")
    assert done.returncode == 0, done.stdout
    entries = {entry["name"]: entry for entry in json.loads(output.read_text(encoding="utf-8"))["benchmarks"]}
    for size in ("1Ki", "3Ki"):
        entry = entries[f"test_device_time[{size}-cupy]"]
        assert entry["stats"]["median"] == pytest.approx(10e-6)
        assert entry["stats"]["rounds"] == gpu_measure.ROUNDS
        assert entry["extra_info"]["percent_of_same_traffic"] == pytest.approx(96)
        assert entry["extra_info"]["percent_of_copy"] == pytest.approx(94)
    assert entries["test_host_time[cupy]"]["stats"]["median"] > 0
