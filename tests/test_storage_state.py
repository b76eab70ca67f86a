"""State of any storage: checkpoints, copies, pickles, conversions."""

from __future__ import annotations

import copy
import io
import pickle

import ml_dtypes
import numpy as np
import pytest
from tolerances import assert_same_bits

import fastadam
from fastadam import FusedAdam, Segment

BF16 = ml_dtypes.bfloat16
N = 60
KINDS = {
    "moments": {"state_dtype": "bfloat16", "amsgrad": True},
    "pair": {"state_dtype": ("bfloat16", "float32"), "ema_decay": 0.9},
    "master": {"master_params": "float32", "state_dtype": "bfloat16"},
    "split": {"master_params": "split", "seed": 5, "offset": 7},
    "parameters": {"seed": 3},
}


def problem(rng, steps=6):
    return rng.standard_normal(N).astype(BF16), [
        rng.standard_normal(N).astype(np.float32) for _ in range(steps)
    ]


def run(opt, params, gradients):
    params = params.copy()
    for grads in gradients:
        opt.step(params, grads)
    return params


def assert_same(one, other):
    (opt, params), (expected, expected_params) = one, other
    assert_same_bits(params.astype(np.float32), expected_params.astype(np.float32))
    found, wanted = opt.state.moments, expected.state.moments
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == wanted[name].dtype
        assert_same_bits(value.view(f"u{value.itemsize}"), wanted[name].view(f"u{value.itemsize}"), name)


def through_npz(entries):
    file = io.BytesIO()
    np.savez(file, **entries)
    file.seek(0)
    return np.load(file)


def loaded(flags, entries):
    opt = FusedAdam(**{name: flags[name] for name in ("state_dtype", "master_params") if name in flags})
    opt.load_state_dict(entries)
    return opt


RESUMES = {
    "dict": lambda opt, flags: loaded(flags, opt.state_dict()),
    "npz": lambda opt, flags: loaded(flags, through_npz(opt.state_dict())),
    "pickle": lambda opt, _: pickle.loads(pickle.dumps(opt)),
    "deepcopy": lambda opt, _: copy.deepcopy(opt),
}


@pytest.mark.parametrize("how", RESUMES)
@pytest.mark.parametrize("kind", KINDS)
def test_resumes_bit_for_bit(rng, kind, how):
    params, gradients = problem(rng)
    whole = FusedAdam(0.1, **KINDS[kind])
    expected = run(whole, params, gradients)
    first = FusedAdam(0.1, **KINDS[kind])
    half = run(first, params, gradients[:3])
    second = RESUMES[how](first, KINDS[kind])
    assert_same((second, half), (first, half))
    assert_same((second, run(second, half, gradients[3:])), (whole, expected))
    assert repr(second) == repr(whole)


def test_contents_of_the_state_dict(rng):
    params, gradients = problem(rng, 2)
    opt = FusedAdam(state_dtype=("bfloat16", "float32"), master_params="split", seed=4)
    run(opt, params, gradients)
    entries = opt.state_dict()
    assert entries["state_dtype"] == ("bfloat16", "float32")
    assert entries["master_params"] == "split"
    assert (entries["rounding"], entries["seed"], entries["offset"]) == ("stochastic", 4, 0)
    dtypes = {name: value.dtype for name, value in entries.items() if isinstance(value, np.ndarray)}
    assert dtypes == {"exp_avg": np.uint16, "exp_avg_sq": np.float32, "param_remainder": np.int16}
    assert_same_bits(entries["exp_avg"], opt.state.exp_avg.view(np.uint16))
    assert (
        repr(opt.state)
        == "State(step=2, exp_avg=bfloat16[60], exp_avg_sq=float32[60], param_remainder=int16[60])"
    )


@pytest.mark.parametrize("how", [dict, through_npz])
def test_conversions(rng, how):
    params, gradients = problem(rng)
    wide, narrow = FusedAdam(amsgrad=True), FusedAdam(amsgrad=True, state_dtype="bfloat16")
    run(wide, params, gradients)
    narrow.load_state_dict(how(wide.state_dict()))
    assert narrow.state_dtype == "bfloat16"
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        expected = getattr(wide.state, name).astype(BF16)
        assert_same_bits(getattr(narrow.state, name).view(np.uint16), expected.view(np.uint16))
    pair = FusedAdam(amsgrad=True, state_dtype=("float32", "bfloat16"))
    pair.load_state_dict(how(narrow.state_dict()))
    assert pair.state.exp_avg.dtype == np.float32
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert_same_bits(
            getattr(pair.state, name).astype(BF16).view(np.uint16),
            getattr(narrow.state, name).view(np.uint16),
        )
    assert pair.state.step == 6


def test_arrays_of_bfloat16_load_too(rng):
    opt = FusedAdam(state_dtype="bfloat16")
    run(opt, *problem(rng))
    entries = opt.state_dict()
    entries["exp_avg"] = entries["exp_avg"].view(BF16)
    other = FusedAdam(state_dtype="bfloat16")
    other.load_state_dict(entries)
    assert_same_bits(other.state.exp_avg.view(np.uint16), opt.state.exp_avg.view(np.uint16))


@pytest.mark.parametrize("master", ["float32", "split"])
def test_masters_begin_with_the_parameters_of_a_checkpoint(rng, master):
    params, gradients = problem(rng)
    without = FusedAdam(0.1)
    params = run(without, params, gradients[:3])
    opt = FusedAdam(master_params=master)
    opt.load_state_dict(without.state_dict())
    plain = FusedAdam()
    plain.load_state_dict(without.state_dict())
    exact = run(plain, params.astype(np.float32), gradients[3:])
    params = run(opt, params, gradients[3:])
    assert_same_bits(opt.state.exp_avg, plain.state.exp_avg)
    assert np.abs(params.astype(np.float32) - exact).max() <= np.abs(exact).max() * 2**-8
    assert opt.state.step == 6


def test_writing_to_the_state_changes_it(rng):
    params, gradients = problem(rng)
    opt = FusedAdam(state_dtype="bfloat16")
    run(opt, params, gradients)
    opt.state.exp_avg[:] = 3
    assert (opt.state.moments["exp_avg"].astype(np.float32) == 3).all()
    assert opt.state.max_exp_avg_sq is None
    assert opt.state.param_master is None
    assert opt.state.param_remainder is None


def test_state_takes_no_more_memory_than_it_must(rng):
    params, gradients = problem(rng, 1)
    for flags, itemsize in (({}, 8), ({"state_dtype": "bfloat16"}, 4), ({"master_params": "split"}, 10)):
        opt = FusedAdam(**flags)
        run(opt, params, gradients)
        assert sum(array.nbytes for array in opt.state.arrays) == itemsize * N


@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
@pytest.mark.parametrize("segments", [[], [Segment(0, 3)]])
def test_warmup_compiles_what_a_step_needs(segments, state_dtype):
    from fastadam.kernels import stored

    flags = {"state_dtype": state_dtype, "max_grad_norm": 1.0}
    fastadam.warmup(dtype=BF16, segments=segments, **flags)
    before = len(stored.serial.signatures)
    FusedAdam(segments=segments, **flags).step(np.ones(N, BF16), np.ones(N, BF16))
    assert len(stored.serial.signatures) == before
