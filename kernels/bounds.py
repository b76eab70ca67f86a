"""Bounds of the new states of a block of 128 elements, which become its scales.

Of Adam's moments they are known before these are: a scale follows the largest gradient of the block as the
moments follow theirs. So a step takes one look at the gradients of a block, which are in the cache then, and
one pass over all else. Of other rules the first look computes the new states, the second computes them again
and stores them. :mod:`fastadam.eight_bit` has the format to the bit.

Functions here, in :mod:`fastadam.kernels.views` and in :mod:`fastadam.kernels.elements` take a tuple of
states in any storage, of which those in 8 bits have scales. What is formed for a block is a tuple with
something for each state. All of it is emitted as LLVM code: as Numba functions, one for each state of each
storage, it took 15 s to compile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .bits import ABS, INF, Bits
from .eight_bits import OFFSET, SIGNED, UNSIGNED

_INT, _FLOAT, _BOOL = ir.IntType(32), ir.FloatType(), ir.IntType(1)

FINE = 0x7FFFFFFC
"""A scale of second moments without the lowest bits, which say how coarse its mantissas are, and its flag."""

_LEAST, _LARGEST = 0x00800000, 0x7F088888
"""Of scales: 2**-126, of which the inverse is finite, and 2**128 / 1.875, of which all codes are."""

_UP = 1 + 2.0**-20
"""Covers what rounding could add to a moment beyond its bound."""

_PER_PEAK, _PER_SQUARE = _UP / (1.875 - OFFSET), _UP / 1.875
"""Of a scale, to the largest magnitude and square: the largest code is 1.875, less an offset."""


def in_blocks(states: Any) -> list[tuple[int, Any]]:
    """Return place and type of the states in blocks."""
    return [(k, state.dtype) for k, state in enumerate(states) if state.dtype in {SIGNED, UNSIGNED}]


def scale_at(builder: Any, scales: Any, k: int, block: Any) -> Any:
    """Emit the pointer to the bits of the scale of a block of the ``k``-th state."""
    at = builder.gep(cgutils.unpack_tuple(builder, scales)[k], [block])
    return builder.bitcast(at, _INT.as_pointer())


def is_flagged(builder: Any, word: Any) -> Any:
    """Emit whether the scale of these bits is that of a block in which something is not finite."""
    return builder.icmp_signed("<", word, _INT(0))


def _bounds_of(states: Any) -> types.UniTuple:
    return types.UniTuple(types.uint32, len(states))


def _single(value: float) -> Any:
    """Return a constant, rounded to float32: LLVM takes only those."""
    return _FLOAT(float(np.float32(value)))


def _follows(builder: Any, rule: Any, moment: int, scale: Any, number: Any, share: float) -> Any:
    """Emit the bound of a moment of this scale that moves towards a number."""
    kind, value = rule

    def coefficient(name: str) -> Any:
        return cgutils.unpack_tuple(builder, value)[kind.instance_class._fields.index(f"{name}{moment}")]

    kept = builder.fmul(builder.fmul(coefficient("beta"), scale), _single(_UP))
    added = builder.fmul(builder.fmul(coefficient("one_minus_beta"), number), _single(share))
    return builder.fadd(kept, added)


@intrinsic
def larger_magnitude(typing_context: Any, peak: Any, number: Any) -> Any:
    """Return the larger of some bits and those of the magnitude of a float32; NaN has the largest."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        build = Bits(builder)
        return build.larger(build.masked(build.of(arguments[1]), ABS), arguments[0])

    is_single = number == types.float32
    return (types.uint32(types.uint32, types.float32), emit) if is_single else None


@intrinsic
def no_bounds(typing_context: Any, states: Any) -> Any:
    """Return bounds below all others, as bits."""
    bounds = _bounds_of(states)
    return bounds(states), lambda context, *_: ir.Constant(context.get_value_type(bounds), [0] * bounds.count)


