"""The bits of the whole phase: those of the rules on NumPy scalars, whoever steps; and neutral values."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from oracles import PHASES, flags_id, initial_states, interpret
from phase_cases import CASES, case_id, options, problem
from tolerances import assert_same_bits

from fastadam import FusedAdam
from fastadam.adam import AdamHyperparameters
from fastadam.coefficients import Coefficients
from fastadam.kernels import cpu, norms, threads

DTYPES = ["float32", "float64"]
SIZES = [0, 1, 3, 7, 8, 16, 17, 33, 129, 257]
LARGE = max(cpu.PARALLEL_FROM, norms.PARALLEL_FROM) + 37


def contents(opt, params):
    """Return everything a step wrote."""
    return {"params": params, **opt.state.moments}


def run(params, gradients, *, grad_scale=None, **flags):
    opt, params = FusedAdam(**flags), params.copy()
    for grads in gradients:
        opt.step(params, grads.copy(), grad_scale=grad_scale)
    return opt, params


def assert_same(one, other):
    (opt, params), (expected, expected_params) = one, other
    assert opt.state.step == expected.state.step
    found, wanted = contents(opt, params), contents(expected, expected_params)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert_same_bits(value, wanted[name], name)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_loop_has_the_bits_of_the_rule(rng, case):
    """Given the norm, which is tested by itself."""
    h = AdamHyperparameters(**options(case))
    for size in SIZES:
        if case["skip_nonfinite"] and not size:
            continue
        params, gradients = problem(rng, case, size)
        states, opt, expected = initial_states(h, params), FusedAdam(**options(case)), params.copy()
        step = 0
        for grads in gradients:
            given = grads.copy()
            opt.step(params, grads, grad_scale=case["grad_scale"])
            if not opt.last_step.skipped:
                step += 1
                scales = {"grad_scale": case["grad_scale"], "clip_factor": opt.last_step.clip_factor}
                expected, states = interpret(h, expected, given, states, step, **scales)
            assert_same_bits(params, expected, "params")
            assert_same_bits(grads, np.zeros_like(given) if case["zero_grads"] else given, "grads")
            for (name, found), wanted in zip(opt.state.moments.items(), states, strict=bool(step)):
                assert_same_bits(found, wanted, name)
        assert step == opt.state.step


SPECIAL = [0.0, 1.0, 1e-20, np.inf, np.nan]


def special_values(dtype):
    finfo = np.finfo(dtype)
    values = [
        *SPECIAL,
        finfo.tiny,
        finfo.tiny / 2,
        finfo.smallest_subnormal,
        finfo.max,
        np.sqrt(finfo.max) * 2,
    ]
    values = np.array([sign * value for value in values for sign in (1, -1)]).astype(dtype)
    return tuple(array.ravel() for array in np.meshgrid(values, values))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", PHASES, ids=flags_id)
@pytest.mark.parametrize("scale", [None, 3.0, 1e-30])
def test_special_values(flags, dtype, scale):
    h = AdamHyperparameters(**flags)
    params, grads = special_values(dtype)
    gradients = [grads, np.roll(grads, 1), grads]
    found = run(params, gradients, grad_scale=scale, **flags)
    expected, states = params, initial_states(h, params)
    for step, given in enumerate(gradients, start=1):
        expected, states = interpret(h, expected, given, states, step, grad_scale=scale)
    assert_same_bits(found[1], expected)
    for (name, value), wanted in zip(found[0].state.moments.items(), states, strict=True):
        assert_same_bits(value, wanted, name)


# --- Threads and splits -------------------------------------------------------------------------------------

WHOLE = {**PHASES[-1], "max_grad_norm": 1.0, "skip_nonfinite": True}


@pytest.mark.parametrize("size", [LARGE, 5 * threads.MIN_PIECE + 11])
@pytest.mark.parametrize("flags", [PHASES[-2], WHOLE], ids=["one-pass", "two-passes"])
def test_any_number_of_threads(rng, all_threads, flags, size, monkeypatch):
    params = rng.standard_normal(size).astype(np.float32)
    gradients = [rng.standard_normal(size).astype(np.float32) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "PARALLEL_FROM", size + 1)
        patch.setattr(norms, "PARALLEL_FROM", size + 1)
        serial = run(params, gradients, grad_scale=3.0, **flags)
    assert serial[0].last_step.clip_factor < 1 or "max_grad_norm" not in flags
    # Small pieces for the pass over the gradients too, so that the pool shares it.
    monkeypatch.setattr(norms, "MIN_PIECE", threads.MIN_PIECE // 4)
    for numba_is_safe in (True, False):
        monkeypatch.setattr(threads, "numba_is_safe", lambda safe=numba_is_safe: safe)
        for count in sorted({n for n in (1, 2, 3, all_threads) if n <= all_threads}):
            numba.set_num_threads(count)
            found = run(params, gradients, grad_scale=3.0, **flags)
            assert_same(found, serial)
            assert found[0].last_step == serial[0].last_step


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_split_into_separate_calls(rng, dtype):
    size = cpu.PARALLEL_FROM + 37
    params = rng.standard_normal(size).astype(dtype)
    gradients = [rng.standard_normal(size).astype(dtype) for _ in range(3)]
    whole = contents(*run(params, gradients, grad_scale=3.0, **PHASES[-2]))
    for cuts in ([1], [5000], [3, 20, 1000, size - 1]):
        ranges = list(zip([0, *cuts], [*cuts, size], strict=True))
        parts = [
            contents(*run(params[a:b], [g[a:b] for g in gradients], grad_scale=3.0, **PHASES[-2]))
            for a, b in ranges
        ]
        for name, value in whole.items():
            assert_same_bits(np.concatenate([part[name] for part in parts]), value, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_any_alignment(rng, dtype, offset):
    params = rng.standard_normal(257).astype(dtype)
    gradients = [rng.standard_normal(257).astype(dtype) for _ in range(2)]
    expected = run(params, gradients, **WHOLE)
    shifted = np.concatenate([np.zeros(offset, dtype), params])[offset:]
    opt = FusedAdam(**WHOLE)
    for grads in gradients:
        opt.step(shifted, np.concatenate([np.zeros(4 - offset, dtype), grads])[4 - offset :])
    assert_same((opt, shifted), expected)
    assert opt.last_step == expected[0].last_step


# --- What changes nothing -----------------------------------------------------------------------------------

NEUTRAL = {
    "grad_scale": ({}, 1.0),
    "max_grad_norm": ({"max_grad_norm": 1e300}, None),
    "max_grad_value": ({"max_grad_value": "largest"}, None),
    "skip_nonfinite": ({"skip_nonfinite": True}, None),
    "zero_grads": ({"zero_grads": True}, None),
    "all": ({"max_grad_norm": 1e300, "skip_nonfinite": True, "zero_grads": True}, 1.0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.1}, {"maximize": True, "amsgrad": True}])
@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_values_change_no_bit(name, decay, dtype):
    """Of any gradient that they leave alone: all but those with inf, where all are looked at."""
    more, scale = NEUTRAL[name]
    more = {key: float(np.finfo(dtype).max) if value == "largest" else value for key, value in more.items()}
    params, grads = special_values(dtype)
    if "max_grad_norm" in more or "skip_nonfinite" in more:
        norm_fits = np.isfinite(grads) & (np.abs(grads.astype(np.float64)) < 1e100)
        params, grads = params[norm_fits], grads[norm_fits]
    if "max_grad_value" in more:
        params, grads = params[~np.isinf(grads)], grads[~np.isinf(grads)]
    gradients = [grads, np.roll(grads, 1), grads]
    assert_same(run(params, gradients, grad_scale=scale, **decay, **more), run(params, gradients, **decay))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_average_does_not_touch_the_rest(dtype):
    params, grads = special_values(dtype)
    opt, found = run(params, [grads, grads], ema_decay=0.9)
    plain, expected = run(params, [grads, grads])
    assert_same_bits(found, expected)
    for name, moment in plain.state.moments.items():
        assert_same_bits(opt.state.moments[name], moment, name)


def test_numbers_never_recompile():
    """Only the presence of a part selects a loop: schedules, scales and limits are numbers."""

    def signatures():
        loops = cpu.serial, cpu.whole_serial, norms.serial, norms.fold
        return sum(len(loop.signatures) for loop in loops)

    opt, params = FusedAdam(**{**WHOLE, "lr": lambda step: 0.1 / step}), np.ones(64, np.float32)
    opt.step(params, np.ones(64, np.float32), grad_scale=2.0)
    before = signatures()
    for number in (0.5, 1, np.float32(0.25)):
        opt.lr, opt.max_grad_norm, opt.max_grad_value, opt.eps = number, number, number, number
        opt.step(params, np.ones(64, np.float32), grad_scale=number)
        opt.step(params, np.ones(64, np.float32))
        opt.lr = lambda step: 0.1 / step
        opt.step(params, np.ones(64, np.float32))
        opt.step(params, np.full(64, np.inf, np.float32))
    assert signatures() == before
    assert Coefficients(opt._hyperparameters, np.dtype(np.float32)).types.conditioning is not type(None)
