"""State in 8 bits: checkpoints, copies, conversions, errors, memory."""

from __future__ import annotations

import copy
import io
import pickle

import ml_dtypes
import numpy as np
import pytest
from test_eight_bit_numpy import deviation
from tolerances import assert_same_bits

from fastadam import FusedAdam, eight_bit

N = 300
KINDS = {
    "both": {"state_dtype": "8bit"},
    "amsgrad": {"state_dtype": "8bit", "amsgrad": True, "seed": 3},
    "first": {"state_dtype": ("8bit", "float32"), "ema_decay": 0.9},
    "second": {"state_dtype": ("bfloat16", "8bit"), "amsgrad": True, "offset": 2**40},
}
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def problem(rng, steps=6):
    gradients = rng.standard_normal((steps, N)) * np.exp2(rng.integers(-5, 6, N))
    gradients[:, 7] = 0
    return rng.standard_normal(N).astype(np.float32), list(gradients.astype(np.float32))


def run(opt, params, gradients):
    params = params.copy()
    for grads in gradients:
        opt.step(params, grads)
    return params


def through_npz(entries):
    file = io.BytesIO()
    np.savez(file, **entries)
    file.seek(0)
    return np.load(file)


def loaded(flags, entries):
    opt = FusedAdam(state_dtype=flags["state_dtype"])
    opt.load_state_dict(entries)
    return opt


def assert_same_state(one, other):
    found, expected = one.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if isinstance(value, np.ndarray):
            assert_same_bits(
                value.view(f"u{value.itemsize}"), expected[name].view(f"u{value.itemsize}"), name
            )
        else:
            assert value == expected[name]


RESUMES = {
    "dict": lambda opt, flags: loaded(flags, opt.state_dict()),
    "npz": lambda opt, flags: loaded(flags, through_npz(opt.state_dict())),
    "pickle": lambda opt, _: pickle.loads(pickle.dumps(opt)),
    "deepcopy": lambda opt, _: copy.deepcopy(opt),
}


@pytest.mark.parametrize("spoiled", [False, True], ids=["finite", "not-finite"])
@pytest.mark.parametrize("how", RESUMES)
@pytest.mark.parametrize("kind", KINDS)
def test_resumes_bit_for_bit(rng, kind, how, spoiled):
    params, gradients = problem(rng)
    if spoiled:
        gradients[1][[3, 280]] = np.nan, np.inf
    whole = FusedAdam(0.1, **KINDS[kind])
    expected = run(whole, params, gradients)
    first = FusedAdam(0.1, **KINDS[kind])
    half = run(first, params, gradients[:3])
    second = RESUMES[how](first, KINDS[kind])
    assert_same_state(second, first)
    assert_same_bits(run(second, half, gradients[3:]), expected)
    assert_same_state(second, whole)
    assert repr(second) == repr(whole)


def test_contents_of_the_state_dict(rng):
    params, gradients = problem(rng, 2)
    opt = FusedAdam(state_dtype=("8bit", "bfloat16"))
    run(opt, params, gradients)
    entries = opt.state_dict()
    arrays = {name: value for name, value in entries.items() if isinstance(value, np.ndarray)}
    assert {name: (value.dtype, value.size) for name, value in arrays.items()} == {
        "exp_avg": (np.uint8, N),
        "exp_avg_scales": (np.float32, 3),
        "exp_avg_sq": (np.uint16, N),
    }
    assert entries["state_dtype"] == ("8bit", "bfloat16")
    found = eight_bit.decode(entries["exp_avg"].view(np.int8), entries["exp_avg_scales"])
    assert_same_bits(found, opt.state.exp_avg)
    arrays["exp_avg"][:] = 0  # a copy
    assert opt.state.exp_avg.any()


def test_moments_are_shown_as_numbers_and_cannot_be_written(rng):
    params, gradients = problem(rng, 1)
    opt = FusedAdam(state_dtype="8bit", ema_decay=0.9)
    assert opt.state.exp_avg is None
    run(opt, params, gradients)
    exact = FusedAdam(ema_decay=0.9)
    run(exact, params, gradients)
    for name in ("exp_avg", "exp_avg_sq"):
        moment = getattr(opt.state, name)
        assert (moment.dtype, moment.shape) == (np.float32, (N,))
        np.testing.assert_allclose(moment, getattr(exact.state, name), rtol=0.13, atol=1e-4)
        with pytest.raises(ValueError, match="read-only"):
            moment[:] = 0
    opt.state.param_ema[:] = 3
    assert (opt.state.param_ema == 3).all()
    assert repr(opt.state) == "State(step=1, exp_avg=8bit[300], exp_avg_sq=8bit[300], param_ema=float32[300])"
    pair = FusedAdam(state_dtype=("bfloat16", "8bit"))
    run(pair, params, gradients)
    assert repr(pair.state) == "State(step=1, exp_avg=bfloat16[300], exp_avg_sq=8bit[300])"


