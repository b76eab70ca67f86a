"""Tests that bite: any small change of the rules or of their coefficients turns a check red."""

from __future__ import annotations
import __future__

import ast
import inspect
import itertools
import textwrap
import types

import numpy as np
import pytest
from oracles import FLAGS, algorithm_1, interpret

from fastadam import hyperparameters
from fastadam.hyperparameters import Coefficients, Hyperparameters
from fastadam.kernels import rules

SOURCE = inspect.getsource(rules)
FUNCTIONS = ["maximize", "l2_decay", "decoupled_decay", "moving_average", "adam", "amsgrad"]


EPS = 0.03
"""It matters, and no other hyperparameter is equal to it."""


def agrees_with_the_paper(update=rules.update, coefficients=Coefficients) -> bool:
    """Whether steps follow Algorithm 1 three times, in every combination of flags."""
    rng = np.random.default_rng(0)
    # Both branches of the moving average.
    for flags, betas in itertools.product(FLAGS, [(0.9, 0.999), (0.3, 0.4)]):
        h = Hyperparameters(lr=0.1, betas=betas, eps=EPS, **flags)
        params = rng.standard_normal(4)
        paper = algorithm_1(params, lr=0.1, betas=betas, eps=EPS, **flags)
        states = tuple(np.zeros(4) for _ in h.moments)
        for step, scale in enumerate([3.0, 1.0, 0.2], start=1):
            grads = scale * rng.standard_normal(4)
            paper.step(grads)
            params, states = interpret(h, params, grads, states, step, update, coefficients)
            expected = [paper.m, paper.v, paper.v_max][: len(states)]
            for actual, moment in zip([params, *states], [paper.theta, *expected], strict=True):
                if not np.allclose(actual, moment, rtol=1e-10, atol=1e-12):
                    return False
    return True


class Mutator(ast.NodeTransformer):
    """Changes the ``target``-th place where something can be changed, and counts the places."""

    SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}  # noqa: RUF012
    FLIPS = {ast.Lt: ast.GtE, ast.Gt: ast.LtE}  # noqa: RUF012

    def __init__(self, target):
        self.target, self.places, self.change = target, 0, None

    def here(self, node, change):
        self.places += 1
        if self.places - 1 != self.target:
            return False
        self.change = f"line {node.lineno}: {ast.unparse(node)}: {change}"
        return True

    def visit_BinOp(self, node):
        self.generic_visit(node)
        if self.here(node, "swap the operator"):
            node.op = self.SWAPS[type(node.op)]()
        return node.left if self.here(node, "keep the left side only") else node

    def visit_UnaryOp(self, node):
        self.generic_visit(node)
        return node.operand if self.here(node, "drop the sign") else node

    def visit_Compare(self, node):
        self.generic_visit(node)
        if self.here(node, "flip the comparison"):
            node.ops = [self.FLIPS[type(node.ops[0])]()]
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        return node.args[0] if self.here(node, "drop the call") else node

    def visit_Attribute(self, node):
        """Take another coefficient of the same tuple."""
        if node.attr in rules.Adam._fields and self.here(node, "take another coefficient"):
            node.attr = "step_size" if node.attr == "eps" else "eps"
        return node


def mutant(target):
    """The rules with one change, and what it is; None when there are no more places to change."""
    tree, mutator = ast.parse(SOURCE), Mutator(target)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS:
            node.body = [mutator.visit(statement) for statement in node.body]
    if mutator.change is None:
        return None
    module = types.ModuleType("mutant")
    exec(compile(ast.fix_missing_locations(tree), "mutant", "exec"), module.__dict__)
    # The coefficients come from the real rules: the mutant's functions must be found by the same types.
    module.sqrt = np.sqrt
    for table in ("TRANSFORMS", "RULES"):
        real, changed = getattr(rules, table), getattr(module, table)
        setattr(module, table, dict(zip(real, changed.values(), strict=True)))
    return module, mutator.change


MUTANTS = []
while (made := mutant(len(MUTANTS))) is not None:
    MUTANTS.append(made)

EQUIVALENT = {
    # Both branches of the moving average are the same function, up to rounding.
    "one_minus_beta < beta: flip the comparison",
}


def test_the_unchanged_rules_agree():
    assert agrees_with_the_paper()


def test_there_are_mutants_of_every_function():
    assert len(MUTANTS) > 50


@pytest.mark.parametrize(("module", "change"), [pytest.param(*made, id=made[1]) for made in MUTANTS])
def test_mutant_is_caught(module, change):
    agrees = agrees_with_the_paper(module.update)
    assert agrees is any(change.endswith(equivalent) for equivalent in EQUIVALENT)


# --- The coefficients ---------------------------------------------------------------------------------------


def keeps_its_word(coefficients) -> bool:
    """Whether all coefficients are scalars of the dtype, the weights of averages sum to 1, no decay is None.

    A ``1 - beta`` that is too large would only choose the other branch of the moving average: it is the same
    in float64, and loses digits in float32.
    """
    dtypes = np.dtype(np.float32), np.dtype(np.float64)
    for flags, dtype in itertools.product([*FLAGS, {"decoupled_weight_decay": True}], dtypes):
        h = Hyperparameters(lr=0.1, eps=EPS, **flags)
        c = coefficients(h, dtype)
        if (c.decay is None) is not (h.weight_decay == 0):
            return False
        rule = c.rule(2)
        if any(type(value) is not dtype.type for value in (*rule, *(c.decay or ()))):
            return False
        weights = [rule.beta1 + rule.one_minus_beta1, rule.beta2 + rule.one_minus_beta2]
        if not np.allclose(weights, 1, rtol=0, atol=np.finfo(dtype).eps):
            return False
    return True


