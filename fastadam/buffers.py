"""Any array -> a flat buffer that shares its memory, or an error that says what is wrong and what helps.

A buffer is a NumPy array in CPU memory, of codes where it holds float16 or bfloat16
(:mod:`fastadam.formats`), a :class:`fastadam.kernels.cuda.DeviceBuffer` in GPU memory. Nothing here copies,
and nothing here writes.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from fastadam import backends, device_buffers, formats
from fastadam.formats import FLOATS
from fastadam.kernels.cuda import DeviceBuffer

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

Buffer: TypeAlias = Array | DeviceBuffer

_DLPACK_CPU = (1, 3, 11)  # kDLCPU, and host memory pinned for CUDA (3) or ROCm (11)
_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


def flat(
    buffer: object, name: str, *, writable: bool, backend: str | None = None, codes: bool = True
) -> Buffer:
    """View an array as a flat buffer.

    Parameters
    ----------
    buffer : array_like
        A C-contiguous array of any shape, float32, float64, float16 or bfloat16: NumPy's, or anything that
        exposes one without a copy through DLPack, ``__array_interface__``, the buffer protocol or
        ``__cuda_array_interface__``.
    name : str
        What errors call it.
    writable : bool
        Whether it must be writable.
    backend : str, optional
        The backend that was asked for.
    codes : bool
        Whether it may be of 16 bits.

    Returns
    -------
    ndarray or DeviceBuffer, shape (n,)
        Shares the memory of ``buffer``.

    Raises
    ------
    ImportError
        If a CUDA array comes and no CUDA backend is installed.
    TypeError
        If the buffer is not an array, cannot be shared, is immutable, or has another dtype.
    ValueError
        If it is not contiguous, not writable where it must be, or not aligned where a GPU needs it.
    """
    if type(buffer) is np.ndarray:
        array = buffer
    else:
        adopted = _adopt(buffer, name, writable, backend, codes)
        if isinstance(adopted, DeviceBuffer):
            return adopted
        array = adopted
    if array.dtype not in FLOATS:
        if not codes:
            raise TypeError(f"{name} must be float32 or float64; got {array.dtype}.")
        array = formats.codes(array, name, getattr(buffer, "dtype", array.dtype))
    flags = array.flags
    if not flags.c_contiguous:
        raise ValueError(
            f"{name} must be C-contiguous; got shape {array.shape} with strides {array.strides}."
            " Keep one flat buffer and give views of it to the model."
        )
    if writable and not flags.writeable:
        raise ValueError(f"{name} must be writable; got a read-only array. Pass a writable copy.")
    return array if array.ndim == 1 else array.reshape(-1)


def require_same_layout(name: str, array: Buffer, other_name: str, other: Buffer) -> bool:
    """Do what :func:`require_same_size` does, and raise TypeError if devices differ."""
    if type(array) is not np.ndarray or type(other) is not np.ndarray:
        require_same_place(name, array, other_name, other)
    return require_same_size(name, array, other_name, other)


def require_same_size(name: str, array: Buffer, other_name: str, other: Buffer) -> bool:
    """Raise unless ``array`` has the size of ``other`` (ValueError), and a rule can take both (TypeError).

    Returns
    -------
    bool
        Whether they have the same dtype.
    """
    if array.size != other.size:
        raise ValueError(f"{name} must have the size of {other_name} ({other.size}); got {array.size}.")
    if array.dtype == other.dtype:
        return True
    if formats.math_of(array.dtype) != formats.math_of(other.dtype):
        wanted, found = formats.name_of(other.dtype), formats.name_of(array.dtype)
        raise TypeError(f"{name} must have the dtype of {other_name} ({wanted}); got {found}.")
    return False


def require_disjoint(name: str, array: Buffer, other_name: str, other: Buffer) -> None:
    """Raise ValueError if two flat buffers in the same memory share some of it."""
    if type(array) is np.ndarray and type(other) is np.ndarray:
        overlap = np.may_share_memory(array, other)  # compares bounds: exact for contiguous arrays
    elif isinstance(array, DeviceBuffer) and isinstance(other, DeviceBuffer):
        overlap = array.pointer < _end(other) and other.pointer < _end(array)
    else:
        overlap = False  # one in each memory
    if overlap:
        raise ValueError(f"{name} must not overlap {other_name}; got buffers that share memory. Pass a copy.")


def _end(buffer: DeviceBuffer) -> int:
    return buffer.pointer + buffer.size * buffer.dtype.itemsize


def place(buffer: Buffer) -> str:
    """Return where a buffer lies, for errors."""
    return f"CUDA device {buffer.device}" if isinstance(buffer, DeviceBuffer) else "CPU memory"


def require_same_place(name: str, array: Buffer, other_name: str, other: Buffer) -> None:
    """Raise TypeError if two buffers lie on different devices."""
    if place(array) != place(other):
        raise TypeError(
            f"{name} must be on the device of {other_name} ({place(other)}); got {place(array)}. Pass a copy."
        )


def require_in_cpu_memory(name: str, array: Buffer) -> None:
    """Raise TypeError if a buffer lies in GPU memory."""
    if isinstance(array, DeviceBuffer):
        raise TypeError(f"{name} must be in CPU memory; got {place(array)}. Pass a CPU copy.")


def _adopt(buffer: object, name: str, writable: bool, backend: str | None, codes: bool) -> Buffer:
    """View what is not exactly an ``ndarray`` as one, or as a buffer in GPU memory."""
    kind = f"{type(buffer).__module__.partition('.')[0]}.{type(buffer).__name__}"
    if isinstance(buffer, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a plain array; got a masked array. Pass its .data.")
    if isinstance(buffer, np.ndarray):  # a memmap, for example
        return np.ndarray.view(buffer, np.ndarray)
    if writable and kind.startswith(("jax.", "jaxlib.")):
        raise TypeError(
            f"{name} must be writable in place; got a JAX array, which is immutable."
            " Pass a NumPy copy: numpy.array(x)."
        )
    try:
        owner, interface, on_device = _device_interface(buffer)
        array = None if on_device else _share(buffer)
    except ImportError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise TypeError(f"{name} must share its memory; {kind} refuses: {reason}") from error
    if interface is not None:
        asked = None if backend == "cpu" else backend
        return device_buffers.flat(owner, interface, name, writable=writable, backend=asked, codes=codes)
    if on_device:
        raise TypeError(
            f"{name} must be in CPU memory or on an NVIDIA GPU; got another device's array ({kind})."
            " Pass a CPU copy."
        )
    if array is None:
        raise TypeError(
            f"{name} must be an array that shares its memory (NumPy, DLPack, __array_interface__, the buffer"
            f" protocol or __cuda_array_interface__); got {type(buffer).__name__}."
        )
    return array


def _device_interface(buffer: Any) -> tuple[Any, dict[str, Any] | None, bool]:
    """Return who exports a CUDA array interface, that, and whether the array is in any device's memory.

    The exporter is the array, or CuPy's view of one that only exports DLPack.
    """
    interface = getattr(buffer, "__cuda_array_interface__", None)
    if interface is not None:
        return buffer, interface, True
    device = int(buffer.__dlpack_device__()[0]) if hasattr(buffer, "__dlpack_device__") else _DLPACK_CPU[0]
    if device in _DLPACK_CUDA:
        if not backends.is_installed("cupy"):
            raise ImportError(f"A CUDA array that only exports DLPack needs CuPy. {backends.REMEDY}")
        view = backends.load("cupy").from_dlpack(buffer)
        return view, view.__cuda_array_interface__, True
    return buffer, None, device not in _DLPACK_CPU


def _share(buffer: Any) -> Array | None:
    if type(buffer).__module__.partition(".")[0] == "torch":
        if formats.is_bfloat16(buffer.dtype) and not buffer.requires_grad:  # else numpy() says what helps
            import torch

            buffer = buffer.view(torch.int16)
        shared: Array = buffer.numpy()  # by DLPack, tensors of older versions would be read-only
        return shared
    if hasattr(buffer, "__dlpack__"):
        try:
            return np.from_dlpack(buffer, copy=False)
        except TypeError:  # an exporter from before that argument: it never copies
            return np.from_dlpack(buffer)
    if _has_buffer_protocol(buffer):
        return np.asarray(memoryview(buffer), copy=False)
    return np.asarray(buffer, copy=False) if hasattr(buffer, "__array_interface__") else None


def _has_buffer_protocol(buffer: object) -> bool:
    try:
        memoryview(buffer)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True
