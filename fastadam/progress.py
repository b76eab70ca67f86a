"""How far a long transfer is: a bar in a terminal, or a call of the user's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TypeAlias

Progress: TypeAlias = bool | Callable[[int, int], object] | None
"""None: a bar for large files, in a terminal. True, False: always, never. Or it gets bytes, done and all."""

_LARGE = 2**30
"""Bytes from which None shows a bar: seconds on most disks."""


def require(value: object) -> None:
    """Raise unless a value says how progress is to be shown, and that is possible."""
    if value is not None and not isinstance(value, bool) and not callable(value):
        raise TypeError(f"progress must be None, True, False or callable; got {type(value).__name__}.")
    if value is True and find_spec("rich") is None:
        raise ImportError('progress=True needs rich. pip install "fastadam[cli]"')


@contextmanager
def counting(progress: Progress, total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Give a function to be called with the number of bytes of each part, when it is done.

    Parameters
    ----------
    progress : Progress
        What :func:`require` let pass.
    total : int
        Bytes in all.
    what : str
        What the bar says.
    """
    if progress is None:
        progress = total >= _LARGE and sys.stderr.isatty() and find_spec("rich") is not None
    if progress is False:
        yield lambda _: None
    elif progress is True:
        with _bar(total, what) as advance:
            yield advance
    else:
        done, report = 0, progress

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            report(done, total)

        yield count


@contextmanager
def _bar(total: int, what: str) -> Iterator[Callable[[int], None]]:
    from rich import progress as rich
    from rich.console import Console

    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.DownloadColumn())
    speed = (rich.TransferSpeedColumn(), rich.TimeRemainingColumn())
    with rich.Progress(*columns, *speed, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda nbytes: bar.update(task, advance=nbytes)
