"""What a result depends on besides the code: machine, versions, date. And where results are kept."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from fastadam import __version__
from fastadam.kernels import threads

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

Result = dict[str, Any]
"""What a JSON file of ``bench/results`` holds: ``kind``, ``environment`` and what the kind says."""


def machine() -> dict[str, Any]:
    """Return the CPU model, the architecture it is compiled for, the logical cores and the memory."""
    return {
        "cpu": str(import_module("cpuinfo").get_cpu_info().get("brand_raw") or platform.machine()),
        "architecture": str(llvm.get_host_cpu_name()),
        "cores": os.cpu_count() or 1,
        "memory_gib": _memory_gib(),
    }


def _memory_gib() -> int | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    except (AttributeError, OSError, ValueError):  # not on Windows
        return None


def _git_commit() -> str | None:
    """Return the commit, marked ``-dirty`` where what is measured differs from it.

    Without git it is what ``FASTADAM_COMMIT`` says, for a copy of the tree on another machine, or None.
    """
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changes = _git("status", "--porcelain", "--", "fastadam", "kernels", "bench/*.py")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FASTADAM_COMMIT")
    return f"{commit}-dirty" if changes else commit


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.strip()


def _version(name: str) -> str:
    # Of itself fastadam knows it, also in a tree that is not installed.
    return __version__ if name == "fastadam" else metadata.version(name)


def environment(packages: Iterable[str] = ()) -> dict[str, Any]:
    """Describe what a result was measured on and with.

    Parameters
    ----------
    packages : iterable of str
        Distributions whose versions matter besides those of fastadam, NumPy, Numba and llvmlite.

    Returns
    -------
    dict
        Plain values.
    """
    names = dict.fromkeys(("fastadam", "numpy", "numba", "llvmlite", *packages))
    return {
        "machine": machine(),
        "os": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "threading_layer": threads.layer(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _git_commit(),
    }


def slug() -> str:
    """Return the name of this machine in file names, such as ``amd-epyc-znver4-2-cores``."""
    facts = machine()
    return _file_name(f"{facts['cpu']} {facts['architecture']} {facts['cores']} cores")


def _file_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def save(result: Result, output: Path | None) -> Path:
    """Write a result as JSON, to a file or as ``<kind>-<machine>.json`` to a folder.

    The default folder is ``bench/results``. The machine of a result with a GPU is the GPU.
    """
    gpu = result["environment"].get("gpu")
    path = output or RESULTS
    if path.suffix != ".json":
        path /= f"{result['kind']}-{_file_name(gpu['name']) if gpu else slug()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path