@pytest.mark.parametrize(("flags", "most"), [({}, 2.1), ({"amsgrad": True}, 3.15)])
def test_bytes_per_parameter(flags, most):
    """Of all memory that the state takes."""
    size = 2**20
    opt = FusedAdam(state_dtype="8bit", **flags)
    opt.step(np.zeros(size, np.float32), np.ones(size, np.float32))
    assert opt.state._block.nbytes <= most * size
    kept = sum(value.nbytes for value in opt.state_dict().values() if isinstance(value, np.ndarray))
    assert kept == (3 if flags else 2) * (size + size // 32)


# --- Conversions --------------------------------------------------------------------------------------------

FORMATS = ["float32", "bfloat16", "8bit", ("8bit", "float32"), ("bfloat16", "8bit")]


def format_of(kind, name):
    return kind if isinstance(kind, str) else kind[name != "exp_avg"]


@pytest.mark.parametrize("how", [dict, through_npz])
@pytest.mark.parametrize("wanted", FORMATS, ids=str)
@pytest.mark.parametrize("given", FORMATS, ids=str)
def test_conversions(rng, given, wanted, how):
    """The same codes to the same format, the same numbers up, to the nearest down."""
    params, gradients = problem(rng)
    opt = FusedAdam(amsgrad=True, state_dtype=given)
    run(opt, params, gradients)
    other = FusedAdam(amsgrad=True, state_dtype=wanted)
    other.load_state_dict(how(opt.state_dict()))
    assert other.state_dtype == wanted
    for name in MOMENTS:
        one, found = getattr(opt.state, name), getattr(other.state, name)
        source, target = format_of(given, name), format_of(wanted, name)
        assert found.dtype == {"bfloat16": ml_dtypes.bfloat16}.get(target, np.float32)
        numbers = one.astype(np.float32)
        if target in {source, "float32"}:
            assert_same_bits(found.astype(np.float32), numbers, name)
        elif target == "bfloat16":
            assert_same_bits(found.astype(np.float32), numbers.astype(ml_dtypes.bfloat16).astype(np.float32))
        else:
            entries = other.state_dict()
            codes = entries[name].view(np.int8 if name == "exp_avg" else np.uint8)
            errors, within = deviation(codes, entries[f"{name}_scales"], numbers.astype(np.float64))
            assert (errors <= within).all()
            assert found[7] == 0
    if given == wanted:
        assert_same_state(other, opt)
    run(other, params, gradients)


def test_conversions_keep_what_is_not_finite(rng):
    params, gradients = problem(rng)
    gradients[2][5] = np.nan
    opt = FusedAdam()
    run(opt, params, gradients)
    narrow = FusedAdam(state_dtype="8bit")
    narrow.load_state_dict(opt.state_dict())
    assert np.flatnonzero(np.isnan(narrow.state.exp_avg)).tolist() == [5]
    assert np.flatnonzero(~np.isfinite(narrow.state.exp_avg_sq)).tolist() == [5]
    wide = FusedAdam()
    wide.load_state_dict(narrow.state_dict())
    assert np.flatnonzero(~np.isfinite(wide.state.exp_avg_sq)).tolist() == [5]


def test_a_resume_in_8_bits_goes_on_like_float32(rng):
    """The start of a run in float32, the rest in 8 bits: parameters stay close."""
    params, gradients = problem(rng, 60)
    exact = FusedAdam(0.01)
    start = run(exact, params, gradients[:30])
    opt = FusedAdam(0.01, state_dtype="8bit")
    opt.load_state_dict(exact.state_dict())
    found, expected = run(opt, start, gradients[30:]), run(exact, start, gradients[30:])
    assert np.abs(found - expected).max() <= 0.2 * np.abs(expected - start).max()
    assert np.isfinite(found).all()
