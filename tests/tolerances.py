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


def phase_tolerance(phase, lr: float, dtype) -> dict[str, np.ndarray]:
    """Bound the errors of parameters, average and moments after some steps of the phase from zero moments.

    In units of eps. A gradient: half for the division by the scale, half for the rounded factor, half for the
    product with it, and 8 for the norm (float64: at most 15 additions in a row in so small a buffer, halved
    by the root): 10. The first moment after T steps: 10 and two roundings each step, of numbers not larger
    than the largest gradient G. The second: 20 and two each step, of G squared; its root half of that. Then
    the 8 of ``ONE_STEP_ULPS``. In all less than 40 + 4 T, of an update that is at most lr times the ratio R
    of G to the root of the debiased second moment, squared where errors of G and of the root meet. Storing a
    parameter costs half an ulp of it, twice each step; the average has as many roundings, and what errors the
    parameters have.
    """
    adam, steps = phase.adam, phase.t
    eps = EPS[np.dtype(dtype)]
    v_hat = adam.v / (1 - adam.betas[1] ** steps) if steps else adam.v
    ratio = np.divide(phase.largest, np.sqrt(v_hat), out=np.ones_like(v_hat), where=v_hat > 0)
    # Lengths of the way: no parameter was further from the present one than this.
    spacing = np.spacing((np.abs(phase.theta) + 2 * steps * lr * ratio).astype(dtype)).astype(v_hat.dtype)
    params = steps * (lr * (40 + 4 * steps) * eps * np.maximum(ratio, 1) ** 2 + spacing)
    return {
        "params": params,
        "param_ema": params + steps * spacing,
        "exp_avg": (10 + 2 * steps) * eps * phase.largest,
        "exp_avg_sq": (20 + 2 * steps) * eps * phase.largest**2,
        "max_exp_avg_sq": (20 + 2 * steps) * eps * phase.largest**2,
    }


def exchange_tolerance(gradients, lr: float, beta2: float, largest_param: float, dtype) -> dict[str, float]:
    """Bound the differences of two Adams after T steps with the same gradients, both in ``dtype``.

    In units of eps. A first moment has two roundings a step, half a unit each, of numbers not larger than the
    largest gradient G, and rounded coefficients: T + 2. A second moment likewise, relative to itself as all
    its terms are positive, with the square: 2 T + 2, and its root half of that. An update has both and the 8
    of ``ONE_STEP_ULPS``: 2 T + 11, times at most lr R, where R is the ratio of G to the smallest root of a
    debiased second moment. Storing a parameter costs half an ulp of it, twice a step. All of it twice, for
    there are two Adams, and that of updates and parameters in each of T steps.
    """
    squares = np.asarray(gradients, np.float64) ** 2
    steps, v, smallest = len(squares), np.zeros(squares.shape[1:]), np.inf
    for t, square in enumerate(squares, start=1):
        v = beta2 * v + (1 - beta2) * square
        smallest = min(smallest, float((v / (1 - beta2**t)).min()))
    largest = float(np.sqrt(squares.max()))
    eps = EPS[np.dtype(dtype)]
    update = lr * largest / np.sqrt(smallest) * (2 * steps + 11) * eps
    return {
        "params": 2 * steps * (update + float(np.spacing(np.dtype(dtype).type(largest_param)))),
        "exp_avg": 2 * (steps + 2) * eps * largest,
        "exp_avg_sq": 2 * (2 * steps + 2) * eps * largest**2,
    }


def trajectory_tolerance(start, expected) -> np.ndarray:
    """Bound the differences of two runs of one rule after every step, both in the dtype of ``expected``.

    The gradients are the same, so an update of step t has errors of what is kept, of at most two roundings in
    each of t steps and two rounded coefficients, and of its own dozen: 2 t + 16 units of eps, of two runs, of
    the largest step U that any element took. The parameters add these up, and half a unit of their own twice
    a step. L2 decay gives their errors back to the gradients, where they count less than those.

    Parameters
    ----------
    start : ndarray, shape (n,)
    expected : ndarray, shape (steps, n)
        The parameters after every step.
    """
    way = np.concatenate([start[None], expected])
    largest = np.abs(np.diff(way, axis=0)).max()
    steps = np.arange(1, len(way))[:, None]
    spacing = np.spacing(np.abs(way).max())
    bound: np.ndarray = steps * (2 * (2 * steps + 16) * largest * EPS[expected.dtype] + 2 * spacing)
    return bound


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
