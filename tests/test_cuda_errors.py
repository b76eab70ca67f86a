"""Steps in GPU memory that are refused, whole messages, and that change nothing."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from cuda_steps import MODES, assert_refused, ones

from fastadam import FusedAdam, backends


def read_only(cupy):
    array = ones(cupy)
    array.host.flags.writeable = False
    return array


REFUSED = {
    "int32": (
        lambda cupy: ones(cupy, dtype=np.int32),
        TypeError,
        "flat_params must be float32, float64, float16 or bfloat16; got int32.",
    ),
    "strided": (
        lambda cupy: ones(cupy, 16)[::2],
        ValueError,
        "flat_params must be C-contiguous; got shape (8,) with strides (8,)."
        " Keep one flat buffer and give views of it to the model.",
    ),
    "read-only": (
        read_only,
        ValueError,
        "flat_params must be writable; got a read-only array. Pass a writable copy.",
    ),
    "size": (
        lambda cupy: ones(cupy, 9),
        ValueError,
        "flat_grads must have the size of flat_params (9); got 8.",
    ),
    "dtype": (
        lambda cupy: ones(cupy, dtype=np.float64),
        TypeError,
        "flat_grads must have the dtype of flat_params (float64); got float32.",
    ),
    "cpu-params": (
        lambda _: np.ones(8, np.float32),
        TypeError,
        "flat_grads must be on the device of flat_params (CPU memory); got CUDA device 0. Pass a copy.",
    ),
}


@MODES
@pytest.mark.parametrize("stepped", [False, True], ids=["first-step", "later-step"])
@pytest.mark.parametrize("case", REFUSED)
def test_bad_params(cupy, case, stepped, capturable):
    make, error, message = REFUSED[case]
    opt = FusedAdam(capturable=capturable)
    if stepped:
        opt.step(ones(cupy), ones(cupy))
    assert_refused(opt, make(cupy), ones(cupy), error, message)


def test_elements_at_odd_addresses(cupy):
    params = cupy.asarray(np.zeros(33, np.uint8))[1:].view(np.float32)
    message = (
        f"flat_params must be aligned to its elements in GPU memory; got address {params.data.ptr:#x}."
        " Pass a copy."
    )
    assert_refused(FusedAdam(), params, ones(cupy), ValueError, message)


def test_overlaps(cupy):
    opt, both = FusedAdam(), ones(cupy, 12)
    message = "flat_grads must not overlap flat_params; got buffers that share memory. Pass a copy."
    assert_refused(opt, both[:8], both[4:], ValueError, message)
    opt.step(both[:4], both[4:8])  # side by side is well
    message = "flat_grads must not overlap the state; got buffers that share memory. Pass a copy."
    assert_refused(opt, both[:4], opt.state.exp_avg, ValueError, message)
    message = "flat_params must not overlap the state; got buffers that share memory. Pass a copy."
    assert_refused(opt, opt.state.exp_avg, both[:4], ValueError, message)


def test_other_memory_than_the_state(cupy):
    opt = FusedAdam()
    opt.step(ones(cupy), ones(cupy))
    message = "flat_params must be on the device of the state (CUDA device 0); got CPU memory. Pass a copy."
    assert_refused(opt, np.ones(8, np.float32), np.ones(8, np.float32), TypeError, message)
    with cupy.cuda.Device(1):
        there = [ones(cupy), ones(cupy)]
    message = (
        "flat_params must be on the device of the state (CUDA device 0); got CUDA device 1. Pass a copy."
    )
    assert_refused(opt, *there, TypeError, message)
    message = (
        "flat_grads must be on the device of flat_params (CUDA device 0); got CUDA device 1. Pass a copy."
    )
    assert_refused(opt, ones(cupy), there[0], TypeError, message)
    opt = FusedAdam()
    opt.step(np.ones(8, np.float32), np.ones(8, np.float32))
    message = "flat_params must be on the device of the state (CPU memory); got CUDA device 0. Pass a copy."
    assert_refused(opt, ones(cupy), ones(cupy), TypeError, message)


def test_other_memory_than_the_backend(cupy):
    message = "flat_params must be in CPU memory for backend='cpu'; got CUDA device 0."
    assert_refused(FusedAdam(backend="cpu"), ones(cupy), ones(cupy), TypeError, message)
    cpu = np.ones(8, np.float32), np.ones(8, np.float32)
    message = "flat_params must be in GPU memory for backend='cupy'; got CPU memory."
    assert_refused(FusedAdam(backend="cupy"), *cpu, TypeError, message)
    message = "flat_params must be in GPU memory with capturable=True; got CPU memory."
    assert_refused(FusedAdam(capturable=True), *cpu, TypeError, message)


def test_moments_of_a_checkpoint_in_gpu_memory(cupy):
    opt = FusedAdam()
    opt.step(ones(cupy), ones(cupy))
    saved = {**opt.state_dict(), "exp_avg": opt.state.exp_avg}
    with pytest.raises(TypeError) as caught:
        opt.load_state_dict(saved)
    assert (
        str(caught.value)
        == "state_dict['exp_avg'] must be in CPU memory; got CUDA device 0. Pass a CPU copy."
    )


def test_only_lr_changes_in_a_capturable_optimizer(cupy):
    opt = FusedAdam(capturable=True)
    opt.eps = 1e-6  # before the first step all may
    opt.step(ones(cupy), ones(cupy))
    with pytest.raises(ValueError, match="lr must be at least 0"):
        opt.lr = -1
    with pytest.raises(ValueError, match="lr must be at most"):
        opt.lr = 1e39
    assert opt.lr == 1e-3
    with pytest.raises(ValueError, match="eps must stay") as caught:
        opt.eps = 1e-3
    assert str(caught.value) == (
        "eps must stay 1e-06 once a capturable step was taken; got 0.001. Only lr may change, until reset."
    )
    opt.reset()
    opt.eps = 1e-3


BETA = 1 - 2.0**-18


@pytest.mark.parametrize("k", [0, 1])
def test_betas_whose_bias_corrections_fill_the_memory(cupy, k):
    too_large = [0.9, 0.999]
    too_large[k] = float(np.nextafter(BETA, 1))
    message = (
        f"betas[{k}] must be at most 0.999996185 where steps are counted on the GPU, which keeps the bias"
        " corrections of all of them; got 0.99999618530273449."
    )
    with pytest.raises(ValueError, match="betas") as caught:
        FusedAdam(betas=too_large, capturable=True)
    assert str(caught.value) == message
    opt = FusedAdam(capturable=True)
    with pytest.raises(ValueError, match="betas") as caught:
        opt.betas = too_large
    assert str(caught.value) == message
    with pytest.raises(ValueError, match="betas") as caught:
        opt.load_state_dict(FusedAdam(betas=too_large).state_dict())
    assert str(caught.value) == message
    assert opt.betas == (0.9, 0.999)
    opt.betas = (0.9, BETA)


def test_dlpack_without_cupy(cupy, monkeypatch):
    monkeypatch.setattr(backends, "is_installed", lambda name: name != "cupy")
    array = SimpleNamespace(__dlpack_device__=lambda: (2, 0))
    with pytest.raises(ImportError, match="DLPack") as caught:
        FusedAdam().step(array, array)
    assert str(caught.value) == (
        "A CUDA array that only exports DLPack needs CuPy."
        ' pip install "fastadam[cuda13]" (or "fastadam[cuda12]")'
    )
