"""The whole phase is what its documentation says: against a literal sequence, and PyTorch's own calls."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from oracles import WIDER
from phase_cases import CASES, FACTORS, LARGEST_LR, PAIRWISE, case_id, options, pairs_of, problem
from phase_oracles import literal_phase, torch_phase
from tolerances import EPS, LONG_DOUBLE_IS_WIDER, assert_same_bits, phase_tolerance

from fastadam import FusedAdam

STEPS = 6


def test_the_cases_have_every_pair_of_features():
    levels = [range(len(values)) for values in FACTORS.values()]
    wanted = {
        ((a, i), (b, j))
        for a, b in combinations(range(len(levels)), 2)
        for i, j in product(levels[a], levels[b])
    }
    assert set().union(*map(pairs_of, PAIRWISE)) == wanted
    assert len(CASES) < 30


def assert_close(found, expected, tolerances):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        error = np.abs(value - expected[name])
        worst = np.argmax(error - tolerances[name])
        assert error[worst] <= tolerances[name][worst], f"{name} at {worst}: {error[worst]}"


def contents(opt, params):
    return {"params": params, **opt.state.moments}


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_the_literal_sequence(rng, case):
    dtype = np.dtype(case["dtype"])
    wide = WIDER[dtype] if LONG_DOUBLE_IS_WIDER else np.float64
    params, gradients = problem(rng, case, steps=STEPS)
    phase = literal_phase(params, **options(case), dtype=wide)
    opt, moved = FusedAdam(**options(case)), 0.0
    for grads in gradients:
        literal = grads.copy()
        before = params.copy(), phase.theta.copy()
        opt.step(params, grads, grad_scale=case["grad_scale"])
        phase.step(literal, case["grad_scale"])
        assert_same_bits(grads, literal, "grads")
        tolerances = phase_tolerance(phase, LARGEST_LR, dtype)
        adam = phase.adam
        expected = {"params": phase.theta, "exp_avg": adam.m, "exp_avg_sq": adam.v}
        expected |= {"max_exp_avg_sq": adam.v_max} if case["amsgrad"] else {}
        expected |= {"param_ema": phase.average} if case["ema_decay"] else {}
        assert_close(contents(opt, params), expected, tolerances)
        moved = max(moved, np.max(np.abs(phase.theta - before[1])))
        assert np.quantile(tolerances["params"], 0.75) < 1e-3 * LARGEST_LR, "a bound that bounds nothing"
        assert_close(
            {"update": params - before[0]},
            {"update": phase.theta - before[1]},
            {"update": 2 * tolerances["params"]},
        )

        last = opt.last_step
        looked = case["skip_nonfinite"] or case["max_grad_norm"] is not None or case["telemetry"]
        assert (last.step, last.skipped) == (phase.t, phase.skipped) == (opt.state.step, last.skipped)
        assert last.lr == (opt.lr(phase.t + phase.skipped) if callable(opt.lr) else opt.lr)
        if not looked:
            assert (last.grad_norm, last.clip_factor) == (None, 1.0)
        elif not phase.skipped:
            np.testing.assert_allclose(float(phase.norm), last.grad_norm, rtol=20 * EPS[np.dtype("f8")])
            np.testing.assert_allclose(float(phase.factor), last.clip_factor, rtol=20 * EPS[np.dtype("f8")])
    assert moved > LARGEST_LR / 4
    assert opt.state.step == STEPS - case["skip_nonfinite"]


@pytest.mark.parametrize("inverse", [False, True], ids=["divided", "multiplied"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_the_calls_of_pytorch(rng, case, inverse):
    """Both are one tolerance away from the literal sequence: two from each other.

    PyTorch takes the norm in the dtype of the gradients, of 300 elements in a row at worst: some more.
    """
    pytest.importorskip("torch")
    dtype = np.dtype(case["dtype"])
    params, gradients = problem(rng, case, steps=STEPS)
    phase = literal_phase(params, **options(case))
    theirs = torch_phase(params, **options(case), inverse=inverse)
    opt = FusedAdam(**options(case))
    for grads in gradients:
        copies = grads.copy(), grads.copy()
        opt.step(params, grads, grad_scale=case["grad_scale"])
        phase.step(copies[0], case["grad_scale"])
        theirs.step(copies[1], case["grad_scale"])
        assert_same_bits(grads, copies[1], "grads")
        tolerances = {name: 4 * bound for name, bound in phase_tolerance(phase, LARGEST_LR, dtype).items()}
        expected = {"params": theirs.theta, **theirs.state}
        expected |= {"param_ema": theirs.average} if case["ema_decay"] else {}
        assert int(expected.pop("step")) == opt.state.step
        assert_close(contents(opt, params), expected, tolerances)


# --- Norms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("magnitude", [1e-30, 1e-22, 1e19, 3e22, 1e37])
def test_squares_beyond_float32(magnitude):
    """The norm is taken in float64: nothing overflows, nothing vanishes, and clipping clips."""
    grads = magnitude * np.array([3, -4, 0, 12], np.float32)
    norm = 13 * np.float64(np.float32(magnitude))
    opt, params = FusedAdam(max_grad_norm=1.0), np.zeros(4, np.float32)
    opt.step(params, grads)
    np.testing.assert_allclose(opt.last_step.grad_norm, norm, rtol=1e-6)
    factor = min(1.0, 1 / (norm + 1e-6))
    np.testing.assert_allclose(opt.last_step.clip_factor, factor, rtol=1e-6)
    np.testing.assert_allclose(opt.state.exp_avg, 0.1 * grads * factor, rtol=1e-5)
    assert np.isfinite(params).all()


@pytest.mark.parametrize("scale", [None, 8.0])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_norm_that_is_not_finite(dtype, value, scale):
    """As clip_grad_norm_: an infinite norm makes zeros, and NaN of inf; NaN makes NaN of all."""
    torch = pytest.importorskip("torch")
    grads = np.array([1.0, -2.0, value, 0.0, -0.0], dtype)
    clipped = torch.from_numpy(grads.copy()).requires_grad_()
    clipped.grad = clipped.detach().clone()
    if scale is not None:
        clipped.grad /= scale
    torch.nn.utils.clip_grad_norm_([clipped], 1.0)
    opt, params = FusedAdam(max_grad_norm=1.0, betas=(0.0, 0.0)), np.ones(5, dtype)
    opt.step(params, grads, grad_scale=scale)
    np.testing.assert_array_equal(opt.state.exp_avg, clipped.grad.numpy())
    assert opt.state.step == 1
    assert not opt.last_step.skipped
    np.testing.assert_equal(opt.last_step.grad_norm, abs(value))
    np.testing.assert_equal(opt.last_step.clip_factor, 0.0 if abs(value) == np.inf else np.nan)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_are_clipped_as_by_pytorch(dtype):
    torch = pytest.importorskip("torch")
    limit = np.dtype(dtype).type(0.3)
    around = [limit, np.nextafter(limit, limit * 2), np.nextafter(limit, limit * 0), np.inf, 1e-40, 0.0]
    grads = np.array([sign * value for value in around for sign in (1, -1)] + [np.nan], dtype)
    clipped = torch.zeros(grads.size, requires_grad=True, dtype=getattr(torch, dtype))
    clipped.grad = torch.from_numpy(grads.copy())
    torch.nn.utils.clip_grad_value_([clipped], 0.3)
    opt, params = FusedAdam(max_grad_value=0.3, betas=(0.0, 0.0)), np.zeros_like(grads)
    opt.step(params, grads)
    np.testing.assert_array_equal(opt.state.exp_avg, clipped.grad.numpy())


def test_the_order_of_a_step():
    """Divided, clipped by norm, then by value: each other order has another result."""
    opt, params = FusedAdam(max_grad_norm=5.0, max_grad_value=3.5, betas=(0.0, 0.0)), np.zeros(2)
    opt.step(params, np.array([60.0, 80.0]), grad_scale=2.0)
    assert opt.last_step.grad_norm == 50.0
    np.testing.assert_allclose(opt.state.exp_avg, [3.0, 3.5], rtol=1e-6)
    maximized = FusedAdam(max_grad_value=1.0, maximize=True, weight_decay=0.5, betas=(0.0, 0.0))
    maximized.step(np.full(1, 8.0), np.full(1, 2.0))
    np.testing.assert_allclose(maximized.state.exp_avg, [-1.0 + 4.0])
