"""How float32 numbers become 16-bit codes and back: bfloat16 and float16, to the nearest or at random.

Codes are integers to compilers: float16 comes as uint16, bfloat16 as int16, so that the type of an array says
what it holds (NumPy has no bfloat16, and Numba does not compute with float16).

- To the nearest, ties to even: the bits of ml_dtypes and of NumPy. A NaN becomes a NaN; what lies beyond the
  largest number becomes inf; subnormals are kept.
- Stochastic: the magnitude is rounded up with the probability of the share that would be cut off, so that the
  expected value is the number itself. Below the smallest normal float16 that share has 16 bits.

Random bits belong to (seed, step, element), by a hash: no state, and the same for any number of threads,
split and backend. The keys are formed from seed and step on the host (:mod:`fastadam.rounding`).

Written as LLVM code on 32-bit integers: Numba makes 64-bit arithmetic of Python's, half as many lanes.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .bits import ABS, INF, Bits
from .rounding import MULTIPLIER, WEYL, WEYL_OF_HIGH

_SHORT, _INT, _INDEX = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_HALF, _FLOAT = ir.HalfType(), ir.FloatType()

BFLOAT16, FLOAT16 = types.int16, types.uint16
"""The types of codes."""

_HALF_INF, _QUIET = 0x7C00, 0x00400000
_REBIAS = (127 - 15) << 23  # of exponents, float32 to float16
_LEAST_NORMAL_HALF = 0x38800000  # 2**-14
_BEYOND_HALF = (0x47800000, 0x477FF000)  # 2**16 at random, 65520 to the nearest: inf from here on
_ONE_HALF = 0x3F000000


@cache
def converts_half() -> bool:
    """Return whether the CPU compiled for converts float16; else LLVM would call what is not there."""
    if platform.machine().lower() in {"arm64", "aarch64"}:
        return True
    features = numba.config.CPU_FEATURES
    return "+f16c" in (llvm.get_host_cpu_features().flatten() if features is None else features).split(",")


def _is_for_gpu(builder: Any) -> bool:
    return str(builder.module.triple).startswith("nvptx")


def _shaped(kind: Any, like: Any) -> Any:
    """Return a type, or a vector of it where ``like`` is a vector."""
    return ir.VectorType(kind, like.type.count) if isinstance(like.type, ir.VectorType) else kind


# --- Scalars to codes; decoding works on vectors, too -------------------------------------------------------


def to_bfloat16(builder: Any, number: Any, random: Any | None) -> Any:
    """Emit the code of a float32."""
    build = Bits(builder)
    bits = build.of(number)
    if random is None:
        add = build.plus(build.masked(build.down(bits, 16), 1), 0x7FFF)
    else:
        add = build.masked(random, 0xFFFF)
    is_nan = builder.fcmp_unordered("uno", number, number)
    rounded = builder.select(is_nan, builder.or_(bits, _INT(_QUIET)), build.plus(bits, add))
    return build.code(build.down(rounded, 16))


def from_bfloat16(builder: Any, code: Any) -> Any:
    """Emit the float32 of a code, or of each in a vector."""
    wide = _shaped(_INT, code)
    places = ir.Constant(wide, 16 if wide is _INT else [16] * wide.count)
    return builder.bitcast(builder.shl(builder.zext(code, wide), places), _shaped(_FLOAT, code))


def to_float16(builder: Any, number: Any, random: Any | None) -> Any:
    """Emit the code of a float32."""
    if random is None and (_is_for_gpu(builder) or converts_half()):
        return builder.bitcast(builder.fptrunc(number, _HALF), _SHORT)
    build = Bits(builder)
    bits = build.of(number)
    magnitude = build.masked(bits, ABS)
    normal = build.plus(magnitude, -_REBIAS)
    if random is None:
        normal = build.plus(normal, build.plus(build.masked(build.down(normal, 13), 1), 0x0FFF))
    else:
        normal = build.plus(normal, build.masked(random, 0x1FFF))
    normal = build.down(normal, 13)
    small = builder.select(  # not too large to be converted, also where it is not asked for
        builder.icmp_unsigned("<", magnitude, _INT(_LEAST_NORMAL_HALF)), build.float(magnitude), _FLOAT(0)
    )
    if random is None:  # one half has the unit of subnormals in its last place: the addition rounds
        subnormal = build.plus(build.of(builder.fadd(small, _FLOAT(0.5))), -_ONE_HALF)
    else:
        units = builder.fptoui(builder.fmul(small, _FLOAT(2.0**40)), _INT)  # to 2**-16 of the last place
        subnormal = build.down(build.plus(units, build.masked(random, 0xFFFF)), 16)
    code = build.choose("<", magnitude, _LEAST_NORMAL_HALF, subnormal, normal)
    code = build.choose(">=", magnitude, _BEYOND_HALF[random is None], _INT(_HALF_INF), code)
    code = build.choose(">", magnitude, INF, _INT(0x7E00), code)
    return build.code(builder.or_(code, build.masked(build.down(bits, 16), 0x8000)))


def from_float16(builder: Any, code: Any) -> Any:
    """Emit the float32 of a code, or of each in a vector."""
    if _is_for_gpu(builder):  # spelled out: LLVM would load four of them in two accesses, as float16
        kind = ir.FunctionType(_FLOAT, [_SHORT])
        return builder.call(ir.InlineAsm(kind, "cvt.f32.f16 $0, $1;", "=f,h"), [code])
    if converts_half():
        return builder.fpext(builder.bitcast(code, _shaped(_HALF, code)), _shaped(_FLOAT, code))
    ints, floats = _shaped(_INT, code), _shaped(_FLOAT, code)

    def constant(kind: Any, value: Any) -> Any:
        return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)

    bits = builder.zext(code, ints)
    magnitude = builder.and_(bits, constant(ints, 0x7FFF))
    raised = builder.shl(magnitude, constant(ints, 13))
    # A product with 2**112 moves the exponent, and makes normal numbers of subnormals; exact.
    scaled = builder.fmul(builder.bitcast(raised, floats), constant(floats, 2.0**112))
    is_finite = builder.icmp_unsigned("<", magnitude, constant(ints, _HALF_INF))
    beyond = builder.or_(raised, constant(ints, INF))
    found = builder.select(is_finite, builder.bitcast(scaled, ints), beyond)
    sign = builder.shl(builder.and_(bits, constant(ints, 0x8000)), constant(ints, 16))
    return builder.bitcast(builder.or_(found, sign), floats)


ENCODERS: dict[types.Type, Callable[..., Any]] = {BFLOAT16: to_bfloat16, FLOAT16: to_float16}
DECODERS: dict[types.Type, Callable[..., Any]] = {BFLOAT16: from_bfloat16, FLOAT16: from_float16}


def _encoder(kind: types.Type, random: types.Type | None) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ENCODERS[kind](builder, arguments[0], arguments[1] if random else None)

    return (kind(types.float32, random) if random else kind(types.float32)), emit


@intrinsic
def bfloat16_nearest(typing_context: Any, number: Any) -> Any:
    """Return the code of a float32."""
    return _encoder(BFLOAT16, None)


@intrinsic
def bfloat16_stochastic(typing_context: Any, number: Any, random: Any) -> Any:
    """Return the code of a float32, rounded by the lowest 16 random bits."""
    return _encoder(BFLOAT16, types.uint32)


@intrinsic
def float16_nearest(typing_context: Any, number: Any) -> Any:
    """Return the code of a float32."""
    return _encoder(FLOAT16, None)


@intrinsic
def float16_stochastic(typing_context: Any, number: Any, random: Any) -> Any:
    """Return the code of a float32, rounded by the lowest 13 random bits, 16 where the code is subnormal."""
    return _encoder(FLOAT16, types.uint32)


@intrinsic
def decoded(typing_context: Any, code: Any) -> Any:
    """Return the float32 of a code."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return DECODERS[code](builder, arguments[0])

    return (types.float32(code), emit) if code in DECODERS else None


