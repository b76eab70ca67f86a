"""Compiled CUDA kernels: on disk, in the folder of Numba's cache for this package; and what is in them.

A cubin is found by a digest of all that it was made from. Trouble with the disk only costs the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
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


def stamp(path: str) -> tuple[str, int, int]:
    """Return what tells a file from its successor in an upgrade.

    Of its time only seconds: the layers of a container image, which may hold the cache, keep no more.
    """
    found = Path(path).stat()
    return path, found.st_size, int(found.st_mtime)


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


# Of the ELF format: type, offset, size and strings of a section; name, type and "other" of a symbol.
_SECTION, _SYMBOLS = "<4xI16xQQI20x", 2
_SYMBOL, _FUNCTION, _ENTRY_POINT = "<IBB18x", 2, 0x10


def symbol(cubin: bytes) -> bytes:
    """Return the name of the only kernel in a cubin, which Numba makes up.

    A cubin is an ELF file of 64 bits. Of the functions among its symbols, NVIDIA's compilers mark those that
    can be launched in ``st_other``; the others are subroutines.
    """
    try:
        names = _entry_points(cubin)
    except (struct.error, IndexError, ValueError) as error:
        raise RuntimeError(f"cubin must be an ELF file of 64 bits, whole; got {len(cubin)} bytes.") from error
    if len(names) != 1:
        raise RuntimeError(f"cubin must have one entry point; got {names}.")
    return names[0]


def _entry_points(cubin: bytes) -> list[bytes]:
    (start,), (count,) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<H", cubin, 0x3C)
    size = struct.calcsize(_SECTION)
    sections = list(struct.iter_unpack(_SECTION, cubin[start : start + size * count]))
    names = []
    for kind, offset, length, strings in sections:
        if kind == _SYMBOLS:
            for name, info, other in struct.iter_unpack(_SYMBOL, cubin[offset : offset + length]):
                if info & 0xF == _FUNCTION and other & _ENTRY_POINT:
                    first = sections[strings][1] + name
                    names.append(cubin[first : cubin.index(b"\0", first)])
    return names
