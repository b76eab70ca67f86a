"""Tests that bite: any small change of the rules turns the check against the paper red."""

from __future__ import annotations

import ast
import inspect
import itertools
import types

import numpy as np
import pytest
from oracles import FLAGS, algorithm_1, interpret

from fastadam.hyperparameters import Hyperparameters
from fastadam.kernels import rules

SOURCE = inspect.getsource(rules)
FUNCTIONS = ["maximize", "l2_decay", "decoupled_decay", "moving_average", "adam", "amsgrad"]


def agrees_with_the_paper(module) -> bool:
    """Whether the rules of a module follow Algorithm 1 for three steps, in every combination of flags."""
    rng = np.random.default_rng(0)
    # Both branches of the moving average, and an eps that matters.
    for flags, betas in itertools.product(FLAGS, [(0.9, 0.999), (0.3, 0.4)]):
        h = Hyperparameters(lr=0.1, betas=betas, eps=0.05, **flags)
        params = rng.standard_normal(4)
        paper = algorithm_1(params, lr=0.1, betas=betas, eps=0.05, **flags)
        states = tuple(np.zeros(4) for _ in h.moments)
        for step, scale in enumerate([3.0, 1.0, 0.2], start=1):
            grads = scale * rng.standard_normal(4)
            paper.step(grads)
            params, states = interpret(h, params, grads, states, step, update=module.update)
            expected = [paper.m, paper.v, paper.v_max][: len(states)]
            for actual, moment in zip([params, *states], [paper.theta, *expected], strict=True):
                if not np.allclose(actual, moment, rtol=1e-10, atol=1e-12):
                    return False
    return True


class Mutator(ast.NodeTransformer):
    """Changes the ``target``-th place where something can be changed, and counts the places."""

    SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}  # noqa: RUF012
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
    assert agrees_with_the_paper(rules)


def test_there_are_mutants_of_every_function():
    assert len(MUTANTS) > 50


@pytest.mark.parametrize(("module", "change"), [pytest.param(*made, id=made[1]) for made in MUTANTS])
def test_mutant_is_caught(module, change):
    agrees = agrees_with_the_paper(module)
    assert agrees is any(change.endswith(equivalent) for equivalent in EQUIVALENT)
