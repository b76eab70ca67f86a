"""Changes to the rules and their coefficients, and what tells the changed from the right ones."""

from __future__ import annotations

import ast
import itertools

import numpy as np
from oracles import FLAGS, PHASES, initial_states, interpret
from phase_oracles import literal_phase

from fastadam.adam import AdamHyperparameters
from fastadam.coefficients import Coefficients
from fastadam.kernels import rules

EPS = 0.03
"""It matters, and no other hyperparameter is equal to it."""

CONDITIONED = [
    *PHASES,
    *(
        {**flags, "max_grad_norm": norm, "max_grad_value": value, "lr": lambda step: 0.2 / step}
        for flags in PHASES[-2:]
        for norm, value in ((0.3, 0.17), (0.3, None), (100.0, 0.3))
    ),
]
"""Parts of the phase; those with a norm are given a ``grad_scale``, and clip, do not, and have a schedule."""


def agrees_with_the_paper(update=rules.update, coefficients=Coefficients) -> bool:
    """Whether steps follow Algorithm 1 three times, in every combination of flags."""
    rng = np.random.default_rng(0)
    # Both branches of the moving average.
    for flags, betas in itertools.product(FLAGS + CONDITIONED, [(0.9, 0.999), (0.3, 0.4)]):
        h = AdamHyperparameters(**{"lr": 0.1, "betas": betas, "eps": EPS, **flags})
        params = rng.standard_normal(4)
        phase = literal_phase(params, **{"lr": 0.1, "betas": betas, "eps": EPS, **flags})
        states = initial_states(h, params)
        for step, scale in enumerate([3.0, 1.0, 0.2], start=1):
            grads = scale * rng.standard_normal(4)
            scales = {}
            grad_scale = 5.0 if "max_grad_norm" in flags else None
            phase.step(grads.copy(), grad_scale)
            if grad_scale is not None:
                clip_factor = coefficients(h, params.dtype).clip_factor(phase.norm)
                scales = {"grad_scale": grad_scale, "clip_factor": clip_factor}
            params, states = interpret(h, params, grads, states, step, update, coefficients, **scales)
            paper = phase.adam
            expected = [paper.theta, *[paper.m, paper.v, paper.v_max][: 3 if h.amsgrad else 2]]
            expected += [] if h.ema_decay is None else [phase.average]
            for actual, wanted in zip([params, *states], expected, strict=True):
                if not np.allclose(actual, wanted, rtol=1e-10, atol=1e-12):
                    return False
    return True


class Mutator(ast.NodeTransformer):
    """Changes the ``target``-th place where something can be changed, and counts the places."""

    SWAPS = {  # noqa: RUF012
        ast.Add: ast.Sub,
        ast.Sub: ast.Add,
        ast.Mult: ast.Div,
        ast.Div: ast.Mult,
        ast.Pow: ast.Mult,
        ast.RShift: ast.LShift,
        ast.BitAnd: ast.BitOr,
    }
    FLIPS = {ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.Is: ast.IsNot}  # noqa: RUF012
    FIELDS = {  # noqa: RUF012
        **dict.fromkeys(rules.Adam._fields, "eps"),
        "eps": "step_size",
        "grad_scale": "clip_factor",
        "clip_factor": "max_value",
        "max_value": "grad_scale",
        "ema_decay": "one_minus_ema_decay",
        "one_minus_ema_decay": "ema_decay",
    }

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
        if node.attr in self.FIELDS and self.here(node, "take another coefficient"):
            node.attr = self.FIELDS[node.attr]
        return node
