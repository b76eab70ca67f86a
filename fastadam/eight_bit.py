r"""States in 8 bits: the format to the bit, and the same in NumPy.

A state is cut into blocks of 128 elements from its beginning; the last may be shorter. Of each element there
is a code of one byte, of each block a scale in float32: 1.03125 bytes per parameter and state.

First moments, and other states with a sign. A code is a sign (bit 7) and seven bits of magnitude, which are
bits 20 to 26 of a float32 between :math:`2^{-15}` and 1.875: four of the exponent and three of the mantissa.
With ``scale`` without its sign,

    exp_avg = +-(float(0x38000000 | magnitude << 20) - 2**-15) * scale

so that code 0 is zero, the smallest magnitudes are evenly :math:`2^{-18}` scale apart, and larger ones 1/16
to 1/8 of themselves.

Second moments, and other states that are never negative. A code is the upper part of a float32 below 2,
shifted: the two lowest bits of the scale say how coarse it is. With ``bits`` those of the scale and ``scale``
without these two and without its sign,

    shift = 17 + (bits & 3)
    exp_avg_sq = 0 if code == 0 else float(0x40000000 - (256 << shift) + (code << shift)) * scale

6, 5, 4 or 3 bits of mantissa, for 4, 8, 16 or 32 octaves. What is not zero gets no code of zero: it is lifted
to code 1. A second moment that were zero would blow up its update.

A scale whose sign is set has something that is not finite in its block: there the largest magnitude (127) is
NaN, the largest code of a second moment (255) is inf, and finite elements reach to the code below.

Scales are at least :math:`2^{-126}` and at most 0x7f088888, the largest of which all codes are finite. That
of a block that was never stepped is 0, and all of it is zero, unless the state begins with another number.

A step of Adam, AMSGrad, NAdam or RAdam first forms the new scales, from the largest magnitude ``G`` of the
gradients of the block as the rule gets them, in float32 and in this order, with ``up = 1 + 2**-20``,
``top = 1.875``, ``less = top - 2**-15``:

    first:   max((beta1 * scale) * up + ((1 - beta1) * G) * (up / less), 2**-126)
    second:  (beta2 * scale) * up + ((1 - beta2) * (G * G)) * (up / top),
             its bits + 3 without the two lowest, at least 2**-126

These are bounds of the new moments, so no code overflows, and they decay as the moments do: what all
elements of a block have in common goes into its scale, and rounding at random adds no noise to it. The
maximum of second moments of AMSGrad has the larger of its own scale and the new one of the second moments.
Then the coarseness: with ``least`` the smallest code but zero, decoded, times beta2, times the inverse of
the new scale,

    span = (0x40000000 - bits(least)) >> 17
    coarseness = (span > 254) + (span > 508) + (span > 1016), 3 if the old scale is 0

A step of any other rule first computes the new states of all elements of the block, and forms the scales of
these: with ``peak`` the largest magnitude of a state and ``least`` the smallest but zero,

    with a sign:     peak * (up / less)
    never negative:  peak * (up / top), its bits + 3 without the two lowest
    span = (0x40000000 - bits(least * (1 / scale))) >> 17

both scales at least 2**-126, and coarseness as above, 3 if all are zero. Then it computes them again and
stores them.

The step computes with the decoded moments; the parameter follows the new ones before they are rounded. A
number ``x`` becomes, with 32 random bits ``r`` (docs/storage.md), and inverses that are rounded to float32,

    first:   magnitude = (bits(abs(x) * (1 / scale) + 2**-15) + (r & 0xfffff)) >> 20 & 127
    second:  code = 0 if x == 0 else
                    (max(bits(x * (1 / scale)), bits of code 1) + (r >> (32 - shift))) >> shift

To the nearest, ``r`` is ``1 << 19`` and ``1 << 31``.

If ``G * G`` or a new state is not finite, or a new scale would be larger than the largest, or the old one is
flagged, ``G`` is formed of the gradients with a finite square alone, ``peak`` of the finite states, the
scales are at most the largest, the coarseness is 3, and numbers from 1.75 scale on (with the 2**-15 of a
first moment) become the code below the largest.

A block of which parts have different coefficients has the largest of the scales that these give, and the
least of their beta2. A frozen part counts with the old scales, and its elements for ``least``. It is written
again, rounded like all else, where the inverse of a scale or the coarseness changes, and where the largest
code becomes one of what is not finite.

With a beta above :math:`1 - 2^{-20}` bounds would grow, slowly: ``up`` is more than what decays.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from fastadam.kernels.groups import BLOCK

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

SIGNED, UNSIGNED = np.dtype(np.int8), np.dtype(np.uint8)
"""The dtypes of codes: of first and of second moments."""

_U = np.uint32
_ABS, _SIGN, _FINE, _TOP = _U(0x7FFFFFFF), _U(0x80000000), _U(0x7FFFFFFC), _U(0x40000000)
_OFFSET, _OFFSET_BITS = np.float32(2.0**-15), _U(0x38000000)
_LEAST, _LARGEST = _U(0x00800000), _U(0x7F088888)
_UP = 1 + 2.0**-20
_PER_PEAK, _PER_SQUARE = np.float32(_UP / (1.875 - 2.0**-15)), np.float32(_UP / 1.875)
_LARGEST_CODES = np.array([248, 252, 254, 255], np.uint8)  # of 1.875, for each coarseness


def blocks_of(size: int) -> int:
    """Return the number of blocks of a moment."""
    return -(-size // BLOCK)


def decode(codes: Array, scales: Array) -> Array:
    """Return a moment.

    Parameters
    ----------
    codes : ndarray of int8 or uint8, shape (n,)
        Of a first or of a second moment.
    scales : ndarray of float32, shape (blocks_of(n),)

    Returns
    -------
    ndarray of float32, shape (n,)
    """
    words = np.repeat(scales.view(_U), BLOCK)[: codes.size]
    flagged = words > _ABS
    # Scales of moments that are not finite would be, too.
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if codes.dtype == SIGNED:
            wide = codes.view(np.uint8).astype(_U)
            magnitude = wide & _U(127)
            number = ((magnitude << _U(20)) | _OFFSET_BITS).view(np.float32) - _OFFSET
            number = np.where(
                flagged & (magnitude == 127), np.float32(np.nan), number * _floats(words & _ABS)
            )
            return _floats((number.view(_U) & _ABS) | ((wide & _U(128)) << _U(24)))
        wide, shift = codes.astype(_U), _U(17) + (words & _U(3))
        number = _floats(_base(shift) + (wide << shift)) * _floats(words & _FINE)
        number = np.where(flagged & (wide == 255), np.float32(np.inf), number)
        return np.where(wide == 0, np.float32(0), number)


def encode(values: Array, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Return the codes and the scales of a moment that comes from elsewhere, rounded to the nearest.

    Parameters
    ----------
    values : ndarray of float32, shape (n,)
    dtype : dtype
        int8 for a first moment, uint8 for a second, which is not negative.

    Returns
    -------
    codes : ndarray of the dtype, shape (n,)
    scales : ndarray of float32, shape (blocks_of(n),)
    """
    padded = np.zeros((blocks_of(values.size), BLOCK), np.float32)
    padded.reshape(-1)[: values.size] = values
    is_finite = np.isfinite(padded)
    magnitudes = np.where(is_finite, np.abs(padded), np.float32(0))
    peaks: Array = magnitudes.max(axis=1, initial=0)
    flagged: Array = np.logical_not(is_finite.all(axis=1))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        code = _first_moments if dtype == SIGNED else _second_moments
        codes, words = code(padded, magnitudes, peaks, flagged)
    words = np.where(flagged, words | _SIGN, words)
    words = np.where((peaks == 0) & ~flagged, _U(0), words)
    return codes.reshape(-1)[: values.size].view(dtype), _floats(words)


