"""How a lane of a warp reads and writes elements of a block, as :mod:`fastadam.kernels.views` for CPUs.

Bounds of a block are formed as there (:mod:`fastadam.kernels.bounds`). Memory is pointers here, and what all
elements of a block have in common beside them, the least code and the largest, is found by the warp between
two of these functions.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.cuda.extending import intrinsic

from .eight_bits import (
    COARSEST,
    ROUNDS_SIGNED,
    ROUNDS_UNSIGNED,
    SHIFT,
    SIGNED,
    TWO,
    UNSIGNED,
    Signed,
    Unsigned,
    decode_signed,
    decode_unsigned,
    encode_signed,
    encode_unsigned,
)
from .formats import DECODERS, ENCODERS

_INT, _FLOAT, _BOOL = ir.IntType(32), ir.FloatType(), ir.IntType(1)
_ABS, _FINE, _FLAG = 0x7FFFFFFF, 0x7FFFFFFC, 0x80000000

_VIEWS: dict[types.Type, types.Type] = {
    SIGNED: types.UniTuple(types.float32, 2),
    UNSIGNED: types.Tuple(
        (types.float32, types.uint32, types.uint32, types.float32, types.uint32, types.uint32)
    ),
}


def _in_blocks(states: Any) -> list[tuple[int, Any]]:
    return [(k, state.dtype) for k, state in enumerate(states) if state.dtype in _VIEWS]


def _at(builder: Any, states: Any, k: int, i: Any) -> Any:
    """Return the pointer to element ``i`` of the ``k``-th of some arrays."""
    return builder.gep(cgutils.unpack_tuple(builder, states)[k], [i])


def _word_at(builder: Any, scales: Any, k: int, block: Any) -> Any:
    return builder.bitcast(_at(builder, scales, k, block), _INT.as_pointer())


# --- What a block has in common -----------------------------------------------------------------------------


@intrinsic
def scales_of_states(typing_context: Any, states: Any, scales: Any) -> Any:
    """Return for each state the pointer to its scales, or any for one that has none."""
    pointers = types.UniTuple(scales[0], len(states))

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        given = cgutils.unpack_tuple(builder, arguments[1])
        found = [given[0]] * len(states)
        for pointer, (k, _) in zip(given, _in_blocks(states), strict=True):
            found[k] = pointer
        return context.make_tuple(builder, pointers, found)

    return pointers(states, scales), emit


@intrinsic
def smaller_code(typing_context: Any, before: Any, state: Any, i: Any) -> Any:
    """Return the smaller of two codes of a second moment, less 1: so zero is the largest, 255."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = builder.load(builder.gep(arguments[1], [arguments[2]]))
        code = builder.zext(builder.sub(code, ir.IntType(8)(1)), _INT)
        return builder.select(builder.icmp_unsigned("<", code, arguments[0]), code, arguments[0])

    return types.uint32(types.uint32, state, i), emit


@intrinsic
def views_of(
    typing_context: Any,
    states: Any,
    scales: Any,
    block: Any,
    bounds: Any,
    leasts: Any,
    beta2: Any,
    is_finite: Any,
) -> Any:
    """Return how a block is read and written, whose least codes, but zero, are ``leasts`` of states 1 and 2.

    ``beta2`` is the least share of a second moment that is left of it.
    """
    views = types.Tuple([_VIEWS.get(state.dtype, types.none) for state in states])

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, scales_, block_, bounds_, leasts_, beta2_, is_finite_ = arguments
        found = [context.get_dummy_value()] * len(states)
        of_states, least_codes = (cgutils.unpack_tuple(builder, value) for value in (bounds_, leasts_))
        for k, kind in _in_blocks(states):
            word = builder.load(_word_at(builder, scales_, k, block_))
            inverse = builder.fdiv(_FLOAT(1), builder.bitcast(of_states[k], _FLOAT))
            view: tuple[Any, ...]
            if kind == SIGNED:
                view = Signed(builder.bitcast(builder.and_(word, _INT(_ABS)), _FLOAT), inverse)
            else:
                view = _view_of_second(builder, word, inverse, least_codes[k - 1], beta2_, is_finite_)
            found[k] = context.make_tuple(builder, _VIEWS[kind], list(view))
        return context.make_tuple(builder, views, found)

    return views(states, scales, block, bounds, leasts, beta2, is_finite), emit


