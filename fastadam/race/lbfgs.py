"""The reference: L-BFGS, which sees the whole loss, without noise and of all data."""

from __future__ import annotations

from math import nan
from time import perf_counter
from typing import Any

import numpy as np

from fastadam.race.problem import Problem, Vector
from fastadam.race.results import Run
from fastadam.race.runs import Recorder

_ARRIVED = 1e-10
"""No element of the gradient is larger: what follows is rounding."""


def run(problem: Problem, seed: int, steps: int) -> Run:
    """Take up to ``steps`` iterations of SciPy's L-BFGS-B.

    An iteration may ask for more than one gradient; they are not in the time of a step, as elsewhere.

    References
    ----------
    Byrd, Lu, Nocedal & Zhu, "A Limited Memory Algorithm for Bound Constrained Optimization", SIAM Journal on
    Scientific Computing 16 (1995).
    """
    from scipy.optimize import minimize

    start = problem.start(seed)
    recorder = Recorder(problem, seed, steps)
    recorder.record(0, start)
    others, taken = 0.0, 0  # seconds of what is no work of the optimizer; iterations

    def loss_and_gradient(params: Vector) -> tuple[float, Vector]:
        nonlocal others
        before = perf_counter()
        value = problem.loss_and_gradient(params)
        others += perf_counter() - before
        return value

    def note(params: Vector) -> None:
        nonlocal others, taken
        before = perf_counter()
        taken += 1
        going = recorder.record(taken, params)
        others += perf_counter() - before
        if not going:
            raise StopIteration

    bounds: Any = None if problem.bounds is None else [problem.bounds] * problem.dims
    limits = {"maxiter": steps, "maxfun": 20 * steps, "ftol": 0.0, "gtol": _ARRIVED}
    before = perf_counter()
    found = minimize(
        loss_and_gradient, start, jac=True, method="L-BFGS-B", bounds=bounds, callback=note, options=limits
    )
    seconds = perf_counter() - before - others
    if taken < steps:
        recorder.stand_still(found.x)
    return recorder.run(seconds / taken if taken else nan)


def warm() -> None:
    """Import SciPy, before any clock starts."""
    from scipy.optimize import minimize

    minimize(lambda params: float(params @ params), np.zeros(1), method="L-BFGS-B")
