"""Steps of whole rows of elements, looked at on the way: the leaf of :mod:`fastadam.kernels.telemetry`.

A row is ``LANES`` elements of a chunk, those that one round of :mod:`fastadam.kernels.norms` adds to its
accumulators. It is loaded once; the rule, sums of squares and the count of vanished updates are formed while
it is in registers. Three passes over a chunk of 2,048 in the cache, before and after its step, took twice the
time of a step in the cache, and 1.6 times in memory: meanwhile nothing was fetched.

The rule stays the scalar one of :mod:`fastadam.kernels.rules`: it is called for each lane, in a loop from and
to buffers of the stack, of which LLVM makes vector code without the buffers. What is around is written out as
LLVM code, with vectors of ``LANES`` elements: compilers do not reorder sums of floats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from . import rules
from .chunks import fold, widen
from .tree import LANES

PREFETCH = 3072
"""Bytes ahead of a row that are fetched to the second cache (32 Mi elements of float32, Zen 4: a thread takes
1.1 times as long as without telemetry from 2,048 to 4,096 bytes, 1.3 further or nearer, and 1.6 without)."""

CACHE_LINE = 64

SUMS = 3
"""Of squares: gradients, differences of the parameters, parameters after the step."""

WORK = LANES * (SUMS + 6)
"""Float64 that a thread works with: the lanes of the sums, and a row of each of at most six arrays.

