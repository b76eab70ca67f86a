"""Bad storage: the whole message of every error, and that nothing was changed."""

from __future__ import annotations

import sys

import ml_dtypes
import numpy as np
import pytest
from phase_cases import assert_changes_nothing

import fastadam
from fastadam import FusedAdam

BF16 = ml_dtypes.bfloat16
N = 8

HYPERPARAMETERS = [
    ({"rounding": "up"}, ValueError, "rounding must be 'stochastic' or 'nearest'; got 'up'."),
    ({"rounding": None}, ValueError, "rounding must be 'stochastic' or 'nearest'; got None."),
    *(
        (
            {"state_dtype": value},
            ValueError,
            f"state_dtype must be 'float32', 'bfloat16', '8bit' or a pair of them; got {value!r}.",
        )
        for value in ("float16", "4bit", None, 8, ("8bit",), ("8bit", "float64"), ("8bit",) * 3, np.float32)
    ),
    (
        {"master_params": "float64"},
        ValueError,
        "master_params must be None, 'float32' or 'split'; got 'float64'.",
    ),
    ({"master_params": True}, ValueError, "master_params must be None, 'float32' or 'split'; got True."),
    *(
        row
        for name in ("seed", "offset")
        for row in (
            ({name: -1}, ValueError, f"{name} must be in [0, 2**53); got -1."),
            ({name: 2**53}, ValueError, f"{name} must be in [0, 2**53); got {2**53}."),
            ({name: 1.0}, TypeError, f"{name} must be an integer; got float."),
        )
    ),
]


@pytest.mark.parametrize(("flags", "error", "message"), HYPERPARAMETERS, ids=lambda value: str(value)[:40])
def test_bad_hyperparameter(flags, error, message):
    with pytest.raises(error) as caught:
        FusedAdam(**flags)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["state_dtype", "master_params", "rounding", "seed", "offset"])
def test_what_cannot_be_set(name):
    with pytest.raises(AttributeError):
        setattr(FusedAdam(), name, None)


def ones(dtype, size=N):
    return np.ones(size, dtype)


MIX = "flat_grads must have the dtype of flat_params ({}); got {}."
FLOAT64 = "state_dtype must be 'float32', the default, for float64 parameters; got {!r}."
STEPS = {
    "float64-and-bfloat16": ({}, np.float64, BF16, TypeError, MIX.format("float64", "bfloat16")),
    "float16-and-float64": ({}, np.float16, np.float64, TypeError, MIX.format("float16", "float64")),
    "float32-and-float64": ({}, np.float32, np.float64, TypeError, MIX.format("float32", "float64")),
    "float64-state": (
        {"state_dtype": "bfloat16"},
        np.float64,
        np.float64,
        ValueError,
        FLOAT64.format("bfloat16"),
    ),
    "float64-pair": (
        {"state_dtype": ("float32", "bfloat16")},
        np.float64,
        np.float64,
        ValueError,
        FLOAT64.format(("float32", "bfloat16")),
    ),
    "float64-8bit": ({"state_dtype": "8bit"}, np.float64, np.float64, ValueError, FLOAT64.format("8bit")),
    "float32-master": (
        {"master_params": "float32"},
        np.float32,
        BF16,
        ValueError,
        "master_params must be None for float32 parameters; got 'float32'.",
    ),
    "float64-master": (
        {"master_params": "split"},
        np.float64,
        np.float64,
        ValueError,
        "master_params must be None for float64 parameters; got 'split'.",
    ),
    "split-float16": (
        {"master_params": "split"},
        np.float16,
        BF16,
        ValueError,
        "master_params must be None or 'float32' for float16 parameters; got 'split'.",
    ),
}


@pytest.mark.parametrize("case", STEPS)
def test_bad_step(case):
    flags, params, grads, error, message = STEPS[case]
    opt, buffers = FusedAdam(**flags), [ones(params), ones(grads)]
    assert_changes_nothing(opt, buffers, error, message, lambda: opt.step(*buffers))


def test_formats_may_change_between_steps_but_not_to_what_cannot_be():
    opt = FusedAdam(state_dtype="bfloat16")
    for params in (BF16, np.float32, np.float16):
        opt.step(ones(params), ones(np.float16))
    bad = [ones(np.float64), ones(np.float64)]
    message = "flat_params must have the dtype of the state (float32); got float64."
    assert_changes_nothing(opt, bad, TypeError, message, lambda: opt.step(*bad))
    opt = FusedAdam(master_params="split")
    opt.step(ones(BF16), ones(BF16))
    bad = [ones(np.float16), ones(BF16)]
    message = "master_params must be None or 'float32' for float16 parameters; got 'split'."
    assert_changes_nothing(opt, bad, ValueError, message, lambda: opt.step(*bad))


def read_only():
    array = ones(BF16)
    array.flags.writeable = False
    return array


OUTS = {
    "float64": (
        lambda *_: ones(np.float64),
        TypeError,
        "out must be float32, float16 or bfloat16; got float64.",
    ),
    "int32": (
        lambda *_: ones(np.int32),
        TypeError,
        "out must be float32, float64, float16 or bfloat16; got int32.",
    ),
    "size": (lambda *_: ones(BF16, 7), ValueError, "out must have the size of flat_params (8); got 7."),
    "read-only": (
        lambda *_: read_only(),
        ValueError,
        "out must be writable; got a read-only array. Pass a writable copy.",
    ),
    "params": (
        lambda params, *_: params,
        ValueError,
        "out must not overlap flat_params; got buffers that share memory. Pass a copy.",
    ),
    "grads": (
        lambda _, grads, *__: grads,
        ValueError,
        "out must not overlap flat_grads; got buffers that share memory. Pass a copy.",
    ),
    "state": (
        lambda _, __, opt: opt.state.exp_avg,
        ValueError,
        "out must not overlap the state; got buffers that share memory. Pass a copy.",
    ),
}


