"""Bad input to the parts of the phase: the whole message of every error, and that nothing was changed."""

from __future__ import annotations

import numpy as np
import pytest
from phase_cases import assert_changes_nothing
from tolerances import assert_same_bits

import fastadam
from fastadam import FusedAdam

N = 8
INF, NAN = float("inf"), float("nan")


def f32(size=N):
    return np.linspace(1, 2, size, dtype=np.float32)


def read_only():
    array = f32()
    array.flags.writeable = False
    return array


WHOLE = {
    "max_grad_norm": 1.0,
    "max_grad_value": 0.5,
    "skip_nonfinite": True,
    "ema_decay": 0.9,
    "zero_grads": True,
}


# --- grad_scale ---------------------------------------------------------------------------------------------

LARGEST = "grad_scale must be at most 3.402823e+38 for float32 buffers; got 1e+39."
SMALLEST = "grad_scale must be at least 1.401298e-45 for float32 buffers; got 1e-50."

SCALES = [
    ("2", TypeError, "grad_scale must be a real number; got str."),
    (True, TypeError, "grad_scale must be a real number; got bool."),
    (np.bool_(True), TypeError, "grad_scale must be a real number; got bool."),
    (2j, TypeError, "grad_scale must be a real number; got complex."),
    ([2.0], TypeError, "grad_scale must be a real number; got list."),
    (np.ones(1), TypeError, "grad_scale must be a real number; got ndarray."),
    (np.ones((1, 1)), TypeError, "grad_scale must be a real number; got ndarray."),
    (np.array("2"), TypeError, "grad_scale must be a real number; got str."),
    (np.array(None), TypeError, "grad_scale must be a real number; got NoneType."),
    (0, ValueError, "grad_scale must be greater than 0; got 0.0."),
    (-0.0, ValueError, "grad_scale must be greater than 0; got -0.0."),
    (-2.0, ValueError, "grad_scale must be greater than 0; got -2.0."),
    (INF, ValueError, "grad_scale must be finite; got inf."),
    (np.float32(NAN), ValueError, "grad_scale must be finite; got nan."),
    (10**400, ValueError, "grad_scale must be finite; got an integer beyond float64."),
    (1e39, ValueError, LARGEST),
    (np.array(1e39), ValueError, LARGEST),
    (1e-50, ValueError, SMALLEST),
]


@pytest.mark.parametrize("flags", [{}, WHOLE], ids=["plain", "whole"])
@pytest.mark.parametrize("stepped", [False, True], ids=["first-step", "later-step"])
@pytest.mark.parametrize(("scale", "error", "message"), SCALES, ids=lambda value: str(value)[:30])
def test_bad_grad_scale(scale, error, message, stepped, flags):
    opt, params, grads = FusedAdam(**flags), f32(), f32()
    if stepped:
        opt.step(params, f32(), grad_scale=2.0)
    assert_changes_nothing(
        opt, [params, grads], error, message, lambda: opt.step(params, grads, grad_scale=scale)
    )


@pytest.mark.parametrize("scale", [1e39, 1e-50])
def test_float64_has_room_for_a_grad_scale(scale):
    FusedAdam().step(np.ones(N), np.ones(N), grad_scale=scale)


@pytest.mark.parametrize(
    "kind", [float, int, np.float32, np.float64, np.int64, np.array, "torch", "parameter"]
)
def test_kinds_of_grad_scale(kind):
    if isinstance(kind, str):
        torch = pytest.importorskip("torch")
        scale = torch.full((), 4.0, requires_grad=kind == "parameter")
    else:
        scale = kind(4.0)
    params, expected = f32(), f32()
    FusedAdam(betas=(0.5, 0.5), eps=1.0).step(params, f32(), grad_scale=scale)
    FusedAdam(betas=(0.5, 0.5), eps=1.0).step(expected, f32() / 4)
    assert_same_bits(params, expected)


# --- Hyperparameters ----------------------------------------------------------------------------------------

HYPERPARAMETERS = [
    *(
        row
        for name in ("max_grad_norm", "max_grad_value")
        for row in (
            ({name: 0}, ValueError, f"{name} must be greater than 0, or None; got 0.0."),
            ({name: -1.0}, ValueError, f"{name} must be greater than 0, or None; got -1.0."),
            ({name: INF}, ValueError, f"{name} must be finite; got inf."),
            ({name: NAN}, ValueError, f"{name} must be finite; got nan."),
            ({name: "1"}, TypeError, f"{name} must be a real number; got str."),
            ({name: False}, TypeError, f"{name} must be a real number; got bool."),
        )
    ),
    *(
        row
        for name in ("skip_nonfinite", "zero_grads")
        for row in (
            ({name: 1}, TypeError, f"{name} must be True or False; got int."),
            ({name: None}, TypeError, f"{name} must be True or False; got NoneType."),
        )
    ),
    ({"ema_decay": 1.0}, ValueError, "ema_decay must be in [0, 1); got 1.0."),
    ({"ema_decay": -0.1}, ValueError, "ema_decay must be in [0, 1); got -0.1."),
    ({"ema_decay": NAN}, ValueError, "ema_decay must be finite; got nan."),
    ({"ema_decay": True}, TypeError, "ema_decay must be a real number; got bool."),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"), HYPERPARAMETERS, ids=lambda value: str(value)[:40]
)
def test_bad_hyperparameters(arguments, error, message):
    for call in (FusedAdam, fastadam.warmup):
        with pytest.raises(error) as caught:
            call(**arguments)
        assert str(caught.value) == message
    opt, params = FusedAdam(**WHOLE), f32()
    opt.step(params, f32())
    ((name, value),) = arguments.items()
    bad = {**opt.state_dict(), name: value}
    if value is not None:
        assert_changes_nothing(opt, [params], error, message, lambda: opt.load_state_dict(bad))
    if name != "ema_decay":
        assert_changes_nothing(opt, [params], error, message, lambda: setattr(opt, name, value))


