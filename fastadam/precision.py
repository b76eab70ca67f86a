"""The checks of what says how numbers are stored."""

from __future__ import annotations

from collections.abc import Sequence

from fastadam.checks import count

StateDtype = str | tuple[str, str]
"""A format of both moments, or one for each."""

_STATE = ("float32", "bfloat16", "8bit")


def rounding(name: str, value: object) -> str:
    """Return "stochastic" or "nearest"."""
    if isinstance(value, str) and value in {"stochastic", "nearest"}:
        return str(value)
    raise ValueError(f"{name} must be 'stochastic' or 'nearest'; got {value!r}.")


def state_dtype(name: str, value: object) -> StateDtype:
    """Return a format of the moments, or a pair of two different ones."""
    given = value if isinstance(value, (tuple, list)) else (value, value)
    if len(given) != 2 or not all(isinstance(one, str) and one in _STATE for one in given):
        raise ValueError(f"{name} must be 'float32', 'bfloat16', '8bit' or a pair of them; got {value!r}.")
    first, second = map(str, given)
    return first if first == second else (first, second)


def state_dtype_of_all(name: str, value: object) -> StateDtype:
    """Return the format of all states of a rule whose moments are not Adam's."""
    if not isinstance(value, str) or value not in {"float32", "bfloat16"}:
        raise ValueError(
            f"{name} must be 'float32' or 'bfloat16' for this optimizer; got {value!r}. Only moments like"
            " Adam's are kept in 8 bits, or each in a format."
        )
    return str(value)


def master_params(name: str, value: object) -> str | None:
    """Return "float32", "split" or None."""
    if value is None or (isinstance(value, str) and value in {"float32", "split"}):
        return None if value is None else str(value)
    raise ValueError(f"{name} must be None, 'float32' or 'split'; got {value!r}.")


def from_zero(name: str, value: object) -> int:
    """Return an integer that is not negative."""
    return count(name, value, least=0)


def pair(stored: StateDtype) -> tuple[str, str]:
    """Return the formats of first and of second moments."""
    return (stored, stored) if isinstance(stored, str) else stored


def of_states(names: Sequence[str], stored: StateDtype) -> tuple[str, ...]:
    """Return the format of each state: those of second moments are alike, an average is never rounded."""
    first, second = pair(stored)
    return tuple(
        first if name == "exp_avg" else "float32" if name == "param_ema" else second for name in names
    )
