"""Arrays of a state dict: what they hold, and conversions from one format to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastadam import buffers, eight_bit, formats
from fastadam.buffers import Array, Buffer
from fastadam.precision import IN_BLOCKS

_REMAINDER = "param_remainder"

SCALES = "_scales"
"""Behind the name of a state in 8 bits: the key of its scales."""


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
    if kind in IN_BLOCKS:
        if not isinstance(value, np.ndarray) or value.dtype != np.uint8:
            found = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            raise TypeError(f"{label} must be codes of 8 bits in a uint8 array; got {found}.")
        return np.ascontiguousarray(value).reshape(-1)
    if kind == _REMAINDER:
        if not isinstance(value, np.ndarray) or value.dtype != np.int16:
            found = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            raise TypeError(f"{label} must be an int16 array; got {found}.")
        return np.ascontiguousarray(value).reshape(-1)
    return buffers.flat(value, label, writable=False, codes=False)


def scales(entries: Mapping[str, Any], state: str, codes: Buffer, dtype: np.dtype[Any]) -> Array:
    """Return the scales of a moment in 8 bits.

    Parameters
    ----------
    entries : mapping
        The state dict.
    state : str
        The name of the moment.
    codes : ndarray of uint8, shape (n,)
    dtype : dtype
        Of the codes in a state: int8 with a sign, uint8 without.

    Raises
    ------
    TypeError, ValueError
        If they are none, of another moment, or not possible.
    """
    label = f"state_dict['{state}{SCALES}']"
    found = buffers.flat(entries[state + SCALES], label, writable=False, codes=False)
    if found.dtype != formats.FLOAT32:
        raise TypeError(f"{label} must be float32; got {found.dtype}.")
    count = eight_bit.blocks_of(codes.size)
    if found.size != count:
        raise ValueError(f"{label} must have {count} elements, one for each block; got {found.size}.")
    if not eight_bit.is_possible(codes.view(dtype), found):  # type: ignore[union-attr, arg-type]
        raise ValueError(f"{label} must be scales of the codes beside them; got others.")
    return found  # type: ignore[return-value]


def dtype_of(kind: str, math: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of a state that is kept in a format, or of a master.

    Raises
    ------
    ValueError
        If it is to be other than float64 beside arithmetic in float64.
    """
    if kind == _REMAINDER:
        return np.dtype(np.int16)
    dtype = formats.stored_as(kind, math)
    if math != formats.FLOAT32 and dtype != math:
        asked = formats.name_of(dtype)
        raise ValueError(f"state_dtype must be 'float32', the default, for float64 moments; got {asked!r}.")
    return dtype


def converted(values: Any, given_scales: Array | None, dtype: np.dtype[Any]) -> tuple[Any, Array | None]:
    """Return a state in the format of another, and its scales: exact up, to the nearest down."""
    if given_scales is not None:
        if values.dtype == dtype:
            return values, given_scales
        values = eight_bit.decode(values, given_scales)
    elif values.dtype == dtype:
        return values, None
    numbers = formats.decoded(values)
    if dtype in {eight_bit.SIGNED, eight_bit.UNSIGNED}:
        return eight_bit.encode(numbers, dtype)
    return formats.encoded(numbers, dtype), None
