"""The Numba-CUDA kernels without a GPU, in numba-cuda's simulator: the bits of the rule on NumPy scalars.

The simulator runs kernels as plain Python over NumPy arrays, in a process of its own, for the choice between it
and CUDA is made when numba.cuda is imported. It cannot run compiled intrinsics, so packs are read and written
here by their definition; ``test_cuda_codegen.py`` proves the intrinsics.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from oracles import FLAGS, PHASES, flags_id, interpret
from tolerances import assert_same_bits

from fastadam import bias_correction
from fastadam.hyperparameters import Coefficients, Hyperparameters
from fastadam.kernels import grids

pytest.importorskip("numba_cuda", reason="the simulator is numba-cuda's")

DTYPES = ["float32", "float64"]
SIZES = [*range(12), 15, 16, 17, 31, 33, 40]
LRS = [1e-3, 0.5, 0.5, 1e-5, 0.3]
"""The learning rate of each captured step."""

SIMULATE = """
import pickle, sys
import numpy as np
from numba import cuda
from fastadam.kernels import cuda_loop, rules

def load_packs(pointers, i):
    lanes = 16 // pointers[0].itemsize
    return tuple(tuple(pointer[i + lane] for pointer in pointers) for lane in range(lanes))

def store_packs(pointers, i, lanes):
    for number, lane in enumerate(lanes):
        for pointer, value in zip(pointers, lane, strict=True):
            pointer[i + number] = value

assert not hasattr(cuda_loop, "load_packs"), "the simulator has learned intrinsics: use them"
cuda_loop.load_packs, cuda_loop.store_packs = load_packs, store_packs
rules.sqrt = np.sqrt  # math.sqrt of an np.float32 is a float64

def eager(kernel, job):
    for coefficients, grads in zip(job["coefficients"], job["gradients"], strict=True):
        kernel(job["params"], grads, job["states"], *job["layout"], coefficients)

def captured(kernel, job):
    for lr, grads in zip(job["lrs"], job["gradients"], strict=True):
        set_lr[1, 1](job["lr"], lr)
        form[1, 1](job["step"], job["lr"], *job["form"])
        kernel(job["params"], grads, job["states"], *job["layout"], job["memory"], job["step"])
        job["seen"].append(job["memory"][:-1].copy())

set_lr, form = cuda.jit(cuda_loop.set_lr), cuda.jit(cuda_loop.form_coefficients)
jobs = pickle.load(sys.stdin.buffer)
for job in jobs:
    kernel = cuda.jit(cuda_loop.make_step(job["kinds"], captured="lrs" in job))[job["grid"]]
    (captured if "lrs" in job else eager)(kernel, job)
