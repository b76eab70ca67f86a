"""The bits of every rule of the family: those of its equation on NumPy scalars, whoever steps what."""

from __future__ import annotations

from itertools import pairwise

import numba
import numpy as np
import pytest
from family_cases import (
    CASES,
    HAS_BETAS,
    HAS_EPS,
    RELATIVES,
    RULES,
    case_id,
    make,
    options,
    shipped_rules,
    stepped,
)
from oracles import initial_states, interpret
from test_phase_bits import special_values
from tolerances import assert_same_bits

from fastadam import Segment
from fastadam.kernels import cpu, norms, threads

DTYPES = ["float32", "float64"]
SIZE = 129


def contents(opt, params):
    """Return everything a step wrote."""
    return {"params": params, **opt.state.moments}


def assert_same(one, other):
    found, wanted = contents(*one), contents(*other)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert_same_bits(value, wanted[name], name)


def assert_is_the_rule(h, found, wanted_params, wanted_states):
    opt, params = found
    assert_same_bits(params, wanted_params, "params")
    for name, wanted in zip(h.state, wanted_states, strict=True):
        assert_same_bits(opt.state.moments[name], wanted, name)


def test_every_rule_is_here():
    """Adding one without tests fails."""
    found = {make(name)._hyperparameters.rule.coefficients for name in RULES}
    assert found == shipped_rules().keys()


@pytest.mark.parametrize("name", RULES)
def test_coefficients_are_those_that_the_rule_names(name):
    rule = make(name)._hyperparameters.rule
    assert len(rule.columns) == len(rule.coefficients._fields)
    assert rule.coefficients._fields[0] == "step_size"


# --- One element --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RELATIVES)
def test_special_values(name, dtype):
    params, grads = special_values(dtype)
    for more in ({}, {"weight_decay": 0.1, "maximize": True}):
        opt = make(name, lr=0.1, **more)
        h, found = opt._hyperparameters, params.copy()
        expected, states = params, initial_states(h, params)
        for step, given in enumerate([grads, np.roll(grads, 1), grads, params], start=1):
            opt.step(found, given.copy())
            expected, states = interpret(h, expected, given, states, step)
        assert_is_the_rule(h, (opt, found), expected, states)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RELATIVES)
def test_a_nan_stays_in_its_element(name, dtype):
    gradients = [np.linspace(-1, 1, 33).astype(dtype) for _ in range(3)]
    clean = stepped(name, gradients, dtype)[1]
    gradients[1][7] = np.nan
    found = stepped(name, gradients, dtype)[1]
    assert np.isnan(found[7])
    found[7] = clean[7]
    assert_same_bits(found, clean)


@pytest.mark.parametrize("name", RELATIVES)
def test_many_steps(rng, name):
    """Over the edge of a block of coefficients."""
    h = make(name)._hyperparameters
    opt, params = make(name), rng.standard_normal(5).astype(np.float32)
    gradients = rng.standard_normal((1030, 5)).astype(np.float32)
    expected, states = params.copy(), initial_states(h, params)
    for step, grads in enumerate(gradients, start=1):
        opt.step(params, grads)
        expected, states = interpret(h, expected, grads, states, step)
    assert_is_the_rule(h, (opt, params), expected, states)


# --- What one step can do besides ---------------------------------------------------------------------------


def table(case):
    """Return segments, and what each unit has of its own: start, stop, hyperparameters; None is frozen."""
    if not case["segments"]:
        return [], [(0, SIZE, {})]
    first = {"lr": 0.05, "weight_decay": 0.2}
    if case["rule"] in HAS_BETAS:
        first["betas"] = (0.5, 0.75)
    if case["rule"] in HAS_EPS:
        first["eps"] = 1e-3
    segments = [Segment(64, 69, frozen=True), Segment(3, 40, **first), Segment(40, 41, weight_decay=0.0)]
    units = [(0, 3, {}), (3, 40, first), (40, 41, {"weight_decay": 0.0}), (41, 64, {}), (64, 69, None)]
    return segments, [*units, (69, SIZE, {})]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_phase_has_the_bits_of_the_rule(rng, case):
    """Given the norm, which is tested by itself; segments have those of optimizers of their own."""
    segments, units = table(case)
    thawed = np.concatenate([np.arange(start, stop) for start, stop, own in units if own is not None])
    opt, n = make(case["rule"], segments=segments, **options(case)), case["accumulated"]
    params = rng.standard_normal(SIZE).astype(case["dtype"])
    scale = case["grad_scale"] if n == 1 else n * (case["grad_scale"] or 1.0)
    expected, states, step = params.copy(), initial_states(opt._hyperparameters, params), 0
    for k in range(5):
        gradients = (rng.standard_normal((n, SIZE)) + 0.3) * (case["grad_scale"] or 1)
        gradients = list(gradients.astype(case["dtype"]))
        if case["skip_nonfinite"] and k == 2:
            gradients[-1][5] = np.inf
        given = sum(gradients[1:], start=gradients[0].copy())
        for grads in gradients[: n if n > 1 else 0]:
            opt.accumulate(grads)
        opt.step(params, gradients[0] if n == 1 else None, grad_scale=case["grad_scale"])
        last = opt.last_step
        assert last.skipped == (case["skip_nonfinite"] and k == 2)
        assert (not case["zero_grads"]) or not gradients[0][thawed].any()
        if last.skipped:
            continue
        step += 1
        expected, states = separately(opt._hyperparameters, units, expected, given, states, step, scale, last)
        assert_is_the_rule(opt._hyperparameters, (opt, params), expected, states)
        if case["telemetry"]:
            norm = np.linalg.norm(params[thawed].astype(float))
            assert last.param_norm == pytest.approx(norm)
            assert 0 <= last.vanished <= SIZE
            assert last.update_norm > 0
    assert step == opt.state.step


