"""The sum of one chunk, in machine-independent order: the leaf of the tree of :mod:`fastadam.kernels.norms`.

The compiler may not reorder additions of floats, so a loop over scalars would have one accumulator and run at a
tenth of the speed of memory; and if it may (``reassoc``), it picks as many accumulators as the machine's vectors
have room for, and the bits differ between machines. So the order is written out: intermediate code of LLVM with
vectors of ``LANES`` float64, which every machine's code generator cuts into the registers that it has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

CHUNK = 2048
"""Elements of a chunk."""

LANES = 32
"""Accumulators of a chunk: those of a warp, and of four 512-bit registers, as many as hide an addition."""

_LANES_OF_FLOAT64 = ir.VectorType(ir.DoubleType(), LANES)
_INDEX = ir.IntType(64)


def _fold(builder: Any, lanes: Any) -> Any:
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
        lanes = builder.fadd(lower, upper)
    return builder.extract_element(lanes, ir.IntType(32)(0))


def _sum_chunk(context: Any, builder: Any, array: Any, start: Any, size: Any, *, squares: bool) -> Any:
    """Emit the sum of ``size`` elements from ``start`` on, or of their squares; return its value."""
    element = array.data.type.pointee
    row = ir.VectorType(element, LANES)
    # A fused multiply-add rounds once where two operations round twice, which is the same where the product is
    # exact, as that of two float32 is in float64: the compiler may fuse there (1.3x faster in cache, Zen 4).
    flags = ("contract",) if isinstance(element, ir.FloatType) else ()

    def load(pointer: Any) -> Any:
        values = builder.load(builder.bitcast(pointer, row.as_pointer()))
        values.align = 1  # gradients may lie anywhere; it costs nothing
        return values if isinstance(element, ir.DoubleType) else builder.fpext(values, _LANES_OF_FLOAT64)

    def add(pointer: Any) -> None:
        values = load(pointer)
        terms = builder.fmul(values, values, flags=flags) if squares else values
        builder.store(builder.fadd(builder.load(lanes), terms, flags=flags), lanes)

    lanes = cgutils.alloca_once_value(builder, ir.Constant(_LANES_OF_FLOAT64, [0.0] * LANES))
    first = builder.gep(array.data, [start])
    rows = builder.udiv(size, _INDEX(LANES))
    with cgutils.for_range(builder, rows) as loop:
        add(builder.gep(first, [builder.mul(loop.index, _INDEX(LANES))]))
    # The rest of the last chunk: a row filled up with zeros. Lanes are never -0.0 here, so adding 0.0 to one
    # is adding nothing.
    rest = builder.urem(size, _INDEX(LANES))
    padded = cgutils.alloca_once(builder, element, LANES)
    with builder.if_then(builder.icmp_unsigned("!=", rest, _INDEX(0)), likely=False):
        cgutils.memset(builder, padded, _INDEX(LANES * context.get_abi_sizeof(element)), 0)
        rest_of_chunk = builder.gep(first, [builder.mul(rows, _INDEX(LANES))])
        cgutils.raw_memcpy(builder, padded, rest_of_chunk, rest, context.get_abi_sizeof(element))
        add(padded)
    return _fold(builder, builder.load(lanes))


def _emitter(values: Any, *, squares: bool) -> tuple[Any, Callable[..., Any]] | None:
    """Return type and code of a sum over an array of ``values``, for Numba."""
    if not (isinstance(values, types.Array) and values.layout == "C" and values.ndim == 1):
        return None  # Numba's typing error

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return _sum_chunk(context, builder, array, *arguments[1:], squares=squares)

    return types.float64(values, types.intp, types.intp), emit


@intrinsic
def sum_of_squares(typing_context: Any, values: Any, start: Any, size: Any) -> Any:
    """Sum the squares of ``values[start : start + size]``, at most ``CHUNK`` of float32 or float64."""
    return _emitter(values, squares=True)


@intrinsic
def sum_of_values(typing_context: Any, values: Any, start: Any, size: Any) -> Any:
    """Sum ``values[start : start + size]``, at most ``CHUNK`` float64, none of them -0.0."""
    return _emitter(values, squares=False)
