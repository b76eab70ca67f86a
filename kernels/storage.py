"""How an element is stored: ``load`` and ``store`` of one element of an array, or of each array of a tuple.

The loops of every compiled backend read and write memory only through these two functions. In float32 and
float64 an element is stored as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.extending import overload


def load(arrays: Any, i: int) -> Any:
    """Return element ``i`` of an array, or a tuple of it for a tuple of arrays."""
    return tuple(load(array, i) for array in arrays) if isinstance(arrays, tuple) else arrays[i]


def store(arrays: Any, i: int, values: Any) -> None:
    """Set element ``i`` of an array to a value, or of each array of a tuple to its value."""
    if isinstance(arrays, tuple):
        for array, value in zip(arrays, values, strict=True):
            store(array, i, value)
    else:
        arrays[i] = values


_MEMORY = (types.Array, types.CPointer)  # what CPU loops take, and what CUDA kernels take


# Tuples are unrolled by recursion over their length, which is known at compile time.
# strict=False: Numba's strict check compares annotations as well as names.


@overload(load, jit_options={"error_model": "numpy"}, strict=False)
def _load(arrays: Any, i: Any) -> Callable[..., Any]:
    if isinstance(arrays, _MEMORY):
        return lambda arrays, i: arrays[i]
    if len(arrays) == 1:
        return lambda arrays, i: (load(arrays[0], i),)
    return lambda arrays, i: (load(arrays[0], i), *load(arrays[1:], i))


@overload(store, jit_options={"error_model": "numpy"}, strict=False)
def _store(arrays: Any, i: Any, values: Any) -> Callable[..., None]:
    if isinstance(arrays, _MEMORY):

        def store_element(arrays: Any, i: int, values: Any) -> None:
            arrays[i] = values

        return store_element

    if len(arrays) == 1:

        def store_last(arrays: Any, i: int, values: Any) -> None:
            store(arrays[0], i, values[0])

        return store_last

    def store_each(arrays: Any, i: int, values: Any) -> None:
        store(arrays[0], i, values[0])
        store(arrays[1:], i, values[1:])

    return store_each
