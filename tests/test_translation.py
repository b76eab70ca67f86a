"""Rules in CUDA C++: what is translated, and what is refused. ``test_cuda.py`` compares the bits."""

from __future__ import annotations

import math
from math import sqrt
from typing import NamedTuple

import pytest
from family_cases import shipped_rules

from fastadam.kernels import relatives, rules
from fastadam.kernels.translation import translate


def test_a_rule_line_by_line():
    choices = {
        rules.transform: {type(None): rules.unchanged, rules.L2Decay: rules.l2_decay},
        rules.advance: {rules.Adam: rules.adam},
        rules.track: {rules.Average: rules.exponential_average},
        rules.split: {},
        rules.join: {},
    }
    code = translate(rules.update, choices)
    assert "struct None" not in code  # kernels/step.cu has it
    assert "struct L2Decay { Real weight_decay; };" in code
    assert code.count("DEVICE auto transform(") == 2
    assert code.count("DEVICE auto moving_average(") == 1
    assert "struct Average { Real ema_decay; Real one_minus_ema_decay; };" in code
    assert "DEVICE auto split(" not in code  # kernels/step.cu has it
    body = code[code.index("DEVICE auto adam(") :]
    assert body.splitlines()[:6] == [
        "DEVICE auto adam(auto param, auto grad, auto state, auto c) {",
        "    auto [exp_avg, exp_avg_sq] = state;",
        "    auto exp_avg_2 = moving_average(exp_avg, grad, c.beta1, c.one_minus_beta1);",
        "    auto exp_avg_sq_2 = moving_average(exp_avg_sq, (grad * grad), c.beta2, c.one_minus_beta2);",
        "    auto denom = (sqrt((exp_avg_sq_2 * c.inv_bias_correction2)) + c.eps);",
        "    return tuple((param - (c.step_size * (exp_avg_2 / denom))), tuple(exp_avg_2, exp_avg_sq_2));",
    ]


class Pair(NamedTuple):
    a: float
    b: float


def every_expression(x, y, c):
    """Not code."""
    x, y = y, x
    larger = x if x >= y else y  # noqa: FURB136
    x = -larger * c.a + c.b / (x - y)
    return sqrt(x), (y, larger)


def test_every_expression():
    assert translate(every_expression, {}) == (
        "DEVICE auto every_expression_0(auto x_, auto y_, auto c_) {\n"
        "    auto [x_2_, y_2_] = tuple(y_, x_);\n"
        "    auto larger_ = ((x_2_ >= y_2_) ? x_2_ : y_2_);\n"
        "    auto x_3_ = (((-larger_) * c_.a) + (c_.b / (x_2_ - y_2_)));\n"
        "    return tuple(sqrt(x_3_), tuple(y_2_, larger_));\n"
        "}"
    )


def both(x, y):
    return x == y if x != 0 and y > 0 else False


def test_conditions():
    assert translate(both, {}) == (
        "DEVICE auto both_0(auto x_, auto y_) {\n"
        "    return (((x_ != Real{}) && (y_ > Real{})) ? (x_ == y_) : false);\n"
        "}"
    )


def helper(x):
    return math.sqrt(x)


def int_(register, new):
    """Names that are words of C++, and one with letters that are not ASCII."""
    β = rules.step_size(register, new)  # noqa: PLC2401
    return helper(β)


def test_names_from_outside():
    assert translate(int_, {}) == (
        "DEVICE auto step_size(auto lr, auto bias_correction1) {\n"
        "    return (lr / bias_correction1);\n"
        "}\n\n"
        "DEVICE auto helper_0(auto x_) {\n"
        "    return sqrt(x_);\n"
        "}\n\n"
        "DEVICE auto int__1(auto register__, auto new__) {\n"
        "    auto u3b2_ = step_size(register__, new__);\n"
        "    return helper_0(u3b2_);\n"
        "}"
    )


def one_state(x, state):
    (y,) = state
    return (-x if x < 0 else y), (y,)


def no_state(x, state):
    return x, state, ()


def test_tuples_of_one_and_of_none():
    assert translate(one_state, {}) == (
        "DEVICE auto one_state_0(auto x_, auto state_) {\n"
        "    auto [y_] = state_;\n"
        "    return tuple(((x_ < Real{}) ? (-x_) : y_), tuple(y_));\n"
        "}"
    )
    assert "return tuple(x_, state_, tuple());" in translate(no_state, {})


def test_every_rule_is_translated():
    assert relatives.SGD in rules.RULES
    for rule in shipped_rules().values():
        head = f"DEVICE auto {rule.__name__}(auto param, auto grad, auto state, auto c) {{"
        assert head in translate(rule, {})


def literal(x):
    return x * 2.0


def loop(x):
    for _ in range(3):
        x = x * x
    return x


def branch(x):
    if x > x:
        x = -x
    return x


def power(x):
    return x**x


def library(x):
    return math.sin(x)


def unknown(x):
    return missing(x)  # noqa: F821


def keyword(x):
    return rules.step_size(lr=x, bias_correction1=x)


def chained(x):
    return x if x < x < x else -x


def global_name(x):
    return x * math.pi


def subscript(x):
    return x[0]


def other_constants(x):
    return x if x != 1 else True


def zero(x):
    return x + 0


def either(x):
    return x if x > 0 or x < 0 else -x


REFUSED = {
    other_constants: "1",
    zero: "0",
    either: "x > 0 or x < 0",
    literal: "2.0",
    loop: "for _ in range(3):\n    x = x * x",
    branch: "if x > x:\n    x = -x",
    power: "x ** x",
    library: "math.sin(x)",
    unknown: "missing(x)",
    keyword: "rules.step_size(lr=x, bias_correction1=x)",
    chained: "x < x < x",
    global_name: "math",
    subscript: "x[0]",
}


@pytest.mark.parametrize("function", REFUSED, ids=lambda function: function.__name__)
def test_refused(function):
    with pytest.raises(TypeError) as caught:
        translate(function, {})
    assert str(caught.value) == (
        f"{function.__name__} must use only assignments, one return, + - * /, comparisons, and, 0, False,"
        f" conditional expressions, tuples, sqrt and calls of rules; got {REFUSED[function]!r}."
    )