@intrinsic
def with_step(
    typing_context: Any, bounds: Any, states: Any, scales: Any, block: Any, peak: Any, rule: Any
) -> Any:
    """Raise bounds to those of elements that are stepped, whose gradients reach ``peak``, given as bits.

    Where the square of that is not finite, no bound is: a second moment would not be, in whatever storage.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        build, found = Bits(builder), cgutils.unpack_tuple(builder, arguments[0])
        largest = build.float(arguments[4])
        square = builder.fmul(largest, largest)
        of_rule, second = (rule, arguments[5]), None
        for k, kind in in_blocks(states):
            word = builder.load(scale_at(builder, arguments[2], k, arguments[3]))
            scale = build.float(build.masked(word, ABS if kind == SIGNED else FINE))
            if kind == SIGNED:
                followed = _follows(builder, of_rule, 1, scale, largest, _PER_PEAK)
                # Not finite where the square is not; as it is else.
                bound = build.of(builder.fadd(followed, builder.fmul(square, _FLOAT(0))))
            elif second is None:
                bound = build.of(_follows(builder, of_rule, 2, scale, square, _PER_SQUARE))
                bound = second = build.masked(build.plus(bound, 3), 0xFFFFFFFC)
            else:  # the maximum of second moments
                bound = build.larger(build.of(scale), second)
            found[k] = build.larger(build.larger(bound, _LEAST), found[k])
        return context.make_tuple(builder, bounds, found)

    return bounds(bounds, states, scales, block, peak, rule), emit


@intrinsic
def no_extents(typing_context: Any, states: Any) -> Any:
    """Return for each state the largest and the least magnitude but zero of no elements, as bits."""
    extents = types.UniTuple(types.uint32, 2 * len(states))
    found = [0, ABS] * len(states)
    return extents(states), lambda context, *_: ir.Constant(context.get_value_type(extents), found)


@intrinsic
def with_new(typing_context: Any, extents: Any, states: Any, numbers: Any, finite_only: Any) -> Any:
    """Widen extents to the new states of an element; with ``finite_only``, to those that are finite."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        build, found = Bits(builder), cgutils.unpack_tuple(builder, arguments[0])
        values, is_any = cgutils.unpack_tuple(builder, arguments[2]), builder.not_(arguments[3])
        for k, kind in in_blocks(states):
            bits = build.masked(build.of(values[k]), ABS)
            counts = builder.or_(is_any, builder.icmp_unsigned("<", bits, _INT(INF)))
            found[2 * k] = build.larger(builder.select(counts, bits, _INT(0)), found[2 * k])
            if kind == UNSIGNED:
                found[2 * k + 1] = _less(builder, bits, found[2 * k + 1])
        return context.make_tuple(builder, extents, found)

    return extents(extents, states, numbers, finite_only), emit


@intrinsic
def with_left(typing_context: Any, extents: Any, states: Any, numbers: Any) -> Any:
    """Widen extents downwards, to the states of an element that is kept as it is."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        build, found = Bits(builder), cgutils.unpack_tuple(builder, arguments[0])
        values = cgutils.unpack_tuple(builder, arguments[2])
        for k, kind in in_blocks(states):
            if kind == UNSIGNED:
                bits = build.masked(build.of(values[k]), ABS)
                found[2 * k + 1] = _less(builder, bits, found[2 * k + 1])
        return context.make_tuple(builder, extents, found)

    return extents(extents, states, numbers), emit


def _less(builder: Any, bits: Any, least: Any) -> Any:
    """Emit the smaller of the bits of two magnitudes; zero is larger than all."""
    build = Bits(builder)
    return builder.add(build.smaller(build.plus(bits, -1), build.plus(least, -1)), _INT(1))


@intrinsic
def with_extents(typing_context: Any, bounds: Any, states: Any, extents: Any) -> Any:
    """Raise bounds to what elements reach that are stepped."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        build, found = Bits(builder), cgutils.unpack_tuple(builder, arguments[0])
        largest = cgutils.unpack_tuple(builder, arguments[2])[::2]
        for k, kind in in_blocks(states):
            share = _PER_PEAK if kind == SIGNED else _PER_SQUARE
            bound = build.of(builder.fmul(build.float(largest[k]), _single(share)))
            if kind == UNSIGNED:
                bound = build.masked(build.plus(bound, 3), 0xFFFFFFFC)
            found[k] = build.larger(build.larger(bound, _LEAST), found[k])
        return context.make_tuple(builder, bounds, found)

    return bounds(bounds, states, extents), emit


@intrinsic
def with_kept(typing_context: Any, bounds: Any, states: Any, scales: Any, block: Any) -> Any:
    """Raise bounds to the scales of a block as they are: what is kept of it needs them."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        build, found = Bits(builder), cgutils.unpack_tuple(builder, arguments[0])
        for k, kind in in_blocks(states):
            word = builder.load(scale_at(builder, arguments[2], k, arguments[3]))
            scale = build.masked(word, ABS if kind == SIGNED else FINE)
            found[k] = build.larger(build.larger(scale, _LEAST), found[k])
        return context.make_tuple(builder, bounds, found)

    return bounds(bounds, states, scales, block), emit


@intrinsic
def limited(typing_context: Any, bounds: Any) -> Any:
    """Return bounds that are scales."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        build, found = Bits(builder), cgutils.unpack_tuple(builder, arguments[0])
        found = [build.smaller(bound, _LARGEST) for bound in found]
        return context.make_tuple(builder, bounds, found)

    return bounds(bounds), emit


@intrinsic
def are_finite(typing_context: Any, states: Any, scales: Any, block: Any, bounds: Any) -> Any:
    """Return whether a block has and gets only finite moments."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found, of_states = _BOOL(1), cgutils.unpack_tuple(builder, arguments[3])
        for k, _ in in_blocks(states):
            word = builder.load(scale_at(builder, arguments[1], k, arguments[2]))
            is_finite = builder.icmp_unsigned("<=", of_states[k], _INT(_LARGEST))
            found = builder.and_(found, builder.and_(is_finite, builder.not_(is_flagged(builder, word))))
        return found

    return types.boolean(states, scales, block, bounds), emit
