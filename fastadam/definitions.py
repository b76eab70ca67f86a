"""What is checked when a rule of one's own is defined, besides its function."""

from __future__ import annotations

import inspect
import keyword
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from fastadam.checks import real
from fastadam.formulas import column_of
from fastadam.hyperparameters import CHECKS, Check, Hyperparameters
from fastadam.loading import SCALES
from fastadam.optimizer import FusedOptimizer, Options
from fastadam.precision import StateDtype
from fastadam.rule import LR
from fastadam.state import State

LAST = ("weight_decay", "decoupled_weight_decay", "maximize")
"""What every rule has behind its own."""
_MOST_STATES = 3
"""For which loops that round and loops that watch are made."""
_OF_ENTRIES = {"step", "segments", "rule", "params", "param_ema", "grad_sum", "grads_summed"}
_KNOWN_STATES = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}


class OwnHyperparameters(Hyperparameters):
    """Those of a rule that is none of fastadam."""

    def require_possible(self) -> None:
        """Raise ValueError if a format of states depends on what nobody has said."""
        self.formats()

    def formats(self, state_dtype: StateDtype | None = None) -> tuple[str, ...]:
        """Return the format of each state, or raise ValueError."""
        asked, rule = self.state_dtype if state_dtype is None else state_dtype, self.rule
        if rule.states and rule.nonnegative is None and asked not in {"float32", "bfloat16"}:
            raise ValueError(
                f"state_dtype must be 'float32' or 'bfloat16' for this rule; got {asked!r}."
                " Say which states are never negative: fastadam.own_rule.define(..., nonnegative=[...])."
            )
        return super().formats(state_dtype)


def require_name(name: object) -> None:
    """Raise TypeError or ValueError unless a class and its checkpoints can have a name."""
    _require_identifier("name", name)
    taken = Hyperparameters.KINDS.get(str(name))
    if taken is not None and not issubclass(taken, OwnHyperparameters):
        raise ValueError(f"name must not be that of a rule of fastadam; got {name!r}.")


