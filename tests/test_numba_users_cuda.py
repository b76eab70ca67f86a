"""The update inside users' own CUDA kernels: the bits of the rule, however they are compiled; no GPU."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from functools import cache
from types import SimpleNamespace
from unittest import mock

import numpy as np
import ptx
import pytest
from cuda_builds import VARIANTS
from numba import cuda, types
from numba.core.errors import TypingError
from numba.cuda import dispatcher
from oracles import interpret
from ptx_checks import foreign
from tolerances import assert_same_bits

from fastadam import FusedAdam, Segment
from fastadam.kernels.storage import load, store
from fastadam.numba_cuda import device_adam

NUMBERS = {"float32": types.float32, "float64": types.float64}
COMPILED = {"plain": (), "fastmath": (("fastmath", True),)}
"""How users compile."""

TRACES = {"plain": {"fma.rn.f32"}, "fastmath": {"fma.rn.ftz.f32", "div.approx.ftz.f32"}}
"""What each leaves in a kernel that is not ours."""

SUFFIX = {"float32": "f32", "float64": "f64"}

NAMES = ["plain", "amsgrad-maximize-adamw", "l2", "amsgrad-maximize-l2-whole", "ema_decay"]
"""Variants that have every rule, direction and decay among them, alone and with all other parts."""


def optimizer(name, **flags):
    return FusedAdam(**{**VARIANTS[name], "zero_grads": False, "betas": (0.9, 0.3), "lr": 0.01, **flags})


def make_kernel(update):
    """A kernel of a user, over pointers, so that its arguments are easily given."""

    def kernel(params, grads, states, size, c):
        i = cuda.grid(1)
        if i < size:
            state = load(states, i)
            params[i], state = update(params[i], grads[i], state, c)
            store(states, i, state)

    return kernel


def compiled(kernel, arguments, options=()):
    device = SimpleNamespace(compute_capability=(9, 0))
    with mock.patch.object(dispatcher, "get_current_device", return_value=device):
        fixed = {"device": False, "abi": "numba", "cc": (9, 0), "output": "ptx"}
        code, _ = cuda.compile(kernel, types.void(*arguments), **fixed, **dict(options))
    (entry,) = ptx.entries(code).values()
    return entry


@cache
def ptx_of(name, dtype, *options):
    opt = optimizer(name)
    scaled = name.endswith("whole")
    update, coefficients = device_adam(opt, dtype, scaled=scaled)
    c = coefficients(1, grad_scale=3.0 if scaled else None)
    pointer = types.CPointer(NUMBERS[dtype])
    states = types.UniTuple(pointer, len(opt._hyperparameters.state))
    arguments = pointer, pointer, states, types.int64, types.UniTuple(NUMBERS[dtype], len(c))
    return compiled(make_kernel(update), arguments, options)


@pytest.mark.parametrize("way", COMPILED)
@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("name", NAMES)
def test_instructions(name, dtype, way):
    """Each is spelled out: nothing fused, flushed, approximate, or of another float."""
    ops = ptx.count(ptx_of(name, dtype, *COMPILED[way]))
    assert foreign(ops, SUFFIX[dtype]) == set()
    assert ops[f"sqrt.rn.{SUFFIX[dtype]}"] == 1
    assert ops[f"div.rn.{SUFFIX[dtype]}"] == (2 if name.endswith("whole") else 1)


@pytest.mark.parametrize("way", COMPILED)
def test_the_check_bites(way):
    """What a kernel computes by itself is fused, or flushed and approximate."""

    def careless(params, grads, size):
        i = cuda.grid(1)
        if i < size:
            params[i] = params[i] / grads[i] + params[i] * grads[i]

    pointer = types.CPointer(types.float32)
    ops = ptx.count(compiled(careless, (pointer, pointer, types.int64), COMPILED[way]))
    assert TRACES[way] <= foreign(ops, "f32")


def problem(rng, dtype, size):
    """Numbers of all magnitudes, subnormal and not finite ones among them."""
    finfo = np.finfo(dtype)
    special = [0.0, -0.0, 1.0, finfo.tiny / 2, finfo.smallest_subnormal, finfo.max, -np.inf, np.nan]
    numbers = 10.0 ** rng.uniform(-12, 6, (3, size)) * rng.standard_normal((3, size))
    with np.errstate(all="ignore"):
        return np.where(rng.random((3, size)) < 0.3, rng.choice(special, (3, size)), numbers).astype(dtype)


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("name", NAMES)
def test_bits(name, dtype, rng):
    """Of what was compiled to be fast and loose."""
    program = ptx.Program(ptx_of(name, dtype, ("fastmath", True)))
    opt, size, grad_scale = optimizer(name), 40, 3.0 if name.endswith("whole") else None
    h = opt._hyperparameters
    params, *gradients = problem(rng, dtype, size)
    mine, states = params.copy(), [np.zeros_like(params) for _ in h.state]
    wanted, wanted_states = params, tuple(np.zeros_like(params) for _ in h.state)
    _, coefficients = device_adam(opt, dtype, scaled=grad_scale is not None)
    for step, (grads, lr) in enumerate(zip(gradients, (0.01, 0.5), strict=True), start=1):
        memory = ptx.Memory()
        pointers = [memory.add(array) for array in (mine, grads, *states)]
        c = coefficients(step, lr=lr, grad_scale=grad_scale)
        program.launch(2, 32, (*pointers, size, *c), memory)
        scales = {} if grad_scale is None else {"grad_scale": grad_scale}
        wanted, wanted_states = interpret(h.changed(lr=lr), wanted, grads, wanted_states, step, **scales)
    assert_same_bits(mine, wanted)
    for array, expected in zip(states, wanted_states, strict=True):
        assert_same_bits(array, expected)


SIMULATE = """
import pickle, sys
import numpy as np
from numba import cuda
from fastadam import FusedAdam
from fastadam.numba_cuda import device_adam

