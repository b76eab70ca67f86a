"""Device -> kernel module, imported on first use: importing fastadam compiles nothing and loads no Numba."""

from __future__ import annotations

from functools import cache
from types import ModuleType


@cache
def cpu() -> ModuleType:
    """Return the backend for buffers in CPU memory."""
    from fastadam.kernels import cpu as module

    return module
