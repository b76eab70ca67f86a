"""What a block of 128 elements has in common where moments come in 8 bits, and how its elements are read and written.

The new scales of a block are bounds of its new moments, known before they are: a scale follows the largest gradient
of the block as the moments follow theirs. So a step takes one look at the gradients of a block, which are in the
cache then, and one pass over all else. :mod:`fastadam.eight_bits` has the format to the bit.

Functions here take a tuple of states in any storage, of which those in 8 bits have scales. What is formed for a
block is a tuple with something for each state. All of it is emitted as LLVM code: as Numba functions, one for each
state of each storage, it took 15 s to compile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .distinct import get, put
from .draws import Word, words_for_states
from .eight_bits import (
    COARSEST,
    OFFSET,
    ROUNDS_SIGNED,
    ROUNDS_UNSIGNED,
    SHIFT,
    SIGNED,
    TWO,
    UNSIGNED,
    Bits,
    Signed,
    Unsigned,
    decode_signed,
    decode_unsigned,
    encode_signed,
    encode_unsigned,
)
from .formats import DECODERS, ENCODERS

_BYTE, _INT, _INDEX, _FLOAT, _BOOL = (
    ir.IntType(8),
    ir.IntType(32),
    ir.IntType(64),
    ir.FloatType(),
    ir.IntType(1),
)

_ABS, _SIGN, _INF = 0x7FFFFFFF, 0x80000000, 0x7F800000
_FINE = 0x7FFFFFFC
"""A scale of second moments without the lowest bits, which say how coarse its mantissas are, and its flag."""
_LEAST_SCALE, _LARGEST_SCALE = (
    0x00800000,
    0x7F7FFFFC,
)  # 2**-126, of which the inverse is finite, and what is finite

_UP = 1 + 2.0**-20
"""Covers what rounding could add to a moment beyond its bound."""
_PER_PEAK, _PER_SQUARE = _UP / (1.875 - OFFSET), _UP / 1.875
"""Of a scale, to the largest magnitude and square: the largest code is 1.875, less the offset where there is one."""

_VIEWS: dict[types.Type, types.Type] = {
    SIGNED: types.UniTuple(types.float32, 2),
    UNSIGNED: types.Tuple(
        (types.float32, types.uint32, types.uint32, types.float32, types.uint32, types.uint32)
    ),
}
_VIEW_OF = {SIGNED: Signed, UNSIGNED: Unsigned}


def _kinds(states: Any) -> list[types.Type]:
    return [state.dtype for state in states]


def _bounds_of(states: Any) -> types.UniTuple:
    return types.UniTuple(types.uint32, len(states))


def _coefficient(builder: Any, rule: Any, value: Any, name: str) -> Any:
    return cgutils.unpack_tuple(builder, value)[rule.instance_class._fields.index(name)]


def _scale_at(builder: Any, scales: Any, k: int, block: Any) -> Any:
    """Return the pointer to the scale of a block of the ``k``-th state."""
    return builder.gep(cgutils.unpack_tuple(builder, scales)[k], [block])


# --- Bounds: bits of the new scales -------------------------------------------------------------------------


@intrinsic
def no_bounds(typing_context: Any, states: Any) -> Any:
    """Return bounds below all others."""
    bounds = _bounds_of(states)
    return bounds(states), lambda context, *_: ir.Constant(context.get_value_type(bounds), [0] * bounds.count)


@intrinsic
def with_step(
    typing_context: Any, bounds: Any, states: Any, scales: Any, block: Any, peak: Any, rule: Any
) -> Any:
    """Raise bounds to those of elements that are stepped, whose gradients reach ``peak``, given as bits."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        old_bounds, _, scales_, block_, peak_, rule_ = arguments
        build = Bits(builder)
        largest = build.float(peak_)

        def follows(old: Any, number: Any, moment: int, share: float) -> Any:
            beta = _coefficient(builder, rule, rule_, f"beta{moment}")
            one_minus_beta = _coefficient(builder, rule, rule_, f"one_minus_beta{moment}")
            kept = builder.fmul(builder.fmul(beta, old), _FLOAT(_single(_UP)))
            added = builder.fmul(builder.fmul(one_minus_beta, number), _FLOAT(_single(share)))
            return build.of(builder.fadd(kept, added))

        found, second = [], None
        before = cgutils.unpack_tuple(builder, old_bounds)
        for k, kind in enumerate(_kinds(states)):
            if kind not in _VIEWS:
                found.append(before[k])
                continue
            word = builder.load(builder.bitcast(_scale_at(builder, scales_, k, block_), _INT.as_pointer()))
            if kind == SIGNED:
                bound = follows(build.float(build.masked(word, _ABS)), largest, 1, _PER_PEAK)
            elif second is None:
                square = builder.fmul(largest, largest)
                bound = follows(build.float(build.masked(word, _FINE)), square, 2, _PER_SQUARE)
                bound = second = build.masked(build.plus(bound, 3), 0xFFFFFFFC)
            else:  # the maximum of second moments
                bound = build.larger(build.masked(word, _FINE), second)
            found.append(build.larger(build.larger(bound, _LEAST_SCALE), before[k]))
        return context.make_tuple(builder, bounds, found)

    return bounds(bounds, states, scales, block, peak, rule), emit


