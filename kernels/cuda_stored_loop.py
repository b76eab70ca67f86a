"""The Numba-CUDA kernels of buffers that are not all of float32, as ``kernels/stored.cu`` does it.

Elements are loaded and stored as in :mod:`fastadam.kernels.storage`, from a stage: what a thread takes
together comes to its registers in one access for each buffer, and goes back in one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import cuda, types

from . import rules
from .cuda import KernelTypes
from .cuda_loop import make_update, pick
from .cuda_seen import make_see_stored
from .device_storage import StoredTypes
from .grids import MATH, PACK
from .rounding import Rounding
from .storage import at_element, load, load_param, store, store_param, word_of_param, words_of_moments
from .tree import LANES

TOGETHER = PACK // MATH.itemsize
"""Elements that a thread takes together."""


class _Use(NamedTuple):
    """Of each buffer, in the order in which kernels take them, whether it is read, and whether written."""

    reads: tuple[bool, ...]
    writes: tuple[bool, ...]


def use_of(kinds: KernelTypes, stored: StoredTypes) -> _Use:
    """Return which buffers a kernel reads and writes."""
    states = (True,) * len(stored.states)
    master, out = (True,) * (stored.master is not None), stored.out is not None
    reads_params = stored.master is None or stored.master != MATH  # else that has all of them
    clears = kinds.clear is not type(None)
    return _Use(
        (reads_params, True, *states, *master, *(False,) * out),
        (True, clears, *states, *master, *(True,) * out),
    )


# --- The stage ----------------------------------------------------------------------------------------------

if hasattr(cuda, "extending"):
    from numba.core import cgutils
    from numba.cuda.extending import intrinsic

    def _place(builder: Any, pointer: Any, at: Any, offset: int) -> Any:
        return builder.gep(pointer, [builder.add(at, ir.Constant(at.type, offset))])

    def make_stage(use: _Use, stride: int) -> tuple[Any, Any]:
        """Return what loads elements ``i``, ``i + stride``, ... of buffers to registers, and stores them.

        Next to each other, with a stride of 1, they are accessed at once, and must be aligned for that.
        """

        def vector(builder: Any, pointer: Any, i: Any) -> tuple[Any, int]:
            kind = ir.VectorType(pointer.type.pointee, TOGETHER)
            kept = pointer.type.pointee
            width = 4 if isinstance(kept, ir.FloatType) else kept.width // 8
            return builder.bitcast(builder.gep(pointer, [i]), kind.as_pointer()), TOGETHER * width

        def loaded(builder: Any, pointer: Any, i: Any) -> list[Any]:
            if stride > 1:
                return [builder.load(_place(builder, pointer, i, k * stride)) for k in range(TOGETHER)]
            place, align = vector(builder, pointer, i)
            values = builder.load(place, align=align)
            return [builder.extract_element(values, ir.Constant(ir.IntType(32), k)) for k in range(TOGETHER)]

        def stored(builder: Any, pointer: Any, i: Any, values: list[Any]) -> None:
            if stride > 1:
                for k, value in enumerate(values):
                    builder.store(value, _place(builder, pointer, i, k * stride))
                return
            place, align = vector(builder, pointer, i)
            together = ir.Constant(place.type.pointee, ir.Undefined)
            for k, value in enumerate(values):
                together = builder.insert_element(together, value, ir.Constant(ir.IntType(32), k))
            builder.store(together, place, align=align)

        @intrinsic
        def load_stage(typing_context: Any, arrays: Any, i: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                pointers = cgutils.unpack_tuple(builder, arguments[0], len(arrays))
                places = []
                for pointer, is_read in zip(pointers, use.reads, strict=True):
                    there = cgutils.alloca_once(builder, pointer.type.pointee, TOGETHER)
                    if is_read:
                        for k, value in enumerate(loaded(builder, pointer, arguments[1])):
                            builder.store(value, builder.gep(there, [ir.Constant(ir.IntType(64), k)]))
                    places.append(there)
                return context.make_tuple(builder, arrays, places)

            return arrays(arrays, i), generate

        @intrinsic
        def store_stage(typing_context: Any, arrays: Any, i: Any, stage: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                pointers, places = (cgutils.unpack_tuple(builder, arguments[k], len(arrays)) for k in (0, 2))
                for pointer, there, is_written in zip(pointers, places, use.writes, strict=True):
                    if is_written:
                        at = [builder.gep(there, [ir.Constant(ir.IntType(64), k)]) for k in range(TOGETHER)]
                        stored(builder, pointer, arguments[1], [builder.load(place) for place in at])
                return context.get_dummy_value()

            return types.void(arrays, i, stage), generate

        return load_stage, store_stage


# --- Elements -----------------------------------------------------------------------------------------------


def at_place(place: int | None) -> Any:
    """Return the device function: buffers -> that at a place, or None."""

    def nothing(arrays: Any) -> None:
        return None

    def one(arrays: Any) -> Any:
        return arrays[place]

    return cuda.jit(device=True)(nothing if place is None else one)


def make_rounding(stored: StoredTypes) -> Any:
    """Return the device function: the keys of the step and the index of element 0 -> :class:`Rounding`."""

    def nearest(bits: int, first: int) -> None:
        return None

    def at_random(bits: int, first: int) -> Rounding:
        return Rounding(np.uint32(bits), np.uint32(bits >> 32), np.uint64(first))

    return cuda.jit(device=True)(at_random if stored.rounds else nearest)


def _make_step_one(kinds: KernelTypes, stored: StoredTypes, *, observed: bool) -> Any:
    """Return the device function that steps one element: at ``k`` of some buffers, ``i`` of the whole.

    It returns what was seen, and that element where the kernel is ``observed``.
    """
    behind = 2 + len(stored.states)
    master_of = at_place(None if stored.master is None else behind)
    out_of = at_place(None if stored.out is None else behind + (stored.master is not None))
    clears = kinds.clear is not type(None)
    see = make_see_stored(has_moments=kinds.n_moments > 0, observed=observed)

    @cuda.jit(device=True)
    def step_one(arrays: Any, k: int, i: int, c: Any, rounding: Any, seen: Any) -> Any:
        params, grads, states = arrays[0], arrays[1], arrays[2:behind]
        master, drawn = master_of(arrays), at_element(rounding, i)
        before, grad = load_param(params, master, k), load(grads, k)
        param, state = rules.update(before, grad, load(states, k), c)
        store(states, k, state, words_of_moments(drawn, i))
        store_param(params, master, k, param, word_of_param(drawn, i))
        store(out_of(arrays), k, param)
        if clears:
            grads[k] = 0
        return see(seen, before, grad, params, master, states, k, c.rule.step_size)

    return step_one


# --- Kernels ------------------------------------------------------------------------------------------------


def make_step_stored(kinds: KernelTypes, *, captured: bool) -> Callable[..., None]:
    """Return the kernel ``step`` or ``step_captured``.

    Both take ``(arrays, keys, size, head, packs, coefficients)``: all buffers as a tuple of pointers, and the
    keys of stochastic rounding as a tuple of two numbers, or, captured, of a pointer to them; empty without.
    """
    stored: StoredTypes = kinds.stored  # type: ignore[assignment]
    places = tuple(range(len(kinds.coefficients)))
    clears, rounds = kinds.clear is not type(None), stored.rounds
    update_of, rounding_of = make_update(kinds), make_rounding(stored)
    step_one = _make_step_one(kinds, stored, observed=False)
    load_stage, store_stage = make_stage(use_of(kinds, stored), 1)

    @cuda.jit(device=True)
    def step_elements(arrays: Any, size: int, head: int, packs: int, c: Any, rounding: Any) -> None:
        k = cuda.grid(1)
        while k < packs:
            i = head + k * TOGETHER
            stage = load_stage(arrays, i)
            step_one(stage, 0, i, c, rounding, None)
            step_one(stage, 1, i + 1, c, rounding, None)
            step_one(stage, 2, i + 2, c, rounding, None)
            step_one(stage, 3, i + 3, c, rounding, None)
            store_stage(arrays, i, stage)
            k += cuda.gridsize(1)

        k = cuda.grid(1)
        while k < size - packs * TOGETHER:
            i = k if k < head else k + packs * TOGETHER
            step_one(arrays, i, i, c, rounding, None)
            k += cuda.gridsize(1)

    def step(arrays: Any, keys: Any, size: int, head: int, packs: int, coefficients: Any) -> None:
        rounding = rounding_of(keys[0], keys[1]) if rounds else rounding_of(0, 0)
        step_elements(arrays, size, head, packs, update_of(coefficients), rounding)

    def step_captured(
        arrays: Any,
        keys: Any,
        size: int,
        head: int,
        packs: int,
        coefficients: Any,
        count: Any,
        skip: Any,
    ) -> None:
        if skip[0] != 0:
            if clears:
                k = cuda.grid(1)
                while k < size:
                    arrays[1][k] = 0
                    k += cuda.gridsize(1)
            return
        rounding = rounding_of(keys[0][0], keys[0][1]) if rounds else rounding_of(0, 0)
        step_elements(arrays, size, head, packs, update_of(pick(coefficients, places)), rounding)
        if cuda.grid(1) == 0:
            count[0] += 1

    return step_captured if captured else step


def make_stored_piece(kinds: KernelTypes, *, observed: bool) -> Any:
    """Return the device function that steps the elements of a lane in a piece of a unit.

    As that of :mod:`fastadam.kernels.cuda_units_loop`, which returns what it saw, of buffers behind which the
    keys may lie.
    """
    stored: StoredTypes = kinds.stored  # type: ignore[assignment]
    rounds, use = stored.rounds, use_of(kinds, stored)
    n_arrays = len(use.reads)
    rounding_of, step_one = make_rounding(stored), _make_step_one(kinds, stored, observed=observed)
    load_stage, store_stage = make_stage(use, LANES)

    @cuda.jit(device=True)
    def step_piece(params: Any, grads: Any, states: Any, first: int, stop: int, c: Any, seen: Any) -> Any:
        everything = (params, grads, *states)
        arrays = everything[:n_arrays]
        rounding = (
            rounding_of(everything[n_arrays][0], everything[n_arrays][1]) if rounds else rounding_of(0, 0)
        )
        i = first
        while i + (TOGETHER - 1) * LANES < stop:
            stage = load_stage(arrays, i)
            seen = step_one(stage, 0, i, c, rounding, seen)
            seen = step_one(stage, 1, i + LANES, c, rounding, seen)
            seen = step_one(stage, 2, i + 2 * LANES, c, rounding, seen)
            seen = step_one(stage, 3, i + 3 * LANES, c, rounding, seen)
            store_stage(arrays, i, stage)
            i += TOGETHER * LANES
        while i < stop:
            seen = step_one(arrays, i, i, c, rounding, seen)
            i += LANES
        return seen

    return step_piece
