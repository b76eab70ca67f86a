"""An optimizer of your own: a scalar Python function and its coefficients, on every backend.

``docs/own-rule.md`` is the guide.

Examples
--------
>>> from typing import NamedTuple
>>> import numpy as np
>>> from fastadam import own_rule
>>> class SignMomentum(NamedTuple):
...     step_size: float
...     beta: float
...     one_minus_beta: float
>>> def sign_momentum(param, grad, state, c):
...     (momentum,) = state
...     momentum = c.beta * momentum + c.one_minus_beta * grad
...     update = c.step_size if momentum > 0 else -c.step_size
...     return param - update, (momentum,)
>>> FusedSignMomentum = own_rule.define(
...     "FusedSignMomentum",
...     sign_momentum,
...     SignMomentum,
...     states=["momentum"],
...     hyperparameters={"lr": 0.01, "beta": 0.9},
...     formulas={"one_minus_beta": lambda beta: 1 - beta},
... )
>>> params, opt = np.array([1.0, -1.0]), FusedSignMomentum(lr=0.25, max_grad_norm=1.0)
>>> opt.step(params, 2 * params)
>>> params.tolist(), opt.state.momentum.round(3).tolist()
([0.75, -0.75], [0.071, -0.071])
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, make_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastadam.coefficients import Coefficients
from fastadam.definitions import (
    LAST,
    OwnHyperparameters,
    columns_of,
    hyperparameters_of,
    nonnegative_of,
    numbers_of,
    require_coefficients,
    require_name,
    start_of,
    states_of,
)
from fastadam.formulas import Formula, bias_correction, inverse_bias_correction, lr_over, per_step
from fastadam.hyperparameters import CHECKS, Hyperparameters
from fastadam.kernels import kinds, rules
from fastadam.kernels.relatives import magnitude
from fastadam.kernels.rules import moving_average
from fastadam.kernels.translation import frozen, translate
from fastadam.optimizer import FusedOptimizer
from fastadam.rule import Rule
from fastadam.tunables import HasBetas, HasDecoupled, HasEps

__all__ = [
    "OwnOptimizer",
    "bias_correction",
    "define",
    "inverse_bias_correction",
    "lr_over",
    "magnitude",
    "moving_average",
    "per_step",
]


class OwnOptimizer(HasDecoupled, FusedOptimizer):
    """What :func:`define` makes: it has all that :class:`fastadam.FusedAdam` has, and its hyperparameters."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(type(self)).bind(*args, **kwargs).arguments
        options = given.pop("options", {})
        self._begin_with(given, options)