@intrinsic
def with_kept(typing_context: Any, bounds: Any, states: Any, scales: Any, block: Any) -> Any:
    """Raise bounds to the scales of a block as they are: what is kept of it needs them."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        build, found = Bits(builder), cgutils.unpack_tuple(builder, arguments[0])
        for k, kind in enumerate(_kinds(states)):
            if kind in _VIEWS:
                at = builder.bitcast(_scale_at(builder, arguments[2], k, arguments[3]), _INT.as_pointer())
                word = build.masked(builder.load(at), _ABS if kind == SIGNED else _FINE)
                found[k] = build.larger(build.larger(word, _LEAST_SCALE), found[k])
        return context.make_tuple(builder, bounds, found)

    return bounds(bounds, states, scales, block), emit


@intrinsic
def limited(typing_context: Any, bounds: Any) -> Any:
    """Return bounds that are finite."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        build = Bits(builder)
        found = [
            build.smaller(bound, _LARGEST_SCALE) for bound in cgutils.unpack_tuple(builder, arguments[0])
        ]
        return context.make_tuple(builder, bounds, found)

    return bounds(bounds), emit


@intrinsic
def are_finite(typing_context: Any, states: Any, scales: Any, block: Any, bounds: Any) -> Any:
    """Return whether a block has and gets only finite moments."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        build, found = Bits(builder), _BOOL(1)
        of_states = cgutils.unpack_tuple(builder, arguments[3])
        flags = _flags(context, builder, states, arguments[1], arguments[2])
        for k, kind in enumerate(_kinds(states)):
            if kind in _VIEWS:
                is_finite = builder.icmp_unsigned("<", of_states[k], _INT(_INF))
                found = builder.and_(found, builder.and_(is_finite, builder.not_(flags[k])))
        return found

    return types.boolean(states, scales, block, bounds), emit


def _flags(context: Any, builder: Any, states: Any, scales: Any, block: Any) -> list[Any]:
    """Return of each state whether a block of it has something that is not finite."""
    found = []
    for k, kind in enumerate(_kinds(states)):
        flag = _BOOL(0)
        if kind in _VIEWS:
            word = builder.load(builder.bitcast(_scale_at(builder, scales, k, block), _INT.as_pointer()))
            flag = builder.icmp_signed("<", word, _INT(0))
        found.append(flag)
    return found


# --- Views --------------------------------------------------------------------------------------------------


@intrinsic
def views_of(
    typing_context: Any,
    states: Any,
    scales: Any,
    block: Any,
    bounds: Any,
    size: Any,
    beta2: Any,
    is_finite: Any,
) -> Any:
    """Return how a block of ``size`` elements is read and written.

    ``beta2`` is the least share of a second moment that is left of it.
    """
    kind_of_views = types.Tuple([_VIEWS.get(kind, types.none) for kind in _kinds(states)])

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        states_, scales_, block_, bounds_, size_, beta2_, is_finite_ = arguments
        build, found = Bits(builder), []
        of_states, memory = (cgutils.unpack_tuple(builder, value) for value in (bounds_, states_))
        for k, kind in enumerate(_kinds(states)):
            if kind not in _VIEWS:
                found.append(context.get_dummy_value())
                continue
            word = builder.load(builder.bitcast(_scale_at(builder, scales_, k, block_), _INT.as_pointer()))
            inverse = builder.fdiv(_FLOAT(1), build.float(of_states[k]))
            if kind == SIGNED:
                parts = Signed(build.float(build.masked(word, _ABS)), inverse)
            else:
                scale = build.float(build.masked(word, _FINE))
                shift = build.plus(build.masked(word, COARSEST), SHIFT)
                base = build.base(shift)
                # The least that a moment that is not zero can become decides how coarse mantissas must be.
                least = builder.shl(_least_code(builder, states[k], memory[k], size_), shift)
                least = builder.fmul(builder.fmul(build.float(builder.add(base, least)), scale), beta2_)
                span = builder.sub(_INT(TWO), build.of(builder.fmul(least, inverse)))
                coarse = _coarseness(builder, builder.lshr(span, _INT(SHIFT)))
                is_fresh = builder.icmp_unsigned("==", word, _INT(0))
                coarse = builder.select(
                    builder.or_(is_fresh, builder.not_(is_finite_)), _INT(COARSEST), coarse
                )
                new_shift = build.plus(coarse, SHIFT)
                first = builder.add(build.base(new_shift), builder.shl(_INT(1), new_shift))
                parts = Unsigned(scale, shift, base, inverse, new_shift, first)
            found.append(context.make_tuple(builder, _VIEWS[kind], list(parts)))
        return context.make_tuple(builder, kind_of_views, found)

    signature = kind_of_views(states, scales, block, bounds, size, beta2, is_finite)
    return signature, emit


def _coarseness(builder: Any, span: Any) -> Any:
    """Return how many bits fewer than 6 a mantissa has, for codes of 2**-6 that lie between least and largest."""
    found = _INT(0)
    for k in range(COARSEST):
        beyond = builder.icmp_unsigned(">", span, _INT((255 << k) - (1 << k)))
        found = builder.add(found, builder.zext(beyond, _INT))
    return found


def _least_code(builder: Any, kind: Any, memory: Any, size: Any) -> Any:
    """Return the least code but zero; 256 if there is none."""
    least = cgutils.alloca_once_value(builder, _BYTE(255))
    with cgutils.for_range(builder, size) as loop:
        code = builder.sub(get(builder, kind, memory, loop.index), _BYTE(1))  # zero is the largest
        before = builder.load(least)
        builder.store(builder.select(builder.icmp_unsigned("<", code, before), code, before), least)
    return builder.add(builder.zext(builder.load(least), _INT), _INT(1))


@intrinsic
def checks_of(typing_context: Any, states: Any, scales: Any, block: Any, is_finite: Any) -> Any:
    """Return flags of the states of a block, and whether it is written with what is not finite."""
    checks = types.UniTuple(types.boolean, len(states) + 1)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flags = _flags(context, builder, states, arguments[1], arguments[2])
        return context.make_tuple(builder, checks, [*flags, builder.not_(arguments[3])])

    return checks(states, scales, block, is_finite), emit


# --- Elements -----------------------------------------------------------------------------------------------


def _parts(builder: Any, kind: Any, view: Any) -> Any:
    return _VIEW_OF[kind](*cgutils.unpack_tuple(builder, view))


def _views(builder: Any, views: Any, value: Any, count: int) -> list[Any]:
    if isinstance(views, types.NoneType):
        return [None] * count
    return cgutils.unpack_tuple(builder, value)  # type: ignore[no-any-return]


def _checks(builder: Any, checks: Any, value: Any, count: int) -> list[Any]:
    if isinstance(checks, types.NoneType):
        return [None] * (count + 1)
    return [builder.trunc(flag, _BOOL) for flag in cgutils.unpack_tuple(builder, value)]


def _load(builder: Any, state: Any, pointer: Any, i: Any, view: Any, flag: Any) -> Any:
    code = get(builder, state, pointer, i)
    if state.dtype in _VIEWS:
        decode = decode_signed if state.dtype == SIGNED else decode_unsigned
        return decode(builder, code, _parts(builder, state.dtype, view), flag)
    return DECODERS[state.dtype](builder, code) if state.dtype in DECODERS else code


def _store(
    builder: Any,
    state: Any,
    pointer: Any,
    i: Any,
    number: Any,
    word: Word | None,
    view: Any,
    clamped: Any,
) -> None:
    if state.dtype == SIGNED:
        random = _INT(ROUNDS_SIGNED) if word is None else word.whole
        number = encode_signed(builder, number, _parts(builder, SIGNED, view), random, clamped)
    elif state.dtype == UNSIGNED:
        random = _INT(ROUNDS_UNSIGNED) if word is None else word.whole
        number = encode_unsigned(builder, number, _parts(builder, UNSIGNED, view), random, clamped)
    elif state.dtype in ENCODERS:
        number = ENCODERS[state.dtype](builder, number, None if word is None else word.half)
    put(builder, state, pointer, i, number)


def _words(builder: Any, draws: Any, value: Any, count: int) -> list[Any]:
    found = [] if isinstance(draws, types.NoneType) else words_for_states(builder, value)
    return [*found, *[None] * count][:count]


@intrinsic
def load_states(typing_context: Any, states: Any, i: Any, views: Any, checks: Any) -> Any:
    """Return element ``i`` of each state."""
    numbers = types.Tuple(
        [types.float32 if s.dtype in DECODERS or s.dtype in _VIEWS else s.dtype for s in states]
    )

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointers = cgutils.unpack_tuple(builder, arguments[0])
        of_views = _views(builder, views, arguments[2], len(states))
        flags = _checks(builder, checks, arguments[3], len(states))
        found = [
            _load(builder, state, pointer, arguments[1], view, flag)
            for state, pointer, view, flag in zip(states, pointers, of_views, flags, strict=False)
        ]
        return context.make_tuple(builder, numbers, found)

    return numbers(states, i, views, checks), emit


@intrinsic
def store_states(
    typing_context: Any, states: Any, i: Any, numbers: Any, draws: Any, views: Any, checks: Any
) -> Any:
    """Set element ``i`` of each state, rounded by the words of its draws, or to the nearest."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointers, values = (cgutils.unpack_tuple(builder, arguments[k]) for k in (0, 2))
        of_views = _views(builder, views, arguments[4], len(states))
        words = _words(builder, draws, arguments[3], len(states))
        clamped = _checks(builder, checks, arguments[5], len(states))[-1]
        for k, state in enumerate(states):
            _store(builder, state, pointers[k], arguments[1], values[k], words[k], of_views[k], clamped)
        return context.get_dummy_value()

    return types.void(states, i, numbers, draws, views, checks), emit


