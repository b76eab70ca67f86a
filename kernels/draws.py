"""Random words from one element to the next: those of :func:`fastadam.kernels.formats.random_bits`, cheaper.

The words of neighbours differ by a constant before they are mixed, so a loop over elements in order carries
them along: an addition for each in place of a product (1.15 times the time of a step, in the cache).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .formats import mixed, place
from .rounding import WEYL

_INT = ir.IntType(32)
_DRAWS = types.UniTuple(types.uint32, 2)


class Word(NamedTuple):
    """Random bits for one state, as it may be stored; states of one element share few of them."""

    signed: Any  # its lower bits are for signed codes of 8 bits
    unsigned: Any  # its upper bits are for those without a sign
    half: Any  # its lower 16 bits are for 16-bit storage


@intrinsic
def draws_at(typing_context: Any, rounding: Any, i: Any) -> Any:
    """Return the draws of element ``i``, whose keys ``rounding`` has; None where none are drawn."""
    if isinstance(rounding, types.NoneType):
        return types.none(rounding, i), lambda context, *_: context.get_dummy_value()

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *keys, first = cgutils.unpack_tuple(builder, arguments[0])
        at = place(builder, first, arguments[1])
        return context.make_tuple(builder, _DRAWS, [builder.add(at, key) for key in keys])

    return _DRAWS(rounding, i), emit


@intrinsic
def draws_after(typing_context: Any, draws: Any) -> Any:
    """Return the draws of the next element."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if isinstance(draws, types.NoneType):
            return context.get_dummy_value()
        following = [builder.add(draw, _INT(WEYL)) for draw in cgutils.unpack_tuple(builder, arguments[0])]
        return context.make_tuple(builder, _DRAWS, following)

    return draws(draws), emit


def words_for_states(builder: Any, draws: Any) -> list[Word]:
    """Emit random bits for each of at most three states; an average behind them is not rounded."""
    return by_place(builder, *(mixed(builder, draw) for draw in cgutils.unpack_tuple(builder, draws)))


def by_place(builder: Any, one: Any, other: Any) -> list[Word]:
    """Emit the same of the two random words of an element."""
    upper, upper_of_other = (builder.lshr(word, _INT(16)) for word in (one, other))
    turned, other_turned = (_turned(builder, word) for word in (one, other))
    return [Word(one, turned, one), Word(turned, one, upper), Word(other_turned, other, upper_of_other)]


def _turned(builder: Any, word: Any) -> Any:
    """Emit a word with its halves exchanged."""
    return builder.or_(builder.lshr(word, _INT(16)), builder.shl(word, _INT(16)))


@intrinsic
def word_for_param(typing_context: Any, draws: Any) -> Any:
    """Return random bits for the parameter; None where none are drawn."""
    if isinstance(draws, types.NoneType):
        return types.none(draws), lambda context, *_: context.get_dummy_value()

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return mixed(builder, cgutils.unpack_tuple(builder, arguments[0])[1])

    return types.uint32(draws), emit