sys.stdout.buffer.write(pickle.dumps(jobs))
"""


def simulate(jobs):
    """Run jobs in the simulator and return them, with their arrays as the kernels left them."""
    # Threads of the simulator do not inherit NumPy's error state: overflow is a warning there.
    process = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", "-c", SIMULATE],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        input=pickle.dumps(jobs),
        stdout=subprocess.PIPE,
        check=True,
    )
    return pickle.loads(process.stdout)


def problem(rng, dtype, size, steps):
    params = rng.standard_normal(size).astype(dtype)
    params[::7] = 0
    scales = 10.0 ** rng.uniform(-30, 20, (steps, size))
    gradients = (scales * rng.standard_normal((steps, size))).astype(dtype)
    gradients[:, 3::11] = -0.0
    gradients[:, 5::13] = np.inf
    return params, gradients


def layouts(size, itemsize):
    """Yield (head, packs): without packs, with a head alone, and for each place of a 16-byte boundary."""
    yield 0, 0
    yield min(2, size), 0
    for offset in range(0, grids.PACK, itemsize):
        yield grids.packs([offset], itemsize, size)


def coefficients(h, dtype, step, **scales):
    c = Coefficients(h, np.dtype(dtype))
    return tuple(value for part in c.update(step, **scales) if part for value in part)


def scales(h):
    """Return what an eager step is given besides the step number, where its kernel takes it."""
    return {} if h.max_grad_value is None else {"grad_scale": 3.0, "clip_factor": 0.7}


def eager_jobs(rng, flags, dtype):
    h = Hyperparameters(**flags)
    kind = Coefficients(h, np.dtype(dtype)).types
    for size in SIZES:
        params, gradients = problem(rng, dtype, size, steps=2)
        for layout in dict.fromkeys(layouts(size, params.itemsize)):
            yield {
                "kinds": kind,
                "grid": (2, 4),
                "layout": (size, *layout),
                "params": params.copy(),  # pickle would keep one array one
                "gradients": [grads.copy() for grads in gradients],
                "states": tuple(np.zeros(size, dtype) for _ in h.state),
                "coefficients": [coefficients(h, dtype, step, **scales(h)) for step in (1, 2)],
            }


def captured_job(rng, flags, dtype):
    """A job of which the coefficients are formed by ``form_coefficients``, as Clock lays them out."""
    h = Hyperparameters(**flags)
    size = 9
    params, gradients = problem(rng, dtype, size, len(LRS))
    kind = Coefficients(h, np.dtype(dtype)).types
    spare = len(kind.coefficients)
    memory = np.array([*coefficients(h, dtype, 1), np.nan], dtype)
    beta1, beta2 = h.betas
    corrections1, inverse2 = bias_correction.table(beta1), 1 / bias_correction.table(beta2)
    changing = ("step_size", "inv_bias_correction2", "lr_times_weight_decay")
    places = [kind.coefficients.index(name) if name in kind.coefficients else spare for name in changing]
    tables = (corrections1, corrections1.size, inverse2, inverse2.size)
    return {
        "kinds": kind,
        "grid": (2, 4),
        "layout": (size, *grids.packs([4 * 2], params.itemsize, size)),
        "params": params,
        "gradients": list(gradients),
        "states": tuple(np.zeros(size, dtype) for _ in h.state),
        "lrs": LRS,
        "step": np.array([0]),
        "lr": np.array([np.nan]),
        "form": (h.weight_decay, *tables, memory, *places),
        "memory": memory,
        "seen": [],
    }


BOTH = [(flags, dtype) for flags in FLAGS + PHASES for dtype in DTYPES]
SHORT_TABLES = {"betas": (0.0, 0.5), "eps": 0.1}
"""Bias corrections that are 1 from the first and from the 54th step on."""


@pytest.fixture(scope="module")
def simulated():
    """All jobs, before and after one run of the simulator: starting it takes a second."""
    rng = np.random.default_rng(0)
    jobs, keys = [], []
    for flags, dtype in BOTH:
        name = flags_id(flags), dtype
        for job in eager_jobs(rng, flags, dtype):
            jobs.append(job)
            keys.append(("eager", *name))
        for more in ({}, SHORT_TABLES):
            jobs.append(captured_job(rng, {**flags, **more}, dtype))
            keys.append(("captured", *name))
    found = {}
    for key, before, after in zip(keys, jobs, simulate(jobs), strict=True):
        found.setdefault(key, []).append((before, after))
    return found


def expect(job, hyperparameters, **scales):
    """Return params, gradients and states after a job's steps, by the rule on NumPy scalars."""
    params, states, gradients = job["params"], job["states"], []
    for step, (h, grads) in enumerate(zip(hyperparameters, job["gradients"], strict=True), start=1):
        params, states = interpret(h, params, grads, states, step, **scales)
        gradients.append(np.zeros_like(grads) if h.zero_grads else grads)
    return params, gradients, states


def assert_same(after, expected):
    params, gradients, states = expected
    assert_same_bits(after["params"], params, f"params at {after['layout']}")
    for number, (grads, wanted) in enumerate(zip(after["gradients"], gradients, strict=True)):
        assert_same_bits(grads, wanted, f"gradients {number} at {after['layout']}")
    for number, state in enumerate(states):
        assert_same_bits(after["states"][number], state, f"state {number} at {after['layout']}")


@pytest.mark.parametrize(("flags", "dtype"), BOTH, ids=lambda v: v if isinstance(v, str) else flags_id(v))
def test_bits_of_the_rule(simulated, flags, dtype):
    results = simulated["eager", flags_id(flags), dtype]
    layouts_seen = {before["layout"] for before, _ in results}
    assert {(0, 0, 0), (40, 0, 0)} < layouts_seen
    assert {head for _, head, packs in layouts_seen if packs > 1} == set(
        range(16 // np.dtype(dtype).itemsize)
    )
    expected = {}
    for before, after in results:
        size = before["params"].size
        if size not in expected:
            h = Hyperparameters(**flags)
            expected[size] = expect(before, [h] * 2, **scales(h))
        assert_same(after, expected[size])


@pytest.mark.parametrize(("flags", "dtype"), BOTH, ids=lambda v: v if isinstance(v, str) else flags_id(v))
def test_captured_steps_have_the_bits_of_eager_ones(simulated, flags, dtype):
    for (before, after), more in zip(
        simulated["captured", flags_id(flags), dtype], ({}, SHORT_TABLES), strict=True
    ):
        by_step = [Hyperparameters(**{**flags, **more, "lr": lr}) for lr in LRS]
        assert after["step"][0] == len(LRS)
        for step, (h, seen) in enumerate(zip(by_step, after["seen"], strict=True), start=1):
            assert_same_bits(seen, np.array(coefficients(h, dtype, step)), f"coefficients of step {step}")
        assert_same(after, expect(before, by_step))
