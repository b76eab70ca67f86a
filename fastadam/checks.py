"""Checks of single values: each returns the value as a plain float, int or bool, or raises.

Messages read ``<argument> must <rule>; got <value>.``
"""

from __future__ import annotations

import math
import numbers

import numpy as np

COUNTS = 2**53
"""Counts from here on are no exact floats any more; no training gets there."""


def real(name: str, value: object) -> float:
    """Return a finite real number."""
    # bool is a number to Python, never a hyperparameter to a person.
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            raise ValueError(f"{name} must be finite; got an integer beyond float64.") from None
        if math.isfinite(number):
            return number
        raise ValueError(f"{name} must be finite; got {number}.")
    raise TypeError(f"{name} must be a real number; got {type(value).__name__}.")


def at_least_zero(name: str, value: object) -> float:
    """Return a finite real number that is not negative."""
    number = real(name, value)
    if number < 0:
        raise ValueError(f"{name} must be at least 0; got {number}.")
    return number


def count(name: str, value: object, *, least: int = 1) -> int:
    """Return an integer in [least, 2**53)."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer; got {type(value).__name__}.")
    number = int(value)
    if not least <= number < COUNTS:
        # Python refuses to print an integer of more than 4,300 digits.
        got = number if abs(number) < 10**20 else "an integer beyond it"
        raise ValueError(f"{name} must be in [{least}, 2**53); got {got}.")
    return number


def require_flag(name: str, value: object) -> bool:
    """Return a bool; raise TypeError if it is none."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False; got {type(value).__name__}.")
    return bool(value)
