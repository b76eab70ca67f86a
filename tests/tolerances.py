"""Every tolerance of the tests, with its derivation. Bits are compared with :func:`assert_same_bits`."""

from __future__ import annotations

import numpy as np

LONG_DOUBLE_IS_WIDER = np.finfo(np.longdouble).eps < np.finfo(np.float64).eps
"""Not on Windows, nor on macOS with ARM: there float64 has no oracle but float64."""

EPS = {np.dtype(dtype): float(np.finfo(dtype).eps) for dtype in (np.float32, np.float64)}

ONE_STEP_ULPS = 8.0
"""Error of the update of one step from zero state, in units of eps times the update.

Eight roundings, each at most eps / 2 relative: gradient times coefficient and the sum in each average (the
second's halved by the root), the square, the bias correction, the root, the sum with eps, the division, the
product with the step size; four rounded coefficients. 16 halves.
"""


def update_error(after, before, exact_update) -> np.ndarray:
    """Error of an update beyond storing the parameter twice (decay and update): half an ulp of it each."""
    update = after.astype(exact_update.dtype) - before
    storing = np.spacing(np.maximum(np.abs(after), np.abs(before)))
    return np.maximum(np.abs(update - exact_update) - storing, 0.0)


def assert_same_bits(actual, expected, what: str = "arrays") -> None:
    """Fail unless two arrays are equal bit for bit; any NaN equals any NaN (its payload carries nothing)."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    unsigned = np.dtype(f"u{actual.itemsize}")
    different = (actual.view(unsigned) != expected.view(unsigned)) & ~(np.isnan(actual) & np.isnan(expected))
    if different.any():
        i = int(np.flatnonzero(different)[0])
        raise AssertionError(
            f"{what} differ in {different.sum()} of {different.size} elements, first at {i}:"
            f" {actual[i]!r} != {expected[i]!r}"
        )
