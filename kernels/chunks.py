"""The sum of one chunk, in machine-independent order: the leaf of the tree of :mod:`fastadam.kernels.norms`.

A compiler may not reorder additions of floats: a loop over scalars has one accumulator and runs at a tenth of
the speed of memory. Where it may (``reassoc``), it takes as many accumulators as suit the machine's vectors,
and the bits differ between machines. So the order is written out here, as LLVM code with vectors of ``LANES``
float64, which the code generator of each machine cuts into the registers that it has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .formats import DECODERS
from .tree import LANES

_LANES_OF_FLOAT64 = ir.VectorType(ir.DoubleType(), LANES)
_INDEX = ir.IntType(64)


def widen(builder: Any, row: Any, kind: Any = None) -> Any:
    """Return a row of elements, codes if their type is of some format, as float64."""
    if kind in DECODERS:
        row = DECODERS[kind](builder, row)
    return builder.fpext(row, _LANES_OF_FLOAT64) if isinstance(row.type.element, ir.FloatType) else row


def fold(builder: Any, lanes: Any, add: Callable[..., Any]) -> Any:
    """Add the upper half of the lanes to the lower half until one is left."""
    width = LANES
    while width > 1:
        width //= 2
        lower, upper = (
            builder.shuffle_vector(
                lanes,
                ir.Constant(lanes.type, ir.Undefined),
                ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(first, first + width))),
            )
            for first in (0, width)
        )
        lanes = add(lower, upper)
    return builder.extract_element(lanes, ir.IntType(32)(0))


def _add_rows(
    context: Any, builder: Any, element: Any, firsts: list[Any], size: Any, add: Callable[[list[Any]], None]
) -> None:
    """Emit ``add`` of pointers for each row of ``size`` elements from ``firsts`` on."""
    rows = builder.udiv(size, _INDEX(LANES))
    with cgutils.for_range(builder, rows) as loop:
        add([builder.gep(first, [builder.mul(loop.index, _INDEX(LANES))]) for first in firsts])
    # The rest of the last chunk: a row filled up with zeros. Lanes are never -0.0 here, so adding 0.0 to one
    # is adding nothing.
    rest, itemsize = builder.urem(size, _INDEX(LANES)), context.get_abi_sizeof(element)
    padded = [cgutils.alloca_once(builder, element, LANES) for _ in firsts]
    with builder.if_then(builder.icmp_unsigned("!=", rest, _INDEX(0)), likely=False):
        for first, row in zip(firsts, padded, strict=True):
            cgutils.memset(builder, row, _INDEX(LANES * itemsize), 0)
            rest_of_chunk = builder.gep(first, [builder.mul(rows, _INDEX(LANES))])
            cgutils.raw_memcpy(builder, row, rest_of_chunk, rest, itemsize)
        add(padded)


def _load_row(builder: Any, pointer: Any, element: Any) -> Any:
    terms = builder.load(builder.bitcast(pointer, ir.VectorType(element, LANES).as_pointer()))
    terms.align = 1  # gradients may lie anywhere; it costs nothing
    return terms


def _sum_chunk(context: Any, builder: Any, kind: Any, arguments: Any, *, squares: bool) -> Any:
    """Emit the sum of ``size`` elements from ``start`` on, or of their squares; return its value."""
    values, start, size = arguments
    element = context.get_data_type(kind.dtype)
    # A fused multiply-add does not round the product. The square of a float32 is exact in float64, so there
    # the compiler may fuse: the same bits, 1.3x faster in cache (Zen 4).
    flags = () if isinstance(element, ir.DoubleType) else ("contract",)

    def add(pointers: list[Any]) -> None:
        terms = widen(builder, _load_row(builder, pointers[0], element), kind.dtype)
        if squares:
            terms = builder.fmul(terms, terms, flags=flags)
        builder.store(builder.fadd(builder.load(lanes), terms, flags=flags), lanes)

    lanes = cgutils.alloca_once_value(builder, ir.Constant(_LANES_OF_FLOAT64, [0.0] * LANES))
    first = builder.gep(context.make_array(kind)(context, builder, values).data, [start])
    _add_rows(context, builder, element, [first], size, add)
    return fold(builder, builder.load(lanes), builder.fadd)


def _emitter(values: Any, *, squares: bool) -> tuple[Any, Callable[..., Any]] | None:
    """Return type and code of a sum over an array of ``values``, for Numba."""
    if not (isinstance(values, types.Array) and values.layout == "C" and values.ndim == 1):
        return None  # Numba's typing error

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _sum_chunk(context, builder, values, arguments, squares=squares)

    return types.float64(values, types.intp, types.intp), emit


@intrinsic
def sum_of_squares(typing_context: Any, values: Any, start: Any, size: Any) -> Any:
    """Sum the squares of ``values[start : start + size]``, at most ``CHUNK`` numbers or codes."""
    return _emitter(values, squares=True)


@intrinsic
def sum_of_values(typing_context: Any, values: Any, start: Any, size: Any) -> Any:
    """Sum ``values[start : start + size]``, at most ``CHUNK`` float64, none of them -0.0."""
    return _emitter(values, squares=False)


@intrinsic
def squares_of_step(typing_context: Any, after: Any, before: Any, size: Any) -> Any:
    """Sum the squares of ``after[:size] - before[:size]``, and those of ``after``: at most ``CHUNK`` float32.

    Each difference is rounded to float64, and so is its square.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def add(pointers: list[Any]) -> None:
            new, old = (widen(builder, _load_row(builder, pointer, element)) for pointer in pointers)
            for row, lanes, flags in ((builder.fsub(new, old), moved, ()), (new, left, ("contract",))):
                square = builder.fmul(row, row, flags=flags)
                builder.store(builder.fadd(builder.load(lanes), square, flags=flags), lanes)

        element, zeros = ir.FloatType(), ir.Constant(_LANES_OF_FLOAT64, [0.0] * LANES)
        moved, left = (cgutils.alloca_once_value(builder, zeros) for _ in range(2))
        firsts = [
            context.make_array(kind)(context, builder, value).data
            for kind, value in zip(signature.args[:2], arguments[:2], strict=True)
        ]
        _add_rows(context, builder, element, firsts, arguments[2], add)
        sums = [fold(builder, builder.load(lanes), builder.fadd) for lanes in (moved, left)]
        return context.make_tuple(builder, signature.return_type, sums)

    row = types.Array(types.float32, 1, "C")
    sums = types.UniTuple(types.float64, 2)
    return (sums(row, row, types.intp), emit) if after == before == row else None
