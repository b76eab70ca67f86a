"""Bad input: the whole message of every error, and that the call changed nothing."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import fastadam
from fastadam import FusedAdam, backends

N = 8


def f32(*shape):
    return np.ones(shape or N, np.float32)


def read_only():
    array = f32()
    array.flags.writeable = False
    return array


def jax_array():
    return pytest.importorskip("jax.numpy").ones(N)


def torch_tensor(**options):
    return pytest.importorskip("torch").ones(N, **options)


class BrokenInterface:
    __cuda_array_interface__ = {"shape": (N,)}  # noqa: RUF012


class OnDevice:
    __cuda_array_interface__ = {"shape": (N,), "typestr": "<f4", "data": (1024, False), "version": 3}  # noqa: RUF012


class OnAnotherDevice:
    def __dlpack__(self, **_):
        raise AssertionError("must not be asked")

    def __dlpack_device__(self):
        return (8, 0)  # Metal


class OnlyArray:
    def __array__(self, dtype=None, copy=None):
        return f32()


NOT_AN_ARRAY = (
    "flat_params must be an array that shares its memory (NumPy, DLPack, __array_interface__, the buffer"
    " protocol or __cuda_array_interface__); got {}."
)
NOT_CONTIGUOUS = (
    "flat_params must be C-contiguous; got shape {} with strides {}."
    " Keep one flat buffer and give views of it to the model."
)

NO_FORMAT = "flat_params must be float32, float64, float16 or bfloat16; got {}"
CODES = " If it holds codes, say of what: x.view(numpy.float16) or x.view(ml_dtypes.bfloat16)."

PARAMS = {
    "list": (lambda: [1.0] * N, TypeError, NOT_AN_ARRAY.format("list")),
    "None": (lambda: None, TypeError, NOT_AN_ARRAY.format("NoneType")),
    "number": (lambda: 1.0, TypeError, NOT_AN_ARRAY.format("float")),
    "only-__array__": (OnlyArray, TypeError, NOT_AN_ARRAY.format("OnlyArray")),
    "masked": (
        lambda: np.ma.ones(N, np.float32),
        TypeError,
        "flat_params must be a plain array; got a masked array. Pass its .data.",
    ),
    "int32": (lambda: np.ones(N, np.int32), TypeError, NO_FORMAT.format("int32.")),
    "uint16": (lambda: np.ones(N, np.uint16), TypeError, NO_FORMAT.format("uint16.") + CODES),
    "int16": (lambda: np.ones(N, np.int16), TypeError, NO_FORMAT.format("int16.") + CODES),
    "void16": (lambda: np.ones(N, np.uint16).view("V2"), TypeError, NO_FORMAT.format("|V2.") + CODES),
    "object": (lambda: np.array([None] * N), TypeError, NO_FORMAT.format("object.")),
    "big-endian": (lambda: np.ones(N, ">f4"), TypeError, NO_FORMAT.format(">f4.")),
    "big-endian-half": (lambda: np.ones(N, ">f2"), TypeError, NO_FORMAT.format(">f2.")),
    "bytes": (lambda: b"\0" * 4 * N, TypeError, NO_FORMAT.format("uint8.")),
    "strided": (lambda: f32(2 * N)[::2], ValueError, NOT_CONTIGUOUS.format("(8,)", "(8,)")),
    "reversed": (lambda: f32()[::-1], ValueError, NOT_CONTIGUOUS.format("(8,)", "(-4,)")),
    "fortran": (
        lambda: np.ones((2, 4), np.float32, order="F"),
        ValueError,
        NOT_CONTIGUOUS.format("(2, 4)", "(4, 8)"),
    ),
    "read-only": (
        read_only,
        ValueError,
        "flat_params must be writable; got a read-only array. Pass a writable copy.",
    ),
    "jax": (
        jax_array,
        TypeError,
        "flat_params must be writable in place; got a JAX array, which is immutable. Pass a NumPy copy:"
        " numpy.array(x).",
    ),
    "torch-requires-grad": (
        lambda: torch_tensor(requires_grad=True),
        TypeError,
        "flat_params must share its memory; torch.Tensor refuses: Can't call numpy() on Tensor that requires"
        " grad. Use tensor.detach().numpy() instead.",
    ),
    "broken-cuda-interface": (
        BrokenInterface,
        TypeError,
        "flat_params must have a whole __cuda_array_interface__; got one without 'data'.",
    ),
    "other-device": (
        OnAnotherDevice,
        TypeError,
        "flat_params must be in CPU memory or on an NVIDIA GPU; got another device's array"
        " (test_errors.OnAnotherDevice). Pass a CPU copy.",
    ),
    "too-small": (
        lambda: f32(N - 1),
        ValueError,
        "flat_grads must have the size of flat_params (7); got 8.",
    ),
    "float64": (
        lambda: np.ones(N),
        TypeError,
        "flat_grads must have the dtype of flat_params (float64); got float32.",
    ),
}


@pytest.mark.parametrize("stepped", [False, True], ids=["first-step", "later-step"])
@pytest.mark.parametrize("case", PARAMS)
def test_bad_params(case, stepped):
    make, error, message = PARAMS[case]
    opt = FusedAdam()
    if stepped:
        opt.step(f32(), f32())
    params = make()
    assert_raises_and_changes_nothing(opt, params, f32(), error, message)


GRADS = {
    case: (make, error, message.replace("flat_params", "flat_grads"))
    for case, (make, error, message) in PARAMS.items()
    if case not in {"None", "jax", "read-only", "too-small", "float64"}
} | {
    "None": (
        lambda: None,
        ValueError,
        "flat_grads must be given where nothing was accumulated; got None.",
    ),
    "too-large": (
        lambda: f32(N + 1),
        ValueError,
        "flat_grads must have the size of flat_params (8); got 9.",
    ),
    "float64": (
        lambda: np.ones(N),
        TypeError,
        "flat_grads must have the dtype of flat_params (float32); got float64.",
    ),
}


@pytest.mark.parametrize("case", GRADS)
def test_bad_grads(case):
    make, error, message = GRADS[case]
    opt = FusedAdam()
    opt.step(f32(), f32())
    assert_raises_and_changes_nothing(opt, f32(), make(), error, message)


OVERLAP = "{} must not overlap {}; got buffers that share memory. Pass a copy."


@pytest.mark.parametrize("shift", [0, 1, N - 1])
def test_params_and_grads_overlap(shift):
    memory = np.arange(2 * N, dtype=np.float32)
    for params, grads in (
        (memory[:N], memory[shift : shift + N]),
        (memory[shift : shift + N], memory[:N]),
    ):
        message = OVERLAP.format("flat_grads", "flat_params")
        assert_raises_and_changes_nothing(FusedAdam(), params, grads, ValueError, message)


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
def test_overlap_with_the_state(moment):
    opt = FusedAdam(amsgrad=True)
    opt.step(f32(), f32())
    inside = opt.state.moments[moment]
    message = OVERLAP.format("flat_params", "the state")
    assert_raises_and_changes_nothing(opt, inside, f32(), ValueError, message)
    message = OVERLAP.format("flat_grads", "the state")
    assert_raises_and_changes_nothing(opt, f32(), inside, ValueError, message)


def test_buffers_unlike_the_state():
    opt = FusedAdam()
    opt.step(f32(), f32())
    message = "flat_params must have the size of the state (8); got 9."
    assert_raises_and_changes_nothing(opt, f32(9), f32(9), ValueError, message)
    message = "flat_params must have the dtype of the state (float32); got float64."
    assert_raises_and_changes_nothing(opt, np.ones(N), np.ones(N), TypeError, message)


def assert_raises_and_changes_nothing(opt, params, grads, error, message):
    memories = [np.asarray(buffer) for buffer in (params, grads) if isinstance(buffer, np.ndarray)]
    before = [memory.copy() for memory in memories]
    state = copy.deepcopy(opt.state_dict())
    with pytest.raises(error) as caught:
        opt.step(params, grads)
    assert type(caught.value) is error
    assert str(caught.value) == message
    for memory, old in zip(memories, before, strict=True):
        np.testing.assert_array_equal(memory, old)
    np.testing.assert_equal(opt.state_dict(), state)


INF, NAN = float("inf"), float("nan")

HYPERPARAMETERS = [
    ({"lr": -0.1}, ValueError, "lr must be at least 0; got -0.1."),
    ({"lr": NAN}, ValueError, "lr must be finite; got nan."),
    ({"lr": INF}, ValueError, "lr must be finite; got inf."),
    ({"lr": 10**400}, ValueError, "lr must be finite; got an integer beyond float64."),
    ({"lr": "0.1"}, TypeError, "lr must be a real number; got str."),
    ({"lr": None}, TypeError, "lr must be a real number; got NoneType."),
    ({"lr": True}, TypeError, "lr must be a real number; got bool."),
    ({"lr": 1j}, TypeError, "lr must be a real number; got complex."),
    ({"lr": np.ones(1)}, TypeError, "lr must be a real number; got ndarray."),
    ({"betas": (1.0, 0.9)}, ValueError, "betas[0] must be in [0, 1); got 1.0."),
    ({"betas": (0.9, 1.0)}, ValueError, "betas[1] must be in [0, 1); got 1.0."),
    ({"betas": (-0.1, 0.9)}, ValueError, "betas[0] must be in [0, 1); got -0.1."),
    ({"betas": (0.9, NAN)}, ValueError, "betas[1] must be finite; got nan."),
    ({"betas": ("a", 0.9)}, TypeError, "betas[0] must be a real number; got str."),
    ({"betas": 0.9}, TypeError, "betas must be a pair of real numbers; got float."),
    ({"betas": (0.9,)}, ValueError, "betas must be a pair of real numbers; got 1 values."),
    ({"betas": "ab"}, TypeError, "betas must be a pair of real numbers; got str."),
    ({"eps": -1e-8}, ValueError, "eps must be at least 0; got -1e-08."),
    ({"eps": NAN}, ValueError, "eps must be finite; got nan."),
    ({"eps": []}, TypeError, "eps must be a real number; got list."),
    ({"weight_decay": -1}, ValueError, "weight_decay must be at least 0; got -1.0."),
    ({"weight_decay": INF}, ValueError, "weight_decay must be finite; got inf."),
    ({"weight_decay": False}, TypeError, "weight_decay must be a real number; got bool."),
    ({"capturable": 1}, TypeError, "capturable must be True or False; got int."),
    (
        {"backend": "gpu"},
        ValueError,
        "backend must be None, 'cpu', 'cupy' or 'numba-cuda'; got 'gpu'.",
    ),
    ({"amsgrad": 1}, TypeError, "amsgrad must be True or False; got int."),
    ({"maximize": "yes"}, TypeError, "maximize must be True or False; got str."),
    (
        {"decoupled_weight_decay": None},
        TypeError,
        "decoupled_weight_decay must be True or False; got NoneType.",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"), HYPERPARAMETERS, ids=lambda value: str(value)[:40]
)
def test_bad_hyperparameters(arguments, error, message):
    for call in (FusedAdam, fastadam.warmup):
        with pytest.raises(error) as caught:
            call(**arguments)
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [row for row in HYPERPARAMETERS if row[0].keys() <= {"lr", "betas", "eps", "weight_decay"}],
    ids=lambda value: str(value)[:40],
)
def test_bad_hyperparameters_set_later(arguments, error, message):
    opt = FusedAdam()
    before = repr(opt)
    ((name, value),) = arguments.items()
    with pytest.raises(error) as caught:
        setattr(opt, name, value)
    assert str(caught.value) == message
    assert repr(opt) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 1e39}, "lr must be at most 3.402823e+38 for float32 buffers; got 1e+39."),
        ({"lr": 1e38}, "lr / (1 - betas[0]) must be at most 3.402823e+38 for float32 buffers; got 1e+39."),
        ({"eps": 1e39}, "eps must be at most 3.402823e+38 for float32 buffers; got 1e+39."),
        ({"weight_decay": 1e39}, "weight_decay must be at most 3.402823e+38 for float32 buffers; got 1e+39."),
        (
            {"lr": 1e20, "weight_decay": 1e20, "decoupled_weight_decay": True},
            "lr * weight_decay must be at most 3.402823e+38 for float32 buffers; got 1e+40.",
        ),
        ({"eps": 1e-50}, "eps must be 0 or at least 1.401298e-45 for float32 buffers; got 1e-50."),
        ({"lr": 1e-50}, "lr must be 0 or at least 1.401298e-45 for float32 buffers; got 1e-50."),
    ],
)
def test_hyperparameters_out_of_the_range_of_float32(arguments, message):
    opt = FusedAdam(**arguments)
    assert_raises_and_changes_nothing(opt, f32(), f32(), ValueError, message)
    opt.step(np.ones(N), np.ones(N))  # float64 has room


def test_stream_for_buffers_in_cpu_memory():
    opt, params = FusedAdam(), f32()
    with pytest.raises(TypeError) as caught:
        opt.step(params, f32(), stream=0)
    assert str(caught.value) == "stream must be None for buffers in CPU memory; got a stream."
    assert opt.state.step == 0


@pytest.mark.parametrize("name", ["cupy", "numba-cuda"])
def test_cuda_backends_without_their_packages(monkeypatch, name):
    monkeypatch.setattr(backends, "is_installed", lambda name: name == "cpu")
    remedy = 'pip install "fastadam[cuda13]" (or "fastadam[cuda12]")'
    package = {"cupy": "CuPy", "numba-cuda": "numba-cuda"}[name]
    with pytest.raises(ImportError) as caught:
        FusedAdam(backend=name)
    assert str(caught.value) == f"backend='{name}' needs {package}. {remedy}"
    with pytest.raises(ImportError) as caught:
        FusedAdam().step(OnDevice(), OnDevice())
    assert str(caught.value) == f"A CUDA array needs CuPy or numba-cuda. {remedy}"


def test_flags_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        FusedAdam(1e-3, (0.9, 0.999), 1e-8, 0.0, True)


@pytest.mark.parametrize("name", ["decoupled_weight_decay", "amsgrad", "maximize", "state"])
def test_what_cannot_be_set(name):
    with pytest.raises(AttributeError):
        setattr(FusedAdam(), name, True)


@pytest.mark.parametrize("name", ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
def test_what_cannot_be_set_in_the_state(name):
    with pytest.raises(AttributeError):
        setattr(FusedAdam().state, name, 3)


def test_bad_dtype_for_warmup():
    with pytest.raises(TypeError) as caught:
        fastadam.warmup(dtype=np.int64)
    assert str(caught.value) == "dtype must be float32, float64, float16 or bfloat16; got int64."