@intrinsic
def keep_states(typing_context: Any, states: Any, i: Any, draws: Any, views: Any, checks: Any) -> Any:
    """Write element ``i`` of the states in blocks as it is, where their scales change."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointers, of_views = (cgutils.unpack_tuple(builder, arguments[k]) for k in (0, 3))
        words = _words(builder, draws, arguments[2], len(states))
        *flags, clamped = _checks(builder, checks, arguments[4], len(states))
        for k, state in enumerate(states):
            if state.dtype in _VIEWS:
                with builder.if_then(_changes(builder, _parts(builder, state.dtype, of_views[k]))):
                    number = _load(builder, state, pointers[k], arguments[1], of_views[k], flags[k])
                    _store(builder, state, pointers[k], arguments[1], number, words[k], of_views[k], clamped)
        return context.get_dummy_value()

    return types.void(states, i, draws, views, checks), emit


def _changes(builder: Any, view: Any) -> Any:
    """Return whether codes would not mean the same after a step."""
    changes = builder.fcmp_unordered("une", builder.fdiv(_FLOAT(1), view.scale), view.inverse)
    if isinstance(view, Unsigned):
        changes = builder.or_(changes, builder.icmp_unsigned("!=", view.shift, view.new_shift))
    return changes


@intrinsic
def set_scales(
    typing_context: Any,
    states: Any,
    scales: Any,
    block: Any,
    bounds: Any,
    views: Any,
    checks: Any,
    size: Any,
) -> Any:
    """Set the scales of a block whose ``size`` elements were stored."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        states_, scales_, block_, bounds_, views_, checks_, size_ = arguments
        build = Bits(builder)
        pointers, words, of_views = (cgutils.unpack_tuple(builder, v) for v in (states_, bounds_, views_))
        clamped = _checks(builder, checks, checks_, len(states))[-1]
        for k, state in enumerate(states):
            if state.dtype not in _VIEWS:
                continue
            word, view = words[k], _parts(builder, state.dtype, of_views[k])
            if state.dtype == UNSIGNED:
                word = builder.or_(word, build.plus(view.new_shift, -SHIFT))
            if clamped is not None:
                flag = builder.and_(clamped, _has_largest(builder, state, pointers[k], size_))
                word = builder.select(flag, builder.or_(word, _INT(_SIGN)), word)
            at = _scale_at(builder, scales_, k, block_)
            builder.store(word, builder.bitcast(at, _INT.as_pointer()))
        return context.get_dummy_value()

    return types.void(states, scales, block, bounds, views, checks, size), emit


