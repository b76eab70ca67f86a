"""What every schedule is: a formula of the step, and the call that made it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fastadam import checks

Rate: TypeAlias = Callable[[int], float]
"""A learning rate for every step, whoever made it."""


@dataclass(frozen=True, repr=False)
class Schedule:
    """A learning rate for every step, made by the functions of :mod:`fastadam.schedules`.

    Two are equal if the same call made them. The repr is that call, and so is a pickle, which therefore is
    checked when it is loaded.

    Parameters
    ----------
    make : callable
        The function that made it.
    arguments : tuple of tuple
        The names and values that ``make`` was called with, checked.
    formula : callable
        The learning rate of a step that was checked.
    """

    make: Callable[..., Schedule]
    arguments: tuple[tuple[str, Any], ...]
    formula: Rate = field(compare=False)

    def __call__(self, step: int) -> float:
        """Return the learning rate of step number ``step``, counted from 1.

        Raises
        ------
        TypeError, ValueError
            If ``step`` is not an integer in [1, 2**53).
        """
        return self.formula(checks.count("step", step))

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments)
        return f"{self.make.__name__}({arguments})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _call, (self.make, self.arguments)


def schedule(make: Callable[..., Schedule], formula: Rate, **arguments: Any) -> Schedule:
    """Return the schedule that ``make`` is to return for ``arguments``."""
    return Schedule(make, tuple(arguments.items()), formula)


def _call(make: Callable[..., Schedule], arguments: tuple[tuple[str, Any], ...]) -> Schedule:
    """Undo ``Schedule.__reduce__``."""
    return make(**dict(arguments))
