"""The conversions of moments in 8 bits as kernels do them, on arrays; all of one scale."""

from __future__ import annotations

from functools import cache

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastadam.kernels import eight_bits
from fastadam.kernels.compiling import JIT_OPTIONS

INT, BOOL = ir.IntType(32), ir.IntType(1)
ABS, FINE = np.uint32(0x7FFFFFFF), np.uint32(0x7FFFFFFC)


@intrinsic
def decoded(typing_context, code, scale, word, flagged):
    """Return the float32 of a code; ``word`` are the bits of the scale, ``scale`` what they mean."""

    def emit(context, builder, signature, arguments):
        code_, scale_, word_, flagged_ = arguments
        if code == types.int8:
            view = eight_bits.Signed(scale_, None)
            return eight_bits.decode_signed(builder, code_, view, flagged_)
        shift = builder.add(builder.and_(word_, INT(3)), INT(17))
        view = eight_bits.Unsigned(scale_, shift, eight_bits.base(builder, shift), None, None, None)
        return eight_bits.decode_unsigned(builder, code_, view, flagged_)

    return types.float32(code, scale, word, flagged), emit


@intrinsic
def encoded(typing_context, like, number, inverse, word, random, clamped):
    """Return the code of a float32, of the type of ``like``."""

    def emit(context, builder, signature, arguments):
        _, number_, inverse_, word_, random_, clamped_ = arguments
        if like == types.int8:
            view = eight_bits.Signed(None, inverse_)
            return eight_bits.encode_signed(builder, number_, view, random_, clamped_)
        shift = builder.add(builder.and_(word_, INT(3)), INT(17))
        least = builder.add(eight_bits.base(builder, shift), builder.shl(INT(1), shift))
        view = eight_bits.Unsigned(None, None, None, inverse_, shift, least)
        return eight_bits.encode_unsigned(builder, number_, view, random_, clamped_)

    return like(like, number, inverse, word, random, clamped), emit


@cache
def loops():
    @numba.njit(**JIT_OPTIONS)
    def decode_each(codes, scale, word, flagged, out):
        for i in range(codes.size):
            out[i] = decoded(codes[i], scale, word, flagged)

    @numba.njit(**JIT_OPTIONS)
    def encode_each(values, inverse, word, random, clamped, out):
        for i in range(values.size):
            out[i] = encoded(out[i], values[i], inverse, word, random[i], clamped)

    return decode_each, encode_each


def scale_of(dtype, word):
    """Return what the bits of a scale mean."""
    return (word & (ABS if dtype == np.int8 else FINE)).view(np.float32)[()]


def decode(codes, word):
    """Return the numbers of codes, int8 or uint8, beside a scale with these bits."""
    out = np.empty(codes.size, np.float32)
    loops()[0](codes, scale_of(codes.dtype, word), word, bool(word > ABS), out)
    return out


def encode(values, dtype, word, random=None, clamped=False):
    """Return the codes of numbers; to the nearest without random bits."""
    out = np.empty(values.size, dtype)
    if random is None:
        nearest = eight_bits.ROUNDS_SIGNED if dtype == np.int8 else eight_bits.ROUNDS_UNSIGNED
        random = np.full(values.size, nearest, np.uint32)
    with np.errstate(divide="ignore"):
        inverse = np.float32(1) / scale_of(dtype, word)
    loops()[1](values, inverse, word, random, clamped, out)
    return out
