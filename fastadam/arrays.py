"""What arguments may be, for type checkers: protocols of arrays that share their memory, streams, numbers.

Nothing here is checked when a program runs; :mod:`fastadam.buffers` does that, and says more. A type cannot
say which dtype an array of any library has, that it is contiguous, or that JAX's are immutable.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, SupportsFloat, TypeAlias

import numpy as np


class SupportsDLPack(Protocol):
    """An array that shares its memory through DLPack: of PyTorch, JAX, CuPy, NumPy and others."""

    def __dlpack__(self) -> Any: ...


class SupportsArrayInterface(Protocol):
    """An array that shares its memory through ``__array_interface__``."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...


class SupportsBuffer(Protocol):
    """An object with the buffer protocol, such as ``array.array`` and ``memoryview``."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


class SupportsCudaArrayInterface(Protocol):
    """An array in GPU memory that has ``__cuda_array_interface__``: of CuPy, Numba, PyTorch and others."""

    @property
    def __cuda_array_interface__(self) -> Any: ...


FlatArray: TypeAlias = (
    np.ndarray[Any, np.dtype[Any]]
    | SupportsDLPack
    | SupportsArrayInterface
    | SupportsBuffer
    | SupportsCudaArrayInterface
)
"""An array of any library that shares its memory, and so can be stepped in place."""


class SupportsCudaStream(Protocol):
    """A CUDA stream of any library that has the protocol of ``cuda.core``."""

    @property
    def __cuda_stream__(self) -> Any: ...


class HasCudaStream(Protocol):
    """A CUDA stream as PyTorch's are."""

    @property
    def cuda_stream(self) -> int:
        """Its handle."""


class HasPtr(Protocol):
    """A CUDA stream as CuPy's are."""

    @property
    def ptr(self) -> int:
        """Its handle."""


CudaStream: TypeAlias = int | SupportsCudaStream | HasCudaStream | HasPtr
"""A CUDA stream of any library, or its handle."""

Number: TypeAlias = float | np.floating[Any] | np.integer[Any]
"""A real number of Python or NumPy."""

Flag: TypeAlias = bool | np.bool
"""Yes or no, of Python or NumPy: what a test of an array gives."""

Scalar: TypeAlias = SupportsFloat | SupportsDLPack | SupportsCudaArrayInterface
"""A real number, or an array of one of any library, in GPU memory too."""

BackendName: TypeAlias = Literal["cpu", "cupy", "numba-cuda"]
"""What runs the steps."""

StateFormat: TypeAlias = Literal["float32", "bfloat16", "8bit"]
"""How a moment is stored."""

MasterFormat: TypeAlias = Literal["float32", "split"]
"""How what 16-bit parameters lack is kept."""

Rounding: TypeAlias = Literal["stochastic", "nearest"]
"""How what is stored in 16 or 8 bits is rounded."""