def _require_identifier(label: str, name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{label} must be a string; got {type(name).__name__}.")
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
        raise ValueError(f"{label} must be a name of Python without a leading underscore; got {name!r}.")


def states_of(given: object, hyperparameters: set[str]) -> tuple[str, ...]:
    """Return the names of states, if state dicts can have them beside all else."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"states must be a sequence of names; got {given!r}.")
    names = tuple(given)
    if len(names) > _MOST_STATES:
        raise ValueError(f"states must be at most {_MOST_STATES} names; got {len(names)}.")
    taken = ({*dir(State), *_OF_ENTRIES} - _KNOWN_STATES) | {*hyperparameters, *Options.__annotations__}
    for k, name in enumerate(names):
        _require_identifier(f"states[{k}]", name)
        if name in names[:k]:
            raise ValueError(f"states[{k}] must differ from the others; got {name!r}.")
        if name in taken or name.endswith(SCALES):
            raise ValueError(f"states[{k}] must not be a name that state dicts have already; got {name!r}.")
    return names


def require_coefficients(coefficients: object) -> None:
    """Raise TypeError or ValueError unless it is a NamedTuple that begins with the step size."""
    found = getattr(coefficients, "_fields", None)
    if not (isinstance(coefficients, type) and issubclass(coefficients, tuple) and found is not None):
        called = getattr(coefficients, "__name__", coefficients)
        raise TypeError(f"coefficients must be a NamedTuple class; got {called!r}.")
    if list(found[:1]) != ["step_size"]:
        raise ValueError(
            f"coefficients must begin with 'step_size'; got {list(found)}. It is what an update is a multiple"
            " of."
        )


def hyperparameters_of(
    given: Mapping[str, Any], ranges: Mapping[str, tuple[float, float]]
) -> tuple[dict[str, Any], dict[str, Check]]:
    """Return the defaults in the order of the arguments, and the checks of those that nobody else has."""
    if not isinstance(given, Mapping):
        raise TypeError(f"hyperparameters must be a mapping; got {type(given).__name__}.")
    present = {field.name: field.default for field in fields(Hyperparameters)}
    own = [name for name in given if name not in {"lr", *LAST}]
    taken = {*dir(FusedOptimizer), *Options.__annotations__, *present, "step", "beta1", "beta2", "grad_scale"}
    for name in own:
        _require_identifier("hyperparameters", name)
        if name in taken or (name in CHECKS and name not in {"betas", "eps"}):
            raise ValueError(f"hyperparameters must not have a name that all optimizers have; got {name!r}.")
    for name in ranges:
        if name not in own or name in CHECKS:
            raise ValueError(f"ranges must be of hyperparameters of your own; got {name!r}.")
    defaults = {"lr": given.get("lr", 1e-3), **{name: given[name] for name in own}}
    defaults |= {name: given.get(name, present[name]) for name in LAST}
    checks = {name: _check(name, ranges.get(name)) for name in own if name not in CHECKS}
    for name, value in defaults.items():
        (checks.get(name) or CHECKS[name])(f"hyperparameters[{name!r}]", value)
    return defaults, checks


def _check(name: str, bounds: object) -> Check:
    """Return the check of a number of a rule."""
    if bounds is None:
        return real
    if not isinstance(bounds, tuple) or len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise ValueError(f"ranges[{name!r}] must be (low, high) with low < high; got {bounds!r}.")
    low, high = map(float, bounds)

    def in_range(label: str, value: object) -> float:
        number = real(label, value)
        if not low <= number < high:
            rule = f"in [{low:g}, {high:g})" if math.isfinite(high) else f"at least {low:g}"
            raise ValueError(f"{label} must be {rule}; got {number}.")
        return number

    return in_range


def numbers_of(defaults: Mapping[str, Any]) -> list[str]:
    """Return the names of what formulas are of."""
    numbers = [name for name in defaults if name not in {"lr", "betas", *LAST}]
    return numbers + ["beta1", "beta2"] * ("betas" in defaults)


def columns_of(coefficients: Any, formulas: dict[str, Any], numbers: list[str]) -> tuple[Any, Any]:
    """Return where all coefficients come from, and what is checked."""
    names = coefficients._fields
    for name in formulas:
        if name not in names:
            raise ValueError(f"formulas must be of coefficients, {list(names)}; got {name!r}.")
    columns: list[Any] = []
    ranges: list[Any] = []
    for name in names:
        formula = formulas.get(name)
        if formula is None and name == "step_size":
            columns.append(LR)
            continue
        if formula is None:
            if name not in numbers:
                raise ValueError(
                    f"formulas must say what {name!r} is; got none, and no hyperparameter of that name."
                )
            formula = _itself(name)
        column, checked = column_of(name, formula, numbers)
        columns.append(column)
        ranges += [] if checked is None else [checked]
    return tuple(columns), tuple(ranges)


def _itself(name: str) -> Callable[..., float]:
    def itself(**numbers: float) -> float:
        return numbers[name]

    itself.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)]
    )
    return itself


def nonnegative_of(given: object, states: tuple[str, ...]) -> frozenset[str] | None:
    """Return the states that are never negative; None if nobody knows."""
    if given is None:
        return None
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"nonnegative must be a sequence of names; got {given!r}.")
    names = tuple(given)
    for name in names:
        if name not in states:
            raise ValueError(f"nonnegative must be of states, {list(states)}; got {name!r}.")
    return frozenset(names)


def start_of(start: Mapping[str, str], states: tuple[str, ...], numbers: list[str]) -> dict[str, str]:
    """Return the hyperparameters with which states begin that do not begin with 0."""
    for state, number in start.items():
        if state not in states:
            raise ValueError(f"start must be of states, {list(states)}; got {state!r}.")
        if number not in numbers:
            raise ValueError(f"start[{state!r}] must be a hyperparameter, of {numbers}; got {number!r}.")
    return dict(start)
