"""The command line: what it prints, how it fails, what it loads; and the facts that ``info`` shows."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import walled_numpy

import fastadam
from fastadam import backends, devices, machine
from fastadam.__main__ import main

runner_of = pytest.importorskip("typer.testing")
pytest.importorskip("rich")

from fastadam.cli import app  # noqa: E402

WIDE = {"COLUMNS": "500", "NO_COLOR": "1", "TERM": "dumb"}
"""Lines are not broken, so that messages can be found whole."""


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    for name, value in WIDE.items():
        monkeypatch.setenv(name, value)


def invoke(*arguments):
    return runner_of.CliRunner().invoke(app, [str(argument) for argument in arguments])


def run(*arguments, cwd=None, **variables):
    """Run a real process; warnings are errors there too."""
    command = [sys.executable, "-W", "error", *(str(argument) for argument in arguments)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", **variables}
    return subprocess.run(
        command, check=False, cwd=cwd, env=environment, capture_output=True, encoding="utf-8", timeout=300
    )


def shown(table):
    """Name -> value of the rows of a printed table of two columns; a value may take several lines."""
    values, name = {}, ""
    for line in table.splitlines():
        cells = [cell.strip() for cell in re.split("[│|]", line)[1:-1]]
        if len(cells) == 2:
            name = cells[0] or name
            values[name] = "\n".join(filter(None, [values.get(name), cells[1]]))
    return values


# --- fastadam -----------------------------------------------------------------------------------------------


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"fastadam {fastadam.__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], []], ids=["help", "nothing"])
def test_help_names_the_commands(arguments):
    output = invoke(*arguments).output
    assert all(
        re.search(rf" {name} ", output) for name in ("info", "demo", "race", "bench", "--version", "--help")
    )


LIBRARIES = ["llvmlite", "matplotlib", "numba", "rich", "scipy.optimize", "sklearn", "torch", "typer"]


def loaded(code):
    process = run("-c", f"import sys; {code}; print([name for name in {LIBRARIES} if name in sys.modules])")
    return ast.literal_eval(process.stdout)


def test_the_interface_loads_nothing_heavy():
    assert loaded("import fastadam.__main__") == []
    assert loaded("import fastadam.cli") == ["rich", "typer"]
    assert loaded("import fastadam.demo_plot") == ["matplotlib"]  # so the check can fail


@pytest.mark.parametrize("missing", ["rich", "typer"])
def test_without_the_packages_of_the_command_line(missing):
    process = run(
        "-c", f"import sys; sys.modules['{missing}'] = None; from fastadam.__main__ import main; main()"
    )
    message = 'ImportError: the fastadam command needs rich and typer. pip install "fastadam[cli]"\n'
    assert (process.returncode, process.stdout, process.stderr) == (1, "", message)


def test_another_missing_module_is_not_blamed_on_the_command_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastadam.demo", None)
    monkeypatch.delitem(sys.modules, "fastadam.cli")
    monkeypatch.delattr(fastadam, "demo", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"fastadam\.demo"):
        main()


MISSING = 'not installed: pip install "fastadam[cuda13]"'


# --- info ---------------------------------------------------------------------------------------------------


def test_info_as_a_process():
    process = run("-m", "fastadam", "info")
    assert (process.returncode, process.stderr) == (0, "")
    assert shown(process.stdout).items() >= machine.facts().items()


def test_info_without_compilation():
    process = run("-m", "fastadam", "info", NUMBA_DISABLE_JIT="1")
    assert (process.returncode, process.stderr) == (0, "")
    assert shown(process.stdout)["Kernel cache"] == "none (NUMBA_DISABLE_JIT is set: nothing is compiled)"


def test_info_prints_values_as_they_are(monkeypatch):
    facts = {"a": "[bold]path[/bold]", "b": "x" * 1000, "c": "first\nsecond"}
    monkeypatch.setattr(machine, "facts", lambda: facts)
    values = shown(invoke("info").stdout)
    assert (values["a"], values["b"].replace("\n", ""), values["c"]) == tuple(facts.values())


def test_facts():
    numpy, numba = pytest.importorskip("numpy"), pytest.importorskip("numba")
    facts = machine.facts()
    assert facts["fastadam"] == fastadam.__version__
    assert (facts["NumPy"], facts["Numba"]) == (numpy.__version__, numba.__version__)
    assert all(facts.values())


def test_facts_tell_which_backends_can_run(monkeypatch):
    status = {"cpu": "ready", "cupy": MISSING, "numba-cuda": "no CUDA driver"}
    monkeypatch.setattr(backends, "status", lambda: status)
    facts = machine.facts()
    assert {name: facts[f"Backend {name}"] for name in status} == status
    assert shown(invoke("info").stdout)["Backend cupy"] == MISSING


def test_facts_import_no_framework():
    assert loaded("from fastadam import machine; machine.facts()") == ["llvmlite", "numba"]


def test_a_distribution_that_is_not_there():
    assert machine._version("no-such-distribution") == "not installed"
    assert machine._version("no-such-distribution", "numpy") == machine.facts()["NumPy"]


@pytest.mark.parametrize(
    ("features", "width"),
    [
        ({"sse2": True, "avx": True, "avx2": True, "avx512f": True}, "512 bits (AVX-512)"),
        ({"sse2": True, "avx": True, "avx2": True, "avx512f": False}, "256 bits (AVX2)"),
        ({"sse2": True, "avx": True}, "256 bits (AVX)"),
        ({"sse2": True}, "128 bits (SSE2)"),
        ({"neon": True}, "128 bits (NEON)"),
        ({"neon": True, "sve": True}, "scalable, width unknown (SVE)"),
        ({}, "unknown"),
    ],
    ids=str,
)
def test_simd(features, width):
    assert machine.simd(features) == width


def test_cpu_that_llvm_does_not_know(monkeypatch):
    def fail():
        raise RuntimeError

    monkeypatch.setattr(machine.llvm, "get_host_cpu_features", fail)
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    assert machine._cpu_features() == {}
    monkeypatch.setattr(machine.platform, "machine", lambda: "arm64")
    assert machine._cpu_features() == {"neon": True}


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("processor\t: 0\nmodel name\t: A Fast One: 9\nflags\t: x\n", "A Fast One: 9"),
        ("BogoMIPS: 1\n", "from platform"),
    ],
)
def test_cpu_name(tmp_path, monkeypatch, cpuinfo, name):
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo)
    monkeypatch.setattr(machine, "_CPUINFO", path)
    monkeypatch.setattr(machine.platform, "processor", lambda: "from platform")
    assert machine.cpu() == name


def test_threads(monkeypatch):
    stub = SimpleNamespace(count=lambda: 4, layer=lambda: "omp", numba_is_safe=lambda: True)
    monkeypatch.setattr(machine, "threads", stub)
    assert machine.threads_used() == "4 (Numba's, omp)"
    stub.layer, stub.numba_is_safe = lambda: "workqueue", lambda: False
    assert machine.threads_used() == "4 (fastadam's own pool; Numba's workqueue is not safe)"

    def fail():
        raise ValueError("No threading layer could be loaded.")

    stub.count = fail
    assert machine.threads_used() == "none: No threading layer could be loaded."


def test_no_cache(monkeypatch):
    serial = SimpleNamespace(stats=SimpleNamespace(cache_path=None))
    monkeypatch.setattr(machine, "cpu_backend", SimpleNamespace(serial=serial))
    assert machine.facts()["Kernel cache"] == "none (no writable location)"


def test_cuda_devices(monkeypatch):
    listing = "GPU 0: NVIDIA X (UUID: GPU-1)\n  MIG 1g.5gb Device 0: (UUID: MIG-2)\n"
    monkeypatch.setattr(machine.shutil, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=listing))
    assert machine.cuda_devices() == ["GPU 0: NVIDIA X", "MIG 1g.5gb Device 0:"]


@pytest.mark.parametrize(
    ("query", "details"),
    [
        ("0, 9.0, 81559 MiB\n1, 12.1, [N/A]\n", " (compute capability 9.0, 81559 MiB)"),
        ("", ""),
        ('Field "compute_cap" is not a valid field to query.\n', ""),
        (None, ""),
    ],
    ids=["known", "nothing", "prose", "fails"],
)
def test_cuda_devices_with_what_the_program_knows_of_them(monkeypatch, query, details):
    def run(command, **_):
        if "-L" in command:
            listing = "GPU 0: X (UUID: GPU-1)\n  MIG 1g Device 0: (UUID: MIG-2)\nGPU 1: Y (UUID: GPU-3)\n"
            return SimpleNamespace(stdout=listing)
        if query is None:
            raise subprocess.CalledProcessError(2, "nvidia-smi")
        return SimpleNamespace(stdout=query)

    monkeypatch.setattr(machine.shutil, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(machine.subprocess, "run", run)
    assert machine.cuda_devices() == [f"GPU 0: X{details}", "MIG 1g Device 0:", "GPU 1: Y"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(),
        subprocess.CalledProcessError(9, "nvidia-smi"),
        subprocess.TimeoutExpired("nvidia-smi", 10),
    ],
    ids=lambda error: type(error).__name__,
)
def test_cuda_devices_of_a_program_that_fails(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(machine.shutil, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(machine.subprocess, "run", fail)
    assert machine.cuda_devices() == []
    assert machine.facts()["CUDA devices"] == "none found"


def test_cuda_devices_without_the_program(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda _: None)
    assert machine.cuda_devices() == []


# --- demo ---------------------------------------------------------------------------------------------------


@pytest.fixture
def needs_demo():
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")


@pytest.mark.usefixtures("needs_demo")
def test_demo_as_a_process(tmp_path):
    process = run("-m", "fastadam", "demo", cwd=tmp_path)
    assert (process.returncode, process.stderr) == (0, "")
    assert re.search(r"100/100 loss 0\.00\d+ +test accuracy 9", process.stdout)
    accuracy = re.search(r"^test accuracy +([\d.]+)% of 360 digits", process.stdout, re.MULTILINE)
    assert float(accuracy[1]) >= 97
    average = re.search(r"^of the average +([\d.]+)%", process.stdout, re.MULTILINE)
    assert float(average[1]) >= 97
    assert re.search(r"^learning rate +linear_warmup\(lr=cosine\(lr=0\.003, ", process.stdout, re.MULTILINE)
    assert re.search(r"^clipped to +a gradient norm of 1\.0 *$", process.stdout, re.MULTILINE)
    assert re.search(r"^trained on +CPU *$", process.stdout, re.MULTILINE)
    assert re.search(r"^time in step\(\) +[\d.]+% of [\d.]+ s of training", process.stdout, re.MULTILINE)
    assert re.search(r"^speed +[\d,]+ steps per second", process.stdout, re.MULTILINE)
    assert process.stdout.endswith("plot            fastadam-demo.png\n")
    assert (tmp_path / "fastadam-demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("needs_demo")
def test_demo_passes_its_options_on(tmp_path, monkeypatch):
    from fastadam import demo

    seen = []
    train = demo.train
    monkeypatch.setattr(
        demo, "train", lambda settings, *a, **k: seen.append(settings) or train(settings, *a, **k)
    )
    monkeypatch.setenv("COLUMNS", "40")
    path = tmp_path / "a long name of a plot in a folder with a long name.svg"
    result = invoke("demo", "--seed", 3, "--epochs", 1, "--lr", 0.01, "--output", path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert seen == [demo.Settings(seed=3, epochs=1, lr=0.01)]
    assert f"{path}\n" in result.stdout
    assert path.read_bytes().startswith(b"<?xml")


@pytest.mark.usefixtures("needs_demo")
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--epochs", 0, "epochs must be at least 1; got 0."),
        ("--lr", -1, "lr must be at least 0; got -1.0."),
        ("--lr", 1e39, "lr must be at most 3.402823e+38 for float32 buffers; got 1e+39."),
        ("--seed", -1, "seed must be in [0, 2**32); got -1."),
        ("--output", "plot.txt", "output must end in .png, .pdf or .svg; got plot.txt."),
    ],
)
def test_demo_refuses_before_it_trains(monkeypatch, option, value, message):
    from fastadam import demo

    monkeypatch.setattr(demo, "load_digits", None)
    monkeypatch.setattr(demo, "train", None)
    result = invoke("demo", option, value)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"ValueError: {message}\n")


@pytest.mark.usefixtures("needs_demo")
@pytest.mark.parametrize("status", [MISSING, "no CUDA device"], ids=["no CuPy", "no GPU"])
def test_demo_on_a_gpu_that_is_not_there(monkeypatch, tmp_path, status):
    from fastadam import demo

    monkeypatch.setattr(backends, "status", lambda: {"cupy": status})
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(demo, "load_digits", None)
    monkeypatch.setattr(demo, "train", None)
    result = invoke("demo", "--device", "cuda", "--output", tmp_path / "plot.png")
    message = f"ImportError: device cuda needs CuPy and an NVIDIA GPU; CuPy here: {status}\n"
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("needs_demo")
def test_demo_on_a_gpu(monkeypatch, tmp_path):
    from fastadam import demo

    walled_numpy.install(monkeypatch, demo)
    path = tmp_path / "plot.svg"
    result = invoke("demo", "--device", "cuda", "--epochs", 2, "--output", path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.search(r"^trained on +Fake GPU, timed by its events *$", result.stdout, re.MULTILINE)
    assert path.read_bytes().startswith(b"<?xml")


@pytest.mark.usefixtures("needs_demo")
def test_demo_without_scikit_learn(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    result = invoke("demo", "--output", tmp_path / "plot.png")
    message = 'ImportError: the demo needs scikit-learn. pip install "fastadam[demo]"\n'
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", message)


def test_demo_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "fastadam.demo_plot", raising=False)
    monkeypatch.delattr(fastadam, "demo_plot", raising=False)
    result = invoke("demo")
    message = 'ImportError: the plot of the demo needs matplotlib. pip install "fastadam[demo]"\n'
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", message)


# --- race ---------------------------------------------------------------------------------------------------


@pytest.fixture
def needs_race(needs_demo):
    pytest.importorskip("scipy")


FEW = ["--problem", "reddi", "--problem", "saddle", "--optimizer", "adam", "--optimizer", "lbfgs"]
FEW += ["--steps", 30, "--seeds", 2, "--trials", 3]


@pytest.mark.usefixtures("needs_race")
def test_race_as_a_process(tmp_path):
    shown = []
    for name in ("first", "second"):
        process = run("-m", "fastadam", "race", *FEW, "--output", name, cwd=tmp_path, COLUMNS="80")
        assert (process.returncode, process.stderr) == (0, "")
        assert re.search(r"^runs +\S+ 16/16 ", process.stdout, re.MULTILINE)
        assert re.search(r"^pictures +\S+ 2/2 ", process.stdout, re.MULTILINE)
        assert max(map(len, process.stdout.splitlines())) <= 80
        assert process.stdout.endswith(f"report          {name}{os.sep}race.html\n")
        assert (tmp_path / name / "race.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
        assert (tmp_path / name / "saddle-paths.png").read_bytes().startswith(b"\x89PNG")
        text = process.stdout.partition("A saddle: 30 steps, target 0.0001")[2].replace(name, "")
        shown.append(re.sub(r" *[\d.]+ us", " - us", text))
    # But for times, and the place of a column that they may move, the same seed shows the same.
    first, second = (re.sub(r"[ ─]+", " ", text) for text in shown)
    assert first == second
    assert re.search(r"^ lbfgs - .* 0 of 2 ?$", first, re.MULTILINE)
    assert re.search(r"^ adam 0\.\d+ .* - us 0 of 6 ?$", first, re.MULTILINE)
    assert "Reddi's counterexample: 30 steps, target 0.01" in first


@pytest.mark.usefixtures("needs_race")
def test_race_passes_its_options_on(tmp_path, monkeypatch):
    from fastadam.race import racing
    from fastadam.race.settings import Settings, Tune

    seen = []
    race = racing.race
    monkeypatch.setattr(
        racing, "race", lambda settings, **others: seen.append(settings) or race(settings, **others)
    )
    path = tmp_path / "a folder"
    options = ("--problem", "noisy", "--optimizer", "adam", "--steps", 10, "--seeds", 1, "--seed", 4)
    result = invoke("race", *options, "--tune", "random", "--trials", 2, "--output", path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert seen == [Settings(("noisy",), ("adam",), 10, 1, 4, Tune.RANDOM, 2)]
    assert json.loads((path / "race.json").read_text(encoding="utf-8"))["arguments"]["seed"] == 4


@pytest.mark.usefixtures("needs_race")
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", 0, "steps must be at least 1; got 0."),
        ("--seeds", 0, "seeds must be at least 1; got 0."),
        ("--trials", 0, "trials must be at least 1; got 0."),
        ("--seed", -1, "seed must be in [0, 2**32 - seeds]; got -1 with 3 seeds."),
        ("--output", "no/folder", "output must be in a folder that exists; got no/folder."),
    ],
)
def test_race_refuses_before_it_runs(monkeypatch, tmp_path, option, value, message):
    from fastadam.race import racing

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(racing, "race", None)
    result = invoke("race", option, value)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.replace(os.sep, "/") == f"ValueError: {message}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("needs_race")
@pytest.mark.parametrize("option", ["--problem", "--optimizer"])
def test_race_names_what_it_knows(option):
    result = invoke("race", option, "x")
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(rf"ValueError: {option[2:]} must be one of \w.*, all; got x\.\n", result.stderr)


@pytest.mark.usefixtures("needs_race")
def test_race_without_scipy(monkeypatch, tmp_path):
    from fastadam.race import settings

    monkeypatch.setattr(settings, "find_spec", lambda name: None if name == "scipy" else name)
    result = invoke("race", "--output", tmp_path / "race")
    message = 'ImportError: optimizer lbfgs needs SciPy. pip install "fastadam[race]"\n'
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", message)
    assert list(tmp_path.iterdir()) == []


def test_race_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for name in ("output", "pictures", "drawing", "report"):
        monkeypatch.delitem(sys.modules, f"fastadam.race.{name}", raising=False)
        monkeypatch.delattr(f"fastadam.race.{name}", raising=False)
    result = invoke("race")
    message = 'ImportError: the pictures of the race need matplotlib. pip install "fastadam[race]"\n'
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", message)


# --- bench --------------------------------------------------------------------------------------------------


def test_bench(monkeypatch):
    from fastadam import benchmark

    asked = []

    def measure(size, dtype, *, rounds, on_round, device):
        assert device is devices.CPU
        asked.append((size, str(dtype), rounds))
        on_round()
        return benchmark.Row(size, 28 * size, seconds=2e-6, times_numpy=12.34, of_roofline=0.987)

    monkeypatch.setattr(benchmark, "measure", measure)
    result = invoke("bench", "--size", 1000, "--size", 2000, "--dtype", "float64", "--rounds", 5)
    assert (result.exit_code, result.stderr) == (0, "")
    assert asked == [(1000, "float64", 5), (2000, "float64", 5)]
    rows = [re.findall(r"[\d.,]+(?: us|x|%)?", line) for line in result.stdout.splitlines() if "%" in line]
    assert rows == [
        ["1,000", "2.0 us", "14.0", "12.3x", "99%"],
        ["2,000", "2.0 us", "28.0", "12.3x", "99%"],
    ]
    assert "Medians of 5 rounds. 56 bytes per element" in re.sub(r"\s+", " ", result.stdout)

    asked.clear()
    invoke("bench")
    assert asked == [(size, "float32", 9) for size in (2**10, 2**16, 2**20, 2**24)]


def test_bench_as_it_is():
    result = invoke("bench", "--size", 64, "--rounds", 1)
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.search(r"\b64\b.* us .*x .*%", result.stdout)


@pytest.mark.parametrize(
    ("option", "message"),
    [("--size", "size must be at least 1; got 0."), ("--rounds", "rounds must be at least 1; got 0.")],
)
def test_bench_refuses(option, message):
    result = invoke("bench", option, 0)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"ValueError: {message}\n")


def test_bench_on_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(backends, "status", lambda: {"cupy": MISSING})
    result = invoke("bench", "--device", "cuda")
    message = f"ImportError: device cuda needs CuPy and an NVIDIA GPU; CuPy here: {MISSING}\n"
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", message)


def test_bench_on_a_gpu(monkeypatch):
    from fastadam import benchmark

    walled_numpy.install(monkeypatch, benchmark)
    result = invoke("bench", "--device", "cuda", "--size", 64, "--rounds", 1)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "times faster than CuPy" in result.stdout
    assert re.search(r"\b64\b.* us .*x .*%", result.stdout)
    caption = re.sub(r"\s+", " ", result.stdout)
    assert "Fake GPU, timed by its events. Medians of 1 rounds. 28 bytes per element" in caption
    assert "roofline: a copy within its memory that moves as many." in caption
