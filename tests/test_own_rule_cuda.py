"""Rules that are none of ours in CUDA: C++ as host code, and what both compilers make of a step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from own_rules import FusedYogi
from test_own_rule import BOTH, after, assert_same, begins_with, numbers

from fastadam.coefficients import Coefficients
from fastadam.kernels import cuda_source

EAGER = {
    "plain": {},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    "whole": {"max_grad_value": 0.7, "ema_decay": 0.9, "weight_decay": 0.1},
}


@BOTH
@pytest.mark.parametrize("options", EAGER)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bits_of_cupy(cupy, rng, make, options, dtype):
    params, gradients = numbers(rng, 131, 3, dtype)
    scales = {"grad_scale": 4.0} if options == "whole" else {}
    expected = after(make(0.1, **EAGER[options]), params, gradients, **scales)
    opt, there = make(0.1, **EAGER[options]), cupy.asarray(params)
    for grads in gradients:
        opt.step(there, cupy.asarray(grads), **scales)
    assert opt.backend == "cupy"
    assert_same([array.host for array in (there, *opt.state.arrays)], expected)


ON_A_CLOCK = {
    "norm": {"max_grad_norm": 1.0},
    "telemetry": {"telemetry": True},
}


@BOTH
@pytest.mark.parametrize("options", ON_A_CLOCK)
def test_bits_of_cupy_on_a_clock(cupy, rng, make, options):
    params, gradients = numbers(rng, 131, 25)  # more steps than tables have
    expected = after(make(0.1, **ON_A_CLOCK[options]), params, gradients)
    opt, there = make(0.1, **ON_A_CLOCK[options]), cupy.asarray(params)
    for grads in gradients:
        opt.step(there, cupy.asarray(grads))
    assert_same([array.host for array in (there, *opt.state.arrays)], expected)


def types_of(make, **options):
    return Coefficients(make(**options)._hyperparameters, np.dtype(np.float32)).types


def test_the_source():
    source = cuda_source.source_of("step", types_of(FusedYogi))
    assert source.count("DEVICE auto with_sign_0(") == 1
    assert source.count("DEVICE auto moving_average(") == 1
    assert types_of(FusedYogi).rule.__name__.startswith("Yogi_")


class OwnBuild(NamedTuple):
    """A step of a rule as a backend makes it."""

    backend: str
    entry: str
    make: type

    @property
    def types(self):
        return types_of(self.make, **DECAYED)

    @property
    def ptx(self):
        pytest.importorskip("cuda.bindings.nvjitlink", exc_type=ImportError)
        pytest.importorskip("numba_cuda", exc_type=ImportError)
        from cuda_builds import SM_90, _numba, compile_cuda, text
        from ptx import entries

        if self.backend == "cupy":
            module, _ = compile_cuda(cuda_source.source_of(self.entry, self.types))
            return entries(module)[self.entry]
        (only,) = entries(text(_numba(self.entry, self.types, SM_90, "-ptx"))).values()
        return only


DECAYED = {"weight_decay": 0.1, "decoupled_weight_decay": True}
EACH = pytest.mark.parametrize("backend", ["cupy", "numba-cuda"])


@EACH
@BOTH
def test_ptx_of_a_step(make, backend):
    """Nothing fused, flushed or approximate, and no float64."""
    ptx = OwnBuild(backend, "step", make).ptx
    from ptx import count
    from ptx_checks import foreign

    ops = count(ptx)
    assert foreign(ops, "f32") == set()
    assert ops["sqrt.rn.f32"] == ops["div.rn.f32"]
    assert (ops["sqrt.rn.f32"] > 0) is (make is FusedYogi)


@EACH
@BOTH
def test_bits_of_ptx(rng, make, backend):
    """What the compilers made, run on NumPy scalars."""
    build = OwnBuild(backend, "step", make)
    ptx = build.ptx
    from host_gpu import HostGpu
    from ptx import Program

    program = Program(ptx)
    params, gradients = numbers(rng, 37, 3)
    opt = make(0.1, **DECAYED)
    expected = after(opt, params, gradients)
    for places in ((0, 0, 0, 0), (3, 3, 3, 3), (0, 1, 0, 0)):
        gpu = HostGpu(build, lambda _: program)
        begin = [params, gradients[0], *begins_with(1e-6)(opt._hyperparameters, params)]
        param, grad, *states = (gpu.buffer(*pair) for pair in zip(begin, places, strict=False))
        c = Coefficients(opt._hyperparameters, params.dtype)
        for step, grads in enumerate(gradients, start=1):
            grad.owner[:] = grads
            gpu.plan(param, grad, states, c.update(step))()
        assert_same([buffer.owner for buffer in (param, *states)], expected)