def define(
    name: str,
    rule: Callable[..., Any],
    coefficients: type[tuple[Any, ...]],
    *,
    states: Iterable[str] = (),
    hyperparameters: Mapping[str, Any] | None = None,
    formulas: Mapping[str, Formula] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    start: Mapping[str, str] | None = None,
    nonnegative: Iterable[str] | None = None,
) -> type[OwnOptimizer]:
    """Return the class of an optimizer with a rule of your own.

    Parameters
    ----------
    name : str
        Of the class: assign it to a variable of this name, by which pickle finds it. Checkpoints have it.
    rule : callable
        ``(param, grad, state, c) -> (param, state)``: how one element is stepped. ``state`` is a tuple of
        numbers, ``c`` the coefficients. Assignments, one return, ``+ - * /``, comparisons, conditional
        expressions, ``math.sqrt`` and functions of the same kind; nothing else compiles to the same bits
        everywhere. The gradient comes unscaled, clipped and with L2 decay.
    coefficients : type
        A NamedTuple. The first field is ``step_size``, what an update is a multiple of.
    states : iterable of str
        What is kept of each element, in the order of ``state``; at most three. Telemetry takes an update for
        none where the first of them is 0.
    hyperparameters : mapping of str to object
        Names and defaults: ``lr``, 1e-3 if it is left out, numbers of your own and, with their usual meanings
        and checks, ``betas`` (in formulas ``beta1`` and ``beta2``) and ``eps``. ``weight_decay``,
        ``decoupled_weight_decay`` and ``maximize`` are always there; here their defaults may change.
    formulas : mapping of str to number or callable
        Where coefficients come from: a number, a function whose parameters are names of hyperparameters, or
        :func:`lr_over` or :func:`per_step` where it changes from step to step. ``step_size`` is the learning
        rate if it is left out, and a coefficient with the name of a hyperparameter is that.
    ranges : mapping of str to (float, float), optional
        ``low <= value < high`` for hyperparameters of your own.
    start : mapping of str to str, optional
        States that do not begin with 0, and the hyperparameter with which they begin.
    nonnegative : iterable of str, optional
        States that are never negative, as averages of squares: those that ``state_dtype="8bit"`` never rounds
        to 0, and that the second format of a pair is for. Without it both are refused. In 8 bits, a
        number that is negative all the same is stored as a positive one.

    Returns
    -------
    type
        A class with the methods and options of :class:`fastadam.FusedAdam`. Its hyperparameters can be passed
        by position, in their order, and set between steps.

    Raises
    ------
    TypeError, ValueError
        If the rule is more than what compiles everywhere, or the parts do not fit.

    Notes
    -----
    The first step of a process compiles, in about a second: machine code of rules from outside of fastadam is
    not kept on disk, where an edited rule might find it.

    A class that is defined again, under the same name, takes no part in what the first one does. A checkpoint
    that is loaded has the rule that was defined last.
    """
    require_name(name)
    defaults, checks = hyperparameters_of({} if hyperparameters is None else hyperparameters, ranges or {})
    names = states_of(states, set(defaults))
    require_coefficients(coefficients)
    kinds.require_rule(rule, coefficients, len(names))
    rule = frozen(rule)
    functions = kinds.require_rule(rule, coefficients, len(names))
    numbers = numbers_of(defaults)
    columns, checked = columns_of(coefficients, dict(formulas or {}), numbers)
    began = start_of(start or {}, names, numbers)

    module = sys._getframe(1).f_globals.get("__name__", "__main__")
    made = _own(coefficients, rule, names)
    described = Rule(made, names, columns, checked, began, nonnegative_of(nonnegative, names))
    own = tuple(defaults)
    namespace = {
        "__module__": module,
        "__qualname__": f"{name}.HYPERPARAMETERS",
        "__doc__": f"The hyperparameters of :class:`{name}`.",
        "OWN": own,
        "OWN_CHECKS": checks,
        "rule": property(lambda self: described),  # noqa: ARG005
    }
    kind: Any = make_dataclass(
        name,
        [(key, Any, field(default=value)) for key, value in defaults.items()],
        bases=(OwnHyperparameters,),
        namespace=namespace,
        frozen=True,
        kw_only=True,
    )
    Coefficients(kind(), np.dtype(np.float32)).update(1)  # formulas give numbers
    rules.RULES[made], rules.CALLED[made] = rule, tuple(functions[:-1])
    kind.KIND = name
    Hyperparameters.KINDS[name] = kind
    bases = (*([HasBetas] * ("betas" in own)), *([HasEps] * ("eps" in own)), OwnOptimizer)
    members = {
        "__module__": module,
        "__qualname__": name,
        "__doc__": inspect.getdoc(rule),
        "HYPERPARAMETERS": kind,
        "__signature__": _signature(defaults),
        **{key: _tunable(key) for key in own if not hasattr(OwnOptimizer, key) and key not in CHECKS},
    }
    return type(name, bases, members)


def _own(coefficients: Any, rule: Callable[..., Any], states: tuple[str, ...]) -> type[tuple[Any, ...]]:
    """Return a class of these coefficients that no other definition has: it selects the rule.

    Its name is that of its code: kernels that are kept on disk are found by it.
    """
    source = repr((translate(rule, {}), coefficients._fields, states))
    called = coefficients.__name__.encode("ascii", "replace").decode().replace("?", "_")
    name = f"{called}_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    return type(name, (coefficients,), {"__slots__": (), "__module__": coefficients.__module__})


def _signature(defaults: Mapping[str, Any]) -> inspect.Signature:
    both, only = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(name, only if name in LAST else both, default=value)
        for name, value in defaults.items()
    ]
    return inspect.Signature([*parameters, inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)])


def _tunable(name: str) -> property:
    def get(self: OwnOptimizer) -> Any:
        return getattr(self._hyperparameters, name)

    def change(self: OwnOptimizer, value: Any) -> None:
        self._change(**{name: value})

    return property(get, change, doc=f"The hyperparameter {name!r}; set it between steps.")
