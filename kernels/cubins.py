"""Compiled CUDA kernels on disk, in the folder of Numba's cache for this package.

A cubin is found by a digest of all that it was made from. Trouble with the disk only costs the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from numba.core.caching import FunctionCache

_DIGEST = hashlib.sha256().digest_size


def folder(function: Callable[..., None]) -> Path | None:
    """Return where Numba would cache a function, or None where there is no writable place."""
    try:
        return Path(FunctionCache(function).cache_path)
    except RuntimeError:
        return None


def cached(place: Path | None, key: str, make: Callable[[], bytes]) -> bytes:
    """Return the cubin of a key, from disk or from ``make``."""
    path = None if place is None else place / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
    if path is not None:
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            digest, cubin = content[:_DIGEST], content[_DIGEST:]
            if hashlib.sha256(cubin).digest() == digest:  # not cut short
                return cubin
    cubin = make()
    if path is not None:
        with contextlib.suppress(OSError):
            _write(path, hashlib.sha256(cubin).digest() + cubin)
    return cubin


def _write(path: Path, content: bytes) -> None:
    """Write aside and rename: another process sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    aside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