@pytest.mark.parametrize("case", OUTS)
def test_bad_out(case):
    make, error, message = OUTS[case]
    opt, params, grads = FusedAdam(), ones(np.float32), ones(np.float32)
    opt.step(params, grads)
    out = make(params, grads, opt)
    assert_changes_nothing(
        opt, [params, grads, out], error, message, lambda: opt.step(params, grads, out=out)
    )


def test_no_out_for_float64():
    opt, buffers = FusedAdam(), [ones(np.float64), ones(np.float64), ones(BF16)]
    message = "out must be None for float64 parameters; got a bfloat16 buffer."
    assert_changes_nothing(opt, buffers, TypeError, message, lambda: opt.step(*buffers[:2], out=buffers[2]))


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_no_swap_of_16_bits(kind):
    params = ones({"float16": np.float16, "bfloat16": BF16}[kind])
    opt = FusedAdam(ema_decay=0.9)
    opt.step(params, params.copy())
    message = (
        f"flat_params must be float32 or float64 for swap_ema; got {kind}."
        " Convert state.param_ema into another buffer."
    )
    assert_changes_nothing(opt, [params], TypeError, message, lambda: opt.swap_ema(params))


def test_bfloat16_tensor_that_requires_grad():
    torch = pytest.importorskip("torch")
    tensor = torch.ones(N, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(TypeError) as caught:
        FusedAdam().step(tensor, ones(BF16))
    assert str(caught.value) == (
        "flat_params must share its memory; torch.Tensor refuses: Can't call numpy() on Tensor that requires"
        " grad. Use tensor.detach().numpy() instead."
    )


def test_bfloat16_state_is_shown_by_ml_dtypes(monkeypatch):
    opt = FusedAdam(state_dtype="bfloat16")
    opt.step(ones(np.float32), ones(np.float32))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError) as caught:
        _ = opt.state.exp_avg
    assert str(caught.value) == 'A bfloat16 array needs ml_dtypes. pip install "fastadam[bfloat16]"'
    opt.step(ones(np.float32), ones(np.float32))  # all else goes on without it
    assert opt.state_dict()["exp_avg"].dtype == np.uint16
    assert "bfloat16[8]" in repr(opt.state)


# --- Checkpoints --------------------------------------------------------------------------------------------


def saved(params=BF16, **flags):
    opt = FusedAdam(**flags)
    opt.step(ones(params), ones(params))
    return opt.state_dict()


CHECKPOINTS = {
    "other-master": (
        {},
        lambda: saved(master_params="split"),
        ValueError,
        "state_dict['master_params'] must be None, the optimizer's own; got 'split'."
        " Make the optimizer with it.",
    ),
    "float32-for-split": (
        {"master_params": "split"},
        lambda: saved(master_params="float32"),
        ValueError,
        "state_dict['master_params'] must be 'split', the optimizer's own; got 'float32'."
        " Make the optimizer with it.",
    ),
    "codes-that-are-none": (
        {},
        lambda: {**saved(state_dtype="bfloat16"), "exp_avg": ones(np.float32)},
        TypeError,
        "state_dict['exp_avg'] must be codes of bfloat16 in uint16; got float32.",
    ),
    "numbers-that-are-none": (
        {},
        lambda: {**saved(), "exp_avg": ones(np.uint16)},
        TypeError,
        "state_dict['exp_avg'] must be float32 or float64; got uint16.",
    ),
    "float16-moment": (
        {},
        lambda: {**saved(), "exp_avg": ones(np.float16)},
        TypeError,
        "state_dict['exp_avg'] must be float32 or float64; got float16.",
    ),
    "float64-into-bfloat16": (
        {"state_dtype": "bfloat16"},
        lambda: saved(np.float64),
        ValueError,
        "state_dtype must be 'float32', the default, for float64 moments; got 'bfloat16'.",
    ),
    "remainder": (
        {"master_params": "split"},
        lambda: {**saved(master_params="split"), "param_remainder": ones(np.float32)},
        TypeError,
        "state_dict['param_remainder'] must be an int16 array; got float32.",
    ),
    "remainder-size": (
        {"master_params": "split"},
        lambda: {**saved(master_params="split"), "param_remainder": ones(np.int16, 7)},
        ValueError,
        "state_dict['param_remainder'] must have the size of state_dict['exp_avg'] (8); got 7.",
    ),
    "unknown-format": (
        {},
        lambda: {**saved(), "state_dtype": "4bit"},
        ValueError,
        "state_dtype must be 'float32', 'bfloat16', '8bit' or a pair of them; got '4bit'.",
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_bad_checkpoint(case):
    flags, make, error, message = CHECKPOINTS[case]
    opt, entries = FusedAdam(**flags), make()
    assert_changes_nothing(opt, [], error, message, lambda: opt.load_state_dict(entries))


def test_bad_warmup():
    for dtype, flags, message in (
        (np.uint16, {}, "dtype must be float32, float64, float16 or bfloat16; got uint16."),
        (
            np.float32,
            {"master_params": "split"},
            "master_params must be None for float32 parameters; got 'split'.",
        ),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            fastadam.warmup(dtype=dtype, **flags)
        assert str(caught.value).startswith(message)
