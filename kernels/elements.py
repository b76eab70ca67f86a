"""Elements of states in any storage: read, written, and, of blocks of which a part is frozen, kept.

:mod:`fastadam.kernels.bounds` says what functions here have in common.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .bounds import in_blocks
from .distinct import get, put
from .draws import Word, words_for_states
from .eight_bits import (
    ROUNDS_SIGNED,
    ROUNDS_UNSIGNED,
    SIGNED,
    Signed,
    Unsigned,
    decode_signed,
    decode_unsigned,
    encode_signed,
    encode_unsigned,
)
from .formats import DECODERS, ENCODERS
from .views import VIEWS, checks_in, parts_of, views_in

_INT, _FLOAT = ir.IntType(32), ir.FloatType()


def _load(builder: Any, state: Any, pointer: Any, i: Any, view: Any, flag: Any) -> Any:
    code = get(builder, state, pointer, i)
    if state.dtype in VIEWS:
        decode: Callable[..., Any] = decode_signed if state.dtype == SIGNED else decode_unsigned
        return decode(builder, code, parts_of(builder, state.dtype, view), flag)
    return DECODERS[state.dtype](builder, code) if state.dtype in DECODERS else code


def _store(
    builder: Any,
    state: Any,
    pointer: Any,
    i: Any,
    number: Any,
    word: Word | None,
    view: Any,
    is_clamped: Any,
) -> None:
    if state.dtype in VIEWS:
        encode: Callable[..., Any] = encode_signed if state.dtype == SIGNED else encode_unsigned
        nearest = ROUNDS_SIGNED if state.dtype == SIGNED else ROUNDS_UNSIGNED
        random = _INT(nearest)
        if word is not None:
            random = word.signed if state.dtype == SIGNED else word.unsigned
        number = encode(builder, number, parts_of(builder, state.dtype, view), random, is_clamped)
    elif state.dtype in ENCODERS:
        number = ENCODERS[state.dtype](builder, number, None if word is None else word.half)
    put(builder, state, pointer, i, number)


def _words(builder: Any, draws: Any, value: Any, count: int) -> list[Any]:
    """Emit random bits for each of ``count`` states; None where none are drawn."""
    found = [] if isinstance(draws, types.NoneType) else words_for_states(builder, value)
    return [*found, *[None] * count][:count]


@intrinsic
def load_states(typing_context: Any, states: Any, i: Any, views: Any, checks: Any) -> Any:
    """Return element ``i`` of each state."""
    numbers = types.Tuple(
        [types.float32 if s.dtype in DECODERS or s.dtype in VIEWS else s.dtype for s in states]
    )

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointers = cgutils.unpack_tuple(builder, arguments[0])
        of_views = views_in(builder, views, arguments[2], len(states))
        flags, _ = checks_in(builder, checks, arguments[3], len(states))
        found = [
            _load(builder, state, pointer, arguments[1], view, flag)
            for state, pointer, view, flag in zip(states, pointers, of_views, flags, strict=True)
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
        of_views = views_in(builder, views, arguments[4], len(states))
        words = _words(builder, draws, arguments[3], len(states))
        _, is_clamped = checks_in(builder, checks, arguments[5], len(states))
        for k, state in enumerate(states):
            _store(builder, state, pointers[k], arguments[1], values[k], words[k], of_views[k], is_clamped)
        return context.get_dummy_value()

    return types.void(states, i, numbers, draws, views, checks), emit


@intrinsic
def keep_states(typing_context: Any, states: Any, i: Any, draws: Any, views: Any, checks: Any) -> Any:
    """Write element ``i`` of the states in blocks as it is, where codes would mean something else."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointers, of_views = (cgutils.unpack_tuple(builder, arguments[k]) for k in (0, 3))
        words = _words(builder, draws, arguments[2], len(states))
        flags, is_clamped = checks_in(builder, checks, arguments[4], len(states))
        for k, kind in in_blocks(states):
            state, view = states[k], of_views[k]
            changes = _changes(builder, parts_of(builder, kind, view), flags[k], is_clamped)
            with builder.if_then(changes):
                number = _load(builder, state, pointers[k], arguments[1], view, flags[k])
                _store(builder, state, pointers[k], arguments[1], number, words[k], view, is_clamped)
        return context.get_dummy_value()

    return types.void(states, i, draws, views, checks), emit


def _changes(builder: Any, view: Signed | Unsigned, flag: Any, is_clamped: Any) -> Any:
    """Emit whether codes would not mean the same after a step."""
    changes = builder.fcmp_unordered("une", builder.fdiv(_FLOAT(1), view.scale), view.inverse)
    if isinstance(view, Unsigned):
        changes = builder.or_(changes, builder.icmp_unsigned("!=", view.shift, view.new_shift))
    # The largest code may become one of what is not finite.
    return builder.or_(changes, builder.and_(is_clamped, builder.not_(flag)))
