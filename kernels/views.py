"""How the elements of a block of 128 are read and written, formed once for all of them; and its scales, set.

:mod:`fastadam.kernels.bounds` says what functions here have in common.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .bits import ABS, SIGN, Bits
from .bounds import FINE, in_blocks, is_flagged, scale_at
from .distinct import get
from .eight_bits import COARSEST, SHIFT, SIGNED, TWO, UNSIGNED, Signed, Unsigned, base

_BYTE, _INT, _FLOAT, _BOOL = ir.IntType(8), ir.IntType(32), ir.FloatType(), ir.IntType(1)

VIEWS: dict[types.Type, types.Type] = {
    SIGNED: types.UniTuple(types.float32, 2),
    UNSIGNED: types.Tuple(
        (types.float32, types.uint32, types.uint32, types.float32, types.uint32, types.uint32)
    ),
}
"""The type of a view of a state in blocks: the parts of a :class:`Signed` or :class:`Unsigned`."""


def parts_of(builder: Any, kind: Any, view: Any) -> Signed | Unsigned:
    """Emit the parts of a view."""
    return (Signed if kind == SIGNED else Unsigned)(*cgutils.unpack_tuple(builder, view))


@intrinsic
def views_of(
    typing_context: Any,
    states: Any,
    scales: Any,
    block: Any,
    bounds: Any,
    size: Any,
    least: Any,
    is_finite: Any,
) -> Any:
    """Return how a block of ``size`` elements is read and written; None for states that are not in blocks.

    ``least`` is the least share of a second moment that is left of it, or the extents of the new states.
    """
    kind_of_views = _views(states)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        states_, scales_, block_, bounds_, size_, least_, is_finite_ = arguments
        build, found = Bits(builder), [context.get_dummy_value()] * len(states)
        of_states, memory = (cgutils.unpack_tuple(builder, value) for value in (bounds_, states_))
        for k, kind in in_blocks(states):
            word = builder.load(scale_at(builder, scales_, k, block_))
            inverse = builder.fdiv(_FLOAT(1), build.float(of_states[k]))
            view: Signed | Unsigned
            if kind == SIGNED:
                view = Signed(build.float(build.masked(word, ABS)), inverse)
            else:
                scale, shift, zero = _second_before(builder, word)
                is_open = builder.not_(is_finite_)
                if isinstance(least, types.BaseTuple):
                    number = build.float(cgutils.unpack_tuple(builder, least_)[2 * k + 1])
                else:
                    # A block that was never stepped has no least: what comes could lie anywhere.
                    is_open = builder.or_(is_open, builder.icmp_unsigned("==", word, _INT(0)))
                    code = _least_code(builder, states[k], memory[k], size_)
                    number = build.float(builder.add(zero, builder.shl(code, shift)))
                    number = builder.fmul(builder.fmul(number, scale), least_)
                new_shift = shift_after(builder, builder.fmul(number, inverse), is_open)
                first = builder.add(base(builder, new_shift), builder.shl(_INT(1), new_shift))
                view = Unsigned(scale, shift, zero, inverse, new_shift, first)
            found[k] = context.make_tuple(builder, VIEWS[kind], list(view))
        return context.make_tuple(builder, kind_of_views, found)

    return kind_of_views(states, scales, block, bounds, size, least, is_finite), emit


@intrinsic
def views_before(typing_context: Any, states: Any, scales: Any, block: Any) -> Any:
    """Return how a block is read; nothing may be written so."""
    kind_of_views = _views(states)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        build, found = Bits(builder), [context.get_dummy_value()] * len(states)
        for k, kind in in_blocks(states):
            word = builder.load(scale_at(builder, arguments[1], k, arguments[2]))
            view: list[Any] = [build.float(build.masked(word, ABS)), _FLOAT(0)]
            if kind == UNSIGNED:
                view = [*_second_before(builder, word), _FLOAT(0), _INT(0), _INT(0)]
            found[k] = context.make_tuple(builder, VIEWS[kind], view)
        return context.make_tuple(builder, kind_of_views, found)

    return kind_of_views(states, scales, block), emit


def _views(states: Any) -> types.Tuple:
    return types.Tuple([VIEWS.get(state.dtype, types.none) for state in states])


def _second_before(builder: Any, word: Any) -> tuple[Any, Any, Any]:
    """Emit how a block of second moments is read: the first parts of its view."""
    build = Bits(builder)
    shift = build.plus(build.masked(word, COARSEST), SHIFT)
    return build.float(build.masked(word, FINE)), shift, base(builder, shift)


def shift_after(builder: Any, least: Any, is_open: Any) -> Any:
    """Emit how far codes will be shifted.

    The least that a moment that is not zero can become, in units of the new scale, decides how coarse
    mantissas must be.
    """
    build = Bits(builder)
    span = build.down(builder.sub(_INT(TWO), build.of(least)), SHIFT)
    coarse = builder.select(is_open, _INT(COARSEST), _coarseness(builder, span))
    return build.plus(coarse, SHIFT)


def _coarseness(builder: Any, span: Any) -> Any:
    """Emit how many of 6 bits a mantissa lacks, for so many codes of 2**-6 between least and largest."""
    found = _INT(0)
    for k in range(COARSEST):
        beyond = builder.icmp_unsigned(">", span, _INT((255 << k) - (1 << k)))
        found = builder.add(found, builder.zext(beyond, _INT))
    return found


def _least_code(builder: Any, kind: Any, memory: Any, size: Any) -> Any:
    """Emit the least code but zero; 256 if there is none."""
    least = cgutils.alloca_once_value(builder, _BYTE(255))
    with cgutils.for_range(builder, size) as loop:
        code = builder.sub(get(builder, kind, memory, loop.index), _BYTE(1))  # zero is the largest
        before = builder.load(least)
        builder.store(builder.select(builder.icmp_unsigned("<", code, before), code, before), least)
    return builder.add(builder.zext(builder.load(least), _INT), _INT(1))


@intrinsic
def checks_of(typing_context: Any, states: Any, scales: Any, block: Any, is_finite: Any) -> Any:
    """Return the flags of the scales of a block, and whether it is written with what is not finite."""
    checks = types.UniTuple(types.boolean, len(states) + 1)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flags = [_BOOL(0)] * len(states)
        for k, _ in in_blocks(states):
            flags[k] = is_flagged(builder, builder.load(scale_at(builder, arguments[1], k, arguments[2])))
        return context.make_tuple(builder, checks, [*flags, builder.not_(arguments[3])])

    return checks(states, scales, block, is_finite), emit


def views_in(builder: Any, kind: Any, views: Any, count: int) -> list[Any]:
    """Emit the view of each of ``count`` states; None for no views."""
    if isinstance(kind, types.NoneType):
        return [None] * count
    return cgutils.unpack_tuple(builder, views)  # type: ignore[no-any-return]


def checks_in(builder: Any, kind: Any, checks: Any, count: int) -> tuple[list[Any], Any]:
    """Emit the flag of each of ``count`` states, and the last check; None for none."""
    if isinstance(kind, types.NoneType):
        return [None] * count, None
    *flags, is_clamped = cgutils.unpack_tuple(builder, checks)
    return flags, is_clamped


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
        _, is_clamped = checks_in(builder, checks, checks_, len(states))
        for k, kind in in_blocks(states):
            word = words[k]
            if kind == UNSIGNED:
                view = parts_of(builder, kind, of_views[k])
                word = builder.or_(word, build.plus(view.new_shift, -SHIFT))  # type: ignore[union-attr]
            if is_clamped is not None:
                flag = builder.and_(is_clamped, _has_largest(builder, states[k], pointers[k], size_))
                word = builder.select(flag, builder.or_(word, _INT(SIGN)), word)
            builder.store(word, scale_at(builder, scales_, k, block_))
        return context.get_dummy_value()

    return types.void(states, scales, block, bounds, views, checks, size), emit


def _has_largest(builder: Any, kind: Any, memory: Any, size: Any) -> Any:
    """Emit whether a code is the one that stands for what is not finite."""
    largest = _BYTE(127 if kind.dtype == SIGNED else 255)
    found = cgutils.alloca_once_value(builder, _BOOL(0))
    with cgutils.for_range(builder, size) as loop:
        code = builder.and_(get(builder, kind, memory, loop.index), largest)
        is_largest = builder.icmp_unsigned("==", code, largest)
        builder.store(builder.or_(builder.load(found), is_largest), found)
    return builder.load(found)
