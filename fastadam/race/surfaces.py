"""Problems of two parameters, whose paths can be drawn over their contours."""

from __future__ import annotations

from abc import abstractmethod
from math import cos, pi, sin
from typing import Any, ClassVar

import numpy as np

from fastadam.race.problem import Draws, Problem, Vector, View, draws_rng, start_rng


class Surface(Problem):
    """A loss of two parameters, which starts near one place.

    Attributes
    ----------
    origin : tuple of float
        Where seeds start, but for :attr:`spread`.
    spread : tuple of float
        Standard deviation of the start, for each parameter.
    """

    dims = 2
    origin: ClassVar[tuple[float, float]]
    spread: ClassVar[tuple[float, float]] = (0.05, 0.05)

    @abstractmethod
    def value(self, x: Any, y: Any) -> Any:
        """Return the loss at numbers, or at each of many: only ``+ - *``, which inf does not stop."""

    @abstractmethod
    def slopes(self, x: float, y: float) -> tuple[float, float]:
        """Return the two derivatives."""

    def start(self, seed: int) -> Vector:
        return np.array(self.origin) + np.array(self.spread) * start_rng(seed).standard_normal(2)

    def loss(self, params: Vector) -> float:
        x, y = params.tolist()  # arithmetic of two numbers is ten times as fast outside of NumPy
        return float(self.value(x, y))

    def gradient(self, params: Vector) -> Vector:
        x, y = params.tolist()
        return np.array(self.slopes(x, y))

    def write_grads(self, params: Vector, draw: Draws, grads: Vector) -> None:
        x, y = params.tolist()
        grads[0], grads[1] = self.slopes(x, y)


class Rosenbrock(Surface):
    """Rosenbrock's valley (1960): ``(1 - x)^2 + 100 (y - x^2)^2``."""

    name = "rosenbrock"
    title = "Rosenbrock's valley"
    lesson = (
        "A curved valley with steep walls and a nearly flat floor. A step small enough for the walls is slow"
        " along the floor; momentum and steps scaled by each parameter's own gradients go faster, and L-BFGS,"
        " which learns the curvature, is there in a few dozen iterations."
    )
    steps = 1000
    target = 1e-3
    origin = (-1.2, 1.0)
    view = View(-1.8, 1.8, -0.8, 2.4)
    goals = ((1.0, 1.0),)

    def value(self, x: Any, y: Any) -> Any:
        a, b = 1 - x, y - x * x
        return a * a + 100 * b * b

    def slopes(self, x: float, y: float) -> tuple[float, float]:
        b = y - x * x
        return -2 * (1 - x) - 400 * x * b, 200 * b


_COS, _SIN = cos(pi / 6), sin(pi / 6)


class Quadratic(Surface):
    """``(a^2 + 200 b^2) / 2`` along axes that are turned by 30 degrees."""

    name = "quadratic"
    title = "An ill-conditioned quadratic"
    lesson = (
        "Two hundred times steeper in one direction than in the other, and neither is an axis: a scale for"
        " each parameter does not help, momentum does. Adam, which long remembers the first steep gradients,"
        " is SGD with momentum in effect; who forgets them sooner (RMSprop) or takes signs only (Lion)"
        " circles the minimum at the distance of the learning rate."
    )
    steps = 400
    target = 1e-6
    origin = (-1.6, 0.6)
    view = View(-2.2, 1.2, -1.4, 1.4)
    goals = ((0.0, 0.0),)
    steepness: ClassVar[float] = 200.0

    def value(self, x: Any, y: Any) -> Any:
        a, b = _COS * x + _SIN * y, _COS * y - _SIN * x
        return (a * a + self.steepness * b * b) / 2

    def slopes(self, x: float, y: float) -> tuple[float, float]:
        a, b = _COS * x + _SIN * y, self.steepness * (_COS * y - _SIN * x)
        return _COS * a - _SIN * b, _SIN * a + _COS * b


class Saddle(Surface):
    """``25 x^2 + (y^2 - 1)^2 / 4``: a saddle at the origin, minima at (0, 1) and (0, -1)."""

    name = "saddle"
    title = "A saddle"
    lesson = (
        "The start is a thousandth away from the line that leads to a saddle, where the gradient that leads"
        " out is tiny, and the other one steep. The steep one limits the learning rate of SGD, which then"
        " waits long for the tiny one to grow; with steps that divide each by its own size it is out soon."
    )
    steps = 300
    target = 1e-4
    origin = (0.5, 1e-3)
    spread = (0.05, 2e-4)
    view = View(-0.7, 0.7, -1.5, 1.5)
    goals = ((0.0, 1.0), (0.0, -1.0))
    steepness: ClassVar[float] = 50.0

    def value(self, x: Any, y: Any) -> Any:
        b = y * y - 1
        return (self.steepness / 2) * x * x + b * b / 4

    def slopes(self, x: float, y: float) -> tuple[float, float]:
        return self.steepness * x, y * (y * y - 1)


class Noisy(Surface):
    """``(x^2 + 10 y^2) / 2``, with Student's t of 2 degrees of freedom added to its gradients."""

    name = "noisy"
    title = "Noisy gradients"
    lesson = (
        "A mild bowl, but noise with heavy tails (Student's t, 2 degrees of freedom) is added to each"
        " gradient. One outlier throws SGD far; who divides by the size of recent gradients, or takes only"
        " their sign, takes it for a step like any other."
    )
    steps = 1000
    every = 10
    target = 1e-2
    floor = 1e-5
    origin = (-1.5, 1.0)
    view = View(-2.0, 1.0, -1.2, 1.4)
    goals = ((0.0, 0.0),)

    def value(self, x: Any, y: Any) -> Any:
        return (x * x + 10 * y * y) / 2

    def slopes(self, x: float, y: float) -> tuple[float, float]:
        return x, 10 * y

    def draws(self, seed: int, steps: int) -> Draws:
        return draws_rng(seed).standard_t(2, (steps, 2))

    def write_grads(self, params: Vector, draw: Draws, grads: Vector) -> None:
        super().write_grads(params, draw, grads)
        grads += draw
