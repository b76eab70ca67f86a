"""The disk cache: hits in the next process, follows every source, and never costs more than itself.

Each test works on a copy of the installed package, in processes of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastadam
from fastadam import kernels

STEP = """
import numpy as np, fastadam
from fastadam.kernels import cpu
opt, params = fastadam.FusedAdam(lr=0.5), np.zeros(SIZE, "DTYPE")
opt.step(params, np.ones(SIZE, "DTYPE"))
kernel = cpu.parallel if SIZE >= cpu.PARALLEL_FROM else cpu.serial
print(float(params[0]), sum(kernel.stats.cache_hits.values()), kernel.stats.cache_path)
"""

NORM = """
import numpy as np
from fastadam.kernels import norms
total, nonfinite = norms.measure(np.full(SIZE, 3, "DTYPE"), np.empty(norms.scratch_size(SIZE)))
hits = [sum(loop.stats.cache_hits.values()) for loop in (norms.serial, norms.parallel, norms.fold)]
print(total, sum(hits), norms.fold.stats.cache_path)
"""

TELEMETRY = """
import numpy as np, fastadam
from fastadam.kernels import telemetry
opt = fastadam.FusedAdam(lr=0.5, eps=0.0, telemetry=True)
opt.step(np.zeros(SIZE, "DTYPE"), np.ones(SIZE, "DTYPE"))
loops = telemetry.serial, telemetry.parallel, telemetry.fold
print(opt.last_step.update_norm, sum(sum(loop.stats.cache_hits.values()) for loop in loops),
      telemetry.fold.stats.cache_path)
"""


def copy_to(root):
    """Copy the package, without any cache."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(fastadam.__file__).parent, root / "fastadam", ignore=ignore)
    shutil.copytree(
        Path(kernels.__file__).parent, root / "fastadam/kernels", ignore=ignore, dirs_exist_ok=True
    )
    return root


@pytest.fixture
def copied(tmp_path):
    """A copy of the package in a folder of its own, without any cache."""
    return copy_to(tmp_path / "copy")


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    """A copy that has stepped, once and serially: compiled for all tests that need no more than that."""
    root = copy_to(tmp_path_factory.mktemp("stepped") / "copy")
    assert run(root)[:2] == (-0.5, 0)
    return root


@pytest.fixture
def cached(stepped, tmp_path):
    """That copy and its cache, somewhere else."""
    return shutil.copytree(stepped, tmp_path / "moved")


def run(root, size=100, dtype="float32", script=STEP, **environment):
    """Step in a new process: (the first parameter, cache hits, cache path)."""
    # -S keeps an editable install's import hook from finding the original.
    paths = [str(root), *(path for path in sys.path if path.endswith("site-packages"))]
    process = subprocess.run(
        [sys.executable, "-S", "-c", script.replace("SIZE", str(size)).replace("DTYPE", dtype)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONDONTWRITEBYTECODE": "1",
            **environment,
        },
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    value, hits, path = process.stdout.split(maxsplit=2)
    return float(value), int(hits), path.strip()


def files(root, suffix):
    return sorted(root.rglob(f"*.{suffix}"))


@pytest.mark.parametrize("size", [100, 100_000], ids=["serial", "parallel"])
def test_the_next_process_compiles_nothing(copied, size):
    assert run(copied, size)[:2] == (-0.5, 0)
    assert files(copied, "nbc")
    assert run(copied, size)[:2] == (-0.5, 1)


def test_a_cache_that_was_moved_holds(cached):
    """As ``ci/check.sh`` needs it to, which keeps it for the next run, and tests that break it."""
    assert run(cached)[:2] == (-0.5, 1)


def test_serial_and_parallel_are_not_mixed_up(cached):
    assert run(cached, 100_000)[1] == 0, "the parallel loop took the serial loop's code"


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("rules.py", "return param - c.step_size", "return param + c.step_size", 0.5),
        (
            "storage.py",
            "arrays[i] = values\n\n    elif",
            "arrays[i] = values + values\n\n    elif",
            -1.0,
        ),
    ],
)
def test_an_edited_source_is_compiled_again(cached, file, old, new, expected):
    source = cached / "fastadam/kernels" / file
    text = source.read_text()
    assert old in text
    stat = source.stat()
    source.write_text(text.replace(old, new))
    os.utime(source, (stat.st_atime, stat.st_mtime))  # an upgrade into the same folder may keep times
    assert run(cached)[:2] == (expected, 0)
    source.write_text(text)
    assert run(cached)[:2] == (-0.5, 1)