# --- A float32 in two halves --------------------------------------------------------------------------------


@intrinsic
def halves(typing_context: Any, number: Any) -> Any:
    """Return the bfloat16 nearest to a float32, ties away from zero, and what is left: exact together."""
    pair = types.UniTuple(types.int16, 2)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        build = Bits(builder)
        bits = build.of(arguments[0])
        is_nan = builder.icmp_unsigned(">", build.masked(bits, ABS), _INT(INF))
        quiet = builder.or_(build.masked(bits, 0x80000000), _INT(0x7FC00000))
        bits = builder.select(is_nan, quiet, bits)  # one that is full of ones would turn its sign around
        code = build.down(build.plus(bits, 0x8000), 16)
        rest = builder.sub(bits, build.up(code, 16))
        return context.make_tuple(builder, pair, [build.code(code), build.code(rest)])

    return pair(types.float32), emit


@intrinsic
def joined(typing_context: Any, code: Any, rest: Any) -> Any:
    """Return the float32 of two halves."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        build = Bits(builder)
        high = build.up(builder.zext(arguments[0], _INT), 16)
        return build.float(builder.add(high, builder.sext(arguments[1], _INT)))

    return types.float32(types.int16, types.int16), emit


# --- Random bits --------------------------------------------------------------------------------------------


def place(builder: Any, first: Any, i: Any) -> Any:
    """Emit what element ``first + i`` adds to a key; the next one adds ``WEYL`` more."""
    return builder.mul(builder.add(builder.trunc(first, _INT), builder.trunc(i, _INT)), _INT(WEYL))


def mixed(builder: Any, word: Any) -> Any:
    """Emit the random bits of a key with a place."""
    return builder.mul(builder.xor(word, builder.lshr(word, _INT(15))), _INT(MULTIPLIER))


@intrinsic
def random_bits(typing_context: Any, key: Any, first: Any, i: Any) -> Any:
    """Return 32 random bits of element ``first + i`` for a key, of which its lower 32 bits count.

    What depends on the upper bits is in the key (:func:`fastadam.kernels.storage.at_element`): 64-bit
    arithmetic on the index of each element would make the whole loop take 1.2 times as long.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        key, first, index = arguments
        return mixed(builder, builder.add(place(builder, first, index), key))

    is_index = isinstance(i, types.Integer) and i.bitwidth == 64
    return (types.uint32(types.uint32, types.uint64, i), emit) if is_index else None


@intrinsic
def with_high_index(typing_context: Any, key: Any, first: Any, start: Any) -> Any:
    """Return the key of the 2**32 elements that element ``first + start`` belongs to."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        high = builder.lshr(builder.add(arguments[1], arguments[2]), _INDEX(32))
        return builder.add(arguments[0], builder.mul(builder.trunc(high, _INT), _INT(WEYL_OF_HIGH)))

    return types.uint32(types.uint32, types.uint64, start), emit


@intrinsic
def upper_half(typing_context: Any, random: Any) -> Any:
    """Return the upper 16 of 32 bits."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.lshr(arguments[0], _INT(16))

    return types.uint32(types.uint32), emit
