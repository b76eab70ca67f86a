"""What is wrong with a definition besides its function, and with calls of what it made."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
from test_own_rule_errors import define

from fastadam import own_rule
from fastadam.hyperparameters import Hyperparameters
from fastadam.kernels import rules


class Late(NamedTuple):
    beta: float
    step_size: float


class OneMore(NamedTuple):
    step_size: float
    beta: float
    gamma: float


def formula(value):
    return {"formulas": {"beta": value}}


WRONG = [
    ({"name": 3}, TypeError, "name must be a string; got int."),
    (
        {"name": "sign-momentum"},
        ValueError,
        "name must be a name of Python without a leading underscore; got 'sign-momentum'.",
    ),
    ({"name": "adam"}, ValueError, "name must not be that of a rule of fastadam; got 'adam'."),
    ({"rule": "fine"}, TypeError, "rule must be a Python function; got str."),
    ({"rule": math.sqrt}, TypeError, "rule must be a Python function; got builtin_function_or_method."),
    ({"coefficients": dict}, TypeError, "coefficients must be a NamedTuple class; got 'dict'."),
    (
        {"coefficients": Late},
        ValueError,
        "coefficients must begin with 'step_size'; got ['beta', 'step_size']. It is what"
        " an update is a multiple"
        " of.",
    ),
    (
        {"coefficients": OneMore},
        ValueError,
        "formulas must say what 'gamma' is; got none, and no hyperparameter of that name.",
    ),
    ({"states": "average"}, TypeError, "states must be a sequence of names; got 'average'."),
    ({"states": list("abcd")}, ValueError, "states must be at most 3 names; got 4."),
    ({"states": ["a", "a"]}, ValueError, "states[1] must differ from the others; got 'a'."),
    ({"states": [0]}, TypeError, "states[0] must be a string; got int."),
    *[
        (
            {"states": [name]},
            ValueError,
            f"states[0] must not be a name that state dicts have already; got {name!r}.",
        )
        for name in ("step", "param_ema", "lr", "beta", "seed", "average_scales", "moments")
    ],
    ({"hyperparameters": ["beta"]}, TypeError, "hyperparameters must be a mapping; got list."),
    *[
        (
            {"hyperparameters": {"beta": 0.9, name: 1.0}},
            ValueError,
            f"hyperparameters must not have a name that all optimizers have; got {name!r}.",
        )
        for name in ("segments", "max_grad_norm", "state", "step", "beta1", "accumulate")
    ],
    (
        {"hyperparameters": {"beta": "0.9"}},
        TypeError,
        "hyperparameters['beta'] must be a real number; got str.",
    ),
    (
        {"hyperparameters": {"beta": 0.9, "lr": -1.0}},
        ValueError,
        "hyperparameters['lr'] must be at least 0; got -1.0.",
    ),
    ({"ranges": {"beta": (0.0, 0.5)}}, ValueError, "hyperparameters['beta'] must be in [0, 0.5); got 0.9."),
    (
        {"ranges": {"beta": (1.0, 0.5)}},
        ValueError,
        "ranges['beta'] must be (low, high) with low < high; got (1.0, 0.5).",
    ),
    (
        {"ranges": {"eps": (0.0, 1.0)}},
        ValueError,
        "ranges must be of hyperparameters of your own; got 'eps'.",
    ),
    ({"start": {"other": "beta"}}, ValueError, "start must be of states, ['average']; got 'other'."),
    (
        {"start": {"average": "lr"}},
        ValueError,
        "start['average'] must be a hyperparameter, of ['beta']; got 'lr'.",
    ),
    ({"nonnegative": "average"}, TypeError, "nonnegative must be a sequence of names; got 'average'."),
    ({"nonnegative": ["other"]}, ValueError, "nonnegative must be of states, ['average']; got 'other'."),
    (
        {"formulas": {"gamma": 1.0}},
        ValueError,
        "formulas must be of coefficients, ['step_size', 'beta']; got 'gamma'.",
    ),
    (formula("0.9"), TypeError, "formulas['beta'] must be a real number; got str."),
    (
        formula(lambda alpha: alpha),
        ValueError,
        "formulas['beta'] must have parameters of ['beta', 'step']; got 'alpha'.",
    ),
    (
        formula(lambda lr: lr),
        ValueError,
        "formulas['beta'] must have parameters of ['beta', 'step']; got 'lr'. See lr_over.",
    ),
    (formula(lambda beta: f"{beta}"), TypeError, "beta must be a real number; got str."),
    (
        formula(lambda beta: 1e39 * beta),
        ValueError,
        "beta must be at most 3.402823e+38 for float32 buffers; got 9e+38.",
    ),
    (formula(lambda beta: math.inf), ValueError, "beta must be finite; got inf."),  # noqa: ARG005
    (formula(lambda step: "x"), TypeError, "beta(1) must be a real number; got str."),  # noqa: ARG005
    (
        {"formulas": {"step_size": own_rule.lr_over(lambda step: step - 3)}},
        ValueError,
        "step_size(3) must not be 0, as lr is divided by it; got 0.0.",
    ),
    (
        formula(own_rule.per_step(own_rule.bias_correction("beta1"))),
        ValueError,
        "formulas['beta'] must be of hyperparameters, ['beta']; got 'beta1'.",
    ),
    (
        formula(own_rule.per_step(lambda step: 1.0, settles=0)),  # noqa: ARG005
        ValueError,
        "formulas['beta'].settles must be in [1, 2**53); got 0.",
    ),
    (
        formula(own_rule.per_step(1.0)),
        TypeError,
        "formulas['beta'] must be a number or a function; got float.",
    ),
]


@pytest.mark.parametrize(("options", "kind", "message"), WRONG, ids=[str(k) for k in range(len(WRONG))])
def test_wrong_arguments(options, kind, message):
    before = dict(rules.RULES), dict(Hyperparameters.KINDS)
    with pytest.raises(kind) as caught:
        define(**options)
    assert str(caught.value) == message
    assert before == (rules.RULES, Hyperparameters.KINDS)


def test_wrong_calls():
    make = define()
    for call, message in (
        (lambda: make(alpha=1), "got an unexpected keyword argument 'alpha'"),
        (lambda: make(0.1, 0.9, 0.0), "too many positional arguments"),
        (lambda: make(beta="x"), "beta must be a real number; got str."),
        (
            lambda: make(state_dtype="8bit"),
            "state_dtype must be 'float32' or 'bfloat16' for this rule; got '8bit'."
            " Say which states are never negative: fastadam.own_rule.define(..., nonnegative=[...]).",
        ),
        (
            lambda: make(state_dtype=("float32", "bfloat16")),
            "state_dtype must be 'float32' or 'bfloat16' for this rule; got ('float32', 'bfloat16').",
        ),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            call()
        assert str(caught.value).startswith(message)