def is_right(coefficients) -> bool:
    try:
        return keeps_its_word(coefficients) and agrees_with_the_paper(coefficients=coefficients)
    except Exception:  # a mutant may do anything
        return False


class CoefficientsMutator(Mutator):
    """Leaves alone what forms no coefficient: range checks, and what a kernel is compiled for."""

    OTHERS = {  # noqa: RUF012
        "beta1": "beta2",
        "beta2": "beta1",
        "lr": "eps",
        "eps": "lr",
        "weight_decay": "eps",
        "amsgrad": "maximize",
        "maximize": "amsgrad",
        "decoupled_weight_decay": "maximize",
    }
    NO_COEFFICIENTS = {"self.types"}  # noqa: RUF012

    def visit_Expr(self, node):
        """A docstring, or the call of a check."""
        return node

    def visit_If(self, node):
        return node if any(isinstance(n, ast.Raise) for n in node.body) else self.generic_visit(node)

    def visit_For(self, node):
        return node if any(isinstance(n, ast.Raise) for n in ast.walk(node)) else self.generic_visit(node)

    def visit_Assign(self, node):
        if ast.unparse(node.targets[0]) not in self.NO_COEFFICIENTS:
            node.value = self.visit(node.value)
        return node

    def visit_AnnAssign(self, node):
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_Call(self, node):
        return super().visit_Call(node) if node.args else node

    def visit_Compare(self, node):
        self.generic_visit(node)
        if type(node.ops[0]) not in self.FLIPS:
            return ast.UnaryOp(ast.Not(), node) if self.here(node, "negate") else node
        if self.here(node, "flip the comparison"):
            node.ops[0] = self.FLIPS[type(node.ops[0])]()
        return node

    def visit_BoolOp(self, node):
        self.generic_visit(node)
        for value in node.values:
            if self.here(node, f"keep {ast.unparse(value)} only"):
                return value
        return node

    def visit_IfExp(self, node):
        self.generic_visit(node)
        if self.here(node, "swap the branches"):
            node.body, node.orelse = node.orelse, node.body
        return node

    def visit_Constant(self, node):
        if type(node.value) is int and self.here(node, "add 1"):
            return ast.Constant(node.value + 1)
        return node

    def visit_Tuple(self, node):
        self.generic_visit(node)
        for i in range(len(node.elts) - 1):
            if self.here(node, f"swap elements {i} and {i + 1}"):
                node.elts[i : i + 2] = node.elts[i + 1], node.elts[i]
                break
        return node

    def other(self, name):
        private = "_" * name.startswith("_")
        return private + self.OTHERS[name.removeprefix("_")]

    def visit_Name(self, node):
        if node.id in self.OTHERS and self.here(node, f"take {self.other(node.id)}"):
            return ast.Name(self.other(node.id), node.ctx)
        return node

    def visit_Attribute(self, node):
        self.generic_visit(node)
        known = node.attr.removeprefix("_") in self.OTHERS
        if known and self.here(node, f"take {self.other(node.attr)}"):
            node.attr = self.other(node.attr)
        return node


def mutant_of_coefficients(target):
    """The class with one change, and what it is; None when there are no more places to change."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(Coefficients)))
    mutator = CoefficientsMutator(target)
    for method in tree.body[0].body:
        if isinstance(method, ast.FunctionDef):
            method.body = [mutator.visit(statement) for statement in method.body]
    if target is not None and mutator.change is None:
        return None
    # The module has it, so the annotations of the class may need it.
    flags = __future__.annotations.compiler_flag
    namespace = dict(vars(hyperparameters))
    exec(compile(ast.fix_missing_locations(tree), "mutant", "exec", flags), namespace)
    return namespace["Coefficients"], mutator.change


MUTANTS_OF_COEFFICIENTS = []
while (made := mutant_of_coefficients(len(MUTANTS_OF_COEFFICIENTS))) is not None:
    MUTANTS_OF_COEFFICIENTS.append(made)

# No mutant is equivalent. One that is would stand here, with the reason.
EQUIVALENT_COEFFICIENTS: set[str] = set()


def test_the_unchanged_coefficients_are_right():
    unchanged, _ = mutant_of_coefficients(None)
    assert keeps_its_word(unchanged)
    assert agrees_with_the_paper(coefficients=unchanged)


def test_there_are_mutants_of_every_coefficient():
    changes = "\n".join(change for _, change in MUTANTS_OF_COEFFICIENTS)
    assert len(MUTANTS_OF_COEFFICIENTS) > 50
    for formed in ("1 - beta1", "1 - beta2"):
        assert f"{formed}: keep the left side only" in changes


@pytest.mark.parametrize(
    ("mutated", "change"), [pytest.param(*made, id=made[1]) for made in MUTANTS_OF_COEFFICIENTS]
)
def test_mutant_of_coefficients_is_caught(mutated, change):
    assert is_right(mutated) is any(change.endswith(equivalent) for equivalent in EQUIVALENT_COEFFICIENTS)
