"""Safetensors files whose every byte is covered by a checksum, read in parts and without a second copy.

Such a file is 8 bytes with the length of a header, that header (JSON, with a name, dtype, shape and place of
each tensor, and texts, ``__metadata__``), and the bytes of the tensors: little-endian, without gaps. Any
reader of safetensors opens it. Nothing in it is ever executed.

Among the texts are the SHA-256 of the tensors, as ``sha256.<name>``: 64 hexadecimal digits for each 4 MiB of
it, so that a part can be verified without the rest; and as ``sha256`` that of the first 8 bytes and the
header, formed with 64 zeros in its own place.

The format is written here and not by the package safetensors, which can neither form checksums while it
writes, nor tell how far it is, nor hand bfloat16 to NumPy. The tests have it read what is written here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

ITEMSIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I16": 2, "U8": 1}
"""What may be in a file: dtype -> bytes of an element."""

_DIGITS = 64
_BLOCK = 2**22
_LARGEST_HEADER = 100_000_000
"""Bytes, the format's own limit."""


class Tensor(NamedTuple):
    """What is to be written: its dtype in the file, its shape, and what gives its memory in time."""

    dtype: str
    shape: tuple[int, ...]
    array: Callable[[], np.ndarray[Any, np.dtype[Any]]]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * ITEMSIZES[self.dtype]


def write(
    file: BinaryIO, tensors: Mapping[str, Tensor], texts: Mapping[str, str], advance: Callable[[int], None]
) -> None:
    """Write a file, in one pass over the tensors and no copy of them.

    Parameters
    ----------
    file : binary file
        New and seekable.
    tensors : mapping
        Name -> tensor.
    texts : mapping
        What else the header says.
    advance : callable
        Called with the number of bytes that were written, again and again.
    """
    # Large elements first: then all of them are aligned.
    ordered = dict(sorted(tensors.items(), key=lambda item: -ITEMSIZES[item[1].dtype]))
    digests = {name: "0" * _DIGITS * -(-tensor.nbytes // _BLOCK) for name, tensor in ordered.items()}
    header, end = {}, 0
    for name, tensor in ordered.items():
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    file.write(_head(header, texts, digests))  # its length is known, its digests are not
    for name, tensor in ordered.items():
        memory = tensor.array().reshape(-1).view(np.uint8).data
        found = []
        for start in range(0, tensor.nbytes, _BLOCK):
            block = memory[start : start + _BLOCK]
            found.append(sha256(block).hexdigest())
            file.write(block)
            advance(len(block))
        digests[name] = "".join(found)
    file.seek(0)
    file.write(_head(header, texts, digests))


def _head(header: Mapping[str, Any], texts: Mapping[str, str], digests: Mapping[str, str]) -> bytes:
    sums = {"sha256": "0" * _DIGITS, **{f"sha256.{name}": digest for name, digest in digests.items()}}
    text = json.dumps({"__metadata__": {**texts, **sums}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # what follows is aligned
    head = len(text).to_bytes(8, "little") + text
    own = b'"sha256":"' + b"0" * _DIGITS
    return head.replace(own, own[:-_DIGITS] + sha256(head).hexdigest().encode(), 1)


class Container:
    """A file that :func:`write` has written, open for reading.

    Parameters
    ----------
    path : path
    kind, version : str, int
        What its texts ``format`` and ``version`` must say, the latter at most.

    Attributes
    ----------
    texts : dict of str to str
    tensors : dict
        Name -> dtype, shape, and first and last byte in the file.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is not such a file, or not whole.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str, version: int) -> None:
        self._path = str(path)
        self._file = Path(path).open("rb")  # noqa: SIM115
        try:
            self._open(kind, version)
        except BaseException:
            self.close()
            raise

    def _open(self, kind: str, version: int) -> None:
        size = os.fstat(self._file.fileno()).st_size
        start = self._file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise self.error("be a whole safetensors file", f"of {size} bytes without its header")
        head = start + self._file.read(length)
        try:
            header = json.loads(head[8:])
            texts = header.pop("__metadata__", {})
            found = texts.get("format")
        except (ValueError, AttributeError, TypeError, RecursionError):
            raise self.error("be a whole safetensors file", "whose header is none") from None
        if found != kind:
            raise self.error(f"be a {kind}", "a safetensors file of something else")
        if str(texts.get("version")).isdecimal() and int(texts["version"]) > version:
            raise self.error(
                f"be a {kind} of version {version} at most",
                f"of version {texts['version']}",
                "Update fastadam.",
            )
        claimed = str(texts.get("sha256")).encode()
        blank = head.replace(b'"sha256":"' + claimed, b'"sha256":"' + b"0" * _DIGITS, 1)
        if len(head) != 8 + length or sha256(blank).hexdigest().encode() != claimed:
            raise self.damaged("its header")
        # From here on the header is what somebody has written; whether that was we is another question.
        self.texts: dict[str, str] = texts
        self.tensors: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        end = 0
        try:
            for name, entry in header.items():
                begin, stop = entry["data_offsets"]
                tensor = Tensor(entry["dtype"], tuple(entry["shape"]), lambda: np.empty(0))
                digits = _DIGITS * -(-tensor.nbytes // _BLOCK)
                if (begin, stop) != (end, end + tensor.nbytes) or len(texts[f"sha256.{name}"]) != digits:
                    raise self.error(f"be a {kind}", "with a header that nobody could have written")
                end = stop
                self.tensors[name] = (tensor.dtype, tensor.shape, 8 + length + begin, 8 + length + stop)
        except (KeyError, TypeError, AttributeError, OverflowError):
            raise self.error(f"be a {kind}", "with a header that nobody could have written") from None
        if size != 8 + length + end:
            raise self.error(f"have {8 + length + end} bytes, as its header says", f"of {size}", _ANOTHER)

    def read_into(self, memory: Bytes, name: str, start: int, advance: Callable[[int], None]) -> None:
        """Read some bytes of a tensor, and verify the blocks in which they lie.

        Parameters
        ----------
        memory : ndarray of uint8, shape (n,)
            Gets them; written even if the call raises.
        name : str
            The tensor.
        start : int
            The first of them.
        advance : callable
            Called with the number of bytes that were read, again and again.

        Raises
        ------
        ValueError
            If they are not what was written.
        """
        _, _, begin, end = self.tensors[name]
        stop, digests = start + memory.size, self.texts[f"sha256.{name}"]
        for k in range(start // _BLOCK, -(-stop // _BLOCK)):
            low, high = k * _BLOCK, min((k + 1) * _BLOCK, end - begin)
            first, last = max(low, start), min(high, stop)
            part = memory[first - start : last - start]
            block = part if last - first == high - low else np.empty(high - low, np.uint8)
            self._file.seek(begin + low)
            n_read, digest = self._file.readinto(block.data), digests[_DIGITS * k : _DIGITS * (k + 1)]
            if n_read != high - low or sha256(block.data).hexdigest() != digest:
                raise self.damaged(f"{name!r}, bytes {begin + low} to {begin + high} of the file")
            if block is not part:
                part[:] = block[first - low : last - low]
            advance(last - first)

    def error(self, rule: str, found: str, remedy: str = "") -> ValueError:
        """Return what to raise for a file that breaks a rule."""
        return ValueError(f"path must {rule}; got {self._path!r}, {found}.{' ' * bool(remedy)}{remedy}")

    def damaged(self, where: str) -> ValueError:
        """Return what to raise where bytes are not those that were written."""
        return self.error("have the bytes that were saved", f"with others in {where}", _ANOTHER)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


_ANOTHER = "It is damaged: take another checkpoint."
