"""Every rule of the family in every storage: the bits of its equation in float32, whatever holds them."""

from __future__ import annotations

import numpy as np
import pytest
from eight_bit_steps import literal_blocks
from family_cases import RELATIVES, make
from storage_cases import DTYPES, encoded, literal_storage
from tolerances import assert_same_bits

from fastadam import Segment, eight_bit

N = 45

FACTORS = {
    "rule": RELATIVES,
    "params": ["bfloat16", "float32", "float16"],
    "grads": ["float32", "bfloat16", "float16"],
    "state_dtype": ["bfloat16", "float32"],
    "master_params": [None, "float32"],
    "out": [None, "bfloat16", "float16", "float32"],
    "weight_decay": [0.0, 0.05],
    "maximize": [False, True],
    "ema_decay": [None, 0.9],
    "max_grad_norm": [None, 0.5],
    "grad_scale": [None, 3.0],
    "zero_grads": [False, True],
    "segments": [False, True],
    "telemetry": [False, True],
}


def two_cases_of_each():
    """Return cases of all rules: two of each, which share no level of a feature that has two.

    Every loop is one for all rules, and Adam's tests have every pair of what it can do.
    """
    random = np.random.default_rng(1)
    for rule in RELATIVES:
        places = random.integers(12, size=len(FACTORS))
        for further in (0, 1):
            levels = (of[(k + further) % len(of)] for k, of in zip(places, FACTORS.values(), strict=True))
            yield {**dict(zip(FACTORS, levels, strict=True)), "rule": rule}


CASES = list(two_cases_of_each())
for case in CASES:  # parameters in float32 have no master
    if case["params"] == "float32":
        case["master_params"] = None


def case_id(case):
    return "-".join(str(value) for value in case.values() if value not in {None, False})


def options(case):
    names = ("rule", "params", "grads", "out", "grad_scale", "segments")
    return {name: value for name, value in case.items() if name not in names}


def assert_same_codes(found, expected, name=""):
    assert found.dtype == expected.dtype, name
    assert_same_bits(found.astype(np.float32), expected.astype(np.float32), name)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_step_has_the_bits_of_the_rule(rng, case):
    segments = [Segment(3, 17), Segment(17, 18)] if case["segments"] else []
    opt = make(case["rule"], lr=0.01, rounding="nearest", segments=segments, **options(case))
    params = encoded(rng.standard_normal(N), case["params"])
    expected = literal_storage(params, opt._hyperparameters)
    out = None if case["out"] is None else np.full(N, 7, DTYPES[case["out"]])
    for _ in range(4):
        given = encoded((rng.standard_normal(N) + 0.3) * (case["grad_scale"] or 1), case["grads"])
        grads = given.copy()
        opt.step(params, grads, grad_scale=case["grad_scale"], out=out)
        scales = {"grad_scale": case["grad_scale"], "clip_factor": opt.last_step.clip_factor}
        expected.step(given, **scales)
        assert_same_codes(params, expected.params, "params")
        assert_same_codes(grads, np.zeros_like(given) if case["zero_grads"] else given, "grads")
        for name, wanted in zip(expected.h.state, expected.states, strict=True):
            assert_same_codes(getattr(opt.state, name), wanted, name)
        if out is not None:
            assert_same_codes(out, encoded(expected.new, case["out"]), "out")
        if case["master_params"]:
            assert_same_bits(opt.state.param_master, expected.exact)


def test_cases_have_every_level():
    for name, levels in FACTORS.items():
        assert {str(case[name]) for case in CASES} == set(map(str, levels)), name
    assert len(set(map(case_id, CASES))) == len(CASES)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adagrad", "rmsprop-centered-momentum", "lion"])
def test_a_split_master_has_the_bits_of_a_float32_run(rng, name):
    params = encoded(rng.standard_normal(N), "bfloat16")
    exact = params.astype(np.float32)
    opt, plain = make(name, master_params="split"), make(name)
    for _ in range(20):
        grads = rng.standard_normal(N).astype(np.float32)
        opt.step(params, grads)
        plain.step(exact, grads)
    high = params.view(np.int16).astype(np.int64) << 16
    bits = (high + opt.state.param_remainder) & 0xFFFFFFFF
    assert_same_bits(bits.astype(np.uint32), exact.view(np.uint32))


SOME = ["nadam", "lion", "adagrad", "rmsprop-momentum"]


