"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where nobody can remove a file that is open
    fcntl = None  # type: ignore[assignment]

_PREFIX, _SUFFIX = ".fastadam-", ".tmp"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of ``path`` when the block ends, whole and on the disk.

    It is written aside in the same directory, synced and renamed, so that whoever opens ``path`` finds the
    old file or the new one, whenever the process, or the machine, comes to its end. If the block raises, the
    old one stays. What killed processes have left in the directory is removed before.

    Raises
    ------
    ValueError
        If there is a device or a pipe.
    OSError
        If it cannot be written: no directory, no permission, no space.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    if target.is_dir():
        raise IsADirectoryError(f"path must be a file; got {str(path)!r}, a directory.")
    if target.exists() and not target.is_file():
        raise ValueError(f"path must be a file; got {str(path)!r}, a device or a pipe.")
    _remove_stale(target.parent)
    aside, file = _create(target.parent)
    try:
        with file:
            with suppress(OSError):  # none yet, or another's
                aside.chmod(target.stat().st_mode & 0o7777)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:  # under its lock, which keeps others from removing it
                aside.replace(target)
        if fcntl is None:
            aside.replace(target)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise
    _sync_directory(target.parent)


def _create(directory: Path) -> tuple[Path, BinaryIO]:
    """Return a new file, locked for as long as this process has it open."""
    while True:
        aside = directory / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
        file = aside.open("xb")
        # Between these two lines another process may have taken it for a stale one.
        if _lock(file) and aside.exists():
            return aside, file
        file.close()


def _lock(file: BinaryIO) -> bool:
    """Lock a file, and return False where another process has; the lock ends with the process."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks, where nothing stale is removed either
            return True
    return True


def _remove_stale(directory: Path) -> None:
    """Remove files of this module that no living process is writing."""
    for aside in directory.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError):  # it was renamed meanwhile, belongs to another user or is being written
            if fcntl is None:
                aside.unlink()
                continue
            with aside.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                aside.unlink()


def _sync_directory(directory: Path) -> None:
    """Have a rename on the disk, where the platform can."""
    if hasattr(os, "O_DIRECTORY"):
        with suppress(OSError):
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
