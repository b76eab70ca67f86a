"""Coefficients from a row of the table of :mod:`fastadam.kernels.units`, in compiled loops of the CPU."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

_INDEX = ir.IntType(64)


@intrinsic
def part_of_row(typing_context: Any, like: Any, coefficients: Any, row: Any, column: Any) -> Any:
    """Return a part of an update, of the type of ``like``, whose coefficients begin in a column of a row."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(coefficients)(context, builder, arguments[1])
        width = cgutils.unpack_tuple(builder, array.shape)[1]
        first = builder.add(builder.mul(arguments[2], width), arguments[3])
        at = builder.gep(array.data, [first])
        found = [builder.load(builder.gep(at, [_INDEX(k)])) for k in range(len(like))]
        return context.make_tuple(builder, like, found)

    return like(like, coefficients, row, column), emit
