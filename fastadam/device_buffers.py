"""Arrays in GPU memory -> :class:`DeviceBuffer`, with the CUDA stream on which their owner works.

Any library's: CuPy, Numba, PyTorch and others export ``__cuda_array_interface__``. No library is imported
for an array that it did not make.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastadam import backends, streams
from fastadam.formats import FLOATS, of_codes
from fastadam.kernels.cuda import DeviceBuffer


def flat(
    buffer: object,
    interface: dict[str, Any],
    name: str,
    *,
    writable: bool,
    backend: str | None,
    codes: bool = True,
) -> DeviceBuffer:
    """View an array in GPU memory as a flat buffer.

    Parameters
    ----------
    buffer : array_like
        C-contiguous, of any shape, float32, float64, float16 or bfloat16.
    interface : dict
        Its ``__cuda_array_interface__``.
    name : str
        What errors call it.
    writable : bool
        Whether it must be writable.
    backend : str or None
        The CUDA backend to ask where the array does not tell its device; None for any.
    codes : bool
        Whether it may be of 16 bits.

    Raises
    ------
    ImportError
        If no CUDA backend is installed.
    TypeError
        If the array has another dtype or a mask.
    ValueError
        If it is not contiguous, not aligned to its elements, or not writable where it must be.
    """
    try:
        shape, strides = tuple(interface["shape"]), interface.get("strides")
        pointer, read_only = interface["data"]
        dtype = np.dtype(interface["typestr"])
    except KeyError as missing:
        raise TypeError(
            f"{name} must have a whole __cuda_array_interface__; got one without {missing}."
        ) from None

    if interface.get("mask") is not None:
        raise TypeError(f"{name} must be a plain array; got a masked array. Pass its data.")
    if dtype not in FLOATS:
        given = getattr(buffer, "dtype", dtype)
        if not codes:
            raise TypeError(f"{name} must be float32 or float64; got {given}.")
        dtype = of_codes(dtype, name, given)
    if strides is not None and not _is_contiguous(shape, strides, dtype.itemsize):
        raise ValueError(
            f"{name} must be C-contiguous; got shape {shape} with strides {tuple(strides)}."
            " Keep one flat buffer and give views of it to the model."
        )
    if writable and read_only:
        raise ValueError(f"{name} must be writable; got a read-only array. Pass a writable copy.")
    pointer = int(pointer or 0)  # None or 0 where there is no element
    if pointer % dtype.itemsize:
        raise ValueError(
            f"{name} must be aligned to its elements in GPU memory; got address {pointer:#x}. Pass a copy."
        )

    made_by = library(buffer)
    device = _device(buffer, pointer, backend or ("numba-cuda" if made_by == "numba" else backends.cuda()))
    stream = streams.current(made_by, device)
    if stream is None:
        bound = interface.get("stream")  # None: nobody works on it, or the exporter does not tell
        default = 0 if made_by == "numba" else None  # what Numba's kernels run on
        stream = default if bound is None else int(bound)
    size = int(np.prod(shape, dtype=np.int64))
    return DeviceBuffer(pointer, size, dtype, device, stream, buffer)


def library(buffer: object) -> str:
    """Return the name of the library that made an array, or the base class of its class."""
    names = [kind.__module__.partition(".")[0] for kind in type(buffer).__mro__]
    return next((name for name in names if name in {"torch", "cupy"}), names[0])


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    if 0 in shape:
        return True
    expected = itemsize
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent > 1 and stride != expected:
            return False
        expected *= extent
    return True


def _device(buffer: Any, pointer: int, name: str) -> int:
    if hasattr(buffer, "__dlpack_device__"):
        return int(buffer.__dlpack_device__()[1])
    backend = backends.load(name)
    return int(backend.device_of(pointer) if pointer else backend.current_device())
