"""The problems by name, in the order in which they are run."""

from __future__ import annotations

from fastadam.race.learning import Digits, Logistic
from fastadam.race.online import Reddi
from fastadam.race.problem import Problem
from fastadam.race.surfaces import Noisy, Quadratic, Rosenbrock, Saddle

PROBLEMS: dict[str, type[Problem]] = {
    problem.name: problem for problem in (Rosenbrock, Quadratic, Saddle, Noisy, Logistic, Digits, Reddi)
}
