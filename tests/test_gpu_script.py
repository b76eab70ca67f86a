"""ci/gpu.sh, as far as a machine without a GPU can tell."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the script is for Linux")


def run(tmp_path, root=ROOT, **changes):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out"), **changes}
    environment.pop("PYTHONPATH", None)
    command = [shutil.which("bash"), str(root / "ci" / "gpu.sh"), "--dry-run"]
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, check=False, text=True)


def test_dry_run_finds_and_skips_everything(tmp_path):
    done = run(tmp_path)
    log = (tmp_path / "out" / "gpu-log.txt").read_text(encoding="utf-8")
    assert done.returncode == 0, log
    assert f"fastadam and its kernels come from the tree, bench from {ROOT}\n" in log
    assert [line.split()[-2] for line in done.stdout.splitlines()[-7:]] == ["ok"] * 7
    for program in ("gpu_compare", "gpu_phase", "gpu_launch", "gpu_torch"):
        assert f" -m bench.$1 && exit 1; [ $? = 2 ] {sys.executable} {program}\nnothing to measure: " in log
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_dry_run_fails_where_the_tree_does_not_import(tmp_path):
    root = tmp_path / "root"
    for folder in ("fastadam", "kernels", "bench", "ci"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "kernels" / "cpu.py").write_text("raise ImportError\n", encoding="utf-8")
    assert run(tmp_path, root).returncode == 1


def test_dry_run_needs_only_what_a_gpu_machine_has(tmp_path):
    missing = tmp_path / "missing"
    missing.mkdir()
    for name in ("hypothesis", "jax", "matplotlib", "rich", "setuptools", "sklearn", "typer"):
        (missing / f"{name}.py").write_text("raise ModuleNotFoundError(__name__)\n", encoding="utf-8")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={missing}:$PYTHONPATH exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    # Without Hypothesis there is no plugin of it either.
    done = run(tmp_path, PYTHON=str(python), PYTEST_ADDOPTS="-p no:hypothesispytest")
    log = (tmp_path / "out" / "gpu-log.txt").read_text(encoding="utf-8")
    assert done.returncode == 0, log
    assert [line.split()[-2] for line in done.stdout.splitlines()[-7:]] == ["ok"] * 7
