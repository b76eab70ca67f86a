"""Bad steps of rows: the whole message of every error, that the call changed nothing, and interrupts."""

from __future__ import annotations

import numpy as np
import pytest
from test_errors import OnDevice
from tolerances import assert_same_bits

from fastadam import FusedAdam, Segment
from fastadam.kernels import norms, row_sums, sparse_rows

R, D = 5, 4


def f32(*shape):
    return np.ones(shape or (3, D), np.float32)


def read_only():
    array = f32(R, D)
    array.flags.writeable = False
    return array


SIZE = "grad_rows must have shape (k, d) with a row for each of rows (3); got {}."
WIDTH = "flat_params must have rows of the width of grad_rows ({}); got shape {}."

ARGUMENTS = {
    "row-too-large": ({"rows": [0, 5, 7]}, ValueError, "rows[1] must be in [0, 5); got 5."),
    "row-negative": ({"rows": [0, 1, -2]}, ValueError, "rows[2] must be in [0, 5); got -2."),
    "row-unsigned": (
        {"rows": np.array([0, 2**64 - 1, 0], np.uint64)},
        ValueError,
        "rows[1] must be in [0, 5); got 18446744073709551615.",
    ),
    "rows-float": ({"rows": [0.0, 1.0, 2.0]}, TypeError, "rows must be integers; got float64."),
    "rows-bool": ({"rows": [True, False, True]}, TypeError, "rows must be integers; got bool."),
    "rows-None": ({"rows": None}, TypeError, "rows must be integers; got object."),
    "rows-matrix": (
        {"rows": np.zeros((3, 1), int)},
        ValueError,
        "rows must have shape (k,); got (3, 1). Pass rows.reshape(-1).",
    ),
    "rows-on-a-GPU": (
        {"rows": OnDevice()},
        TypeError,
        "rows must be in CPU memory; got OnDevice in GPU memory. Pass a CPU copy.",
    ),
    "rows-ragged": (
        {"rows": [[1], [2, 3]]},
        TypeError,
        "rows must be an array of integers; list refuses: setting an array element with a sequence. The"
        " requested array has an inhomogeneous shape after 1 dimensions. The detected shape was (2,) +"
        " inhomogeneous part.",
    ),
    "too-few-gradients": ({"grad_rows": f32(2, D)}, ValueError, SIZE.format((2, D))),
    "too-many-gradients": ({"grad_rows": f32(4, D)}, ValueError, SIZE.format((4, D))),
    "flat-gradients": ({"grad_rows": f32(3 * D)}, ValueError, SIZE.format((3 * D,))),
    "no-columns": ({"grad_rows": f32(3, 0)}, ValueError, SIZE.format((3, 0))),
    "other-width": ({"grad_rows": f32(3, 2)}, ValueError, WIDTH.format(2, (R, D))),
    "no-whole-rows": (
        {"flat_params": f32(R * D), "grad_rows": f32(3, 3)},
        ValueError,
        WIDTH.format(3, (R * D,)),
    ),
    "other-size": (
        {"flat_params": f32(R + 1, D)},
        ValueError,
        f"flat_params must have the size of the state ({R * D}); got {(R + 1) * D}.",
    ),
    "read-only": (
        {"flat_params": read_only()},
        ValueError,
        "flat_params must be writable; got a read-only array. Pass a writable copy.",
    ),
    "not-contiguous": (
        {"grad_rows": f32(D, 3).T},
        ValueError,
        "grad_rows must be C-contiguous; got shape (3, 4) with strides (4, 12)."
        " Keep one flat buffer and give views of it to the model.",
    ),
    "list": (
        {"grad_rows": [[1.0] * D] * 3},
        TypeError,
        "grad_rows must be an array that shares its memory (NumPy, DLPack, __array_interface__, the buffer"
        " protocol or __cuda_array_interface__); got list.",
    ),
    "float64-gradients": (
        {"grad_rows": np.ones((3, D))},
        TypeError,
        "grad_rows must have the dtype of flat_params (float32); got float64.",
    ),
    "float64": (
        {"flat_params": np.ones((R, D)), "grad_rows": np.ones((3, D))},
        TypeError,
        "flat_params must have the dtype of the state (float32); got float64.",
    ),
    "float16": (
        {"flat_params": np.ones((R, D), np.float16)},
        TypeError,
        "flat_params must be float32 or float64 for step_rows; got float16.",
    ),
    "grad-scale": ({"grad_scale": 0.0}, ValueError, "grad_scale must be greater than 0; got 0.0."),
}


def assert_nothing_changes(opt, error, message, **changed):
    arguments = {"flat_params": f32(R, D), "rows": [0, 3, 0], "grad_rows": f32(), **changed}
    arrays = {name: value.copy() for name, value in arguments.items() if isinstance(value, np.ndarray)}
    state, last = opt.state_dict(), opt.last_step
    with pytest.raises(error) as caught:
        opt.step_rows(**arguments)
    assert type(caught.value) is error
    assert str(caught.value) == message
    for name, before in arrays.items():
        np.testing.assert_array_equal(arguments[name], before)
    np.testing.assert_equal(opt.state_dict(), state)
    assert opt.last_step == last