flags, dtype, params, gradients, n_states = pickle.load(sys.stdin.buffer)
update, coefficients = device_adam(FusedAdam(**flags), dtype)
states = np.zeros((n_states, params.size), dtype)

@cuda.jit
def kernel(params, grads, states, c):
    i = cuda.grid(1)
    if i < params.size:
        state = tuple([states[k, i] for k in range(states.shape[0])])
        params[i], state = update(params[i], grads[i], state, c)
        for k in range(states.shape[0]):
            states[k, i] = state[k]

for step, grads in enumerate(gradients, start=1):
    kernel[2, 32](params, grads, states, coefficients(step))
sys.stdout.buffer.write(pickle.dumps((params, states)))
"""


@pytest.mark.parametrize("dtype", NUMBERS)
def test_simulator(dtype, rng):
    flags = {"amsgrad": True, "weight_decay": 0.1, "max_grad_value": 0.5}
    params, *gradients = (rng.standard_normal(40).astype(dtype) for _ in range(4))
    process = subprocess.run(
        [sys.executable, "-c", SIMULATE],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        input=pickle.dumps((flags, dtype, params, gradients, 3)),
        stdout=subprocess.PIPE,
        check=True,
    )
    mine, states = pickle.loads(process.stdout)
    opt = FusedAdam(**flags)
    for grads in gradients:
        opt.step(params, grads)
    assert_same_bits(mine, params)
    for array, expected in zip(states, opt.state.arrays, strict=True):
        assert_same_bits(array, expected)


def test_coefficients():
    """A schedule is asked; the norm clips as a step of the optimizer does."""
    opt = FusedAdam(
        lr=lambda step: 0.1 * step, max_grad_norm=1.0, weight_decay=0.1, decoupled_weight_decay=True
    )
    _, coefficients = device_adam(opt, "float64", scaled=True)
    c = coefficients(2, grad_scale=8.0, grad_norm=4.0)
    assert c[:3] == (8.0, 1 / (4 + 1e-6), np.inf)
    assert c[3] == 0.2 * 0.1
    assert {type(number) for number in c} == {np.float64}
    assert coefficients(2, lr=0.5, grad_scale=8.0, grad_norm=4.0)[3] == 0.05


# --- Errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "arguments", "error", "message"),
    [
        ({}, {"dtype": "int32"}, TypeError, "dtype must be float32 or float64; got int32."),
        ({"telemetry": True}, {}, ValueError, "telemetry must be False for a device function; got True."),
        ({"zero_grads": True}, {}, ValueError, "zero_grads must be False for a device function; got True."),
        (
            {"skip_nonfinite": True},
            {},
            ValueError,
            "skip_nonfinite must be False for a device function; got True.",
        ),
        (
            {"state_dtype": "bfloat16"},
            {},
            ValueError,
            "state_dtype must be 'float32' for a device function; got 'bfloat16'.",
        ),
        (
            {"segments": [Segment(0, 1)]},
            {},
            ValueError,
            "segments must be empty for a device function; got 1.",
        ),
    ],
)
def test_optimizers(flags, arguments, error, message):
    with pytest.raises(error) as caught:
        device_adam(FusedAdam(**flags), **arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("flags", "scaled", "arguments", "message"),
    [
        ({}, True, {}, "grad_scale must be given; got None."),
        ({}, False, {"grad_scale": 2.0}, "grad_scale must be None, unless scaled=True; got 2.0."),
        ({}, True, {"grad_scale": 0.0}, "grad_scale must be greater than 0; got 0.0."),
        ({"max_grad_norm": 1.0}, False, {}, "grad_norm must be given to be clipped; got None."),
        ({}, False, {"grad_norm": 1.0}, "grad_norm must be None, unless there is a max_grad_norm; got 1.0."),
        ({}, False, {"lr": -1.0}, "lr must be at least 0; got -1.0."),
        ({}, False, {"step": 0}, "step must be in [1, 2**53); got 0."),
    ],
)
def test_arguments_of_coefficients(flags, scaled, arguments, message):
    _, coefficients = device_adam(FusedAdam(**flags), scaled=scaled)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        coefficients(**{"step": 1, **arguments})
    assert str(caught.value) == message


F32, F64 = types.float32, types.float64


@pytest.mark.parametrize(
    ("param", "grad", "state", "count", "message"),
    [
        (F64, F32, (F32, F32), 7, "param must be float32, as the coefficients are; got float64."),
        (F32, F64, (F32, F32), 7, "grad must be float32, as the coefficients are; got float64."),
        (F32, F32, (F32,), 7, "state must be a tuple of 2 float32; got UniTuple(float32 x 1)."),
        (F32, F32, (F32, F64), 7, "state must be a tuple of 2 float32; got Tuple(float32, float64)."),
        (F32, F32, (F32, F32), 0, "c must be what coefficients() gives; got Tuple()."),
        (F32, F32, (F32, F32), 6, "c must have 7 numbers, as coefficients() gives; got 6."),
    ],
)
def test_types(param, grad, state, count, message):
    update, _ = device_adam(FusedAdam())

    def kernel(param, grad, state, c):
        update(param, grad, state, c)

    with pytest.raises(TypingError) as caught:
        compiled(kernel, (param, grad, types.Tuple(state), types.Tuple([F32] * count)))
    assert f"TypingError: {message}\n" in str(caught.value)
