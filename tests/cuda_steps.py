"""Steps on the stand-in for CuPy, and what they must equal."""

from __future__ import annotations

import numpy as np
import pytest
from tolerances import assert_same_bits

from fastadam import FusedAdam

DTYPES = ["float32", "float64"]
MODES = pytest.mark.parametrize("capturable", [False, True], ids=["eager", "capturable"])


def problem(rng, size, dtype="float32", steps=3):
    params = rng.standard_normal(size).astype(dtype)
    return params, [
        (10.0 ** rng.uniform(-6, 3, size) * rng.standard_normal(size)).astype(dtype) for _ in range(steps)
    ]


def ones(cupy, *shape, dtype=np.float32):
    return cupy.asarray(np.ones(shape or 8, dtype))


class Exported:
    """A device array of some library: what it exports and nothing else."""

    def __init__(self, array, **interface):
        self.array = array
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, "stream": None, **interface}


def on_cpu(params, gradients, *, grad_scale=None, **options):
    opt, params = FusedAdam(backend="cpu", **options), params.copy()
    for grads in gradients:
        opt.step(params, grads.copy(), grad_scale=grad_scale)
    return opt, params


def on_device(cupy, params, gradients, *, grad_scale=None, **options):
    opt, params = FusedAdam(**options), cupy.asarray(params)
    for grads in gradients:
        sent = cupy.asarray(grads)
        opt.step(params, sent, grad_scale=grad_scale)
        assert_same_bits(sent.host, np.zeros_like(grads) if opt.zero_grads else grads, "grads")
    return opt, params


def assert_same(device, cpu):
    (opt, params), (expected, expected_params) = device, cpu
    assert_same_bits(params.host, expected_params, "params")
    assert opt.state.step == expected.state.step
    for name, moment in expected.state.moments.items():
        assert_same_bits(opt.state.moments[name].host, moment, name)


def assert_refused(opt, params, grads, error, message, **options):
    """A step that raises this, whole, and changes nothing."""
    before = [buffer.host.copy() for buffer in (params, grads) if not isinstance(buffer, np.ndarray)]
    state = opt.state_dict()
    with pytest.raises(error) as caught:
        opt.step(params, grads, **options)
    assert str(caught.value) == message
    after = [buffer.host for buffer in (params, grads) if not isinstance(buffer, np.ndarray)]
    np.testing.assert_equal(after, before)
    np.testing.assert_equal(opt.state_dict(), state)
