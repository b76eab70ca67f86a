"""What a step needs to know of storage; without Numba, for the host to form."""

from __future__ import annotations

from typing import Any, NamedTuple

WEYL, WEYL_OF_HIGH, MULTIPLIER = 0xC2B2AE3D, 0x27D4EB2F, 0xD35A2D97
"""Of the hash that random bits are. (With the golden ratio in place of the first, elements a Fibonacci number
apart correlate.)"""


class Rounding(NamedTuple):
    """What stochastic rounding needs to know of a step; None is to the nearest."""

    moments: Any  # key of the word for exp_avg (its lower half) and exp_avg_sq (its upper half), uint32
    params: Any  # of the word for the parameters (lower) and for the maximum of AMSGrad (upper), uint32
    first: Any  # index of element 0 in the whole buffer, uint64


class Storage(NamedTuple):
    """What a step of other than plain arrays works with, each None for none; arrays of shape (n,)."""

    rounding: Rounding | None = None
    master: Any = None  # of the parameters: float32, or int16 beside parameters of int16
    out: Any = None  # uint16, int16 or float32: gets a copy of the new parameters
    scales: Any = None  # where a state is in blocks, for each a float32 array of one for each block, or empty


PLAIN = Storage()
"""What asks for nothing."""
