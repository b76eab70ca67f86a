"""What users' compiled functions are refused, and what an optimizer is while its state is lent."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from numba import njit
from numba.core.errors import TypingError
from phase_cases import assert_changes_nothing
from tolerances import assert_same_bits

from fastadam import FusedAdam, Segment
from fastadam.numba import compiled, step

PARAMS = np.ones(4, np.float32)


@njit
def one_step(params, grads, adam, grad_scale=None):
    return step(params, grads, adam, grad_scale)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


TYPES = [
    (
        (np.ones(4), PARAMS),
        {},
        "flat_params must be float32, as adam was made for; got float64.",
    ),
    (
        (PARAMS, np.ones(4)),
        {},
        "flat_grads must be float32, as adam was made for; got float64.",
    ),
    (
        (PARAMS, [1.0, 2.0]),
        {},
        "flat_grads must be an array; got reflected list(float64)<iv=None>.",
    ),
    (
        (PARAMS.reshape(2, 2), PARAMS),
        {},
        "flat_params must be a C-contiguous array of one dimension; got array(float32, 2d, C)."
        " Pass flat_params.ravel() of a contiguous one.",
    ),
    (
        (PARAMS, PARAMS[::2]),
        {},
        "flat_grads must be a C-contiguous array of one dimension; got array(float32, 1d, A)."
        " Pass flat_grads.ravel() of a contiguous one.",
    ),
    (
        (read_only(PARAMS), PARAMS),
        {},
        "flat_params must be writable; got readonly array(float32, 1d, C).",
    ),
    (
        (PARAMS, read_only(PARAMS)),
        {"zero_grads": True},
        "flat_grads must be writable; got readonly array(float32, 1d, C).",
    ),
    ((PARAMS, PARAMS, True), {}, "grad_scale must be a real number; got bool."),
    ((PARAMS, PARAMS, "2"), {}, "grad_scale must be a real number; got unicode_type."),
]


@pytest.mark.parametrize(("arguments", "flags", "message"), TYPES)
@pytest.mark.filterwarnings("ignore:.*reflected list.*")
def test_types(arguments, flags, message):
    """Numba puts what was raised in the middle of an account of its own."""
    params, grads, *rest = arguments
    with compiled(FusedAdam(**flags), PARAMS.copy()) as adam, pytest.raises(TypingError) as caught:
        one_step(params, grads, adam, *rest)
    assert f"TypingError: {message}\n" in str(caught.value)


def test_another_adam():
    with pytest.raises(
        TypingError, match=r"adam must be what fastadam\.numba\.compiled gives; got float64\."
    ):
        one_step(PARAMS, PARAMS, 1.0)


LR = (
    "adam.lr[0] must be at least 0, and neither it nor lr / (1 - betas[0]) nor lr * weight_decay may overflow"
    " or become zero in the dtype of flat_params."
)
SCALE = "grad_scale must be greater than 0, and neither overflow nor become zero in the dtype of flat_params."


@pytest.mark.parametrize(
    ("params", "grads", "lr", "grad_scale", "message"),
    [
        (5, 5, 0.1, 1.0, "flat_params must have the size that adam was made for."),
        (4, 5, 0.1, 1.0, "flat_grads must have the size of flat_params."),
        (4, 4, -0.1, 1.0, LR),
        (4, 4, np.nan, 1.0, LR),
        (4, 4, np.inf, 1.0, LR),
        (4, 4, 1e38, 1.0, LR),  # a tenth of 1 - 0.9
        (4, 4, 1e-46, 1.0, LR),
        (4, 4, 2e-45, 1.0, LR),  # a half, of the decay
        (4, 4, 0.1, 0.0, SCALE),
        (4, 4, 0.1, -1.0, SCALE),
        (4, 4, 0.1, np.nan, SCALE),
        (4, 4, 0.1, 1e39, SCALE),
        (4, 4, 0.1, 1e-46, SCALE),
    ],
)
def test_values(params, grads, lr, grad_scale, message):
    opt = FusedAdam(lr=0.1, weight_decay=0.2, decoupled_weight_decay=True, max_grad_norm=1.0)
    opt.step(PARAMS.copy(), PARAMS)
    buffers = np.ones(params, np.float32), np.ones(grads, np.float32)

    def call():
        with compiled(opt, PARAMS.copy()) as adam:
            adam.lr[0] = lr
            one_step(*buffers, adam, grad_scale)

    assert_changes_nothing(opt, buffers, ValueError, message, call)


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_overlap(shift):
    memory = np.ones(8, np.float32)
    with (
        compiled(FusedAdam(), memory[:4]) as adam,
        pytest.raises(ValueError, match=r"^flat_grads must not overlap flat_params\.$"),
    ):
        one_step(memory[:4], memory[shift : shift + 4], adam)
    with compiled(FusedAdam(), memory[:4]) as adam:
        one_step(memory[:4], memory[4:], adam)
        one_step(memory[4:], memory[:4], adam)


@pytest.mark.parametrize(
    ("flags", "dtype", "error", "message"),
    [
        ({"telemetry": True}, "f4", ValueError, "telemetry must be False for compiled code; got True."),
        (
            {"state_dtype": "8bit"},
            "f4",
            ValueError,
            "state_dtype must be 'float32' for compiled code; got '8bit'.",
        ),
        (
            {"master_params": "float32"},
            "f4",
            ValueError,
            "master_params must be None for compiled code; got 'float32'.",
        ),
        (
            {"segments": [Segment(0, 2)]},
            "f4",
            ValueError,
            "segments must be empty for compiled code; got 1.",
        ),
        (
            {"lr": lambda step: 0.1 * step},
            "f4",
            TypeError,
            "lr must be a number for compiled code; got a function. Make an array of its values, and set"
            " adam.lr[0] before each step.",
        ),
        ({}, "f2", TypeError, "flat_params must be float32 or float64 for compiled code; got float16."),
        ({}, "i4", TypeError, None),
        (
            {"lr": 1e38},
            "f4",
            ValueError,
            "lr / (1 - betas[0]) must be at most 3.402823e+38 for float32 buffers; got 1e+39.",
        ),
    ],
)
def test_optimizers(flags, dtype, error, message):
    opt = FusedAdam(**flags)
    with pytest.raises(error) as caught, compiled(opt, np.ones(4, dtype)):
        pass
    assert message is None or str(caught.value) == message
    assert opt.state.step == 0


def test_accumulated_gradients():
    opt = FusedAdam()
    opt.accumulate(PARAMS)
    message = r"Accumulated gradients must be used before compiled code steps; got 1 of them\. Call opt\.step"
    with pytest.raises(ValueError, match=message), compiled(opt, PARAMS.copy()):
        pass


def test_size_of_the_state():
    opt = FusedAdam()
    opt.step(PARAMS.copy(), PARAMS)
    with pytest.raises(ValueError, match="size"), compiled(opt, np.ones(5, np.float32)):
        pass
    opt.step(PARAMS.copy(), PARAMS)


# --- While it is lent ---------------------------------------------------------------------------------------

LENT = (
    "The optimizer must not be used while compiled code has its state; got a use of it inside"
    " `with fastadam.numba.compiled(...)`. Use it after the block."
)


@pytest.mark.parametrize(
    "use",
    [
        lambda opt: opt.step(PARAMS.copy(), PARAMS),
        lambda opt: opt.accumulate(PARAMS),
        lambda opt: opt.state_dict(),
        lambda opt: opt.state.step,
        lambda opt: setattr(opt, "lr", 0.5),
        lambda opt: setattr(opt, "segments", [Segment(0, 2)]),
        copy.deepcopy,
        lambda opt: opt.swap_ema(PARAMS.copy()),
        lambda opt: compiled(opt, PARAMS.copy()).__enter__(),
    ],
)
def test_use_of_what_is_lent(use):
    opt, params = FusedAdam(ema_decay=0.9), PARAMS.copy()
    opt.step(params, PARAMS)
    before = opt.state_dict()
    with compiled(opt, params):
        with pytest.raises(ValueError, match="must not be used") as caught:
            use(opt)
        assert str(caught.value) == LENT
    np.testing.assert_equal(opt.state_dict(), before)
    opt.step(params, PARAMS)


def test_an_exception_in_the_block():
    opt, params, theirs, other = FusedAdam(), PARAMS.copy(), PARAMS.copy(), FusedAdam()

    def interrupted():
        with compiled(opt, params) as adam:
            one_step(params, PARAMS, adam)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    other.step(theirs, PARAMS)
    assert opt.state.step == 1
    opt.step(params, PARAMS)
    other.step(theirs, PARAMS)
    assert_same_bits(params, theirs)


def test_no_step_in_the_block():
    """Then the average begins with the parameters of the first step, as ever."""
    opt, params = FusedAdam(ema_decay=0.9), PARAMS.copy()
    before = opt.state_dict()
    with compiled(opt, params) as adam:
        adam.lr[0] = 0.5
    assert opt.state_dict() == before
    assert opt.last_step is None


def test_use_after_the_block():
    opt, params = FusedAdam(), PARAMS.copy()
    with compiled(opt, params) as adam:
        one_step(params, read_only(PARAMS), adam)
    message = r"^adam must be used inside the block that fastadam\.numba\.compiled gave it to\.$"
    with pytest.raises(ValueError, match=message):
        one_step(params, read_only(PARAMS), adam)
    assert opt.state.step == 1


def test_parameters_in_the_state():
    opt = FusedAdam()
    opt.step(PARAMS.copy(), PARAMS)
    moment = opt.state.exp_avg
    with pytest.raises(ValueError, match="overlap"), compiled(opt, moment):
        pass
    assert opt.state.step == 1


def test_reset_in_the_block():
    opt, params = FusedAdam(), PARAMS.copy()
    with compiled(opt, params) as adam:
        one_step(params, PARAMS, adam)
        opt.reset()
    assert opt.state.step == 0
    assert opt.state.exp_avg is None
