"""How buffers say what they hold, and 16-bit codes in NumPy.

Inside of fastadam an array of uint16 holds float16 codes and one of int16 bfloat16 codes; users give and get
arrays of NumPy's float16 and of the bfloat16 of ml_dtypes or PyTorch, whose memory they share.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from fastadam import eight_bit
from fastadam.precision import SIGNED_8BIT, UNSIGNED_8BIT

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
FLOAT16, BFLOAT16 = np.dtype(np.uint16), np.dtype(np.int16)

FLOATS = frozenset({FLOAT32, FLOAT64})
"""The dtypes in which rules compute."""

_NAMES: dict[np.dtype[Any], str] = {
    FLOAT16: "float16",
    BFLOAT16: "bfloat16",
    eight_bit.SIGNED: "8bit",
    eight_bit.UNSIGNED: "8bit",
}
_DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": BFLOAT16,
    SIGNED_8BIT: eight_bit.SIGNED,
    UNSIGNED_8BIT: eight_bit.UNSIGNED,
}
_KINDS = {dtype: kind for kind, dtype in _DTYPES.items()}
_ML_DTYPES = 'pip install "fastadam[bfloat16]"'


def name_of(dtype: np.dtype[Any]) -> str:
    """Return what users call the format of a buffer."""
    return _NAMES.get(dtype) or str(dtype)


def stored_as(kind: str, math: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of a state that is kept in a format; "float32" is the dtype of the arithmetic."""
    return _DTYPES.get(kind, math)


def kind_of(dtype: np.dtype[Any]) -> str:
    """Return the format of a state of a dtype."""
    return _KINDS.get(dtype, "float32")


def math_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype in which a rule computes with what is stored in another."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def is_bfloat16(dtype: Any) -> bool:
    """Return whether a dtype of any library is bfloat16; imports none of them."""
    if isinstance(dtype, np.dtype):
        return dtype.kind == "V" and dtype.itemsize == 2 and dtype.name == "bfloat16"
    return str(dtype) == "torch.bfloat16"


def codes(array: Array, name: str, given: object) -> Array:
    """View an array of float16 or bfloat16 as codes; the rest as for :func:`of_codes`."""
    return array.view(of_codes(array.dtype, name, given))


def of_codes(dtype: np.dtype[Any], name: str, given: object) -> np.dtype[Any]:
    """Return the dtype of the codes in an array of float16 or bfloat16.

    Parameters
    ----------
    dtype : dtype
        NumPy's of the array, any but float32 and float64.
    name : str
        What errors call it.
    given : object
        The dtype that its owner gives it.

    Raises
    ------
    TypeError
        If it is of another dtype.
    """
    if dtype == np.float16:
        return FLOAT16
    if is_bfloat16(given):
        return BFLOAT16
    remedy = ""
    if dtype.kind in "uiV" and dtype.itemsize == 2:
        remedy = " If it holds codes, say of what: x.view(numpy.float16) or x.view(ml_dtypes.bfloat16)."
    raise TypeError(f"{name} must be float32, float64, float16 or bfloat16; got {dtype}.{remedy}")


def decoded(array: Array) -> Array:
    """Return the numbers of an array of codes, in float32; an array of numbers as it is."""
    if array.dtype == FLOAT16:
        return array.view(np.float16).astype(FLOAT32)
    if array.dtype == BFLOAT16:
        return (array.view(np.uint16).astype(np.uint32) << 16).view(FLOAT32)
    return array


def encoded(array: Array, dtype: np.dtype[Any]) -> Array:
    """Return numbers as they are stored in ``dtype``, to the nearest, ties to even; float32 to bfloat16."""
    if dtype != BFLOAT16 or array.dtype == BFLOAT16:
        return array
    bits = array.view(np.uint32)
    rounded = bits + (0x7FFF + (bits >> 16 & 1))
    rounded = np.where(np.isnan(array), bits | 0x00400000, rounded)
    return (rounded >> 16).astype(np.uint16).view(BFLOAT16)


def shown(array: Array) -> Any:
    """View bfloat16 codes as the bfloat16 of ml_dtypes.

    Raises
    ------
    ImportError
        If that is not installed.
    """
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise ImportError(f"A bfloat16 array needs ml_dtypes. {_ML_DTYPES}") from None
    return array.view(bfloat16)
