"""Arrays in GPU memory -> :class:`DeviceBuffer`, and the CUDA stream on which their owner works.

Any library's: CuPy, Numba, PyTorch and others export ``__cuda_array_interface__``. No library is imported
for an array that it did not make.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from fastadam import backends
from fastadam.kernels.cuda import DeviceBuffer

_FLOATS = frozenset({np.dtype(np.float32), np.dtype(np.float64)})


def flat(buffer: object, interface: dict[str, Any], name: str, *, writable: bool) -> DeviceBuffer:
    """View an array in GPU memory as a flat buffer.

    Parameters
    ----------
    buffer : array_like
        C-contiguous, of any shape, float32 or float64.
    interface : dict
        Its ``__cuda_array_interface__``.
    name : str
        What errors call it.
    writable : bool
        Whether it must be writable.

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
    if dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32 or float64; got {getattr(buffer, 'dtype', dtype)}.")
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

    device = _device(buffer, pointer)
    made_by = library(buffer)
    stream = current_stream(made_by, device)
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


def current_stream(library: str, device: int) -> int | None:
    """Return the handle of a library's current stream on a device, or None where it has no such thing."""
    module = sys.modules.get(library)
    if module is None:
        return None
    if library == "torch":
        return int(module.cuda.current_stream(device).cuda_stream)
    if library == "cupy":
        return int(module.cuda.get_current_stream(device).ptr)
    return None


def stream_handle(stream: Any) -> int:
    """Return the handle of a stream: an int, or any library's stream object.

    Raises
    ------
    TypeError
        If it is neither.
    """
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        return int((protocol() if callable(protocol) else protocol)[1])
    for attribute in ("cuda_stream", "ptr"):  # PyTorch's, CuPy's
        handle = getattr(stream, attribute, None)
        if isinstance(handle, int):
            return handle
    raise TypeError(f"stream must be a CUDA stream or its handle; got {type(stream).__name__}.")


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    if 0 in shape:
        return True
    expected = itemsize
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent > 1 and stride != expected:
            return False
        expected *= extent
    return True


def _device(buffer: Any, pointer: int) -> int:
    if hasattr(buffer, "__dlpack_device__"):
        return int(buffer.__dlpack_device__()[1])
    backend = backends.load(backends.cuda())
    return int(backend.device_of(pointer) if pointer else backend.current_device())
