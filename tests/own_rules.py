"""Rules that are none of fastadam, as a user writes them, and the same in NumPy, over whole arrays."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from fastadam import own_rule


def with_sign(size, like):
    """Return a size with the sign of a number."""
    negative = -size if like < 0 else like
    return size if like > 0 else negative


class Yogi(NamedTuple):
    step_size: float
    beta1: float
    one_minus_beta1: float
    one_minus_beta2: float
    inv_bias_correction2: float
    eps: float


def yogi(param, grad, state, c):
    """Yogi (Zaheer et al., "Adaptive Methods for Nonconvex Optimization", Algorithm 2), debiased."""
    exp_avg, variance = state
    exp_avg = own_rule.moving_average(exp_avg, grad, c.beta1, c.one_minus_beta1)
    square = grad * grad
    variance = variance - c.one_minus_beta2 * with_sign(square, variance - square)
    denom = math.sqrt(variance * c.inv_bias_correction2) + c.eps
    return param - c.step_size * (exp_avg / denom), (exp_avg, variance)


YOGI_FORMULAS = {
    "step_size": own_rule.lr_over(own_rule.bias_correction("beta1")),
    "one_minus_beta1": lambda beta1: 1 - beta1,
    "one_minus_beta2": lambda beta2: 1 - beta2,
    "inv_bias_correction2": own_rule.per_step(own_rule.inverse_bias_correction("beta2")),
}

FusedYogi = own_rule.define(
    "FusedYogi",
    yogi,
    Yogi,
    states=["exp_avg", "variance"],
    hyperparameters={"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-3, "initial": 1e-6},
    formulas=YOGI_FORMULAS,
    ranges={"initial": (0.0, math.inf)},
    start={"variance": "initial"},
    nonnegative=["variance"],
)


def yogi_in_numpy(params, gradients, lr=0.01, beta1=0.9, beta2=0.999, eps=1e-3, initial=1e-6):
    """Return parameters and states after a step with each gradient; beta1 greater than 1/2."""
    number = params.dtype.type
    exact1, exact2 = Fraction(beta1), Fraction(beta2)
    params, exp_avg, variance = params.copy(), np.zeros_like(params), np.full_like(params, initial)
    for step, grads in enumerate(gradients, start=1):
        step_size = number(lr / float(1 - exact1**step))
        inverse = number(1 / float(1 - exact2**step))
        exp_avg = exp_avg + number(1 - beta1) * (grads - exp_avg)
        square = grads * grads
        variance = variance - number(1 - beta2) * (np.sign(variance - square) * square)
        params = params - step_size * (exp_avg / (np.sqrt(variance * inverse) + number(eps)))
    return params, exp_avg, variance


class Triple(NamedTuple):
    step_size: float
    beta: float
    one_minus_beta: float
    eps: float


def triple(param, grad, state, c):
    """A state that is never negative before two with a sign."""
    largest, momentum, slow = state
    faded, present = c.beta * largest, own_rule.magnitude(grad)
    largest = faded if faded > present else present  # noqa: FURB136 - a rule has no max
    momentum = c.beta * momentum + grad / (largest + c.eps)
    slow = own_rule.moving_average(slow, momentum, c.beta, c.one_minus_beta)
    return param - c.step_size * (momentum + slow), (largest, momentum, slow)


FusedTriple = own_rule.define(
    "FusedTriple",
    triple,
    Triple,
    states=["largest", "momentum", "slow"],
    hyperparameters={"lr": 0.01, "beta": 0.9, "eps": 1e-3},
    formulas={"one_minus_beta": lambda beta: 1 - beta},
    nonnegative=["largest"],
)


class Tiger(NamedTuple):
    step_size: float
    beta: float
    one_minus_beta: float
    shrink: float


def tiger(param, grad, state, c):
    """A sign of the momentum, whose beta and step size change from step to step."""
    (momentum,) = state
    momentum = c.beta * momentum + c.one_minus_beta * grad
    return param - with_sign(c.step_size, momentum) * c.shrink, (momentum,)


def beta_at(step, beta):
    return min(beta, 1 - 1 / (step + 1))


FusedTiger = own_rule.define(
    "FusedTiger",
    tiger,
    Tiger,
    states=["momentum"],
    hyperparameters={
        "lr": 0.01,
        "beta": 0.95,
        "slow": 10.0,
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
    },
    formulas={
        "step_size": own_rule.lr_over(lambda step, slow: 1 + slow / step, settles=20),
        "beta": own_rule.per_step(beta_at, settles=lambda beta: math.ceil(beta / (1 - beta))),
        "one_minus_beta": own_rule.per_step(
            lambda step, beta: 1 - beta_at(step, beta), settles=lambda beta: math.ceil(beta / (1 - beta))
        ),
        "shrink": 0.5,
    },
    ranges={"beta": (0.0, 1.0)},
)