def _view_of_second(
    builder: Any, word: Any, inverse: Any, least_code: Any, beta2: Any, is_finite: Any
) -> Unsigned:
    def zero(shift: Any) -> Any:
        return builder.sub(_INT(TWO), builder.shl(_INT(256), shift))

    scale = builder.bitcast(builder.and_(word, _INT(_FINE)), _FLOAT)
    shift = builder.add(builder.and_(word, _INT(COARSEST)), _INT(SHIFT))
    least = builder.bitcast(builder.add(zero(shift), builder.shl(least_code, shift)), _FLOAT)
    least = builder.fmul(builder.fmul(builder.fmul(least, scale), beta2), inverse)
    span = builder.lshr(builder.sub(_INT(TWO), builder.bitcast(least, _INT)), _INT(SHIFT))
    coarse = _INT(0)
    for k in range(COARSEST):
        beyond = builder.icmp_unsigned(">", span, _INT((255 << k) - (1 << k)))
        coarse = builder.add(coarse, builder.zext(beyond, _INT))
    is_open = builder.or_(builder.icmp_unsigned("==", word, _INT(0)), builder.not_(is_finite))
    new_shift = builder.add(builder.select(is_open, _INT(COARSEST), coarse), _INT(SHIFT))
    first = builder.add(zero(new_shift), builder.shl(_INT(1), new_shift))
    return Unsigned(scale, shift, zero(shift), inverse, new_shift, first)


@intrinsic
def largest_codes(typing_context: Any, states: Any, i: Any) -> Any:
    """Return for each state a bit: whether the code of element ``i`` is that of what is not finite."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = _INT(0)
        for k, kind in _in_blocks(states):
            largest = ir.IntType(8)(127 if kind == SIGNED else 255)
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
        for k, kind in _in_blocks(states):
            word = words[k]
            if kind == UNSIGNED:
                new_shift = Unsigned(*cgutils.unpack_tuple(builder, of_views[k])).new_shift
                word = builder.or_(word, builder.sub(new_shift, _INT(SHIFT)))
            flag = builder.and_(builder.shl(largest_, _INT(31 - k)), _INT(_FLAG))
            builder.store(builder.or_(word, flag), _word_at(builder, scales_, k, block_))
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
        self._words, self._flags, self.is_clamped = None, [None] * count, None
        if not isinstance(types_of[2], types.NoneType):
            self._words = cgutils.unpack_tuple(builder, values[2])
        if not isinstance(types_of[4], types.NoneType):
            *self._flags, self.is_clamped = cgutils.unpack_tuple(builder, values[4])

    def view(self, k: int) -> Any:
        """Return the view of a state in blocks."""
        parts = cgutils.unpack_tuple(self.b, self.views[k])
        return Signed(*parts) if self.states[k].dtype == SIGNED else Unsigned(*parts)

    def load(self, k: int) -> Any:
        """Emit the number of a state."""
        kind = self.states[k].dtype
        code = self.b.load(_at(self.b, self._memory, k, self._i))
        if kind in _VIEWS:
            decode = decode_signed if kind == SIGNED else decode_unsigned
            return decode(self.b, code, self.view(k), self._flags[k])
        return DECODERS[kind](self.b, code) if kind in DECODERS else code

    def store(self, k: int, number: Any) -> None:
        """Emit the store of a number."""
        kind, word = self.states[k].dtype, None
        if self._words is not None:  # a whole one for 8 bits, a half for 16
            word = self._words[k // 2] if k < 3 else None
            if kind in ENCODERS and k > 0:
                word = self.b.lshr(word, _INT(16))
        if kind == SIGNED:
            word = _INT(ROUNDS_SIGNED) if word is None else word
            number = encode_signed(self.b, number, self.view(k), word, self.is_clamped)
        elif kind == UNSIGNED:
            word = _INT(ROUNDS_UNSIGNED) if word is None else word
            number = encode_unsigned(self.b, number, self.view(k), word, self.is_clamped)
        elif kind in ENCODERS:
            number = ENCODERS[kind](self.b, number, word)
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
        for k, _ in _in_blocks(states):
            with builder.if_then(element.changes(k)):
                element.store(k, element.load(k))
        return context.get_dummy_value()

    return types.void(states, i, words, views, checks), emit
