"""The counterexample to Adam's convergence."""

from __future__ import annotations

import numpy as np

from fastadam.race.problem import Draws, Problem, Vector, start_rng

C = 3.0
"""The gradient of every third round; the theorem asks for more than 2."""

PERIOD = 3

BETAS = (0.0, 1 / (1 + C**2))
"""Those of the theorem: a memory shorter than the period."""


class Reddi(Problem):
    """Reddi, Kale & Kumar, "On the Convergence of Adam and Beyond" (ICLR 2018), Theorem 1.

    Rounds of ``3 x, -x, -x`` on [-1, 1]. Their mean is ``x / 3``, so -1 is best; the loss is by how much the
    mean is above its value there.
    """

    name = "reddi"
    title = "Reddi's counterexample"
    lesson = (
        "Every third gradient is 3, the others are -1, so on average x should fall. With the betas of the"
        " theorem, 0 and 0.1, Adam has forgotten the large gradient when the small ones come, divides each"
        " by little more than its own size, and goes the wrong way. AMSGrad remembers the largest."
    )
    dims = 1
    steps = 900
    every = PERIOD  # within a period x goes up and down
    target = 0.01
    in_logs = False
    bounds = (-1.0, 1.0)
    lr_range = (1e-2, 1.0)  # with less, who goes the wrong way looks best where it hardly moves
    arguments = {  # noqa: RUF012 - a mapping that nobody writes to
        **{name: {"betas": BETAS} for name in ("adam", "adamw", "amsgrad", "nadam", "radam", "adamax")},
        "rmsprop": {"alpha": BETAS[1]},
        "adadelta": {"rho": BETAS[1]},
    }
    goals = ((-1.0,),)

    def start(self, seed: int) -> Vector:
        return 0.1 * start_rng(seed).standard_normal(1)

    def loss(self, params: Vector) -> float:
        return (C - 2) / PERIOD * (float(params[0]) + 1)

    def gradient(self, params: Vector) -> Vector:
        return np.array([(C - 2) / PERIOD])

    def draws(self, seed: int, steps: int) -> Draws:
        return np.where(np.arange(steps) % PERIOD == 0, C, -1.0)[:, None]

    def write_grads(self, params: Vector, draw: Draws, grads: Vector) -> None:
        grads[:] = draw
