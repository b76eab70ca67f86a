"""How an element is stored: ``load`` and ``store`` of one element of an array, or of each array of a tuple.

The loops of every compiled backend read and write memory only through these functions. In float32 and float64
an element is stored as it is; in an array of uint16 are float16 codes and in one of int16 bfloat16 codes
(:mod:`fastadam.kernels.formats`), which are float32 to a rule.

A parameter may be kept with a master, from which a step goes on and which it writes: an array of float32, or
of int16, what is missing in a bfloat16 parameter to the exact float32 (``joined``, ``halves``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.extending import overload

from . import formats
from .rounding import Rounding


def load(arrays: Any, i: int) -> Any:
    """Return element ``i`` of an array, or a tuple of it for a tuple of arrays."""
    return tuple(load(array, i) for array in arrays) if isinstance(arrays, tuple) else arrays[i]


def store(arrays: Any, i: int, values: Any, random: Any = None) -> None:
    """Set element ``i`` of an array to a value, or of each array of a tuple to its value; of None nothing.

    ``random`` are random bits to round by, or a tuple with at least as many words as there are arrays; None
    rounds to the nearest.
    """
    if isinstance(arrays, tuple):
        for array, value in zip(arrays, values, strict=True):
            store(array, i, value)
    elif arrays is not None:
        arrays[i] = values


_MEMORY = (types.Array, types.CPointer)  # what CPU loops take, and what CUDA kernels take


# Tuples are unrolled by recursion over their length, which is known at compile time.
# strict=False: Numba's strict check compares annotations as well as names.


_OPTIONS = {"error_model": "numpy"}


@overload(load, jit_options=_OPTIONS, strict=False)
def _load(arrays: Any, i: Any) -> Callable[..., Any]:
    if isinstance(arrays, _MEMORY):
        if arrays.dtype in formats.DECODERS:
            return lambda arrays, i: formats.decoded(arrays[i])
        return lambda arrays, i: arrays[i]
    if len(arrays) == 0:
        return lambda arrays, i: ()  # noqa: ARG005
    if len(arrays) == 1:
        return lambda arrays, i: (load(arrays[0], i),)
    return lambda arrays, i: (load(arrays[0], i), *load(arrays[1:], i))


@overload(store, jit_options=_OPTIONS, strict=False)
def _store(arrays: Any, i: Any, values: Any, random: Any = None) -> Callable[..., None]:
    nearest = random is None or isinstance(random, (types.NoneType, types.Omitted))
    if isinstance(arrays, types.NoneType) or (isinstance(arrays, types.BaseTuple) and len(arrays) == 0):
        return lambda arrays, i, values, random=None: None  # noqa: ARG005
    if isinstance(arrays, _MEMORY):
        return _store_in(arrays.dtype, nearest=nearest)
    return (_store_tuple_nearest if nearest else _store_tuple)(last=len(arrays) == 1)


def _store_tuple_nearest(*, last: bool) -> Callable[..., None]:
    def store_last(arrays: Any, i: int, values: Any, random: Any = None) -> None:
        store(arrays[0], i, values[0])

    def store_each(arrays: Any, i: int, values: Any, random: Any = None) -> None:
        store(arrays[0], i, values[0])
        store(arrays[1:], i, values[1:])

    return store_last if last else store_each


def _store_tuple(*, last: bool) -> Callable[..., None]:
    def store_last(arrays: Any, i: int, values: Any, random: Any = None) -> None:
        store(arrays[0], i, values[0], random[0])

    def store_each(arrays: Any, i: int, values: Any, random: Any = None) -> None:
        store(arrays[0], i, values[0], random[0])
        store(arrays[1:], i, values[1:], random[1:])

    return store_last if last else store_each


def _store_in(kind: Any, *, nearest: bool) -> Callable[..., None]:
    """Return what stores a value in an array of codes, or of numbers."""
    if kind not in formats.ENCODERS:

        def store_element(arrays: Any, i: int, values: Any, random: Any = None) -> None:
            arrays[i] = values

    elif nearest:
        to_nearest = {
            formats.BFLOAT16: formats.bfloat16_nearest,
            formats.FLOAT16: formats.float16_nearest,
        }[kind]

        def store_element(arrays: Any, i: int, values: Any, random: Any = None) -> None:
            arrays[i] = to_nearest(values)

    else:
        by_bits = {
            formats.BFLOAT16: formats.bfloat16_stochastic,
            formats.FLOAT16: formats.float16_stochastic,
        }[kind]

        def store_element(arrays: Any, i: int, values: Any, random: Any = None) -> None:
            arrays[i] = by_bits(values, random)

    return store_element


# --- Parameters with a master -------------------------------------------------------------------------------


def load_param(params: Any, master: Any, i: int) -> Any:
    """Return parameter ``i``, from its master where it has one; for compiled loops."""
    return load(params if master is None else master, i)


@overload(load_param, jit_options=_OPTIONS, strict=False)
def _load_param(params: Any, master: Any, i: Any) -> Callable[..., Any]:
    if isinstance(master, types.NoneType):
        return lambda params, master, i: load(params, i)  # noqa: ARG005
    if master.dtype == types.int16:
        return lambda params, master, i: formats.joined(params[i], master[i])
    return lambda params, master, i: master[i]  # noqa: ARG005


def store_param(params: Any, master: Any, i: int, value: Any, random: Any) -> None:
    """Set parameter ``i``, and its master where it has one; for compiled loops."""
    store(params, i, value, random)


@overload(store_param, jit_options=_OPTIONS, strict=False)
def _store_param(params: Any, master: Any, i: Any, value: Any, random: Any) -> Callable[..., None]:
    if isinstance(master, types.NoneType):
        return lambda params, master, i, value, random: store(  # noqa: ARG005
            params, i, value, random
        )
    if master.dtype == types.int16:

        def store_halves(params: Any, master: Any, i: int, value: Any, random: Any) -> None:
            params[i], master[i] = formats.halves(value)

        return store_halves

    def store_both(params: Any, master: Any, i: int, value: Any, random: Any) -> None:
        master[i] = value
        store(params, i, value)

    return store_both


# --- Random bits --------------------------------------------------------------------------------------------


def at_element(rounding: Any, start: int) -> Any:
    """Return the rounding of what shares the upper index bits of element ``start``; for compiled loops."""
    return rounding


@overload(at_element, jit_options=_OPTIONS, strict=False)
def _at_element(rounding: Any, start: Any) -> Callable[..., Any]:
    if isinstance(rounding, types.NoneType):
        return lambda rounding, start: None  # noqa: ARG005
    return lambda rounding, start: Rounding(
        formats.with_high_index(rounding.moments, rounding.first, start),
        formats.with_high_index(rounding.params, rounding.first, start),
        rounding.first,
    )


def words_of_moments(rounding: Any, i: int) -> Any:
    """Return random bits for each of at most four states of element ``i``; for compiled loops."""
    return None


@overload(words_of_moments, jit_options=_OPTIONS, strict=False)
def _words_of_moments(rounding: Any, i: Any) -> Callable[..., Any]:
    if isinstance(rounding, types.NoneType):
        return lambda rounding, i: None  # noqa: ARG005

    def words(rounding: Any, i: int) -> Any:
        word = formats.random_bits(rounding.moments, rounding.first, i)
        other = formats.upper_half(formats.random_bits(rounding.params, rounding.first, i))
        return word, formats.upper_half(word), other, other  # an average behind the moments is not rounded

    return words


def word_of_param(rounding: Any, i: int) -> Any:
    """Return random bits for parameter ``i``; for compiled loops."""
    return None


@overload(word_of_param, jit_options=_OPTIONS, strict=False)
def _word_of_param(rounding: Any, i: Any) -> Callable[..., Any]:
    if isinstance(rounding, types.NoneType):
        return lambda rounding, i: None  # noqa: ARG005
    return lambda rounding, i: formats.random_bits(rounding.params, rounding.first, i)