@pytest.mark.parametrize("name", SOME)
def test_states_are_rounded_at_random_to_a_neighbour(rng, name):
    """After one step, of both at once."""
    params, grads = (rng.standard_normal(2000).astype(np.float32) for _ in range(2))
    opt, plain = make(name, state_dtype="bfloat16", seed=3), make(name)
    opt.step(params.copy(), grads)
    plain.step(params, grads)
    for key, exact in plain.state.moments.items():
        found = opt.state.moments[key].astype(np.float32)
        below = (exact.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        above = ((exact.view(np.uint32) & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32)
        is_below, is_above = found == below, found == above
        assert (is_below | is_above | (found == exact)).all(), key
        assert is_below.mean() > 0.05, key
        assert is_above.mean() > 0.05, key


@pytest.mark.parametrize("name", ["sgd", *SOME])
def test_shards_have_the_bits_of_the_whole(rng, name):
    """Stochastic rounding of parameters and of states, by the index in the whole."""
    params = encoded(rng.standard_normal(300), "bfloat16")
    several = [rng.standard_normal(300).astype(np.float32) for _ in range(3)]
    assert_shards_are_of_the_whole(name, params, several, 77, "bfloat16")


def assert_shards_are_of_the_whole(name, params, several, cut, state_dtype):
    """Fail unless two shards, cut there, have after a step with each gradient what the whole has."""

    def steps(start, stop):
        part = params[start:stop].copy()
        opt = make(name, state_dtype=state_dtype, seed=5, offset=start)
        for grads in several:
            opt.step(part, grads[start:stop])
        return {"params": part, **opt.state.moments}

    whole, parts = steps(0, params.size), [steps(0, cut), steps(cut, params.size)]
    for key, value in whole.items():
        assert_same_codes(np.concatenate([part[key] for part in parts]), value, key)


# --- 8 bits -------------------------------------------------------------------------------------------------

BLOCKS = [
    ({"state_dtype": "8bit", "rounding": "nearest", "weight_decay": 0.05, "maximize": True}, ()),
    ({"state_dtype": ("8bit", "bfloat16"), "ema_decay": 0.9, "max_grad_value": 0.5}, ()),
    (
        {"state_dtype": "8bit", "seed": 9, "decoupled_weight_decay": True, "weight_decay": 0.1},
        (Segment(5, 40, lr=0.03), Segment(120, 140, frozen=True), Segment(150, 160, betas=(0.3, 0.9))),
    ),
]


@pytest.mark.parametrize("name", ["nadam", "radam"])
@pytest.mark.parametrize("more", BLOCKS, ids=["nearest", "pair", "segments"])
def test_moments_in_8_bits_follow_the_format(rng, name, more):
    assert_follows_the_format(rng, name, *more)


def assert_follows_the_format(rng, name, flags, segments=()):
    params = rng.standard_normal(300).astype(np.float32)
    opt = make(name, **{"lr": 0.01, **flags}, segments=segments)
    expected = literal_blocks(params, segments, opt._hyperparameters)
    for step in range(25):
        grads = gradients(rng, 300)
        opt.step(params, grads)
        expected.step(grads)
        expected.assert_same(opt, params, assert_same_bits, step)
    assert np.isfinite(params).all()


def gradients(rng, size):
    grads = (rng.standard_normal(size) * np.exp2(rng.integers(-3, 4, size))).astype(np.float32)
    grads[::7] = 0
    return grads


_OTHERS = {"nadam", "radam", "sgd", "nesterov", "rmsprop-centered"}
IN_BLOCKS = [name for name in RELATIVES if name not in _OTHERS]
"""Rules of which no bound is known before a block was computed; Nesterov's momentum is that of the other."""


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_states_in_8_bits_follow_the_format(rng, name):
    segments = (Segment(5, 40, lr=0.03), Segment(120, 140, frozen=True), Segment(150, 160, weight_decay=0.3))
    assert_follows_the_format(rng, name, {"state_dtype": "8bit", "seed": 9, "weight_decay": 0.1}, segments)


PAIRS = [
    ("rmsprop-momentum", {"state_dtype": ("8bit", "float32"), "rounding": "nearest"}),
    ("rmsprop-momentum", {"state_dtype": ("bfloat16", "8bit"), "ema_decay": 0.9}),
    ("adamax", {"state_dtype": ("float32", "8bit"), "maximize": True, "max_grad_value": 0.5}),
    ("nesterov", {"state_dtype": ("8bit", "float32"), "rounding": "nearest"}),
]


@pytest.mark.parametrize(("name", "flags"), PAIRS, ids=["signed", "unsigned", "adamax", "nesterov"])
def test_a_pair_is_of_states_with_a_sign_and_of_those_without(rng, name, flags):
    assert_follows_the_format(rng, name, flags)


@pytest.mark.parametrize("name", ["rmsprop-momentum", "adagrad", "lion"])
def test_what_is_not_finite_stays_in_its_element(rng, name):
    """Whole blocks, one of which gets inf, NaN and what overflows; and a shorter one."""
    params = rng.standard_normal(300).astype(np.float32)
    opt = make(name, lr=0.01, state_dtype="8bit", seed=2)
    expected = literal_blocks(params, (), opt._hyperparameters)
    for step in range(6):
        grads = gradients(rng, 300)
        if step in {1, 3}:
            grads[[7, 130, 299]] = np.inf, np.nan, 3e38
        opt.step(params, grads)
        expected.step(grads)
        expected.assert_same(opt, params, assert_same_bits, step)
    bad = ~np.isfinite(params)
    assert set(np.flatnonzero(bad)) <= {7, 130, 299}
    assert bad[130]


def test_a_rule_without_states_has_nothing_in_8_bits(rng):
    params = rng.standard_normal(300).astype(np.float32)
    opt, plain, same = make("sgd", state_dtype="8bit"), make("sgd"), params.copy()
    for _ in range(3):
        grads = gradients(rng, 300)
        opt.step(params, grads)
        plain.step(same, grads)
    assert_same_bits(params, same)


@pytest.mark.parametrize("name", ["adagrad", "rmsprop-centered-momentum"])
def test_shards_in_8_bits_have_the_bits_of_the_whole(rng, name):
    params = rng.standard_normal(3 * 128 + 40).astype(np.float32)
    several = [gradients(rng, params.size) for _ in range(4)]
    assert_shards_are_of_the_whole(name, params, several, 256, "8bit")


@pytest.mark.parametrize("name", ["adagrad", "rmsprop-centered-momentum", "adadelta", "momentum"])
def test_states_in_8_bits_come_back(rng, tmp_path, name):
    """By a state dict, and by a checkpoint: the codes of states with a sign, and of others."""
    params = rng.standard_normal(300).astype(np.float32)
    opt = make(name, state_dtype="8bit", seed=4)
    for _ in range(3):
        opt.step(params, gradients(rng, 300))
    opt.save(tmp_path / "run.safetensors")
    others = [make(name, state_dtype="8bit", seed=4), type(opt).load(tmp_path / "run.safetensors")]
    others[0].load_state_dict(opt.state_dict())
    exact = make(name)
    exact.load_state_dict(opt.state_dict())
    for key, value in opt.state.moments.items():
        assert_same_bits(exact.state.moments[key], value, key)
    grads = gradients(rng, 300)
    mine = params.copy()
    opt.step(mine, grads)
    for other in others:
        theirs = params.copy()
        other.step(theirs, grads)
        assert_same_bits(theirs, mine)
        for key, value in opt.state.moments.items():
            assert_same_bits(other.state.moments[key], value, key)


def test_an_accumulator_starts_in_8_bits(rng):
    params = rng.standard_normal(300).astype(np.float32)
    opt = make("adagrad", state_dtype="8bit", initial_accumulator_value=0.5)
    expected = literal_blocks(params, (), opt._hyperparameters)
    assert (eight_bit.decode(*started(expected)) > 0.49).all()
    for step in range(3):
        grads = gradients(rng, 300)
        opt.step(params, grads)
        expected.step(grads)
        expected.assert_same(opt, params, assert_same_bits, step)


def started(expected):
    return expected.codes("sum"), expected.words["sum"].view(np.float32)


@pytest.mark.parametrize("name", ["rmsprop-momentum", "lion"])
def test_telemetry_of_8_bits_changes_nothing(rng, name):
    """An element has no update where its first state is zero, which codes say without their scale."""
    params = rng.standard_normal(300).astype(np.float32)
    segments = (Segment(5, 40, lr=0.03), Segment(120, 140, frozen=True))
    opt, seen = (make(name, state_dtype="8bit", segments=segments, telemetry=on) for on in (False, True))
    mine, theirs = params.copy(), params.copy()
    for _ in range(5):
        grads = gradients(rng, 300)
        opt.step(mine, grads)
        seen.step(theirs, grads)
        assert_same_bits(theirs, mine)
        for key, value in opt.state.moments.items():
            assert_same_bits(seen.state.moments[key], value, key)
    # Every seventh element never had a gradient: no update, and none that was too small to count.
    assert seen.last_step.vanished == 0
    large = np.full(300, 2.0**30, np.float32)
    moving = np.arange(300) % 7 > 0
    moving[120:140] = False
    seen.step(large, gradients(rng, 300))
    assert seen.last_step.vanished == moving.sum()
