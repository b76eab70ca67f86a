"""How a lane of a warp reads and writes elements of a block, as :mod:`fastadam.kernels.views` for CPUs.

Bounds of a block are formed as there (:mod:`fastadam.kernels.bounds`). Memory is pointers here, and what all
elements of a block have in common beside them, the least code and the largest, is found by the warp between
two of these functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.cuda.extending import intrinsic

from .bits import SIGN, Bits
from .bounds import in_blocks, scale_at
from .draws import by_place
from .eight_bits import (
    ROUNDS_SIGNED,
    ROUNDS_UNSIGNED,
    SHIFT,
    SIGNED,
    UNSIGNED,
    Signed,
    Unsigned,
    base,
    decode_signed,
    decode_unsigned,
    encode_signed,
    encode_unsigned,
)
from .formats import DECODERS, ENCODERS
from .tree import LANES
from .views import VIEWS, checks_in, parts_of, shift_after

_BYTE, _INT, _FLOAT = ir.IntType(8), ir.IntType(32), ir.FloatType()

_WHOLE_WARP, _BUTTERFLY, _LAST_LANE = _INT(0xFFFFFFFF), _INT(3), _INT(LANES - 1)
"""Of a shuffle: who takes part, that lanes exchange numbers, and the last of them."""


def _at(builder: Any, states: Any, k: int, i: Any) -> Any:
    """Return the pointer to element ``i`` of the ``k``-th of some arrays."""
    return builder.gep(cgutils.unpack_tuple(builder, states)[k], [i])


# --- What a block has in common -----------------------------------------------------------------------------


@intrinsic
def scales_of_states(typing_context: Any, states: Any, scales: Any) -> Any:
    """Return for each state the pointer to its scales, or any for one that has none."""
    pointers = types.UniTuple(scales[0], len(states))

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        given = cgutils.unpack_tuple(builder, arguments[1])
        found = [given[0]] * len(states)
        for pointer, (k, _) in zip(given, in_blocks(states), strict=True):
            found[k] = pointer
        return context.make_tuple(builder, pointers, found)

    return pointers(states, scales), emit


@intrinsic
def smaller_code(typing_context: Any, before: Any, state: Any, i: Any) -> Any:
    """Return the smaller of two codes of a second moment, less 1: so zero is the largest, 255."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = builder.load(builder.gep(arguments[1], [arguments[2]]))
        code = builder.zext(builder.sub(code, _BYTE(1)), _INT)
        return builder.select(builder.icmp_unsigned("<", code, arguments[0]), code, arguments[0])

    return types.uint32(types.uint32, state, i), emit


@intrinsic
def extents_left(typing_context: Any, states: Any, views: Any, leasts: Any, share: Any) -> Any:
    """Return extents of a block of which at least this share is left of second moments.

    The least codes, but zero, are ``leasts`` of states 1 and 2.
    """
    extents = types.UniTuple(types.uint32, 2 * len(states))

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        build, found = Bits(builder), [_INT(0)] * (2 * len(states))
        of_views, codes = (cgutils.unpack_tuple(builder, value) for value in arguments[1:3])
        for k, kind in in_blocks(states):
            if kind == UNSIGNED:
                view = Unsigned(*cgutils.unpack_tuple(builder, of_views[k]))
                number = build.float(builder.add(view.base, builder.shl(codes[k - 1], view.shift)))
                number = builder.fmul(builder.fmul(number, view.scale), arguments[3])
                found[2 * k + 1] = build.of(number)
        return context.make_tuple(builder, extents, found)

    return extents(states, views, leasts, share), emit