These rows are not on the stack: LLVM 22 fills arrays of it by aligned vectors, and does not always align it.
"""

_INDEX, _COUNT, _BYTES = ir.IntType(64), ir.IntType(32), ir.IntType(8).as_pointer()


def moved_by(grad: Any, moments: Any) -> Any:
    """Return what is 0 where there is no update: the first moment, or the gradient where there is none."""
    return moments[0] if len(moments) else grad


@overload(moved_by, strict=False)
def _compiled_moved_by(grad: Any, moments: Any) -> Any:
    return (lambda grad, moments: moments[0]) if len(moments) else (lambda grad, moments: grad)  # noqa: ARG005


def _step_lane(param: Any, grad: Any, state: Any, c: Any) -> Any:
    """Step one element; return with it 1 if its update vanished, and 0 if not."""
    after, state_after = rules.update(param, grad, state, rules.Update(*c))
    moments, _ = rules.split(state_after, c[4])  # an average is no update
    vanished = rules.vanishes(param, after, moved_by(grad, moments), c[3].step_size)
    return after, state_after, np.int32(vanished)


class _Emitter:
    """Emits the step of rows of arrays, from the same element on."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        params, grads, states, work, _, _, c = signature.args[:7]
        self.context, self.builder, self.c = context, builder, c
        self._value_of_c, start = arguments[6], arguments[4]
        self.element = context.get_data_type(params.dtype)
        self.itemsize = context.get_abi_sizeof(self.element)
        self._state = types.UniTuple(params.dtype, len(states))
        self._lane = types.Tuple((params.dtype, self._state, types.int32))(
            params.dtype, params.dtype, self._state, c
        )
        values = [arguments[0], arguments[1], *cgutils.unpack_tuple(builder, arguments[2])]
        self.arrays = [
            builder.gep(self._data(kind, value), [start])
            for kind, value in zip([params, grads, *states], values, strict=True)
        ]
        self._before, self._after = self._rows(), self._rows()
        self._counts = cgutils.alloca_once_value(builder, _constant(_COUNT, 0))
        # In registers while rows are stepped.
        data = self._data(work, arguments[3])
        rows_of_work = [builder.gep(data, [_INDEX(LANES * k)]) for k in range(SUMS + len(values))]
        self._memory = rows_of_work[:SUMS]
        self.padded = [builder.bitcast(row, self.element.as_pointer()) for row in rows_of_work[SUMS:]]
        lanes = [self._load(memory, ir.DoubleType()) for memory in self._memory]
        self._sums = [cgutils.alloca_once_value(builder, lane) for lane in lanes]

    def _data(self, kind: Any, value: Any) -> Any:
        return self.context.make_array(kind)(self.context, self.builder, value).data

    def _rows(self) -> list[Any]:
        return [cgutils.alloca_once(self.builder, self.element, LANES) for _ in self.arrays]

    def _load(self, pointer: Any, element: Any = None) -> Any:
        row = ir.VectorType(element or self.element, LANES)
        loaded = self.builder.load(self.builder.bitcast(pointer, row.as_pointer()))
        loaded.align = 1  # buffers may lie anywhere
        return loaded

    def store(self, row: Any, pointer: Any) -> None:
        """Store a row, at any address."""
        self.builder.store(row, self.builder.bitcast(pointer, row.type.as_pointer())).align = 1

    def _add_square(self, lanes: Any, terms: Any, flags: tuple[str, ...]) -> None:
        square = self.builder.fmul(terms, terms, flags=flags)
        self.builder.store(self.builder.fadd(self.builder.load(lanes), square, flags=flags), lanes)

    def prefetch(self, offset: Any) -> None:
        """Have the row fetched that comes ``PREFETCH`` bytes behind that of an offset."""
        number = ir.IntType(32)
        function = self.builder.module.declare_intrinsic(
            "llvm.prefetch", [_BYTES], ir.FunctionType(ir.VoidType(), [_BYTES, number, number, number])
        )
        for array in self.arrays:
            row = self.builder.bitcast(self.builder.gep(array, [offset]), _BYTES)
            for line in range(PREFETCH, PREFETCH + LANES * self.itemsize, CACHE_LINE):
                ahead = self.builder.gep(row, [_INDEX(line)])
                # To be read, kept in all caches but the first, data.
                self.builder.call(function, [ahead, number(0), number(2), number(1)])

    def row(self, pointers: list[Any], active: Any = None) -> None:
        """Step a row; of lanes that are not ``active`` nothing counts."""
        builder = self.builder
        rows = [self._load(pointer) for pointer in pointers]
        for row, buffer in zip(rows, self._before, strict=True):
            self.store(row, buffer)
        counts = cgutils.alloca_once(builder, _COUNT, LANES)
        with cgutils.for_range(builder, _INDEX(LANES)) as loop:
            param, grad, *state = (builder.load(builder.gep(b, [loop.index])) for b in self._before)
            lane = [param, grad, self.context.make_tuple(builder, self._state, state), self._value_of_c]
            stepped = self.context.compile_internal(builder, _step_lane, self._lane, lane)
            param, state, count = cgutils.unpack_tuple(builder, stepped)
            state = cgutils.unpack_tuple(builder, state)
            for value, buffer in zip([param, *state], [self._after[0], *self._after[2:]], strict=True):
                builder.store(value, builder.gep(buffer, [loop.index]))
            builder.store(count, builder.gep(counts, [loop.index]))
        # The moments first, as in :func:`fastadam.kernels.cpu.step_element`.
        for buffer, pointer in [*zip(self._after, pointers, strict=True)][:1:-1]:
            self.store(self._load(buffer), pointer)
        after, vanished = self._load(self._after[0]), self._load(counts, _COUNT)
        self.store(after, pointers[0])

        if active is not None:
            after = builder.select(active, after, _constant(self.element, 0.0))
            vanished = builder.select(active, vanished, _constant(_COUNT, 0))
        builder.store(builder.add(builder.load(self._counts), vanished), self._counts)
        before, grads, after = (widen(builder, row) for row in (rows[0], rows[1], after))
        # A fused multiply-add does not round squares. That of a float32 is exact, that of a difference not.
        exact = ("contract",) if isinstance(self.element, ir.FloatType) else ()
        self._add_square(self._sums[0], grads, exact)
        self._add_square(self._sums[1], builder.fsub(after, before), ())
        self._add_square(self._sums[2], after, exact)

    def finish(self) -> Any:
        """Put the sums back; return how many updates vanished."""
        for lanes, memory in zip(self._sums, self._memory, strict=True):
            self.store(self.builder.load(lanes), memory)
        count = fold(self.builder, self.builder.load(self._counts), self.builder.add)
        return self.builder.zext(count, _INDEX)


