"""What is wrong with a rule is said when it is defined, whole."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import pytest
from own_rules import with_sign

from fastadam import own_rule
from fastadam.hyperparameters import Hyperparameters
from fastadam.kernels import rules

LANGUAGE = (
    "use only assignments to names, one return at the end, + - * /, comparisons, and,"
    " conditional expressions,"
    " tuples, math.sqrt, and functions of the same kind"
)
OUTSIDE = 0.5


class C(NamedTuple):
    step_size: float
    beta: float


def fine(param, grad, state, c):
    (average,) = state
    return param - c.step_size * grad * c.beta, (average,)


def loop(param, grad, state, c):
    for _ in range(3):
        grad = grad * grad
    return param, state


def branch(param, grad, state, c):
    if grad > 0:
        grad = -grad
    return param, state


def literal(param, grad, state, c):
    return param - 0.5 * grad, state


def integer(param, grad, state, c):
    return param - 0, state


def added(param, grad, state, c):
    param -= grad
    return param, state


def subscript(param, grad, state, c):
    return param - state[0], state


def from_outside(param, grad, state, c):
    return param - OUTSIDE * grad, state


def unknown_coefficient(param, grad, state, c):
    return param - c.alpha * grad, state


def of_a_library(param, grad, state, c):
    return param - math.exp(grad), state


def built_in(param, grad, state, c):
    return param - abs(grad), state


def too_few(param, grad, state, c):
    return param - with_sign(grad), state


def root_of_two(param, grad, state, c):
    return math.sqrt(param, grad), state


def multiplied_comparison(param, grad, state, c):
    return param - grad * (grad > param), state


def chosen_tuple(param, grad, state, c):
    return param, state if grad > param else (grad,)


def number_as_condition(param, grad, state, c):
    return param if grad else grad, state


def either(param, grad, state, c):
    return param if grad > 0 or param > 0 else grad, state


def other_states(param, grad, state, c):
    one, other = state
    return param, (one, other)


def only_a_parameter(param, grad, state, c):
    return param - grad


def state_is_a_number(param, grad, state, c):
    (average,) = state
    return param, average


def a_comparison(param, grad, state, c):
    return param > grad, state


def nothing(param, grad, state, c):
    param = param - grad


def with_a_default(param, grad, state, c=0):
    return param, state


def three(param, grad, c):
    return param


def itself(param, grad, state, c):
    return itself(param, grad, state, c)


def helper_with_a_literal(x):
    return x * 2.0


def calls_it(param, grad, state, c):
    return helper_with_a_literal(param), state


def inner():
    def decorated(function):
        @functools.wraps(function)
        def other(param, grad, state, c):
            return function(param, grad, state, c)

        return other

    return decorated


@inner()
def decorated(param, grad, state, c):
    return param, state


MADE = {}
exec("def without_source(param, grad, state, c):\n    return param, state", MADE)

CHOOSE = "Choose a number instead: a if condition else b."
COEFFICIENT = "Make it a coefficient, which is rounded as all numbers are."
REFUSED = {
    loop: (
        f"{LANGUAGE}; got 'for _ in range(3):\\n    grad = grad * grad' in its line 2. Write"
        " the repetitions out."
    ),
    branch: f"{LANGUAGE}; got 'if grad > 0:\\n    grad = -grad' in its line 2. {CHOOSE}",
    literal: f"{LANGUAGE}; got '0.5' in its line 2. {COEFFICIENT}",
    integer: f"{LANGUAGE}; got '0' in its line 2. {COEFFICIENT}",
    added: f"{LANGUAGE}; got 'param -= grad' in its line 2. Write name = name + value.",
    subscript: f"{LANGUAGE}; got 'state[0]' in its line 2. Unpack the tuple: first, second = state.",
    from_outside: f"use only its parameters and variables; got 'OUTSIDE' in its line 2. {COEFFICIENT}",
    unknown_coefficient: (
        "use coefficients that there are, ['step_size', 'beta']; got 'c.alpha' in its line 2."
    ),
    of_a_library: (
        "call only math.sqrt and Python functions of the same kind; got 'math.exp(grad)' in its line 2."
    ),
    built_in: "call only math.sqrt and Python functions of the same kind; got 'abs(grad)' in its line 2.",
    too_few: "call with_sign with 2 arguments; got 'with_sign(grad)' in its line 2.",
    root_of_two: "call math.sqrt with 1 argument; got 'math.sqrt(param, grad)' in its line 2.",
    multiplied_comparison: (
        "have a number, not a comparison, for 'grad > param'; got 'grad * (grad > param)' in its line 2."
    ),
    chosen_tuple: "choose numbers, not (a number,); got 'state if grad > param else (grad,)' in its line 2.",
    number_as_condition: (
        "have a comparison, not a number, for 'grad'; got 'param if grad else grad' in its line 2."
    ),
    either: (
        f"{LANGUAGE}; got 'grad > 0 or param > 0' in its line 2. Choose twice: a if one"
        " else (a if other else b)."
    ),
    other_states: "unpack (a number,) to as many names; got 'one, other = state' in its line 2.",
    only_a_parameter: "return (param, state), the state a tuple of 1; got a number.",
    state_is_a_number: "return (param, state), the state a tuple of 1; got (a number, a number).",
    a_comparison: "return (param, state), the state a tuple of 1; got (a comparison, (a number,)).",
    nothing: f"{LANGUAGE}; got 'param = param - grad' in its line 2.",
    with_a_default: "have plain parameters; got 'c=0'.",
    three: "have the parameters (param, grad, state, c); got (param, grad, c).",
    itself: "not call itself; got such a call.",
    decorated: (
        "be what its source says; got another function. Leave decorators out, and start"
        " Python again where the"
        " file was edited."
    ),
    MADE["without_source"]: (
        "have its source where Python finds it; got a function without, as at a prompt"
        " or by exec. Define it in a"
        " file or in a notebook."
    ),
}


def define(rule=fine, coefficients=C, name="FusedOwn", **options):
    given = {"states": ["average"], "hyperparameters": {"beta": 0.9}} | options
    return own_rule.define(name, rule, coefficients, **given)


@pytest.mark.parametrize("rule", REFUSED, ids=lambda rule: rule.__name__)
def test_refused_rules(rule):
    before = dict(rules.RULES), dict(Hyperparameters.KINDS)
    with pytest.raises(TypeError) as caught:
        define(rule)
    assert str(caught.value) == f"{rule.__qualname__} must {REFUSED[rule]}"
    assert before == (rules.RULES, Hyperparameters.KINDS)


def test_a_helper_is_named():
    with pytest.raises(TypeError) as caught:
        define(calls_it)
    assert str(caught.value).startswith(f"helper_with_a_literal must {LANGUAGE}; got '2.0'")


def test_a_lambda():
    with pytest.raises(TypeError, match=r"<lambda> must be made by def; got a lambda\."):
        define(lambda param, grad, state, c: (param - c.step_size * grad, state))


def test_an_edited_file(tmp_path, monkeypatch):
    """Its function is not what is read."""
    text = "def edited(param, grad, state, c):\n    return param - grad, state\n"
    (tmp_path / "edited_rule.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import edited_rule

    (tmp_path / "edited_rule.py").write_text(text.replace("- grad", "+ grad + grad"))
    with pytest.raises(TypeError, match="edited must be what its source says; got another function"):
        define(edited_rule.edited)
