"""The keys of stochastic rounding: of (seed, step), on the host."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from fastadam.kernels.rounding import Rounding

_MASK = 2**64 - 1


@lru_cache(maxsize=16)
def mixed(seed: int) -> int:
    """Return the 64 bits that a seed becomes, whatever the step."""
    return splitmix64(seed)


def splitmix64(value: int) -> int:
    """Return 64 bits that look random, a different value for each value of 64 bits.

    Steele, Lea & Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    value = value + 0x9E3779B97F4A7C15 & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def random_bits(seed: int, step: int) -> int:
    """Return the 64 bits of a step, counted from 1, of which the keys are the halves."""
    return splitmix64(mixed(seed) ^ step)


def rounding(seed: int, step: int, offset: int) -> Rounding:
    """Return what stochastic rounding needs in a step, counted from 1, of a buffer.

    Parameters
    ----------
    seed : int
    step : int
    offset : int
        Index of the buffer's first element in the whole buffer.
    """
    bits = random_bits(seed, step)
    return Rounding(np.uint32(bits & 0xFFFFFFFF), np.uint32(bits >> 32), np.uint64(offset))