@intrinsic
def views_after(
    typing_context: Any, states: Any, views: Any, bounds: Any, extents: Any, is_finite: Any
) -> Any:
    """Return the views of a block as it is read with how it is written.

    Read as in a look before, it has the same numbers: compilers need not compute them again.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        build = Bits(builder)
        found, words, extents_ = (cgutils.unpack_tuple(builder, value) for value in arguments[1:4])
        for k, kind in in_blocks(states):
            view = parts_of(builder, kind, found[k])
            inverse = builder.fdiv(_FLOAT(1), build.float(words[k]))
            if isinstance(view, Signed):
                view = Signed(view.scale, inverse)
            else:
                least = builder.fmul(build.float(extents_[2 * k + 1]), inverse)
                shift = shift_after(builder, least, builder.not_(arguments[4]))
                first = builder.add(base(builder, shift), builder.shl(_INT(1), shift))
                view = Unsigned(view.scale, view.shift, view.base, inverse, shift, first)
            found[k] = context.make_tuple(builder, VIEWS[kind], list(view))
        return context.make_tuple(builder, views, found)

    return views(states, views, bounds, extents, is_finite), emit


@intrinsic
def extents_of_warp(typing_context: Any, extents: Any, states: Any) -> Any:
    """Return extents of the elements of all lanes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        build, found = Bits(builder), cgutils.unpack_tuple(builder, arguments[0])
        for k, kind in in_blocks(states):
            found[2 * k] = _of_warp(builder, found[2 * k], build.larger)
            if kind == UNSIGNED:
                found[2 * k + 1] = _of_warp(builder, found[2 * k + 1], build.smaller)
        return context.make_tuple(builder, extents, found)

    return extents(extents, states), emit


def _of_warp(builder: Any, value: Any, chosen: Callable[..., Any]) -> Any:
    """Emit what is chosen of the values of all lanes."""
    kind = ir.FunctionType(ir.LiteralStructType([_INT, ir.IntType(1)]), [_INT] * 5)
    shuffle = cgutils.get_or_insert_function(builder.module, kind, "llvm.nvvm.shfl.sync.i32")
    apart = 1
    while apart < LANES:
        got = builder.call(shuffle, [_WHOLE_WARP, _BUTTERFLY, value, _INT(apart), _LAST_LANE])
        value = chosen(value, builder.extract_value(got, 0))
        apart *= 2
    return value


@intrinsic
def largest_codes(typing_context: Any, states: Any, i: Any) -> Any:
    """Return for each state a bit: whether the code of element ``i`` is that of what is not finite."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = _INT(0)
        for k, kind in in_blocks(states):
            largest = _BYTE(127 if kind == SIGNED else 255)
            code = builder.and_(builder.load(_at(builder, arguments[0], k, arguments[1])), largest)
            bit = builder.zext(builder.icmp_unsigned("==", code, largest), _INT)
            found = builder.or_(found, builder.shl(bit, _INT(k)))
        return found

    return types.uint32(states, i), emit


@intrinsic
def set_scales(
    typing_context: Any, states: Any, scales: Any, block: Any, bounds: Any, views: Any, largest: Any
) -> Any:
    """Set the scales of a block, flagged where ``largest`` has the bit of the state."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, scales_, block_, bounds_, views_, largest_ = arguments
        words, of_views = (cgutils.unpack_tuple(builder, value) for value in (bounds_, views_))
        for k, kind in in_blocks(states):
            word = words[k]
            if kind == UNSIGNED:
                new_shift = Unsigned(*cgutils.unpack_tuple(builder, of_views[k])).new_shift
                word = builder.or_(word, builder.sub(new_shift, _INT(SHIFT)))
            flag = builder.and_(builder.shl(largest_, _INT(31 - k)), _INT(SIGN))
            builder.store(builder.or_(word, flag), scale_at(builder, scales_, k, block_))
        return context.get_dummy_value()

    return types.void(states, scales, block, bounds, views, largest), emit


# --- Elements -----------------------------------------------------------------------------------------------


