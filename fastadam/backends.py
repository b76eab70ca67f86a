"""Backends by name, imported on first use: importing fastadam compiles nothing and loads no Numba or CuPy."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from textwrap import shorten
from typing import Any

NAMES = ("cpu", "cupy", "numba-cuda")
"""The CUDA backends in the order in which one is chosen."""

_MODULES = {
    "cpu": "fastadam.kernels.cpu",
    "cupy": "fastadam.kernels.cuda_cupy",
    "numba-cuda": "fastadam.kernels.cuda_numba",
}
_PACKAGES = {"cupy": ("CuPy", "cupy"), "numba-cuda": ("numba-cuda", "numba_cuda")}
_LONGEST_REASON = 300
REMEDY = 'pip install "fastadam[cuda13]" (or "fastadam[cuda12]")'


def require_name(backend: object) -> str | None:
    """Return the name of a backend, or None.

    Raises
    ------
    ValueError
        If there is no such backend.
    ImportError
        If the package that it needs is not installed.
    """
    if backend is None:
        return None
    if backend not in NAMES:
        raise ValueError(f"backend must be None, 'cpu', 'cupy' or 'numba-cuda'; got {backend!r}.")
    _require_installed(str(backend))
    return str(backend)


def is_installed(name: str) -> bool:
    """Return whether the package that a backend needs is installed; imports nothing."""
    return name == "cpu" or find_spec(_PACKAGES[name][1]) is not None


def _require_installed(name: str) -> None:
    if not is_installed(name):
        raise ImportError(f"backend={name!r} needs {_PACKAGES[name][0]}. {REMEDY}")


@cache
def load(name: str) -> Any:
    """Return a backend: the module :mod:`fastadam.kernels.cpu`, or a :class:`fastadam.kernels.cuda.Cuda`."""
    _require_installed(name)
    module = import_module(_MODULES[name])
    return module if name == "cpu" else module.backend


def cuda() -> str:
    """Return the name of the CUDA backend that serves where none is asked for.

    Raises
    ------
    ImportError
        If none is installed.
    """
    for name in _PACKAGES:
        if is_installed(name):
            return name
    raise ImportError(f"A CUDA array needs CuPy or numba-cuda. {REMEDY}")


def status() -> dict[str, str]:
    """Return, for each backend, "ready" or why it cannot run here. Imports those installed; never raises."""
    return {name: _status(name) for name in NAMES}


def _status(name: str) -> str:
    if not is_installed(name):
        return f"not installed: {REMEDY}"
    try:
        backend = load(name)
        if name != "cpu" and backend.device_count() == 0:
            return "no CUDA device"
    except Exception as error:  # whatever a broken installation raises
        return _reason(error)
    return "ready"


def _reason(error: BaseException) -> str:
    """Return an error in one line.

    Numba puts the reason below an empty line, and CuPy a page of advice around what it caught at its import.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    return shorten(f"{type(error).__name__}: {error}", _LONGEST_REASON, placeholder=" ...").rstrip(" :")