def _constant(element: Any, value: Any) -> Any:
    return ir.Constant(ir.VectorType(element, LANES), [value] * LANES)


def _emit_rows(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    emitter, rows = _Emitter(context, builder, signature, arguments), arguments[5]
    with cgutils.for_range(builder, rows) as loop:
        offset = builder.mul(loop.index, _INDEX(LANES))
        emitter.prefetch(offset)
        emitter.row([builder.gep(array, [offset]) for array in emitter.arrays])
    return emitter.finish()


def _emit_part(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Emit the step of a row in which other elements are zeros, and count for nothing."""
    emitter = _Emitter(context, builder, signature, arguments)
    size, lane = arguments[5], arguments[7]
    places = [builder.gep(row, [lane]) for row in emitter.padded]
    for row, place, array in zip(emitter.padded, places, emitter.arrays, strict=True):
        emitter.store(_constant(emitter.element, 0.0), row)
        cgutils.raw_memcpy(builder, place, array, size, emitter.itemsize)
    first, behind = (builder.trunc(x, _COUNT) for x in (lane, builder.add(lane, size)))
    lanes = ir.Constant(ir.VectorType(_COUNT, LANES), list(range(LANES)))
    active = builder.and_(
        builder.icmp_unsigned(">=", lanes, _broadcast(builder, first)),
        builder.icmp_unsigned("<", lanes, _broadcast(builder, behind)),
    )
    emitter.row(emitter.padded, active)
    for k, (place, array) in enumerate(zip(places, emitter.arrays, strict=True)):
        if k != 1:  # gradients are only read
            cgutils.raw_memcpy(builder, array, place, size, emitter.itemsize)
    return emitter.finish()


def _broadcast(builder: Any, number: Any) -> Any:
    one = builder.insert_element(_constant(_COUNT, ir.Undefined), number, _COUNT(0))
    return builder.shuffle_vector(one, _constant(_COUNT, ir.Undefined), _constant(_COUNT, 0))


def _typed(emit: Callable[..., Any], arrays: tuple[Any, ...], *rest: Any) -> Any:
    if not all(isinstance(a, types.Array) and a.layout == "C" and a.ndim == 1 for a in arrays):
        return None  # Numba's typing error
    params, grads, *states, work = arrays
    return types.intp(params, grads, types.Tuple(states), work, types.intp, types.intp, *rest), emit


@intrinsic
def step_rows(
    typing_context: Any, params: Any, grads: Any, states: Any, work: Any, start: Any, rows: Any, c: Any
) -> Any:
    """Step some whole rows from element ``start`` on; return how many updates vanished.

    ``work`` is ``WORK`` float64: adds to its first ``LANES`` for each of the ``SUMS``. ``c`` is the parts of
    :class:`rules.Update`.
    """
    return _typed(_emit_rows, (params, grads, *states, work), c)


@intrinsic
def step_part(
    typing_context: Any,
    params: Any,
    grads: Any,
    states: Any,
    work: Any,
    start: Any,
    size: Any,
    c: Any,
    lane: Any,
) -> Any:
    """Do the same with ``size`` elements that are a part of a row, the first in lane ``lane`` of it."""
    return _typed(_emit_part, (params, grads, *states, work), c, types.intp)


@intrinsic
def sum_of_lanes(typing_context: Any, work: Any, k: Any) -> Any:
    """Fold the lanes of the ``k``-th of the ``SUMS``."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row = ir.VectorType(ir.DoubleType(), LANES)
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.gep(data, [builder.mul(arguments[1], _INDEX(LANES))])
        lanes = builder.load(builder.bitcast(place, row.as_pointer()))
        lanes.align = 8
        return fold(builder, lanes, builder.fadd)

    return types.float64(work, types.intp), emit
