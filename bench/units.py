"""Sizes, dtypes and times, as people write them."""

from __future__ import annotations

_PREFIXES = {"Gi": 2**30, "Mi": 2**20, "Ki": 2**10}
_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def parse_size(text: str) -> int:
    """Return a number of elements: ``"32Mi"`` is 32 * 2**20, ``"1000"`` is 1000."""
    factor = _PREFIXES.get(text[-2:], 1)
    digits = text[:-2] if factor > 1 else text
    if not digits.isdecimal() or int(digits) == 0:
        raise ValueError(f"a size must be a positive integer, with Ki, Mi or Gi or without; got {text!r}.")
    return int(digits) * factor


def parse_dtype(text: str) -> str:
    """Return the name of a dtype that fastadam steps in."""
    if text not in {"float32", "float64"}:
        raise ValueError(f"the dtype must be float32 or float64; got {text!r}.")
    return text


def format_size(size: int) -> str:
    """Return the shortest exact text of a size, such as ``"32Mi"``."""
    for prefix, factor in _PREFIXES.items():
        if size % factor == 0:
            return f"{size // factor}{prefix}"
    return str(size)


def format_time(seconds: float) -> str:
    """Return a time with three significant digits, such as ``"16.2 ms"``."""
    for unit, name in _TIMES:
        if seconds >= unit:
            return f"{_three_digits(seconds / unit)} {name}"
    return f"{_three_digits(seconds * 1e9)} ns"


def format_bytes(count: float) -> str:
    """Return a number of bytes with three significant digits, such as ``"8.00 KiB"``."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(count) >= unit:
            return f"{_three_digits(count / unit)} {name}"
    return f"{count:.0f} B"


def _three_digits(value: float) -> str:
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}"