def test_the_average_is_kept_or_not_from_the_first_step_on():
    with pytest.raises(AttributeError):
        FusedAdam().ema_decay = 0.5
    with pytest.raises(AttributeError):
        FusedAdam().state.param_ema = 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"max_grad_value": 1e39},
            "max_grad_value must be at most 3.402823e+38 for float32 buffers; got 1e+39.",
        ),
        (
            {"max_grad_value": 1e-50},
            "max_grad_value must be at least 1.401298e-45 for float32 buffers; got 1e-50.",
        ),
    ],
)
def test_out_of_the_range_of_float32(arguments, message):
    opt, params, grads = FusedAdam(**arguments), f32(), f32()
    assert_changes_nothing(opt, [params, grads], ValueError, message, lambda: opt.step(params, grads))
    opt.step(np.ones(N), np.ones(N))


# --- Buffers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stepped", [False, True], ids=["first-step", "later-step"])
@pytest.mark.parametrize("value", [1.0, NAN])
def test_read_only_gradients_cannot_be_zeroed(stepped, value):
    opt, params, grads = FusedAdam(**WHOLE), f32(), np.full(N, value, np.float32)
    if stepped:
        opt.step(params, f32())
    grads.flags.writeable = False
    message = "flat_grads must be writable; got a read-only array. Pass a writable copy."
    assert_changes_nothing(opt, [params, grads], ValueError, message, lambda: opt.step(params, grads))
    opt.zero_grads = False
    opt.step(params, read_only())


def swappable():
    opt, params = FusedAdam(ema_decay=0.5), f32()
    opt.step(params, f32())
    return opt


NO_AVERAGE = "swap_ema must come after a step with ema_decay; got no average of the parameters."


def without_average():
    opt = FusedAdam()
    opt.step(f32(), f32())
    return opt


def skipped():
    opt = FusedAdam(ema_decay=0.5, skip_nonfinite=True)
    opt.step(f32(), np.full(N, INF, np.float32))
    return opt


def reset():
    opt = swappable()
    opt.reset()
    return opt


SWAPS = {
    "without ema_decay": (without_average, f32, ValueError, NO_AVERAGE),
    "before a step": (lambda: FusedAdam(ema_decay=0.5), f32, ValueError, NO_AVERAGE),
    "after a skipped step": (skipped, f32, ValueError, NO_AVERAGE),
    "after a reset": (reset, f32, ValueError, NO_AVERAGE),
    "size": (
        swappable,
        lambda: f32(9),
        ValueError,
        "flat_params must have the size of the state (8); got 9.",
    ),
    "dtype": (
        swappable,
        lambda: np.ones(N),
        TypeError,
        "flat_params must have the dtype of the state (float32); got float64.",
    ),
    "read-only": (
        swappable,
        read_only,
        ValueError,
        "flat_params must be writable; got a read-only array. Pass a writable copy.",
    ),
    "strided": (
        swappable,
        lambda: f32(16)[::2],
        ValueError,
        "flat_params must be C-contiguous; got shape (8,) with strides (8,)."
        " Keep one flat buffer and give views of it to the model.",
    ),
    "integers": (
        swappable,
        lambda: np.ones(N, int),
        TypeError,
        "flat_params must be float32, float64, float16 or bfloat16; got int64.",
    ),
}


@pytest.mark.parametrize("case", SWAPS)
def test_bad_swap(case):
    make, buffer, error, message = SWAPS[case]
    opt, params = make(), buffer()
    assert_changes_nothing(opt, [params], error, message, lambda: opt.swap_ema(params))


def test_swap_on_a_stream_in_cpu_memory():
    opt, params = swappable(), f32()
    message = "stream must be None for buffers in CPU memory; got a stream."
    assert_changes_nothing(opt, [params], TypeError, message, lambda: opt.swap_ema(params, stream=1))


@pytest.mark.parametrize("moment", ["param_ema", "exp_avg"])
def test_swap_with_the_state_itself(moment):
    opt = swappable()
    message = "flat_params must not overlap the state; got buffers that share memory. Pass a copy."
    inside = opt.state.moments[moment]
    assert_changes_nothing(opt, [], ValueError, message, lambda: opt.swap_ema(inside))


@pytest.mark.parametrize("drop", [True, False])
def test_a_checkpoint_with_another_state(drop):
    opt, other = swappable(), FusedAdam()
    entries = opt.state_dict()
    if drop:
        del entries["param_ema"]
        message = "state_dict must have the key 'param_ema'; got ['step', 'exp_avg', 'exp_avg_sq']."
    else:
        del entries["ema_decay"]
        message = "state_dict must have no key 'param_ema'."
    for one in (opt, other):
        assert_changes_nothing(one, [], ValueError, message, lambda one=one: one.load_state_dict(entries))
