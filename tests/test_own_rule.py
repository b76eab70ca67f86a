"""Optimizers of rules that are none of ours: bits, and all else that an optimizer has."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from typing import NamedTuple
from unittest import mock

import numba
import numpy as np
import own_rules
import pytest
from eight_bit_steps import literal_blocks
from oracles import interpret_steps
from own_rules import FusedTiger, FusedTriple, FusedYogi, yogi_in_numpy
from tolerances import assert_same_bits

import fastadam
from fastadam import Segment, own_rule
from fastadam.formulas import column_of
from fastadam.hyperparameters import Hyperparameters
from fastadam.kernels import cpu, rules, threads
from fastadam.kernels.translation import translate

BOTH = pytest.mark.parametrize("make", [FusedYogi, FusedTiger], ids=lambda make: make.__name__)


def numbers(rng, size, steps, dtype=np.float32):
    gradients = rng.standard_normal((steps, size)).astype(dtype)
    gradients[:, : size // 4] *= gradients[:, : size // 4] > 0  # zeros, too
    return rng.standard_normal(size).astype(dtype), gradients


def evaluated(opt, params, gradients, **scales):
    """Return what the rule computes with NumPy scalars."""
    with mock.patch.object(own_rules.math, "sqrt", np.sqrt):
        params, states = interpret_steps(opt._hyperparameters, params, gradients, **scales)
    return (params, *states)


def after(opt, params, gradients, **scales):
    params = params.copy()
    for grads in gradients:
        opt.step(params, grads, **scales)
    return (params, *opt.state.arrays)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 7, 1000, 40_000])
def test_yogi_has_the_bits_of_numpy(rng, dtype, size):
    params, gradients = numbers(rng, size, 4, dtype)
    assert_same(after(FusedYogi(), params, gradients), yogi_in_numpy(params, gradients))


OPTIONS = {
    "plain": {},
    "l2": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    "whole": {"max_grad_value": 0.7, "ema_decay": 0.9, "weight_decay": 0.1},
}


@BOTH
@pytest.mark.parametrize("options", OPTIONS)
def test_bits_of_the_phase(rng, make, options):
    params, gradients = numbers(rng, 131, 3)
    opt = make(0.1, **OPTIONS[options])
    if make is FusedYogi:
        start = mock.patch("oracles.initial_states", begins_with(opt._hyperparameters.initial))
    else:
        start = mock.patch("oracles.initial_states", begins_with(0))
    scales = {"grad_scale": 4.0} if options == "whole" else {}
    with start:
        expected = evaluated(opt, params, gradients, **scales)
    assert_same(after(opt, params, gradients, **scales), expected)


def begins_with(initial):
    def states(hyperparameters, params):
        given = {"param_ema": params.copy(), "variance": np.full_like(params, initial)}
        return tuple(given.get(name, np.zeros_like(params)) for name in hyperparameters.state)

    return states


@BOTH
def test_a_rule_works(make):
    params = np.random.default_rng(0).standard_normal(64)
    opt = make(lr=0.02, weight_decay=0.0)
    for _ in range(1500):
        opt.step(params, params.copy())
    assert np.abs(params).max() < 0.05


@BOTH
def test_threads_and_splits(rng, make, all_threads):
    params, gradients = numbers(rng, 100_003, 2)
    expected = after(make(), params, gradients)
    numba.set_num_threads(1)
    assert_same(after(make(), params, gradients), expected)
    numba.set_num_threads(all_threads)
    with mock.patch.object(threads, "numba_is_safe", return_value=False):
        assert_same(after(make(), params, gradients), expected)
    parts = [slice(0, 7), slice(7, 60_001), slice(60_001, None)]
    found = [after(make(), params[part], gradients[:, part]) for part in parts]
    assert_same([np.concatenate(arrays) for arrays in zip(*found, strict=True)], expected)


@BOTH
def test_segments_are_optimizers_of_their_own(rng, make):
    params, gradients = numbers(rng, 3000, 3)
    segments = [Segment(0, 500, lr=0.5), Segment(700, 900, frozen=True), Segment(900, 3000, weight_decay=0.3)]
    found = after(make(segments=segments), params, gradients)
    parts = [(0, 500, {"lr": 0.5}), (500, 700, {}), (900, 3000, {"weight_decay": 0.3})]
    for start, stop, own in parts:
        expected = after(make(**own), params[start:stop], gradients[:, start:stop])
        assert_same([array[start:stop] for array in found], expected)
    assert_same([found[0][700:900]], [params[700:900]])


def test_segments_may_set_betas_and_eps(rng):
    params, gradients = numbers(rng, 64, 3)
    found = after(FusedYogi(segments=[Segment(0, 40, betas=(0.8, 0.9), eps=0.1)]), params, gradients)
    expected = after(FusedYogi(betas=(0.8, 0.9), eps=0.1), params[:40], gradients[:, :40])
    assert_same([array[:40] for array in found], expected)
    with pytest.raises(ValueError, match="as FusedTiger has no betas"):
        FusedTiger(segments=[Segment(0, 40, betas=(0.8, 0.9))])


@BOTH
@pytest.mark.parametrize("how", ["state dict", "file", "pickle", "copy"])
def test_a_run_goes_on(rng, tmp_path, make, how):
    params, gradients = numbers(rng, 257, 6)
    whole = after(make(0.1), params, gradients)
    first = make(0.1)
    middle = after(first, params, gradients[:3])[0]
    if how == "state dict":
        second = make()
        second.load_state_dict(first.state_dict())
        assert first.state_dict()["rule"] == make.__name__
    elif how == "file":
        first.save(tmp_path / "run", params=middle)
        second = make.load(tmp_path / "run", params=middle)
        assert type(second) is make
    else:
        second = copy.deepcopy(first) if how == "copy" else pickle.loads(pickle.dumps(first))
    assert_same(after(second, middle, gradients[3:]), whole)


def test_a_checkpoint_of_a_rule_that_is_not_defined(rng, tmp_path, monkeypatch):
    params, gradients = numbers(rng, 8, 1)
    opt = FusedYogi()
    after(opt, params, gradients)
    opt.save(tmp_path / "run")
    monkeypatch.delitem(fastadam.hyperparameters.Hyperparameters.KINDS, "FusedYogi")
    with pytest.raises(ValueError, match="is defined") as caught:
        FusedYogi.load(tmp_path / "run")
    assert str(caught.value) == (
        f"path must be of a rule that is defined; got {str(tmp_path / 'run')!r}, of 'FusedYogi'. Run its"
        " fastadam.own_rule.define before it is loaded."
    )


def test_bf16_states(rng):
    pytest.importorskip("ml_dtypes")
    params, gradients = numbers(rng, 5000, 3)
    found = after(FusedYogi(state_dtype="bfloat16", rounding="nearest"), params, gradients)
    assert found[1].dtype.name == "bfloat16"
    for one, other in zip(found, yogi_in_numpy(params, gradients), strict=True):
        assert np.allclose(one.astype(np.float32), other, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("make", [FusedYogi, FusedTriple], ids=lambda make: make.__name__)
def test_states_in_8_bits(rng, make, rounding):
    """What is said to be never negative is 0 only where it is; all else follows the format.

    Turned around, gradients of 0 are -0, as are their magnitudes then.
    """
    params, gradients = numbers(rng, 300, 6)
    segments = (Segment(30, 60, frozen=True), Segment(60, 90, lr=0.1))
    opt = make(state_dtype="8bit", rounding=rounding, segments=segments, maximize=True)
    expected = literal_blocks(params, segments, opt._hyperparameters)
    for k, grads in enumerate(gradients):
        opt.step(params, grads)
        expected.step(grads)
        expected.assert_same(opt, params, assert_same_bits, k)
    never_negative, with_a_sign, *_ = sorted(opt.state.arrays, key=np.min, reverse=True)
    zero = (gradients == 0).all(axis=0) | ((np.arange(300) >= 30) & (np.arange(300) < 60))
    np.testing.assert_array_equal(never_negative == 0, zero & (make is FusedTriple))
    assert (with_a_sign < 0).any()


def test_what_is_never_negative_must_be_known(rng):
    """A definition that does not say it cannot read what another one has saved."""
    first = FusedYogi(state_dtype="8bit")
    first.step(np.ones(8, np.float32), rng.standard_normal(8).astype(np.float32))
    told = first.state_dict()
    undefined = own_rule.define(
        "FusedYogi",
        own_rules.yogi,
        own_rules.Yogi,
        states=["exp_avg", "variance"],
        hyperparameters={"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-3, "initial": 1e-6},
        formulas=own_rules.YOGI_FORMULAS,
    )
    Hyperparameters.KINDS["FusedYogi"] = FusedYogi.HYPERPARAMETERS
    opt = undefined()
    with pytest.raises(ValueError, match="must be 'float32' or 'bfloat16' for this rule; got '8bit'"):
        opt.load_state_dict(told)
    assert opt.state.step == 0


def test_stochastic_rounding_knows_no_splits(rng):
    pytest.importorskip("ml_dtypes")
    params, gradients = numbers(rng, 5000, 3)
    whole = after(FusedTiger(state_dtype="bfloat16", seed=3), params, gradients)
    parts = [
        after(FusedTiger(state_dtype="bfloat16", seed=3, offset=part.start), params[part], gradients[:, part])
        for part in (slice(0, 1201), slice(1201, 5000))
    ]
    assert_same([np.concatenate(arrays) for arrays in zip(*parts, strict=True)], whole)


@pytest.mark.parametrize("master", ["float32", "split"])
def test_bf16_parameters(rng, master):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    params, gradients = numbers(rng, 1000, 3)
    params = params.astype(ml_dtypes.bfloat16)
    gradients = gradients.astype(ml_dtypes.bfloat16)
    opt = FusedYogi(master_params=master)
    found = after(opt, params, gradients)
    expected = yogi_in_numpy(params.astype(np.float32), gradients.astype(np.float32))
    assert_same(found[1:3], expected[1:])
    assert np.array_equal(found[0], expected[0].astype(ml_dtypes.bfloat16)) or master == "split"


@BOTH
def test_telemetry_changes_no_bit(rng, make):
    params, gradients = numbers(rng, 5000, 2)
    opt = make(telemetry=True, max_grad_norm=1.0, skip_nonfinite=True)
    assert_same(after(opt, params, gradients), after(make(max_grad_norm=1.0), params, gradients))
    assert opt.last_step.param_norm > 0
    assert opt.last_step.clip_factor < 1
    gradients[0, 3] = np.nan
    opt.step(params, gradients[0])
    assert opt.last_step.skipped


def test_hyperparameters_are_attributes():
    opt = FusedTiger(0.1, 0.5, slow=3, max_grad_norm=1)
    assert (opt.lr, opt.beta, opt.slow, opt.weight_decay, opt.decoupled_weight_decay) == (
        0.1,
        0.5,
        3.0,
        0.1,
        True,
    )
    assert type(opt.slow) is float
    opt.beta = 0.25
    assert opt.beta == 0.25
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\); got 1.0."):
        opt.beta = 1.0
    assert repr(opt) == (
        "FusedTiger(lr=0.1, beta=0.25, slow=3.0, weight_decay=0.1, decoupled_weight_decay=True,"
        " maximize=False, max_grad_norm=1.0)"
    )
    assert FusedYogi().betas == (0.9, 0.999)
    assert "initial=1e-06" in str(inspect.signature(FusedYogi))
    assert FusedYogi.__doc__.startswith("Yogi (Zaheer")
    assert FusedYogi.__module__ == "own_rules"


def test_a_change_between_steps(rng):
    params, gradients = numbers(rng, 33, 2)
    opt = FusedTiger()
    params = after(opt, params, gradients[:1])[0]
    opt.slow, opt.beta = 0.0, 0.5
    momentum = opt.state.momentum.copy()
    found = after(opt, params, gradients[1:])
    number = np.float32
    momentum = number(0.5) * momentum + number(0.5) * gradients[1]
    decayed = params - number(0.01 * 0.1) * params
    assert_same(found, [decayed - np.sign(momentum) * number(0.01) * number(0.5), momentum])


def test_no_step_but_the_first_compiles(rng):
    params, gradients = numbers(rng, 16, 5)
    opt = FusedTiger()
    after(opt, params, gradients[:1])
    compiled = len(cpu.serial.signatures)
    opt.beta = 0.3
    after(opt, params, gradients[1:])
    assert len(cpu.serial.signatures) == compiled


def test_sequences(rng):
    columns = FusedTiger.HYPERPARAMETERS().rule.columns
    sequence = columns[1].of(0.9)
    assert sequence == columns[1].of(0.9)
    assert hash(sequence) == hash(columns[1].of(0.9))
    assert sequence != columns[1].of(0.8)
    expected = [own_rules.beta_at(step, 0.9) for step in range(1, 2048)]
    assert sequence.block(0)[1:].tolist() == expected[:1023]
    assert sequence.block(1).tolist() == expected[1023:]
    assert sequence.table().tolist() == expected[:10]
    over = columns[0].of(10.0)
    assert over.table().tolist() == [1 + 10.0 / step for step in range(1, 21)]
    assert over.block(0)[21:].tolist() == over.block(3)[1:1004].tolist() == [1.5] * 1003
    column, _ = column_of("step_size", own_rule.lr_over(lambda step, slow: 1 + slow / step), ["slow"])
    unsettled = column.of(10.0)
    assert unsettled.table() is None  # a GPU cannot count these steps
    assert unsettled.block(3)[5] == 1 + 10.0 / (3 * 1024 + 5)


def make_scaled(factor_of):
    """Return an optimizer like gradient descent, defined in place: its rule and its formulas are closures."""

    def scaled(param, grad, state, c):
        return param - c.step_size * factor_of(grad), state

    return own_rule.define("FusedScaled", scaled, OnlyStepSize, hyperparameters={"lr": 1.0})


class OnlyStepSize(NamedTuple):
    step_size: float


def doubled(x):
    return x + x


def negated(x):
    return -x


def test_the_later_definition_counts_for_new_optimizers():
    params = np.zeros(3)
    older = make_scaled(doubled)(0.5)
    newer = make_scaled(negated)
    for make, expected in ((older, -1.0), (newer(0.5), 0.5), (older, -1.0)):
        params[:] = 0
        make.step(params, np.ones(3))
        assert params.tolist() == [expected] * 3


def test_a_helper_that_changes_changes_no_rule(monkeypatch):
    """A kernel that is compiled later is of the rule as it was defined; so is the source of CUDA."""
    opt, params = FusedLately(1.0), np.zeros(2)
    monkeypatch.setattr(sys.modules[__name__], "doubled", negated)
    opt.step(params, np.ones(2))
    assert params.tolist() == [-2.0, -2.0]
    source = translate(rules.RULES[opt._hyperparameters.rule.coefficients], {})
    assert "doubled_" in source
    assert "negated" not in source


def lately(param, grad, state, c):
    return param - c.step_size * doubled(grad), state


FusedLately = own_rule.define("FusedLately", lately, OnlyStepSize)