@pytest.mark.parametrize("size", [100, 200_000], ids=["serial", "parallel"])
def test_norms(copied, size):
    """The sums of :mod:`fastadam.kernels.norms` are emitted by functions that Numba's cache does not know.

    An edit is one of the key that all loops have: seen by the parallel ones in :func:`test_telemetry`.
    """
    assert run(copied, size, script=NORM)[:2] == (9 * size, 0)
    assert run(copied, size, script=NORM)[:2] == (9 * size, 2)
    if size > 100:
        return
    source = copied / "fastadam/kernels/chunks.py"
    text = source.read_text()
    assert text.count("builder.fmul(terms, terms") == 1
    source.write_text(text.replace("builder.fmul(terms, terms", "builder.fadd(terms, terms"))
    assert run(copied, size, script=NORM)[:2] == (6 * size, 0)
    source.write_text(text)
    assert run(copied, size, script=NORM)[:2] == (9 * size, 2)


def test_machine_code_of_a_stale_pyc_is_not_kept(copied):
    """Python itself runs the old rule after an edit of one size and second; a touch must end that."""
    writes_pyc = {"PYTHONDONTWRITEBYTECODE": ""}
    assert run(copied, **writes_pyc)[0] == -0.5
    source = copied / "fastadam/kernels/rules.py"
    stat, text = source.stat(), source.read_text()
    source.write_text(text.replace("return param - c.step_size", "return param + c.step_size"))
    os.utime(source, (stat.st_atime, stat.st_mtime))
    assert run(copied, **writes_pyc)[0] == -0.5, "no stale .pyc: this test shows nothing"
    os.utime(source)
    assert run(copied, **writes_pyc)[0] == 0.5


def test_other_jit_options_are_compiled_again(cached):
    source = cached / "fastadam/kernels/compiling.py"
    source.write_text(source.read_text().replace('"nogil": True', '"nogil": False'))
    assert run(cached)[1] == 0


@pytest.mark.skipif(
    sys.platform == "win32",
    reason="Numba finds its user-wide cache there through the registry, not the environment",
)
def test_no_writable_place(copied, tmp_path):
    """Every place that Numba would write to is a file: no cache, and nothing else."""
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    (copied / "fastadam/kernels/__pycache__").write_text("")
    environment = {
        name: str(nowhere) for name in ("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA", "NUMBA_CACHE_DIR")
    }
    assert run(copied, **environment) == (-0.5, 0, "None")
    assert run(copied, **environment) == (-0.5, 0, "None")


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("content", [b"", b"not a cache", None], ids=["empty", "garbage", "half"])
def test_a_broken_file_is_ignored(cached, suffix, content):
    assert files(cached, suffix)
    for file in files(cached, suffix):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content is None else content)
    assert run(cached)[:2] == (-0.5, 0)


def test_a_place_that_stops_being_writable(copied, tmp_path):
    """It passes the check at import, and then every file in it fails to open."""
    cache = tmp_path / "cache"
    run(copied, NUMBA_CACHE_DIR=str(cache))
    for file in [*files(cache, "nbi"), *files(cache, "nbc")]:
        file.unlink()
        file.mkdir()
    assert run(copied, NUMBA_CACHE_DIR=str(cache))[:2] == (-0.5, 0)


def test_code_for_other_types_is_not_taken(cached):
    """Two processes that save at once can leave an index that names the other's file."""
    run(cached, dtype="float64")
    first, second = files(cached, "nbc")
    first_content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(first_content)
    assert run(cached)[:2] == (-0.5, 0)


@pytest.mark.parametrize("size", [100, 40_000], ids=["serial", "parallel"])
def test_telemetry(copied, size):
    """So is the step of :mod:`fastadam.kernels.observed`, and the rule is compiled by it."""
    norm = 0.5 * size**0.5
    assert run(copied, size, script=TELEMETRY)[:2] == (norm, 0)
    assert run(copied, size, script=TELEMETRY)[:2] == (norm, 2)
    emitter = "observed.py", "builder.fsub(after, before)", "builder.fadd(after, after)", 2 * norm
    rule = "rules.py", "return param - c.step_size", "return param - c.step_size * c.step_size", 5 * norm
    for file, old, new, expected in (emitter, rule) if size == 100 else (rule,):
        source = copied / "fastadam/kernels" / file
        text = source.read_text()
        assert text.count(old) >= 1
        source.write_text(text.replace(old, new))
        assert run(copied, size, script=TELEMETRY)[:2] == (expected, 0)
        source.write_text(text)
    assert run(copied, size, script=TELEMETRY)[:2] == (norm, 2)
