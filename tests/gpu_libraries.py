"""The libraries whose arrays GPU tests step, one way to use each, and what steps must equal."""

from __future__ import annotations

import numpy as np
import pytest
from tolerances import assert_same_bits

from fastadam import FusedAdam

DTYPES = ["float32", "float64"]
MODES = pytest.mark.parametrize("capturable", [False, True], ids=["eager", "capturable"])


class CuPy:
    def __init__(self):
        self.cupy = pytest.importorskip("cupy")

    def put(self, array):
        return self.cupy.asarray(array)

    def get(self, array):
        return self.cupy.asnumpy(array)

    def fill(self, array, values):
        array.set(values)

    def stream(self):
        return self.cupy.cuda.Stream(non_blocking=True)

    def on(self, stream):
        return stream

    def synchronize(self):
        self.cupy.cuda.runtime.deviceSynchronize()


class Numba:
    def __init__(self):
        self.cuda = pytest.importorskip("numba.cuda")

    def put(self, array):
        return self.cuda.to_device(array)

    def get(self, array):
        return array.copy_to_host()

    def fill(self, array, values):
        array.copy_to_device(values)

    def synchronize(self):
        self.cuda.synchronize()


class Torch:
    def __init__(self):
        self.torch = pytest.importorskip("torch")
        if not self.torch.cuda.is_available():
            pytest.skip("this PyTorch sees no GPU")

    def put(self, array):
        return self.torch.from_numpy(np.array(array)).cuda()

    def get(self, array):
        return array.cpu().numpy()

    def fill(self, array, values):
        array.copy_(self.torch.from_numpy(values))

    def stream(self):
        return self.torch.cuda.Stream()

    def on(self, stream):
        return self.torch.cuda.stream(stream)

    def synchronize(self):
        self.torch.cuda.synchronize()


LIBRARIES = {"cupy": CuPy, "numba": Numba, "torch": Torch}


def problem(rng, size, dtype="float32", steps=3):
    params = rng.standard_normal(size).astype(dtype)
    return params, [
        (10.0 ** rng.uniform(-6, 3, size) * rng.standard_normal(size)).astype(dtype) for _ in range(steps)
    ]


def on_cpu(params, gradients, *, grad_scale=None, **options):
    opt, params = FusedAdam(**options), params.copy()
    for grads in gradients:
        opt.step(params, grads.copy(), grad_scale=grad_scale)
    return opt, params


def assert_same(library, device, cpu):
    (opt, params), (expected, expected_params) = device, cpu
    library.synchronize()
    assert_same_bits(library.get(params), expected_params, "params")
    saved, wanted = opt.state_dict(), expected.state_dict()
    assert saved["step"] == wanted["step"]
    for name in expected.state.moments:
        assert_same_bits(saved[name], wanted[name], name)


def of_backend(backend):
    """The library that shares its name with a backend."""
    return LIBRARIES["cupy" if backend == "cupy" else "numba"]()