def is_possible(codes: Array, scales: Array) -> bool:
    """Return whether codes and scales are those of a moment: larger ones could overflow with a step."""
    words = scales.view(_U)
    if not ((words & _ABS) <= (_LARGEST | _U(3))).all():
        return False
    if codes.dtype == SIGNED:
        return True
    if ((words > _ABS) & (words & _U(3) != 3)).any():
        return False
    return bool((codes <= np.repeat(_LARGEST_CODES[words & _U(3)], BLOCK)[: codes.size]).all())


def _first_moments(values: Array, magnitudes: Array, peaks: Array, flagged: Array) -> tuple[Array, Array]:
    words = np.clip((peaks * _PER_PEAK).view(_U), _LEAST, _LARGEST)
    scaled = magnitudes * (np.float32(1) / _floats(words))[:, None] + _OFFSET
    codes = (scaled.view(_U) + _U(1 << 19)) >> _U(20) & _U(127)
    codes = np.where(flagged[:, None] & (scaled >= 1.75), _U(126), codes)
    codes = np.where(np.isfinite(values), codes, _U(127))
    return (codes | (values.view(_U) >> _U(24) & _U(128))).astype(np.uint8), words


def _second_moments(values: Array, magnitudes: Array, peaks: Array, flagged: Array) -> tuple[Array, Array]:
    words = np.clip((peaks * _PER_SQUARE).view(_U) + _U(3) & ~_U(3), _LEAST, _LARGEST)
    scaled = magnitudes * (np.float32(1) / _floats(words))[:, None]
    least = np.where(magnitudes > 0, scaled, np.float32(np.inf)).min(axis=1, initial=np.float32(1.875))
    span = (_TOP - least.view(_U)) >> _U(17)
    coarseness = sum(((span > limit).astype(_U) for limit in (254, 508, 1016)), _U(0))
    coarseness = np.where(flagged, _U(3), coarseness).astype(_U)
    shift = (_U(17) + coarseness)[:, None]
    raised = np.maximum(scaled.view(_U), _base(shift) + (_U(1) << shift))
    codes = (raised + (_U(1) << (shift - _U(1)))) >> shift & _U(255)
    codes = np.where(flagged[:, None] & (scaled >= 1.75), _U(254), codes)
    codes = np.where(magnitudes == 0, _U(0), codes)
    codes = np.where(np.isfinite(values), codes, _U(255))
    return codes.astype(np.uint8), words | coarseness


def _base(shift: Any) -> Any:
    """Return the bits of what code 0 of a second moment would be, were it not zero."""
    return _TOP - (_U(256) << shift)


def _floats(bits: Any) -> Array:
    return np.ascontiguousarray(bits, dtype=_U).view(np.float32)
