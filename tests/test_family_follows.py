"""States of every rule in 8 bits follow those in float32: unbiased, never frozen, and no update blows up."""

from __future__ import annotations

import numpy as np
import pytest
from family_cases import make
from own_rules import FusedTriple
from test_eight_bit_follows import GRADIENTS, deviations
from test_rounding import SIGMAS

from fastadam import FusedRMSprop

RULES = {
    "adamax": {"betas": (0.9, 0.999)},
    "rmsprop": {"alpha": 0.999},
    "adadelta": {"rho": 0.999},
    "adagrad": {"initial_accumulator_value": 0.0},
}
"""Those with a state that is never negative, and no second moment of Adam's."""


def both(name, **flags):
    """Return an optimizer with states in 8 bits, and one with float32."""
    return make(name, **flags, state_dtype="8bit"), make(name, **flags)


def never_negative(opt):
    state = opt.state
    (name,) = {"exp_inf", "square_avg", "sum"} & set(state.moments)
    return state.moments[name].astype(np.float64)


@pytest.mark.parametrize("name", RULES)
def test_it_never_freezes(name):
    """Gradients drop to a tenth, and rise again: the mean follows to 2 %, each element to 6 % on average."""
    optimizers = both(name, lr=1e-3, **RULES[name])
    size, steps, rng = 512, 3000, np.random.default_rng(5)
    params = [np.zeros(size, np.float32) for _ in optimizers]
    for factor in (1.0, 0.1, 1.0):
        for grads in (factor * rng.standard_normal((steps, size))).astype(np.float32):
            for opt, param in zip(optimizers, params, strict=True):
                opt.step(param, grads)
        found, wanted = map(never_negative, optimizers)
        assert abs(found.mean() / wanted.mean() - 1) <= 0.02, factor
        assert np.abs(found / wanted - 1).mean() <= 0.06, factor


EVERY = ["adamax", "momentum", "lion", "adagrad", "rmsprop-momentum", "adadelta"]


@pytest.mark.parametrize("name", EVERY)
def test_a_step_is_unbiased(rng, name):
    size = 2**15
    grads = (rng.uniform(0.5, 2, size) * np.exp2(rng.integers(-3, 4, size))).astype(np.float32)
    opt, plain = both(name, lr=1e-3)
    for one in (opt, plain):
        one.step(np.zeros(size, np.float32), grads)
    states = zip(opt.state._views, opt.state._scales, plain.state.arrays, strict=True)
    found = [deviations(*state) for state in states]
    assert np.abs(found).max() <= SIGMAS, found


def test_states_draw_apart(rng):
    """The errors of one state that is never negative and of two with a sign are not correlated."""
    size = 2**15
    grads = rng.uniform(1, 2, size).astype(np.float32)
    opt, plain = FusedTriple(eps=1.0, state_dtype="8bit"), FusedTriple(eps=1.0)
    for one in (opt, plain):
        one.step(np.zeros(size, np.float32), grads)
    pairs = zip(opt.state.arrays, plain.state.arrays, strict=True)
    errors = [found.astype(np.float64) - exact for found, exact in pairs]
    errors = [(error - error.mean()) / error.std() for error in errors]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs((errors[one] * errors[other]).mean()) <= SIGMAS / np.sqrt(size), (one, other)


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("name", ["adamax", "rmsprop", "adagrad"])
def test_no_update_blows_up(rng, name, kind):
    """What divides is zero only where it always was, and no update is much larger than float32's.

    A first moment is 0 or at least 2**-18 of the largest in its block; what divides it in Adamax is as small
    as that of float32.
    """
    gradients = GRADIENTS[kind](rng, (200, 384)).astype(np.float32)
    optimizers = both(name, lr=1.0, eps=1e-30, **RULES[name])
    params, largest = [np.zeros(384, np.float32), np.zeros(384, np.float32)], [0.0, 0.0]
    for grads in gradients:
        for k, (opt, param) in enumerate(zip(optimizers, params, strict=True)):
            before = param.copy()
            opt.step(param, grads)
            largest[k] = max(largest[k], float(np.abs(param - before).max()))
        found, wanted = (never_negative(opt) == 0 for opt in optimizers)
        np.testing.assert_array_equal(found, wanted)
    assert largest[0] <= (4 if (name, kind) == ("adamax", "spread") else 2) * largest[1]


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("state_dtype", ["8bit", "bfloat16", ("8bit", "float32")])
def test_a_centered_root_is_one_of_float32(rng, state_dtype, momentum):
    """Gradients have a mean: rounded to less, variances would be less than 0, and updates blow up."""
    flags = {"centered": True, "momentum": momentum, "lr": 0.01}
    opt, plain = FusedRMSprop(state_dtype=state_dtype, **flags), FusedRMSprop(**flags)
    params, exact = np.zeros(256, np.float32), np.zeros(256, np.float32)
    for _ in range(400):
        grads = (3 + rng.standard_normal(256)).astype(np.float32)
        before = params.copy()
        opt.step(params, grads)
        plain.step(exact, grads)
        assert np.abs(params - before).max() < 0.5
    assert np.abs(params - exact).max() <= 0.05 * np.abs(exact).max()
    for name in ("square_avg", "grad_avg"):
        np.testing.assert_array_equal(opt.state.moments[name], plain.state.moments[name])
