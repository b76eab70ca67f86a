"""Tests that bite: any small change of the rules turns a check red."""

from __future__ import annotations

import ast
import inspect
import types

import numpy as np
import pytest
from mutation import Mutator, agrees_with_the_paper

from fastadam.kernels import rules

SOURCE = inspect.getsource(rules)
FUNCTIONS = [
    *["condition", "maximize", "l2_decay", "decoupled_decay", "moving_average", "adam", "amsgrad"],
    *["exponential_average", "split", "join"],
]


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
    # The coefficients come from the real rules: the mutant's functions must be found by the same types. The
    # relatives of Adam are behind them, and not in the mutant.
    module.sqrt = np.sqrt
    for table in ("TRANSFORMS", "RULES", "AVERAGES"):
        real, changed = getattr(rules, table), getattr(module, table)
        setattr(module, table, dict(zip(real, changed.values(), strict=False)))
    return module, mutator.change


MUTANTS = []
while (made := mutant(len(MUTANTS))) is not None:
    MUTANTS.append(made)

EQUIVALENT = {
    # Both branches of the moving average are the same function, up to rounding.
    "one_minus_beta < beta: flip the comparison",
    # With equal weights, the branch is taken that does not use this one.
    "c.one_minus_ema_decay: take another coefficient",
}


def test_the_unchanged_rules_agree():
    assert agrees_with_the_paper()


def test_there_are_mutants_of_every_function():
    assert len(MUTANTS) > 50


@pytest.mark.parametrize(("module", "change"), [pytest.param(*made, id=made[1]) for made in MUTANTS])
def test_mutant_is_caught(module, change):
    try:
        agrees = agrees_with_the_paper(module.update)
    except (AttributeError, TypeError, ValueError):  # a tuple of another length, or none
        agrees = False
    assert agrees is any(change.endswith(equivalent) for equivalent in EQUIVALENT)
