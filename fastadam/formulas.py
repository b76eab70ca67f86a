"""Where the coefficients of a rule of one's own come from: formulas of hyperparameters and of the step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from fastadam import rule
from fastadam.bias_correction import BLOCK, Corrections
from fastadam.checks import count, real
from fastadam.rule import Constant, LrOver, Number, PerStep, Range, Sequence

Column: TypeAlias = Constant | PerStep | LrOver
_Taker: TypeAlias = Callable[..., float]


class Stepwise(NamedTuple):
    """A coefficient that changes from step to step: what :func:`lr_over` and :func:`per_step` return."""

    of: _Taker | Built
    settles: int | Callable[..., int] | None
    kind: type[PerStep] | type[LrOver]


class Built(NamedTuple):
    """Numbers of steps that are formed here: what :func:`bias_correction` returns."""

    of: Callable[..., Sequence]
    beta: str


Formula: TypeAlias = float | _Taker | Stepwise


def lr_over(of: _Taker | Built, *, settles: int | Callable[..., int] | None = None) -> Stepwise:
    """Return the formula of a coefficient that is the learning rate over a number of the step.

    Parameters
    ----------
    of : callable
        A function whose parameters are ``step``, counted from 1, and names of hyperparameters; never 0. Or
        :func:`bias_correction`.
    settles : int or callable, optional
        The step from which on the numbers stay as they are, or a function of hyperparameters that returns it.
        Only then can GPUs count steps by themselves: with ``capturable=True``, and where a step is clipped by
        the norm, skipped or has telemetry or segments.
    """
    return Stepwise(of, settles, LrOver)


def per_step(of: _Taker | Built, *, settles: int | Callable[..., int] | None = None) -> Stepwise:
    """Return the formula of a coefficient that is a number of the step; all else as for :func:`lr_over`."""
    return Stepwise(of, settles, PerStep)


def bias_correction(beta: str) -> Built:
    """Return ``1 - beta ** step`` of a hyperparameter, correctly rounded on every machine."""
    return Built(rule.BiasCorrection, beta)


def inverse_bias_correction(beta: str) -> Built:
    """Return ``1 / (1 - beta ** step)``, for :func:`per_step`."""
    return Built(rule.InverseBiasCorrection, beta)


def column_of(name: str, formula: object, numbers: Collection[str]) -> tuple[Column, Range | None]:
    """Return where a coefficient comes from, and what is checked before it is formed.

    Parameters
    ----------
    name : str
        Of the coefficient.
    formula : Formula
        A number, a function whose parameters are names of ``numbers``, or a ``Stepwise``.
    numbers : collection of str
        The hyperparameters.

    Raises
    ------
    TypeError, ValueError
        If it is no formula, or one of other numbers.
    """
    if isinstance(formula, Stepwise):
        return _stepwise(name, formula, numbers)
    if not callable(formula):
        constant = real(f"formulas[{name!r}]", formula)
        return _constant(_Constant(name, lambda: constant, ()))
    names = _parameters(f"formulas[{name!r}]", formula, numbers)
    if "step" in names:
        return _stepwise(name, per_step(formula), numbers)
    return _constant(_Constant(name, formula, names))


@dataclass(frozen=True, eq=False)
class _Constant:
    """A function of hyperparameters, of floats or of an array of each."""

    label: str
    function: _Taker
    names: tuple[str, ...]

    def __call__(self, *numbers: Number) -> Number:
        if not any(isinstance(number, np.ndarray) for number in numbers):
            return self._one(*numbers)
        rows = np.broadcast_arrays(*numbers)
        return np.array([self._one(*row) for row in zip(*(row.tolist() for row in rows), strict=True)])

    def _one(self, *numbers: float) -> float:
        return real(self.label, self.function(**dict(zip(self.names, numbers, strict=True))))

    def magnitude(self, *numbers: Number) -> Number:
        """Return its magnitude, of which ranges are checked."""
        return np.abs(self(*numbers))


def _constant(of: _Constant) -> tuple[Column, Range]:
    return Constant(of, of.names), Range(of.label, of.magnitude, of.names)


@dataclass(frozen=True, eq=False)
class _Steps:
    """A function of the step and of hyperparameters."""

    label: str
    function: _Taker
    settles: int | Callable[..., int] | None
    names: tuple[str, ...]
    is_over_lr: bool

    def __call__(self, *numbers: float) -> _Sequence:
        values = dict(zip(self.names, numbers, strict=True))
        last = self.settles
        if callable(last):
            last = last(**{name: values[name] for name in inspect.signature(last).parameters})
        return _Sequence(self, numbers, None if last is None else count(f"settles of {self.label}", last))


@dataclass(frozen=True)
class _Sequence:
    """The numbers of all steps, for some hyperparameters; equal for the same ones."""

    steps: _Steps
    numbers: tuple[float, ...]
    last: int | None  # the step from which on they stay

    def at(self, step: int) -> float:
        """Return the number of a step, counted from 1."""
        s = self.steps
        taken = {
            name: self.numbers[s.names.index(name)]
            for name in inspect.signature(s.function).parameters
            if name != "step"
        }
        value = real(f"{s.label}({step})", s.function(step=step, **taken))
        if s.is_over_lr and value == 0:
            raise ValueError(f"{s.label}({step}) must not be 0, as lr is divided by it; got {value}.")
        return value

    def _of(self, first: int, stop: int) -> Corrections:
        end = stop if self.last is None else max(first, min(stop, self.last + 1))
        found = [self.at(step) for step in range(first, end)]
        if len(found) < stop - first:
            found += [self.at(self.last or 1)] * (stop - first - len(found))
        return np.array(found)

    def block(self, number: int) -> Corrections:
        """Return those of a block; NaN for step 0."""
        first = number * BLOCK
        if first:
            return self._of(first, first + BLOCK)
        return np.concatenate([[np.nan], self._of(1, BLOCK)])

    def table(self) -> Corrections | None:
        """Return all that differ; None if they may never stay."""
        return None if self.last is None else self._of(1, self.last + 1)


def _stepwise(name: str, formula: Stepwise, numbers: Collection[str]) -> tuple[Column, Range | None]:
    label, over = f"formulas[{name!r}]", formula.kind is LrOver
    if isinstance(formula.of, Built):
        of, beta = formula.of
        if beta not in numbers:
            raise ValueError(f"{label} must be of hyperparameters, {sorted(numbers)}; got {beta!r}.")
        made: Callable[..., Sequence] = of
        names: tuple[str, ...] = (beta,)
    else:
        names = tuple(n for n in _parameters(label, formula.of, numbers) if n != "step")
        if callable(formula.settles):
            asked = _parameters(f"{label}.settles", formula.settles, numbers)
            names = tuple(dict.fromkeys((*names, *(n for n in asked if n != "step"))))
        elif formula.settles is not None:
            count(f"{label}.settles", formula.settles)
        made = _Steps(name, formula.of, formula.settles, names, over)

    def first(lr: Number, *given: Number) -> Number:
        """Return what the learning rate is over its number of the first step, for floats or arrays."""
        if not any(isinstance(number, np.ndarray) for number in given):
            return np.abs(lr / made(*given).block(0)[1])
        rows = zip(*(row.tolist() for row in np.broadcast_arrays(*given)), strict=True)
        return np.abs(lr / np.array([made(*row).block(0)[1] for row in rows]))

    column = formula.kind(made, names)
    return column, Range(f"{name}(1)", first, ("lr", *names)) if over else None


def _parameters(label: str, function: Any, numbers: Collection[str]) -> tuple[str, ...]:
    """Return the names of the parameters of a formula, or raise."""
    if not callable(function):
        raise TypeError(f"{label} must be a number or a function; got {type(function).__name__}.")
    try:
        names = tuple(inspect.signature(function).parameters)
    except ValueError:  # a function of C without a signature
        raise TypeError(
            f"{label} must be a function with named parameters; got {function!r}. Wrap it in a lambda."
        ) from None
    for name in names:
        if name not in {*numbers, "step"}:
            remedy = " See lr_over." if name == "lr" else ""
            raise ValueError(
                f"{label} must have parameters of {sorted({*numbers, 'step'})}; got {name!r}.{remedy}"
            )
    return names
