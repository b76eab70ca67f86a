"""Moments in one byte: how numbers become codes and back, in units of the scale that a block of them shares.

Codes are int8 for first moments (a sign and a magnitude) and uint8 for second moments, so that the type of an
array says what it holds. :mod:`fastadam.eight_bit` has the format to the bit, and the same in NumPy;
:mod:`fastadam.kernels.bounds` and :mod:`fastadam.kernels.views` have what a block has in common.

LLVM code on 32-bit integers, as in :mod:`fastadam.kernels.formats`: functions here emit it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types

from .bits import ABS, INF, SIGN, Bits

_BYTE, _INT, _FLOAT = ir.IntType(8), ir.IntType(32), ir.FloatType()

SIGNED, UNSIGNED = types.int8, types.uint8
"""The types of codes."""

OFFSET = 2.0**-15
"""Of a magnitude of a first moment: below it codes are linear, with zero among them."""

LARGEST = 1.75
"""Of what is finite in a block in which something is not, in units of the scale, the offset included."""

SHIFT, COARSEST = 17, 3
"""How far codes of second moments are shifted with the finest mantissa, 6 bits, and how much more."""

_OFFSET_BITS, TWO = 0x38000000, 0x40000000
"""The bits of the offset, and of 2."""

ROUNDS_SIGNED, ROUNDS_UNSIGNED = 1 << 19, 1 << 31
"""In place of random bits: to the nearest."""


class Signed(NamedTuple):
    """How a block of a first moment is read, and written."""

    scale: Any
    inverse: Any  # of the new scale


class Unsigned(NamedTuple):
    """How a block of a second moment is read, and written."""

    scale: Any
    shift: Any
    base: Any  # bits of what code 0 would be, were it not zero
    inverse: Any  # of the new scale
    new_shift: Any
    least: Any  # bits of what code 1 will be


def base(builder: Any, shift: Any) -> Any:
    """Emit the bits of what code 0 of a second moment would be, were it not zero."""
    return builder.sub(_INT(TWO), builder.shl(_INT(256), shift))


def decode_signed(builder: Any, code: Any, view: Signed, flagged: Any = None) -> Any:
    """Emit the float32 of a code; the largest is NaN where ``flagged``."""
    build = Bits(builder)
    wide = builder.sext(code, _INT)
    raised = build.masked(builder.shl(wide, _INT(20)), 127 << 20)
    number = build.float(builder.or_(raised, _INT(_OFFSET_BITS)))
    number = builder.fmul(builder.fsub(number, _FLOAT(OFFSET)), view.scale)
    if flagged is not None:
        is_largest = builder.icmp_unsigned("==", build.masked(wide, 127), _INT(127))
        number = builder.select(builder.and_(flagged, is_largest), _FLOAT(float("nan")), number)
    sign = build.masked(wide, SIGN)  # also of zero
    return build.float(builder.or_(build.masked(build.of(number), ABS), sign))


def encode_signed(builder: Any, number: Any, view: Signed, random: Any, clamped: Any = None) -> Any:
    """Emit the code of a float32, rounded by the lower 20 random bits.

    Where ``clamped``, what is not finite gets the largest code, and nothing else does.
    """
    build = Bits(builder)
    bits = build.of(number)
    scaled = builder.fadd(builder.fmul(build.magnitude(number), view.inverse), _FLOAT(OFFSET))
    code = builder.lshr(builder.add(build.of(scaled), build.masked(random, 0xFFFFF)), _INT(20))
    code = build.masked(code, 127)
    if clamped is not None:
        limited = builder.select(builder.fcmp_unordered("uge", scaled, _FLOAT(LARGEST)), _INT(126), code)
        is_finite = builder.icmp_unsigned("<", build.masked(bits, ABS), _INT(INF))
        code = builder.select(clamped, builder.select(is_finite, limited, _INT(127)), code)
    sign = build.masked(builder.lshr(bits, _INT(24)), 128)
    return builder.trunc(builder.or_(code, sign), _BYTE)


def decode_unsigned(builder: Any, code: Any, view: Unsigned, flagged: Any = None) -> Any:
    """Emit the float32 of a code; the largest is inf where ``flagged``."""
    build = Bits(builder)
    wide = builder.zext(code, _INT)
    number = build.float(builder.add(builder.shl(wide, view.shift), view.base))
    number = builder.fmul(number, view.scale)
    number = builder.select(builder.icmp_unsigned("==", wide, _INT(0)), _FLOAT(0), number)
    if flagged is not None:
        is_largest = builder.icmp_unsigned("==", wide, _INT(255))
        number = builder.select(builder.and_(flagged, is_largest), _FLOAT(float("inf")), number)
    return number


def encode_unsigned(builder: Any, number: Any, view: Unsigned, random: Any, clamped: Any = None) -> Any:
    """Emit the code of a float32 that is not negative, rounded by as many upper random bits as are cut off.

    What is not zero becomes no zero. ``clamped`` as for :func:`encode_signed`.
    """
    build = Bits(builder)
    scaled = builder.fmul(number, view.inverse)
    bits = build.of(scaled)  # in order, as numbers are, for what is not negative
    raised = builder.select(builder.icmp_signed(">", bits, view.least), bits, view.least)
    share = builder.lshr(random, builder.sub(_INT(32), view.new_shift))
    code = builder.lshr(builder.add(raised, share), view.new_shift)
    code = build.choose("==", build.masked(build.of(number), ABS), 0, _INT(0), code)
    if clamped is not None:
        limited = builder.select(builder.fcmp_unordered("uge", scaled, _FLOAT(LARGEST)), _INT(254), code)
        is_finite = builder.icmp_unsigned("<", build.masked(build.of(number), ABS), _INT(INF))
        code = builder.select(clamped, builder.select(is_finite, limited, _INT(255)), code)
    return builder.trunc(code, _BYTE)
