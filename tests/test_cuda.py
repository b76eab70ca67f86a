"""Steps in GPU memory without a GPU: the CUDA C++ kernels as host code, behind a stand-in for CuPy."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest
from fake_cupy import make
from oracles import FLAGS, flags_id
from tolerances import assert_same_bits

from fastadam import FusedAdam, backends

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

DTYPES = ["float32", "float64"]
SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 63, 65, 257, 1023]


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def cupy(libraries, monkeypatch):
    """The stand-in in the place of CuPy, and a backend that has seen no other."""
    module = make(libraries)
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.delitem(sys.modules, "fastadam.kernels.cuda_cupy", raising=False)
    backends.load.cache_clear()
    yield module
    backends.load.cache_clear()
    sys.modules.pop("fastadam.kernels.cuda_cupy", None)


def problem(rng, size, dtype, steps=3):
    params = rng.standard_normal(size).astype(dtype)
    return params, [
        (10.0 ** rng.uniform(-6, 3, size) * rng.standard_normal(size)).astype(dtype) for _ in range(steps)
    ]


def on_cpu(params, gradients, **options):
    opt, params = FusedAdam(backend="cpu", **options), params.copy()
    for grads in gradients:
        opt.step(params, grads)
    return opt, params


def on_device(cupy, params, gradients, **options):
    opt, params = FusedAdam(**options), cupy.asarray(params)
    for grads in gradients:
        opt.step(params, cupy.asarray(grads))
    return opt, params


def assert_same(device, cpu):
    (opt, params), (expected, expected_params) = device, cpu
    assert_same_bits(params.host, expected_params, "params")
    assert opt.state.step == expected.state.step
    for name, moment in expected.state.moments.items():
        assert_same_bits(opt.state.moments[name].host, moment, name)


@pytest.mark.parametrize("capturable", [False, True], ids=["eager", "capturable"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", FLAGS, ids=flags_id)
def test_bits_of_the_cpu(cupy, rng, flags, dtype, capturable):
    for size in SIZES:
        params, gradients = problem(rng, size, dtype)
        device = on_device(cupy, params, gradients, capturable=capturable, **flags)
        assert_same(device, on_cpu(params, gradients, **flags))
        assert device[0].backend == "cupy"
