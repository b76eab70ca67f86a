"""``1 - beta ** step`` for every step: correctly rounded float64, the same bits on every machine.

The C library's ``pow`` differs between machines in the last bit, and a GPU has another one again. Powers are
formed here in double-double arithmetic (a float64 and its rounding error), by additions and multiplications
only, in blocks of :data:`BLOCK` steps. A power is off by less than 2**-90, so the one rounding at the end
is the right one, but for cases rarer than one in 2**25.

Dekker, "A floating-point technique for extending the available precision", Numer. Math. 18 (1971).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

Number: TypeAlias = Any
"""A float or a float64 array."""

Corrections: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

DoubleDouble: TypeAlias = tuple[Number, Number]
"""A number and what its rounding left."""

BLOCK = 1024
"""Steps whose corrections are formed together; a power of two."""

_LARGEST_BLOCK = 2**16
"""Corrections of many betas that are formed together."""

_SPLIT = 2.0**27 + 1.0  # Veltkamp's constant for 53 bits


def _halves(a: Number) -> DoubleDouble:
    high = _SPLIT * a
    high = high - (high - a)
    return high, a - high


def _multiply(a: DoubleDouble, b: DoubleDouble) -> DoubleDouble:
    product = a[0] * b[0]
    (a_high, a_low), (b_high, b_low) = _halves(a[0]), _halves(b[0])
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    error = error + (a[0] * b[1] + a[1] * b[0])
    total = product + error
    return total, error - (total - product)


def _power(base: DoubleDouble, exponent: int) -> DoubleDouble:
    """By repeated squaring."""
    result: DoubleDouble = (1.0, 0.0)
    while exponent:
        if exponent & 1:
            result = _multiply(result, base)
        base = _multiply(base, base)
        exponent >>= 1
    return result


@lru_cache(maxsize=16)
def _first_powers(beta: float, rest: float = 0.0) -> DoubleDouble:
    """Return ``(beta + rest) ** (0, ..., BLOCK - 1)``, by doubling."""
    high, low = np.ones(1), np.zeros(1)
    while high.size < BLOCK:
        shift = _power((beta, rest), high.size)
        more = _multiply((high, low), shift)
        high, low = np.concatenate([high, more[0]]), np.concatenate([low, more[1]])
    return high, low


def _one_minus(power: DoubleDouble) -> Corrections:
    high, low = power
    difference = 1.0 - high
    error = (1.0 - difference) - high
    corrections: Corrections = difference + (error - low)
    return corrections


@lru_cache(maxsize=16)
def block(beta: float, number: int) -> Corrections:
    """Return the corrections of the steps ``number * BLOCK`` up to, without, ``(number + 1) * BLOCK``."""
    return _one_minus(_multiply(_first_powers(beta), _power((beta, 0.0), number * BLOCK)))


def powers(base: DoubleDouble, number: int) -> Corrections:
    """Return the rounded powers of a base in [0, 1], of the exponents of a block."""
    with np.errstate(under="ignore"):
        high, _ = _multiply(_first_powers(*base), _power(base, number * BLOCK))
    rounded: Corrections = high
    return rounded


class OfMany:
    """The corrections of many betas, the same bits: formed in blocks of fewer steps the more betas there are.

    Parameters
    ----------
    betas : ndarray, shape (n,)
        Not empty.
    """

    def __init__(self, betas: Corrections) -> None:
        self._betas = betas
        self._steps = BLOCK
        while self._steps > 1 and self._steps * betas.size > _LARGEST_BLOCK:
            self._steps //= 2
        self._formed = (-1, betas[None])  # one object: another thread may form another block meanwhile

    def at(self, step: int) -> Corrections:
        """Return the corrections of a step, shape (n,), not to be written to."""
        number, place = divmod(step, self._steps)
        formed, block = self._formed
        if number != formed:
            block = self._form(number * self._steps)
            self._formed = number, block
        corrections: Corrections = block[place]
        return corrections

    def _form(self, first: int) -> Corrections:
        number, start = divmod(first, BLOCK)
        places = np.arange(start, start + self._steps)[:, None]
        # Powers by repeated squaring, as _first_powers has them: it doubles, which is the same products.
        base: DoubleDouble = (self._betas, np.zeros_like(self._betas))
        shape = (self._steps, self._betas.size)
        powers: DoubleDouble = (np.ones(shape), np.zeros(shape))
        for bit in range(BLOCK.bit_length() - 1):
            taken = (places >> bit & 1).astype(bool)
            if taken.any():
                more = _multiply(powers, base)
                powers = np.where(taken, more[0], powers[0]), np.where(taken, more[1], powers[1])
            base = _multiply(base, base)
        return _one_minus(_multiply(powers, _power((self._betas, 0.0), number * BLOCK)))


@lru_cache(maxsize=8)
def of_many(betas: tuple[float, ...]) -> OfMany:
    """Return the corrections of many betas, with the block that was formed last for the same ones."""
    return OfMany(np.array(betas))


@lru_cache(maxsize=16)
def _powers(base: float, number: int) -> list[float]:
    """Return the rounded powers of a block of exponents."""
    found: list[float] = powers((base, 0.0), number).tolist()
    return found


def power(base: float, exponent: int) -> float:
    """Return ``base ** exponent`` for a base in [0, 1] and a count: the same bits on every machine."""
    number, place = divmod(exponent, BLOCK)
    return _powers(base, number)[place]


def table(beta: float) -> Corrections:
    """Return the corrections of the steps 1, 2, ... up to the first that is exactly 1, as are all after it.

    37.4 / (1 - beta) of them: 300 kB for 0.999.
    """
    blocks: list[Corrections] = []
    while not blocks or blocks[-1][-1] < 1.0:
        blocks.append(block.__wrapped__(beta, len(blocks)))
    corrections = np.concatenate(blocks)[1:]
    return corrections[: int(np.argmax(corrections == 1.0)) + 1]