def _has_largest(builder: Any, kind: Any, memory: Any, size: Any) -> Any:
    mask = _BYTE(127 if kind.dtype == SIGNED else 255)
    found = cgutils.alloca_once_value(builder, _BOOL(0))
    with cgutils.for_range(builder, size) as loop:
        code = builder.and_(get(builder, kind, memory, loop.index), mask)
        is_largest = builder.icmp_unsigned("==", code, mask)
        builder.store(builder.or_(builder.load(found), is_largest), found)
    return builder.load(found)


@intrinsic
def larger_magnitude(typing_context: Any, peak: Any, number: Any) -> Any:
    """Return the larger of some bits and those of the magnitude of a float32; NaN has the largest."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        build = Bits(builder)
        return build.larger(build.masked(build.of(arguments[1]), _ABS), arguments[0])

    is_single = number == types.float32
    return (types.uint32(types.uint32, types.float32), emit) if is_single else None


def _single(value: float) -> float:
    """Round to float32: LLVM takes constants of that type only so."""
    return float(np.float32(value))


@intrinsic
def pointers_to(typing_context: Any, arrays: Any) -> Any:
    """Return pointers to the arrays of a tuple."""
    pointers = types.Tuple([types.CPointer(array.dtype) for array in arrays])

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = [
            context.make_array(kind)(context, builder, value).data
            for kind, value in zip(arrays, cgutils.unpack_tuple(builder, arguments[0]), strict=True)
        ]
        return context.make_tuple(builder, pointers, found)

    return pointers(arrays), emit


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
