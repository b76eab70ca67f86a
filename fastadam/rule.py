"""What an optimizer knows of its update rule: what is kept of each element, and how coefficients come about.

The equation itself is scalar code (:mod:`fastadam.kernels.rules`, :mod:`fastadam.kernels.relatives`), and its
coefficients are a NamedTuple of scalars. Here is said where each of these comes from, one way for all who
form them: :class:`fastadam.coefficients.Coefficients` for one set of hyperparameters,
:class:`fastadam.rows.Rows` for a table of them, and GPUs, which count steps themselves, from tables.

Hyperparameters are *numbers* by name here; ``betas`` are ``beta1`` and ``beta2``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from fastadam import bias_correction
from fastadam.bias_correction import Corrections

Number: TypeAlias = Any
"""A float, or a float64 array of one for each row of a table."""


class Sequence(Hashable, Protocol):
    """A number for each step, counted from 1; hashable, equal where the numbers are the same."""

    def __hash__(self) -> int: ...

    def block(self, number: int) -> Corrections:
        """Return those of the steps ``number * BLOCK`` up to, without, ``(number + 1) * BLOCK``.

        Step 0 is never taken: whatever stands there.
        """

    def table(self) -> Corrections | None:
        """Return those of the steps 1, 2, ... up to the first from which they stay; None if they do not."""


class Constant(NamedTuple):
    """A coefficient that is the same in every step: ``of(*numbers)``, for floats and for arrays of them."""

    of: Callable[..., Number]
    names: tuple[str, ...]


class PerStep(NamedTuple):
    """A coefficient that is a number of the sequence ``of(*numbers)``."""

    of: Callable[..., Sequence]
    names: tuple[str, ...]


class LrOver(NamedTuple):
    """A coefficient that is the learning rate over a number of the sequence ``of(*numbers)``."""

    of: Callable[..., Sequence]
    names: tuple[str, ...]


class Range(NamedTuple):
    """A number that must neither overflow nor become 0 in the dtype: ``of(*numbers)``."""

    label: str
    of: Callable[..., Number]
    names: tuple[str, ...]  # "lr" is the learning rate


NONNEGATIVE = frozenset({"exp_avg_sq", "max_exp_avg_sq", "exp_inf", "sum", "square_avg", "acc_delta"})
"""The states of fastadam's rules that are never negative."""


@dataclass(frozen=True)
class Rule:
    """An update rule.

    Parameters
    ----------
    coefficients : type
        The NamedTuple of its coefficients, which selects its equation.
    states : tuple of str
        What is kept of each element, in the order of the equation.
    columns : tuple of Constant, PerStep or LrOver
        Where the coefficients come from, in their order; the first is LrOver.
    ranges : tuple of Range
        What is checked before any is formed.
    start : mapping of str to str
        States that do not begin with 0, and the number that they begin with.
    nonnegative : frozenset of str or None
        States that are never negative, which have a format of 8 bits of their own; None if nobody knows.
    exact : frozenset of str
        States that are never stored in less than the dtype of the arithmetic.
    """

    coefficients: type
    states: tuple[str, ...]
    columns: tuple[Constant | PerStep | LrOver, ...]
    ranges: tuple[Range, ...] = ()
    start: Mapping[str, str] = field(default_factory=dict)
    nonnegative: frozenset[str] | None = NONNEGATIVE
    exact: frozenset[str] = frozenset()

    __hash__ = object.__hash__

    def names(self) -> set[str]:
        """Return the numbers that the coefficients are made of, besides the learning rate."""
        return {name for column in (*self.columns, *self.ranges) for name in column.names} - {"lr"}


LABELS = {"beta1": "betas[0]", "beta2": "betas[1]"}
"""What users call numbers that have another name here."""


def unsettled(rule: Rule, column: int, numbers: Mapping[str, float], of: str = "") -> ValueError:
    """Return the error where a GPU counts steps, but a coefficient never stays; ``of`` is a segment."""
    names = rule.columns[column].names
    labels = " and ".join(f"{of if name in LABELS else ''}{LABELS.get(name, name)}" for name in names)
    values = " and ".join(repr(numbers[name]) for name in names)
    field = rule.coefficients._fields[column]  # type: ignore[attr-defined]
    return ValueError(
        f"{labels} must let {field} settle where steps are counted on the GPU, which keeps a table of it;"
        f" got {values}."
    )


# --- Columns that rules share -------------------------------------------------------------------------------


def _itself(number: Number) -> Number:
    return number


def _one_minus(number: Number) -> Number:
    return 1 - number


def number(name: str) -> Constant:
    """Return the column of a hyperparameter."""
    return Constant(_itself, (name,))


def one_minus(name: str) -> Constant:
    """Return the column of 1 minus a hyperparameter."""
    return Constant(_one_minus, (name,))


def in_range(label: str, name: str) -> Range:
    """Return the check of a hyperparameter."""
    return Range(label, _itself, (name,))


# --- Sequences ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class One:
    """1 in every step."""

    def block(self, number: int) -> Corrections:  # noqa: ARG002
        """Return ones."""
        return np.ones(bias_correction.BLOCK)

    def table(self) -> Corrections:
        """Return the only number."""
        return np.ones(1)


@dataclass(frozen=True)
class BiasCorrection:
    """``1 - beta ** step``."""

    beta: float

    def block(self, number: int) -> Corrections:
        """Return those of a block."""
        return bias_correction.block(self.beta, number)

    def table(self) -> Corrections:
        """Return all that differ."""
        return bias_correction.table(self.beta)


@dataclass(frozen=True)
class InverseBiasCorrection:
    """``1 / (1 - beta ** step)``."""

    beta: float

    def block(self, number: int) -> Corrections:
        """Return those of a block."""
        with np.errstate(divide="ignore"):  # step 0
            inverse: Corrections = 1 / bias_correction.block(self.beta, number)
        return inverse

    def table(self) -> Corrections:
        """Return all that differ."""
        inverse: Corrections = 1 / bias_correction.table(self.beta)
        return inverse


LR = LrOver(One, ())
"""The learning rate."""

LR_OVER_BIAS_CORRECTION1 = LrOver(BiasCorrection, ("beta1",))


def _lr_over_one_minus(lr: Number, beta: Number) -> Number:
    return lr / (1 - beta)


LARGEST_STEP_SIZE = Range("lr / (1 - betas[0])", _lr_over_one_minus, ("lr", "beta1"))
"""That of the first step."""
