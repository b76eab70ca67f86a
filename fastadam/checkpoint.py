"""Checkpoints: one file with everything that a bit-exact resume needs.

``opt.save(path)`` and ``FusedAdam.load(path)`` are what most need; see ``docs/checkpoints.md``. The files are
those of :mod:`fastadam.containers`: safetensors, every byte under a checksum.

Examples
--------
>>> import tempfile, numpy as np
>>> from fastadam import FusedAdam, checkpoint
>>> params = np.ones(4, np.float32)
>>> opt = FusedAdam(0.1)
>>> opt.step(params, 2 * params)
>>> with tempfile.TemporaryDirectory() as folder:
...     opt.save(f"{folder}/run.safetensors", params=params, extra={"epoch": 3})
...     with checkpoint.Checkpoint(f"{folder}/run.safetensors") as file:
...         file.step, file.size, file.extra, file.params().tolist() == params.tolist()
(1, 4, {'epoch': 3}, True)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import numpy as np

from fastadam import documents, eight_bit, formats, loading, progress
from fastadam.checks import count
from fastadam.containers import Container
from fastadam.hyperparameters import Hyperparameters
from fastadam.kernels.groups import BLOCK
from fastadam.loss_scale import DynamicLossScale
from fastadam.progress import Progress
from fastadam.state import MASTERS

__all__ = ["Checkpoint", "read", "read_shard"]

KIND, VERSION = "fastadam checkpoint", 1

DTYPES = {formats.FLOAT64: "F64", formats.FLOAT32: "F32", formats.FLOAT16: "F16", formats.BFLOAT16: "BF16"}
DTYPES |= {eight_bit.SIGNED: "U8", eight_bit.UNSIGNED: "U8"}
_PLAIN = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.uint16,
    "BF16": np.uint16,
    "I16": np.int16,
    "U8": np.uint8,
}


class _Undefined(Exception):  # noqa: N818
    """A file names a rule that nobody has defined."""


class Checkpoint:
    """A checkpoint, open for reading; its header is verified, its arrays are when they are read.

    Parameters
    ----------
    path : path
        What :meth:`fastadam.FusedAdam.save` has written.

    Attributes
    ----------
    step : int
        Steps taken.
    size : int or None
        Elements of the buffer; None where nothing in the file has them.
    extra : object
        What was saved as ``extra``.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is something else, damaged, or of a newer version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = file = Container(path, KIND, VERSION)
        try:
            self._document = document = json.loads(file.texts["optimizer"])
            self.extra: Any = json.loads(file.texts["extra"])
            self.step = count("step", document["step"], least=0)
            self._called: dict[str, Any] = document["schedules"]
            kind, values = document.get("rule", "adam"), document["hyperparameters"]
            if isinstance(kind, str) and kind.isidentifier() and kind not in Hyperparameters.KINDS:
                raise _Undefined(kind)  # noqa: TRY301
            of_rule = Hyperparameters.KINDS[kind]
            names = set(of_rule.names())
            if not values.keys() <= names:
                raise KeyError(*values.keys() - names)  # noqa: TRY301
            self._hyperparameters = of_rule(**values)
            self.loss_scale()
            for written in (self._called.get("lr"), *dict(self._called["segments"]).values()):
                if written is not None and "callable" not in written:
                    documents.to_schedule(written)
            shapes = {shape for name, (_, shape, _, _) in file.tensors.items() if _is_whole(name)}
            (shape,) = shapes or {()}
            self.size: int | None = shape[0] if shape else None
            said = document.get("size")  # by newer versions, for rules that keep nothing
            if said is not None and count("size", said, least=0) != self.size:
                if shape:
                    raise ValueError(f"size {said} instead of {self.size}")  # noqa: TRY301
                self.size = said
            self._require_tensors()
        except _Undefined as error:
            file.close()
            raise file.error(
                "be of a rule that is defined",
                f"of {error.args[0]!r}",
                "Run its fastadam.own_rule.define before it is loaded.",
            ) from None
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            file.close()
            raise file.error(f"be a {KIND}", f"with what nobody could have written: {error}") from error

    def _require_tensors(self) -> None:
        """Raise ValueError unless the tensors are those that the hyperparameters ask for."""
        found = {name: (dtype, shape) for name, (dtype, shape, _, _) in self._file.tensors.items()}
        expected: dict[str, tuple[str, tuple[int, ...]]] = {}
        n = self.size or 0
        self._math = formats.FLOAT64 if self._dtype_of_arithmetic() == "F64" else formats.FLOAT32
        names, dtypes = self._stored()
        for name, dtype in zip(names, dtypes, strict=True):
            expected[name] = "I16" if name == MASTERS["split"] else DTYPES[dtype], (n,)
            if DTYPES[dtype] == "U8":
                expected[name + loading.SCALES] = "F32", (eight_bit.blocks_of(n),)
        if count("grads_summed", self._document["grads_summed"], least=0):
            expected["grad_sum"] = DTYPES[self._math], (n,)
        for name in ("params", "segments"):
            if name in found:
                expected[name] = found[name]
        if found != expected:
            raise ValueError(f"{found} instead of {expected}")

    def _dtype_of_arithmetic(self) -> str:
        names = (*self._hyperparameters.state, "grad_sum")
        found = {self._file.tensors[name][0] for name in names if name in self._file.tensors}
        return "F64" if "F64" in found else "F32"

    def _stored(self) -> tuple[tuple[str, ...], tuple[np.dtype[Any], ...]]:
        """Return the names of what a state of this file has, and the dtype of each; nothing before step 1."""
        tensors, h = self._file.tensors, self._hyperparameters
        if h.state and h.state[0] not in tensors:
            return (), ()
        masters = tuple(name for name in MASTERS.values() if name in tensors)
        kinds = (*h.formats(), *masters)
        names = (*h.state, *masters)
        return names, tuple(loading.dtype_of(kind, self._math) for kind in kinds)

    def _range(self, start: object, stop: object) -> tuple[int, int]:
        """Return the elements that are asked for, or raise."""
        size = self.size or 0
        first = count("start", start, least=0)
        last = size if stop is None else count("stop", stop, least=0)
        if not first <= last <= size:
            raise ValueError(f"start and stop must be a part of the {size} elements; got {first} and {last}.")
        if any(name.endswith(loading.SCALES) for name in self._file.tensors):
            for name, value in (("start", first), ("stop", last)):
                if value % BLOCK and value != size:
                    raise ValueError(
                        f"{name} must be a multiple of {BLOCK}, as moments are in 8 bits; got {value}."
                    )
        return first, last

    def _array(self, name: str, start: int, stop: int, advance: Callable[[int], None]) -> Any:
        """Return elements of a tensor, as codes where NumPy has no such numbers."""
        dtype, shape, _, _ = self._file.tensors[name]
        if name == "segments":
            start, stop = 0, shape[0]
        elif name.endswith(loading.SCALES):
            start, stop = start // BLOCK, eight_bit.blocks_of(stop)
        array = np.empty((stop - start, *shape[1:]), _PLAIN[dtype])
        self._fill(array, name, start, advance)
        return array

    def _fill(self, array: Any, name: str, start: int, advance: Callable[[int], None]) -> None:
        per_row = array.itemsize * int(np.prod(array.shape[1:], dtype=int))
        self._file.read_into(array.reshape(-1).view(np.uint8), name, start * per_row, advance)

    def state_dict(
        self, start: int = 0, stop: int | None = None, *, progress: Progress = None
    ) -> dict[str, Any]:
        """Return what :meth:`fastadam.FusedAdam.state_dict` did when the file was saved, or of a shard.

        Parameters
        ----------
        start, stop : int, optional
            The elements ``start`` up to, without, ``stop``: the state of an optimizer of this part of the
            buffer alone, with its ``offset``, so that stochastic rounding goes on with the bits of the whole.
            Only blocks of 4 MiB in which they lie are read. With moments in 8 bits, multiples of 128.
        progress : None, bool or callable
            As for :meth:`fastadam.FusedAdam.save`.

        Raises
        ------
        ValueError
            If the file is damaged, or the range is not in it.
        """
        first, last = self._range(start, stop)
        names = [name for name in self._file.tensors if name != "params"]
        h = self._hyperparameters
        entries: dict[str, Any] = {**replace(h, offset=h.offset + first).to_dict(), **rule_of(h)}
        entries["step"] = self.step
        with self._reading(names, first, last, progress) as advance:
            entries |= {name: self._array(name, first, last, advance) for name in names}
        if "segments" in entries:
            entries["segments"], _ = clipped(entries["segments"], first, None if self.size is None else last)
        if "grad_sum" in entries:
            entries["grads_summed"] = self._document["grads_summed"]
        return entries

    def params(self, start: int = 0, stop: int | None = None, *, progress: Progress = None) -> Any:
        """Return the parameters that were saved with it, as a new array; bfloat16 needs ml_dtypes.

        Parameters
        ----------
        start, stop, progress
            As for :meth:`state_dict`.

        Raises
        ------
        ValueError
            If there are none, the file is damaged, or the range is not in it.
        """
        self._require_params()
        first, last = self._range(start, stop)
        with self._reading(["params"], first, last, progress) as advance:
            array = self._array("params", first, last, advance)
        dtype = self._file.tensors["params"][0]
        return (
            formats.shown(array) if dtype == "BF16" else array.view(np.float16) if dtype == "F16" else array
        )

    def _require_params(self) -> None:
        if "params" not in self._file.tensors:
            raise self._file.error("have parameters", "without", "Save them: opt.save(path, params=...).")

    def loss_scale(self) -> DynamicLossScale | None:
        """Return the loss scale that was saved with it, or None."""
        entries = self._document["loss_scale"]
        if entries is None:
            return None
        scale = DynamicLossScale()
        scale.load_state_dict(entries)
        return scale

    def _reading(self, names: list[str], start: int, stop: int, show: Progress) -> Any:
        progress.require(show)
        total = 0
        for name in names:
            _, _, first, last = self._file.tensors[name]
            share = (stop - start) / (self.size or 1) if name != "segments" else 1
            total += round((last - first) * share)
        return progress.counting(show, total, "loading")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __repr__(self) -> str:
        return f"Checkpoint(step={self.step}, size={self.size})"