class _Element:
    """Emits the load and the store of an element of each state."""

    def __init__(self, builder: Any, types_of: tuple[Any, ...], values: tuple[Any, ...]) -> None:
        """Of types and values of (states, i, words, views, checks)."""
        self.b, self.states = builder, types_of[0]
        self._memory, self._i = values[:2]
        count = len(self.states)
        self.views = cgutils.unpack_tuple(builder, values[3])
        self._words: list[Any] = [None] * count
        if not isinstance(types_of[2], types.NoneType):
            self._words[:3] = by_place(builder, *cgutils.unpack_tuple(builder, values[2]))[:count]
        self._flags, self.is_clamped = checks_in(builder, types_of[4], values[4], count)

    def view(self, k: int) -> Any:
        """Return the view of a state in blocks."""
        return parts_of(self.b, self.states[k].dtype, self.views[k])

    def load(self, k: int) -> Any:
        """Emit the number of a state."""
        kind = self.states[k].dtype
        code = self.b.load(_at(self.b, self._memory, k, self._i))
        if kind in VIEWS:
            decode = decode_signed if kind == SIGNED else decode_unsigned
            return decode(self.b, code, self.view(k), self._flags[k])
        return DECODERS[kind](self.b, code) if kind in DECODERS else code

    def store(self, k: int, number: Any) -> None:
        """Emit the store of a number."""
        kind, word = self.states[k].dtype, self._words[k]
        if kind == SIGNED:
            random = _INT(ROUNDS_SIGNED) if word is None else word.signed
            number = encode_signed(self.b, number, self.view(k), random, self.is_clamped)
        elif kind == UNSIGNED:
            random = _INT(ROUNDS_UNSIGNED) if word is None else word.unsigned
            number = encode_unsigned(self.b, number, self.view(k), random, self.is_clamped)
        elif kind in ENCODERS:
            number = ENCODERS[kind](self.b, number, None if word is None else word.half)
        self.b.store(number, _at(self.b, self._memory, k, self._i))

    def changes(self, k: int) -> Any:
        """Emit whether the code would not mean the same after a step."""
        view = self.view(k)
        changes = self.b.fcmp_unordered("une", self.b.fdiv(_FLOAT(1), view.scale), view.inverse)
        if isinstance(view, Unsigned):
            changes = self.b.or_(changes, self.b.icmp_unsigned("!=", view.shift, view.new_shift))
        # The largest code may become one of what is not finite.
        return self.b.or_(changes, self.b.and_(self.is_clamped, self.b.not_(self._flags[k])))


@intrinsic
def load_states(typing_context: Any, states: Any, i: Any, views: Any, checks: Any) -> Any:
    """Return element ``i`` of each state."""
    numbers = types.UniTuple(types.float32, len(states))

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        given = (states, i, types.none, views, checks)
        element = _Element(builder, given, (*arguments[:2], None, *arguments[2:]))
        return context.make_tuple(builder, numbers, [element.load(k) for k in range(len(states))])

    return numbers(states, i, views, checks), emit


@intrinsic
def store_states(
    typing_context: Any, states: Any, i: Any, numbers: Any, words: Any, views: Any, checks: Any
) -> Any:
    """Set element ``i`` of each state, rounded by two random words, or to the nearest."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        states_, i_, numbers_, *others = arguments
        element = _Element(builder, (states, i, words, views, checks), (states_, i_, *others))
        for k, number in enumerate(cgutils.unpack_tuple(builder, numbers_)):
            element.store(k, number)
        return context.get_dummy_value()

    return types.void(states, i, numbers, words, views, checks), emit


@intrinsic
def keep_states(typing_context: Any, states: Any, i: Any, words: Any, views: Any, checks: Any) -> Any:
    """Write element ``i`` of the states in blocks as it is, where codes would mean something else."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        element = _Element(builder, signature.args, arguments)
        for k, _ in in_blocks(states):
            with builder.if_then(element.changes(k)):
                element.store(k, element.load(k))
        return context.get_dummy_value()

    return types.void(states, i, words, views, checks), emit
