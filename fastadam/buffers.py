"""Any array -> a flat NumPy array that shares its memory, or an error that says what is wrong and what helps.

Nothing here copies, and nothing here writes.
"""

from __future__ import annotations

from typing import Any, TypeAlias, cast

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_FLOATS = frozenset({np.dtype(np.float32), np.dtype(np.float64)})
_DLPACK_CPU = {1, 3, 11}  # kDLCPU, and host memory pinned for CUDA (3) or ROCm (11)


def flat(buffer: object, name: str, *, writable: bool) -> Array:
    """View a buffer as a flat array.

    Parameters
    ----------
    buffer : array_like
        A C-contiguous array of any shape, float32 or float64: NumPy's, or anything that exposes one without a
        copy through DLPack, ``__array_interface__`` or the buffer protocol.
    name : str
        What errors call it.
    writable : bool
        Whether it must be writable.

    Returns
    -------
    ndarray, shape (n,)
        Shares the memory of ``buffer``.

    Raises
    ------
    TypeError
        If the buffer is not an array in CPU memory, cannot be shared, is immutable, or has another dtype.
    ValueError
        If it is not contiguous, or not writable where it must be.
    """
    array: Array = (
        cast("Array", buffer) if type(buffer) is np.ndarray else _adopt(buffer, name, writable=writable)
    )
    if array.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32 or float64; got {array.dtype}.")
    flags = array.flags
    if not flags.c_contiguous:
        raise ValueError(
            f"{name} must be C-contiguous; got shape {array.shape} with strides {array.strides}."
            " Keep one flat buffer and give views of it to the model."
        )
    if writable and not flags.writeable:
        raise ValueError(f"{name} must be writable; got a read-only array. Pass a writable copy.")
    return array if array.ndim == 1 else array.reshape(-1)


def require_same_layout(name: str, array: Array, other_name: str, other: Array) -> None:
    """Raise unless ``array`` has the size (ValueError) and the dtype (TypeError) of ``other``."""
    if array.size != other.size:
        raise ValueError(f"{name} must have the size of {other_name} ({other.size}); got {array.size}.")
    if array.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name} ({other.dtype}); got {array.dtype}.")


def require_disjoint(name: str, array: Array, other_name: str, other: Array) -> None:
    """Raise ValueError if two flat arrays share memory."""
    if np.may_share_memory(array, other):  # compares bounds: exact for contiguous arrays
        raise ValueError(f"{name} must not overlap {other_name}; got buffers that share memory. Pass a copy.")


def _adopt(buffer: object, name: str, *, writable: bool) -> Array:
    """View what is not exactly an ``ndarray`` as one."""
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
        on_device = _is_on_device(buffer)
        array = None if on_device else _share(buffer)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise TypeError(f"{name} must share its memory; {kind} refuses: {reason}") from error
    if on_device:
        raise TypeError(f"{name} must be in CPU memory; got a device array ({kind}). Pass a CPU copy.")
    if array is None:
        raise TypeError(
            f"{name} must be an array that shares its memory (NumPy, DLPack, __array_interface__ or the"
            f" buffer protocol); got {type(buffer).__name__}."
        )
    return array


def _is_on_device(buffer: object) -> bool:
    if hasattr(buffer, "__cuda_array_interface__"):
        return True
    return hasattr(buffer, "__dlpack_device__") and int(buffer.__dlpack_device__()[0]) not in _DLPACK_CPU


def _share(buffer: Any) -> Array | None:
    if type(buffer).__module__.partition(".")[0] == "torch":
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
