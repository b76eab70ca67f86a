"""Whose arrays can lie in one flat buffer, and how each library makes one."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any, ClassVar

import numpy as np

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector of a CPU."""


class Library(ABC):
    """What a flat buffer needs of a library."""

    name: ClassVar[str]

    @abstractmethod
    def dtype(self, array: Any) -> str:
        """Return what users call the dtype."""

    @abstractmethod
    def place(self, array: Any) -> str:
        """Return where an array lies, for errors."""

    @abstractmethod
    def key(self, array: Any) -> Hashable:
        """Return what two arrays have in common if they are one: where it begins, and its layout."""

    @abstractmethod
    def address(self, array: Any) -> int:
        """Return where the first element lies."""

    @abstractmethod
    def zeros(self, count: int, like: Any) -> Any:
        """Return a vector of zeros of the dtype and on the device of an array, at any address."""

    @abstractmethod
    def fill(self, view: Any, source: Any) -> None:
        """Copy an array into a view of its shape."""

    def aligned_zeros(self, count: int, like: Any) -> Any:
        """Return a vector of zeros that starts at a multiple of :data:`ALIGNMENT` bytes."""
        spare = ALIGNMENT // self.itemsize(like)
        memory = self.zeros(count + spare, like)
        start = -self.address(memory) % ALIGNMENT // self.itemsize(like)
        return memory[start : start + count]

    def itemsize(self, array: Any) -> int:
        """Return the bytes of an element."""
        return int(array.dtype.itemsize)


class _NumPy(Library):
    name = "NumPy"

    def dtype(self, array: Any) -> str:
        return str(array.dtype)

    def place(self, array: Any) -> str:  # noqa: ARG002
        return "CPU memory"

    def key(self, array: Any) -> Hashable:
        return self.address(array), array.shape, array.strides

    def address(self, array: Any) -> int:
        return int(array.ctypes.data)

    def zeros(self, count: int, like: Any) -> Any:
        return np.zeros(count, like.dtype)

    def fill(self, view: Any, source: Any) -> None:
        view[...] = source


class _CuPy(_NumPy):
    name = "CuPy"

    def place(self, array: Any) -> str:
        return f"CUDA device {array.device.id}"

    def address(self, array: Any) -> int:
        return int(array.data.ptr)

    def zeros(self, count: int, like: Any) -> Any:
        import cupy

        with like.device:
            return cupy.zeros(count, like.dtype)

    def fill(self, view: Any, source: Any) -> None:
        with view.device:
            view[...] = source


class _Torch(Library):
    name = "PyTorch"

    def dtype(self, array: Any) -> str:
        return str(array.dtype).removeprefix("torch.")

    def place(self, array: Any) -> str:
        if str(array.layout) != "torch.strided":
            return f"a tensor of layout {array.layout}"
        device = array.device
        named = {"cpu": "CPU memory", "cuda": f"CUDA device {device.index}"}
        return named.get(device.type, f"device {device}")

    def key(self, array: Any) -> Hashable:
        return self.address(array), tuple(array.shape), array.stride()

    def address(self, array: Any) -> int:
        return int(array.data_ptr())

    def zeros(self, count: int, like: Any) -> Any:
        import torch

        return torch.zeros(count, dtype=like.dtype, device=like.device)

    def fill(self, view: Any, source: Any) -> None:
        view.copy_(source.detach())


NUMPY, CUPY, TORCH = _NumPy(), _CuPy(), _Torch()


def of(array: object, label: str) -> Library:
    """Return the library of an array that a step could take; imports none.

    Raises
    ------
    TypeError
        If it is no array of these libraries, has another dtype than those of a step, or lies elsewhere.
    """
    found: Library | None = None
    kinds = (NUMPY, np.ndarray), (CUPY, _kind("cupy", "ndarray")), (TORCH, _kind("torch", "Tensor"))
    for library, kind in kinds:
        if kind is not None and isinstance(array, kind):
            found = library
    if found is None or isinstance(array, np.ma.MaskedArray):
        kind = f"{type(array).__module__.partition('.')[0]}.{type(array).__name__}".removeprefix("builtins.")
        remedy = ""
        if kind.startswith(("jax.", "jaxlib.")):
            remedy = " Use jax.flatten_util.ravel_pytree and fastadam.jax."
        raise TypeError(f"{label} must be an array of NumPy, CuPy or PyTorch; got {kind}.{remedy}")
    dtype = found.dtype(array)
    is_native = getattr(getattr(array, "dtype", None), "isnative", True)
    if dtype not in {"float32", "float64", "float16", "bfloat16"} or not is_native:
        raise TypeError(f"{label} must be float32, float64, float16 or bfloat16; got {dtype}.")
    place = found.place(array)
    if not place.startswith("C"):
        raise TypeError(f"{label} must be in CPU memory or on an NVIDIA GPU; got {place}.")
    return found


def _kind(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)


def is_module(given: object) -> bool:
    """Return whether something is a ``torch.nn.Module``."""
    kind = _kind("torch.nn", "Module")
    return kind is not None and isinstance(given, kind)