def separately(h, units, params, grads, states, step, scale, last):
    """Return what the equation gives with the hyperparameters of each unit."""
    params, states = params.copy(), tuple(state.copy() for state in states)
    for start, stop, own in units:
        if own is None:
            continue
        part, of_unit = slice(start, stop), h.changed(**own)
        if callable(h.lr) and "lr" not in own:
            of_unit = of_unit.changed(lr=h.lr(step))
        arrays = params[part], grads[part], tuple(state[part] for state in states)
        params[part], new = interpret(of_unit, *arrays, step, grad_scale=scale, clip_factor=last.clip_factor)
        for state, values in zip(states, new, strict=True):
            state[part] = values
    return params, states


def test_cases_have_every_pair():
    for rule in RELATIVES:
        assert {case["dtype"] for case in CASES if case["rule"] == rule} == set(DTYPES)
        assert {case["telemetry"] for case in CASES if case["rule"] == rule} == {False, True}
        assert {case["segments"] for case in CASES if case["rule"] == rule} == {False, True}


# --- Threads and splits -------------------------------------------------------------------------------------

LARGE = max(cpu.PARALLEL_FROM, norms.PARALLEL_FROM) + 37
WHOLE = {"max_grad_norm": 1.0, "ema_decay": 0.9, "zero_grads": True, "weight_decay": 0.1}


@pytest.mark.parametrize("more", [{}, WHOLE], ids=["plain", "whole"])
@pytest.mark.parametrize("name", RELATIVES)
def test_any_number_of_threads(rng, all_threads, name, more, monkeypatch):
    gradients = [rng.standard_normal(LARGE).astype(np.float32) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "PARALLEL_FROM", LARGE + 1)
        patch.setattr(norms, "PARALLEL_FROM", LARGE + 1)
        serial = stepped(name, gradients, **more)
    for numba_is_safe in (True, False):
        monkeypatch.setattr(threads, "numba_is_safe", lambda safe=numba_is_safe: safe)
        for count in sorted({1, all_threads}):
            numba.set_num_threads(count)
            found = stepped(name, gradients, **more)
            assert_same(found, serial)
            assert found[0].last_step == serial[0].last_step


@pytest.mark.parametrize("name", RELATIVES)
def test_any_split_and_alignment(rng, name):
    """Into separate optimizers, into segments that change nothing, and at any place in memory."""
    size = 257
    params = rng.standard_normal(size).astype(np.float32)
    gradients = [rng.standard_normal(size).astype(np.float32) for _ in range(3)]

    def steps(start, stop, **more):
        opt, part = make(name, **more), np.concatenate([np.zeros(3, np.float32), params[start:stop]])[3:]
        for grads in gradients:
            opt.step(part, grads[start:stop])
        return opt, part

    whole = contents(*steps(0, size))
    cuts = [0, 1, 20, 128, 255, size]
    parts = [contents(*steps(*cut)) for cut in pairwise(cuts)]
    segments = contents(*steps(0, size, segments=[Segment(1, 20), Segment(128, 255)]))
    for key, value in whole.items():
        assert_same_bits(np.concatenate([part[key] for part in parts]), value, key)
        assert_same_bits(segments[key], value, key)


def test_numbers_never_recompile():
    """Numbers, and the coefficients of a step, are no part of a loop's type."""
    for name in RELATIVES:
        opt, params = make(name), np.ones(64, np.float32)
        opt.step(params, params.copy())
        before = len(cpu.serial.signatures)
        for lr in (0.5, np.float32(0.25)):
            opt.lr, opt.weight_decay = lr, 0.0
            opt.step(params, np.ones(64, np.float32))
        assert len(cpu.serial.signatures) == before, name
