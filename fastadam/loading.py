"""Arrays of a state dict: what they hold, and conversions from one format to another."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastadam import buffers, formats
from fastadam.buffers import Buffer

_REMAINDER = "param_remainder"


def array(value: object, label: str, kind: str) -> Buffer:
    """Return what a state dict has of one state.

    Parameters
    ----------
    value : object
        An array of numbers or, of bfloat16, of codes: ``numpy.savez`` keeps uint16, not bfloat16.
    label : str
        What errors call it.
    kind : str
        Its format, or the name of the master that it is.

    Raises
    ------
    TypeError, ValueError
        If it is no such array.
    """
    if kind == "bfloat16":
        if isinstance(value, np.ndarray) and value.dtype == np.uint16:
            return np.ascontiguousarray(value).reshape(-1).view(formats.BFLOAT16)
        codes = buffers.flat(value, label, writable=False)
        if codes.dtype != formats.BFLOAT16:
            name = formats.name_of(codes.dtype)
            raise TypeError(f"{label} must be codes of bfloat16 in uint16; got {name}.")
        return codes
    if kind == _REMAINDER:
        if not isinstance(value, np.ndarray) or value.dtype != np.int16:
            found = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            raise TypeError(f"{label} must be an int16 array; got {found}.")
        return np.ascontiguousarray(value).reshape(-1)
    return buffers.flat(value, label, writable=False, codes=False)


def dtype_of(kind: str, math: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of a state that is kept in a format, or of a master.

    Raises
    ------
    ValueError
        If it is to be bfloat16 beside arithmetic in float64.
    """
    if kind == _REMAINDER:
        return np.dtype(np.int16)
    if kind == "bfloat16" and math != formats.FLOAT32:
        raise ValueError("state_dtype must be 'float32', the default, for float64 moments; got 'bfloat16'.")
    return math if kind == "param_master" else formats.stored_as(kind, math)


def converted(values: Any, dtype: np.dtype[Any]) -> Any:
    """Return a state in the format of another: exact up, to the nearest down."""
    if values.dtype == dtype:
        return values
    return formats.encoded(formats.decoded(values), dtype)
