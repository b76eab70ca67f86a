"""The Numba-CUDA kernels: a step over the rules as the CPU compiles them, in 16-byte packs and one by one.

Kernels take pointers, not arrays: a launch costs less, and any library's buffer will do. The simulator of
numba-cuda runs the same functions over NumPy arrays, all but :func:`load_packs` and :func:`store_packs`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cuda, types
from numba.extending import overload

from . import rules
from .compiling import JIT_OPTIONS
from .cuda import KernelTypes
from .grids import PACK
from .storage import load, store

# --- Lanes: tuples of one element each, (param, grad, *state) in, (param, *state) out; with a gradient to be
# cleared, (param, grad, *state) out.


def update_lane(lane: Any, c: Any, clear: Any) -> Any:
    """Update one element."""
    param, state = rules.update(lane[0], lane[1], lane[2:], c)
    return (param, *state) if clear is None else (param, type(param)(0), *state)


def update_lanes(lanes: Any, c: Any, clear: Any) -> Any:
    """Update each element of a pack."""
    return tuple(update_lane(lane, c, clear) for lane in lanes)


def pick(values: Any, places: tuple[int, ...], begin: int = 0) -> Any:
    """Return a tuple of the values at some places, counted from ``begin``."""
    return tuple(values[begin + place] for place in places)


@overload(update_lane, jit_options=JIT_OPTIONS, strict=False)
def _update_lane(lane: Any, c: Any, clear: Any) -> Any:
    if isinstance(clear, types.NoneType):

        def keep(lane: Any, c: Any, clear: Any) -> Any:
            param, state = rules.update(lane[0], lane[1], lane[2:], c)
            return (param, *state)

        return keep
    zero = {types.float32: np.float32(0), types.float64: np.float64(0)}[lane.dtype]

    def clear_gradient(lane: Any, c: Any, clear: Any) -> Any:
        param, state = rules.update(lane[0], lane[1], lane[2:], c)
        return (param, zero, *state)

    return clear_gradient


@overload(update_lanes, jit_options=JIT_OPTIONS, strict=False)
def _update_lanes(lanes: Any, c: Any, clear: Any) -> Any:
    if len(lanes) == 1:
        return lambda lanes, c, clear: (update_lane(lanes[0], c, clear),)
    return lambda lanes, c, clear: (update_lane(lanes[0], c, clear), *update_lanes(lanes[1:], c, clear))


@overload(pick, jit_options=JIT_OPTIONS, strict=False)
def _pick(values: Any, places: Any, begin: Any = 0) -> Any:
    if len(places) == 1:
        return lambda values, places, begin=0: (values[begin + places[0]],)
    return lambda values, places, begin=0: (
        values[begin + places[0]],
        *pick(values, places[1:], begin),
    )


# --- Packs: 16-byte accesses, which Numba does not make by itself -------------------------------------------

if hasattr(cuda, "extending"):
    from numba.cuda.extending import intrinsic

    def _vector(builder: Any, pointer: Any, i: Any, element: Any, lanes: int) -> Any:
        kind = ir.VectorType(element, lanes).as_pointer()
        return builder.bitcast(builder.gep(pointer, [i]), kind)

    @intrinsic
    def load_packs(typing_context: Any, pointers: Any, i: Any) -> Any:
        """Load the pack at element ``i`` of each pointer; return a tuple of lanes."""
        element = pointers.dtype.dtype
        count = PACK * 8 // element.bitwidth
        lanes = types.UniTuple(types.UniTuple(element, len(pointers)), count)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            of_llvm = context.get_value_type(element)
            vectors = [
                builder.load(
                    _vector(builder, builder.extract_value(arguments[0], k), arguments[1], of_llvm, count),
                    align=PACK,
                )
                for k in range(len(pointers))
            ]
            result = ir.Constant(context.get_value_type(lanes), ir.Undefined)
            for lane in range(count):
                for k, vector in enumerate(vectors):
                    value = builder.extract_element(vector, ir.Constant(ir.IntType(32), lane))
                    result = builder.insert_value(result, value, [lane, k])
            return result

        return lanes(pointers, i), generate

    @intrinsic
    def store_packs(typing_context: Any, pointers: Any, i: Any, lanes: Any) -> Any:
        """Store a tuple of lanes as the pack at element ``i`` of each pointer."""
        element = pointers.dtype.dtype

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            of_llvm = context.get_value_type(element)
            for k in range(len(pointers)):
                vector = ir.Constant(ir.VectorType(of_llvm, len(lanes)), ir.Undefined)
                for lane in range(len(lanes)):
                    value = builder.extract_value(arguments[2], [lane, k])
                    vector = builder.insert_element(vector, value, ir.Constant(ir.IntType(32), lane))
                pointer = builder.extract_value(arguments[0], k)
                builder.store(
                    vector, _vector(builder, pointer, arguments[1], of_llvm, len(lanes)), align=PACK
                )
            return context.get_dummy_value()

        return types.void(pointers, i, lanes), generate


# --- Kernels ------------------------------------------------------------------------------------------------


def make_part(kind: type, start: int, stop: int) -> Any:
    """Return the device function: coefficients -> one part of an update, of some of them."""
    if kind is type(None):

        def part(values: Any) -> Any:
            return None

    elif start == stop:

        def part(values: Any) -> Any:
            return kind()

    else:

        def part(values: Any) -> Any:
            return kind(*values[start:stop])

    return cuda.jit(device=True)(part)


def make_update(kinds: KernelTypes) -> Any:
    """Return the device function: all coefficients -> :class:`rules.Update`."""
    stops = list(accumulate(len(getattr(kind, "_fields", ())) for kind in kinds.parts))
    starts = [0, *stops[:-1]]
    conditioning, direction, decay, rule, average = map(make_part, kinds.parts, starts, stops)

    @cuda.jit(device=True)
    def update_of(values: Any) -> Any:
        return rules.Update(
            conditioning(values), direction(values), decay(values), rule(values), average(values)
        )

    return update_of


def make_step(kinds: KernelTypes, *, captured: bool) -> Callable[..., None]:
    """Return the kernel ``step`` or ``step_captured``.

    Both take ``(params, grads, states, size, head, packs, coefficients)``: the coefficients as a tuple of
    numbers, or, captured, as a pointer to them. ``step_captured`` also takes pointers to the step counter,
    where it counts, and to the flag that tells it to skip.
    """
    lanes = PACK // kinds.dtype.itemsize
    places = tuple(range(len(kinds.coefficients)))
    clear = None if kinds.clear is type(None) else True
    update_of = make_update(kinds)

    @cuda.jit(device=True)
    def step_elements(
        params: Any, grads: Any, states: Any, size: int, head: int, packs: int, values: Any
    ) -> None:
        c = update_of(values)
        read = (params, grads, *states)
        written = (params, *states) if clear is None else read

        k = cuda.grid(1)
        while k < packs:
            i = head + k * lanes
            store_packs(written, i, update_lanes(load_packs(read, i), c, clear))
            k += cuda.gridsize(1)

        k = cuda.grid(1)
        while k < size - packs * lanes:
            i = k if k < head else k + packs * lanes
            store(written, i, update_lane(load(read, i), c, clear))
            k += cuda.gridsize(1)

    def step(
        params: Any, grads: Any, states: Any, size: int, head: int, packs: int, coefficients: Any
    ) -> None:
        step_elements(params, grads, states, size, head, packs, coefficients)

    def step_captured(
        params: Any,
        grads: Any,
        states: Any,
        size: int,
        head: int,
        packs: int,
        coefficients: Any,
        count: Any,
        skip: Any,
    ) -> None:
        if skip[0] != 0:
            if clear is not None:
                k = cuda.grid(1)
                while k < size:
                    grads[k] = 0
                    k += cuda.gridsize(1)
            return
        step_elements(params, grads, states, size, head, packs, pick(coefficients, places))
        if cuda.grid(1) == 0:
            count[0] += 1

    return step_captured if captured else step
