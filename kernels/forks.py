"""Whether this process is a forked child. Known from ``import fastadam`` on, before Numba is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable

in_child = False
"""True in a child that was forked after this module was imported."""

_resets: list[Callable[[], None]] = []


def on_fork(reset: Callable[[], None]) -> None:
    """Call ``reset`` in every child forked from now on."""
    _resets.append(reset)


def _after_in_child() -> None:
    global in_child
    in_child = True
    for reset in _resets:
        reset()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_in_child)
