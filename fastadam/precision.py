"""How numbers are stored: what users may say, and what it means for each state."""

from __future__ import annotations

from functools import lru_cache

from fastadam.checks import count

StateDtype = str | tuple[str, str]
"""A format of all states, or one of those with a sign and one of those that are never negative."""

SIGNED_8BIT, UNSIGNED_8BIT = "8bit with a sign", "8bit without"
"""What users call "8bit", of states that may be negative and of others."""
IN_BLOCKS = frozenset({SIGNED_8BIT, UNSIGNED_8BIT})
"""The formats of states that have scales."""

_STATE = ("float32", "bfloat16", "8bit")


def rounding(name: str, value: object) -> str:
    """Return "stochastic" or "nearest"."""
    if isinstance(value, str) and value in {"stochastic", "nearest"}:
        return str(value)
    raise ValueError(f"{name} must be 'stochastic' or 'nearest'; got {value!r}.")


def state_dtype(name: str, value: object) -> StateDtype:
    """Return a format of the states, or a pair of two different ones."""
    given = value if isinstance(value, (tuple, list)) else (value, value)
    if len(given) != 2 or not all(isinstance(one, str) and one in _STATE for one in given):
        raise ValueError(f"{name} must be 'float32', 'bfloat16', '8bit' or a pair of them; got {value!r}.")
    first, second = map(str, given)
    return first if first == second else (first, second)


def master_params(name: str, value: object) -> str | None:
    """Return "float32", "split" or None."""
    if value is None or (isinstance(value, str) and value in {"float32", "split"}):
        return None if value is None else str(value)
    raise ValueError(f"{name} must be None, 'float32' or 'split'; got {value!r}.")


def from_zero(name: str, value: object) -> int:
    """Return an integer that is not negative."""
    return count(name, value, least=0)


def pair(stored: StateDtype) -> tuple[str, str]:
    """Return the formats of states with a sign and of those that are never negative."""
    return (stored, stored) if isinstance(stored, str) else stored


@lru_cache(maxsize=64)
def of_states(
    names: tuple[str, ...], nonnegative: frozenset[str], exact: frozenset[str], stored: StateDtype
) -> tuple[str, ...]:
    """Return the format of each state, as :mod:`fastadam.formats` has it.

    Of ``exact`` ones, and of an average, which is never rounded, it is "float32".
    """
    signed, unsigned = pair(stored)
    signed = SIGNED_8BIT if signed == "8bit" else signed
    unsigned = UNSIGNED_8BIT if unsigned == "8bit" else unsigned
    never_rounded = exact | {"param_ema"}
    return tuple(
        "float32" if name in never_rounded else unsigned if name in nonnegative else signed for name in names
    )