def read(path: str | os.PathLike[str], *, progress: Progress = None) -> dict[str, Any]:
    """Return the state dict of a file, verified: ``opt.load_state_dict(checkpoint.read(path))``.

    Parameters
    ----------
    path : path
    progress : None, bool or callable
        As for :meth:`fastadam.FusedAdam.save`.

    Raises
    ------
    OSError, ValueError
        As :class:`Checkpoint` does, or if the file is damaged.
    """
    with Checkpoint(path) as file:
        return file.state_dict(progress=progress)


def read_shard(
    path: str | os.PathLike[str], start: int, stop: int, *, progress: Progress = None
) -> dict[str, Any]:
    """Return the state dict of the elements ``start`` up to, without, ``stop``; see :func:`read`."""
    with Checkpoint(path) as file:
        return file.state_dict(start, stop, progress=progress)


def rule_of(h: Hyperparameters) -> dict[str, str]:
    """Return what a state dict says of its rule: nothing of Adam, which came first."""
    return {} if h.KIND == "adam" else {"rule": h.KIND}


def _is_whole(name: str) -> bool:
    """Return whether a tensor has an element for each of the buffer."""
    return name != "segments" and not name.endswith(loading.SCALES)


def clipped(table: Any, start: int, stop: int | None) -> tuple[Any, list[int]]:
    """Return the table of the segments of a shard, and which of the whole they are; None is the end."""
    table = table.copy()
    table[:, :2] = np.clip(table[:, :2], start, stop) - start
    kept = np.flatnonzero(table[:, 0] < table[:, 1])
    return table[kept], kept.tolist()