@pytest.mark.parametrize(("changed", "error", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_bad_argument(changed, error, message):
    opt = FusedAdam()
    opt.step_rows(f32(R, D), [0, 3, 0], f32())
    assert_nothing_changes(opt, error, message, **changed)


@pytest.mark.parametrize("name", ["row-too-large", "float16", "no-whole-rows", "grad-scale"])
def test_bad_first_argument(name):
    assert_nothing_changes(FusedAdam(), *ARGUMENTS[name][1:], **ARGUMENTS[name][0])


def test_gradients_that_are_parameters():
    memory = f32(R + 2, D)
    message = "grad_rows must not overlap flat_params; got buffers that share memory. Pass a copy."
    assert_nothing_changes(
        FusedAdam(), ValueError, message, flat_params=memory[:R], grad_rows=memory[R - 1 :]
    )


def test_gradients_that_are_moments():
    opt = FusedAdam()
    opt.step(f32(R, D), f32(R, D))
    message = "grad_rows must not overlap the state; got buffers that share memory. Pass a copy."
    grads = opt.state.exp_avg[: 3 * D].reshape(3, D)
    assert_nothing_changes(opt, ValueError, message, grad_rows=grads)


OPTIONS = {
    "ema_decay": (
        0.9,
        "ema_decay must be None for step_rows: an average of all rows takes a step of all; got 0.9.",
    ),
    "zero_grads": (
        True,
        "zero_grads must be False for step_rows: gradients of rows are read only; got True.",
    ),
    "telemetry": (
        True,
        "telemetry must be False for step_rows: norms of all parameters take a step of all; got True.",
    ),
    "state_dtype": (
        "bfloat16",
        "state_dtype must be 'float32' for step_rows: rows are stepped in float32 and float64; got"
        " 'bfloat16'.",
    ),
    "master_params": (
        "split",
        "master_params must be None for step_rows: rows are stepped in float32 and float64; got 'split'.",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_option(name):
    value, message = OPTIONS[name]
    assert_nothing_changes(FusedAdam(**{name: value}), ValueError, message)


def test_more_bad_options():
    assert_nothing_changes(
        FusedAdam(capturable=True), ValueError, "capturable must be False for step_rows; got True."
    )
    opt = FusedAdam()
    opt.accumulate(f32(R, D))
    message = "step_rows must not come between accumulate and step; got 1 accumulated gradients."
    assert_nothing_changes(opt, ValueError, message)
    message = f"segments[0].stop must be at most the size of flat_params ({R * D}); got 999."
    assert_nothing_changes(FusedAdam(segments=[Segment(0, 999)]), ValueError, message)
    message = "lr must be at most 3.402823e+38 for float32 buffers; got 1e+39."
    assert_nothing_changes(FusedAdam(lr=1e39), ValueError, message)


def test_buffers_in_gpu_memory(cupy):
    message = "flat_params must be in CPU memory for step_rows; got CUDA device 0."
    with pytest.raises(TypeError) as caught:
        FusedAdam().step_rows(cupy.asarray(f32(R, D)), [0], f32(1, D))
    assert str(caught.value) == message


# --- Interrupts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 2])
def test_an_interrupt_during_the_kernel_loses_no_step(monkeypatch, steps):
    opt, other, params, expected = FusedAdam(), FusedAdam(), f32(R, D), f32(R, D)
    for optimizer, array in ((opt, params), (other, expected)):
        for _ in range(steps):
            optimizer.step_rows(array, [0, 3, 0], f32())
    loop = sparse_rows.serial

    def interrupted(*arguments):
        loop(*arguments)
        if arguments[7].size > 1:  # shares: more than in the call that compiles
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sparse_rows, "serial", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step_rows(params, [0, 3, 0], f32())
    other.step_rows(expected, [0, 3, 0], f32())
    assert_same_bits(params, expected)
    assert opt.last_step == other.last_step
    np.testing.assert_equal(opt.state_dict(), other.state_dict())


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("module", "loop"), [(norms, "fold"), (row_sums, "serial")])
def test_an_interrupt_before_the_kernel_changes_nothing(monkeypatch, steps, module, loop):
    opt, params = FusedAdam(max_grad_norm=1.0), f32(R, D)
    for _ in range(steps):
        opt.step_rows(params, [0, 3, 0], f32())
    before, state, last = params.copy(), opt.state_dict(), opt.last_step
    measured = getattr(module, loop)

    def interrupted(*arguments):
        measured(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, loop, interrupted)
    with pytest.raises(KeyboardInterrupt):
        opt.step_rows(params, [0, 3, 0], f32())
    assert_same_bits(params, before)
    np.testing.assert_equal(opt.state_dict(), state)
    assert opt.last_step == last


@pytest.mark.parametrize("steps", [0, 2])
def test_a_kernel_that_does_not_compile_changes_nothing(monkeypatch, steps):
    opt, params = FusedAdam(), f32(R, D)
    for _ in range(steps):
        opt.step_rows(params, [0, 3, 0], f32())
    opt.max_grad_value = 0.5
    before, state, last = params.copy(), opt.state_dict(), opt.last_step

    def fails(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(sparse_rows, "serial", fails)
    with pytest.raises(RuntimeError, match="no compiler"):
        opt.step_rows(params, [0, 3, 0], f32())
    assert_same_bits(params, before)
    np.testing.assert_equal(opt.state_dict(), state)
    assert opt.last_step == last
