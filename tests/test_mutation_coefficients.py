"""Tests that bite: any small change of how coefficients are formed turns a check red."""

# ruff: noqa: N802 - the names of methods are those of ast

from __future__ import annotations
import __future__

import ast
import inspect
import itertools
import textwrap

import numpy as np
import pytest
from mutation import CONDITIONED, EPS, Mutator, agrees_with_the_paper
from oracles import FLAGS

from fastadam import coefficients
from fastadam.adam import AdamHyperparameters
from fastadam.coefficients import Coefficients
from fastadam.kernels import rules


def keeps_its_word(coefficients) -> bool:
    """Whether all coefficients are scalars of the dtype, and what is not asked for is None.

    A ``1 - beta`` that is too large would only choose the other branch of the moving average: it is the same
    in float64, and loses digits in float32. So the weights of averages must sum to 1.
    """
    dtypes = np.dtype(np.float32), np.dtype(np.float64)
    for flags, dtype in itertools.product([*CONDITIONED, *FLAGS, {"decoupled_weight_decay": True}], dtypes):
        h = AdamHyperparameters(**{"lr": 0.1, "eps": EPS, **flags})
        c = coefficients(h, dtype)
        conditions = h.max_grad_norm is not None or h.max_grad_value is not None
        for scale in (None, 2.0):
            parts = c.update(2, grad_scale=scale)
            asked = conditions or scale is not None, h.maximize, h.weight_decay > 0, h.ema_decay is not None
            made = parts.conditioning, parts.direction, parts.decay, parts.average
            types = c.types if scale is None else c.scaled_types
            if tuple(part is not None for part in made) != asked or types.parts != tuple(map(type, parts)):
                return False
            if parts.direction is not None and type(parts.direction) is not rules.Maximize:
                return False
            if any(type(value) is not dtype.type for part in parts if part for value in part):
                return False
        rule, average = parts.rule, parts.average
        weights = [rule.beta1 + rule.one_minus_beta1, rule.beta2 + rule.one_minus_beta2]
        weights += [] if average is None else [average.ema_decay + average.one_minus_ema_decay]
        if not np.allclose(weights, 1, rtol=0, atol=np.finfo(dtype).eps):
            return False
        late = c.rule(2000).inv_bias_correction2  # of another block
        if not np.isclose(late, 1 / (1 - h.betas[1] ** 2000)):
            return False
        lr = h.lr(7) if callable(h.lr) else h.lr
        if coefficients(h, dtype).lr != (h.lr(1) if callable(h.lr) else h.lr):
            return False
        if c.lr_of(7) != lr or (c.clear is not None) is not h.zero_grads:
            return False
        if not as_on_a_gpu(c, 5):
            return False
        if (c.types.clear is rules.Clear) is not h.zero_grads or c.types.n_states != len(h.state):
            return False
    return decides(coefficients)


def as_on_a_gpu(c, step) -> bool:
    """Whether the tables for GPUs have one row, from which the coefficients of a step come."""
    table, numbers = c.columns()
    (row,), rule = table.tolist(), list(c.rule(step))
    for place, is_over_lr, first, count in row:
        number = numbers[first : first + count][min(step, count) - 1]
        if rule[place] != c.dtype.type(c.lr / number if is_over_lr else number):
            return False
    return len(row) == 2


ADDED = [
    {"lr": abs},
    {"max_grad_norm": 1.0},
    {"max_grad_value": 1.0},
    {"skip_nonfinite": True},
    {"ema_decay": 0.5},
    {"zero_grads": True},
]
"""What each makes a step more than a plain one."""


def decides(coefficients) -> bool:
    """Whether steps are plain, and look at the gradients first, where they must, and only there."""
    for flags in FLAGS:
        for added in ({}, *ADDED):
            h = AdamHyperparameters(**flags, **added)
            if coefficients(h, np.dtype(np.float32)).is_plain is not (not added):
                return False
    for skip, norm in itertools.product((False, True), (None, 1.0)):
        h = AdamHyperparameters(skip_nonfinite=skip, max_grad_norm=norm)
        c = coefficients(h, np.dtype(np.float32))
        if (c.skips, c.reads_gradients_first) != (skip, skip or norm is not None):
            return False
        if norm is None and c.clip_factor(3.0) != 1:
            return False
    return True


def is_right(coefficients) -> bool:
    try:
        return keeps_its_word(coefficients) and agrees_with_the_paper(coefficients=coefficients)
    except Exception:  # a mutant may do anything
        return False


class CoefficientsMutator(Mutator):
    """Leaves alone what forms no coefficient: range checks."""

    OTHERS = {  # noqa: RUF012
        "beta1": "beta2",
        "beta2": "beta1",
        "lr": "eps",
        "eps": "lr",
        "weight_decay": "eps",
        "amsgrad": "maximize",
        "maximize": "amsgrad",
        "decoupled_weight_decay": "maximize",
        "max_grad_norm": "max_grad_value",
        "max_grad_value": "max_grad_norm",
        "max_norm": "max_value",
        "ema_decay": "eps",
        "skip_nonfinite": "zero_grads",
        "zero_grads": "skip_nonfinite",
    }

    def visit_Expr(self, node):
        """A docstring, or the call of a check."""
        return node

    def visit_If(self, node):
        return node if any(isinstance(n, ast.Raise) for n in node.body) else self.generic_visit(node)

    def visit_For(self, node):
        return node if any(isinstance(n, ast.Raise) for n in ast.walk(node)) else self.generic_visit(node)

    def visit_Assign(self, node):
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
    namespace = dict(vars(coefficients))
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
    for formed in ("self.lr / of_block[place]", "1 - h.ema_decay"):
        assert f"{formed}: keep the left side only" in changes


@pytest.mark.parametrize(
    ("mutated", "change"), [pytest.param(*made, id=made[1]) for made in MUTANTS_OF_COEFFICIENTS]
)
def test_mutant_of_coefficients_is_caught(mutated, change):
    assert is_right(mutated) is any(change.endswith(equivalent) for equivalent in EQUIVALENT_COEFFICIENTS)
