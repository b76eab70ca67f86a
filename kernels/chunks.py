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


def _sum_chunk(context: Any, builder: Any, kind: Any, arguments: Any, *, squares: bool) -> Any:
    """Emit the sum of ``size`` elements from ``start`` on, or of their squares; return its value."""
    values, start, size = arguments
    element = context.get_data_type(kind.dtype)
    row = ir.VectorType(element, LANES)
    # A fused multiply-add does not round the product. The square of a float32 is exact in float64, so there
    # the compiler may fuse: the same bits, 1.3x faster in cache (Zen 4).
    flags = () if isinstance(element, ir.DoubleType) else ("contract",)

    def add(pointer: Any) -> None:
        terms = builder.load(builder.bitcast(pointer, row.as_pointer()))
        terms.align = 1  # gradients may lie anywhere; it costs nothing
        terms = widen(builder, terms, kind.dtype)
        if squares:
            terms = builder.fmul(terms, terms, flags=flags)
        builder.store(builder.fadd(builder.load(lanes), terms, flags=flags), lanes)

    lanes = cgutils.alloca_once_value(builder, ir.Constant(_LANES_OF_FLOAT64, [0.0] * LANES))
    first = builder.gep(context.make_array(kind)(context, builder, values).data, [start])
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
