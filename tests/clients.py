"""Loss curves: how far rounding alone takes two trainings apart, and what of an optimizer is more than that.

Two right implementations of Adam form the same step, and differ by what they round. For each element by its
own: at most one ulp of the parameter (each stores it to half of one), and ``2 * ONE_STEP_ULPS * eps`` of the
update. For all elements and steps alike: by the coefficients, ``COEFFICIENTS * eps`` of the update.

So a third training, with the client's own optimizer, is nudged by so much after every step: by the one at
random, by the other always ahead. The distance of its losses from those of the undisturbed one is what
rounding may do to this model, on this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from tolerances import EPS, ONE_STEP_ULPS

from fastadam import coefficients
from fastadam.bias_correction import BLOCK

COEFFICIENTS = 6.0
"""Errors of the coefficients in both implementations, in units of eps times the update.

Two of each average, the correction of the bias and the step size: six in each, half an eps at most.
"""

FACTOR = 4.0
"""How much further from the client's own curve ours may be than the nudged one.

Both distances are root mean squares over a curve, in the worst case of one random direction for each seed.
With three seeds the square of their ratio then has an F distribution with (3, 3) degrees of freedom. Nudges
are about three times larger than roundings, so that it would have to exceed 144: in 0.1 % of all models.
"""

SEEDS = (0, 1, 2)

Train = Callable[[str, int], np.ndarray]
"""Returns the losses of a training: with what ("fused", "own" or "nudged"), from which seed."""


class Nudges:
    """Moves parameters by what two right steps may differ in."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng([seed, 1])

    def __call__(self, params: np.ndarray, before: np.ndarray) -> None:
        """Move ``params``, in place; ``before`` is what they were before the step."""
        update = (params - before) * params.dtype.type(EPS[params.dtype])
        size = np.spacing(np.abs(params)) + 2 * ONE_STEP_ULPS * np.abs(update)
        params += self._rng.choice([-1, 1], params.shape).astype(params.dtype) * size + COEFFICIENTS * update


def distance(curves: np.ndarray, others: np.ndarray) -> float:
    return float(np.sqrt(np.mean((curves.astype(np.float64) - others) ** 2)))


def curves(train: Train, kind: str) -> np.ndarray:
    """The losses of each seed, shape (seeds, steps)."""
    return np.array([train(kind, seed) for seed in SEEDS], np.float64)


@cache
def of_the_client(train: Train) -> tuple[np.ndarray, float]:
    """Return the curves of the client's own optimizer, and the distance of the nudged ones.

    Fails where that would tell nothing: if the client did not learn, or rounding alone changes its curve by
    more than a thousandth of what it learned.
    """
    own = curves(train, "own")
    learned = float(np.mean(own[:, 0] - own[:, -1]))
    assert learned > 0.2 * own[:, 0].mean()
    yardstick = distance(curves(train, "nudged"), own)
    assert 0 < yardstick < 1e-3 * learned
    return own, yardstick


def excess(train: Train) -> float:
    """Return how many times further from the client's own curve ours is than the nudged one."""
    own, yardstick = of_the_client(train)
    return distance(curves(train, "fused"), own) / yardstick


def skip_bias_correction(monkeypatch) -> None:
    """Plant a defect."""
    monkeypatch.setattr(coefficients, "_block", lambda *_: [1.0] * BLOCK)
    monkeypatch.setattr(coefficients, "_rounded", lambda *key: [key[-1].type(1)] * BLOCK)


def assert_trains_as_its_own(train: Train) -> None:
    assert excess(train) < FACTOR


def assert_finds_a_defect(train: Train, monkeypatch) -> None:
    """Without bias corrections the same check fails, by far."""
    skip_bias_correction(monkeypatch)
    assert excess(train) > 100 * FACTOR
