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

from fastadam.adam import AdamHyperparameters
from fastadam.coefficients import Coefficients
from fastadam.kernels import grids

pytest.importorskip("numba_cuda", reason="the simulator is numba-cuda's")

DTYPES = ["float32", "float64"]
SIZES = [*range(12), 15, 16, 17, 31, 33, 40]
SKIPS = [0, 1, 0, 0, 1, 1, 0, 0, 1]
"""Of captured steps: the flag of each."""

LRS = [1e-3, 0.5, 0.5, 1e-5, 0.3, 0.3]
"""The learning rate of each captured step that is taken, and of the one after."""

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
    steps = zip(job["coefficients"], job["gradients"], job["skips"], strict=True)
    for coefficients, grads, skip in steps:
        flag = np.array([skip])
        kernel(job["params"], grads, job["states"], *job["layout"], coefficients, job["step"], flag)
        assert flag[0] == skip

jobs = pickle.load(sys.stdin.buffer)
for job in jobs:
    kernel = cuda.jit(cuda_loop.make_step(job["kinds"], captured="skips" in job))[job["grid"]]
    (captured if "skips" in job else eager)(kernel, job)
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


WHOLE = {"grad_scale": 3.0, "clip_factor": 0.7}


def scales(flags):
    """Return what a step is given besides the step number: a division with all parts, and without no scale."""
    return WHOLE if flags_id(flags).endswith("whole") else {"clip_factor": 0.7}


def types_of(h, dtype, scales):
    c = Coefficients(h, np.dtype(dtype))
    return c.scaled_types if "grad_scale" in scales else c.types


def eager_jobs(rng, flags, dtype):
    h = AdamHyperparameters(**flags)
    kind = types_of(h, dtype, scales(flags))
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
                "coefficients": [coefficients(h, dtype, step, **scales(flags)) for step in (1, 2)],
            }


def captured_job(rng, flags, dtype, more):
    """A job whose steps read their coefficients from memory, count, and skip where a flag is set."""
    by_step = [AdamHyperparameters(**{**flags, **more, "lr": lr}) for lr in LRS]
    size = 9
    params, gradients = problem(rng, dtype, size, len(SKIPS))
    taken = 0
    memory = []
    for skip in SKIPS:
        values = coefficients(by_step[taken], dtype, taken + 1, **scales(flags))
        # What is skipped is not read; nor is what lies behind.
        memory.append(np.array([*((np.nan,) * len(values) if skip else values), np.nan], dtype))
        taken += not skip
    return {
        "kinds": types_of(by_step[0], dtype, scales(flags)),
        "grid": (2, 4),
        "layout": (size, *grids.packs([4 * 2], params.itemsize, size)),
        "params": params,
        "gradients": list(gradients),
        "states": tuple(np.zeros(size, dtype) for _ in by_step[0].state),
        "coefficients": memory,
        "skips": SKIPS,
        "step": np.array([0]),
    }


BOTH = [(flags, dtype) for flags in FLAGS + PHASES for dtype in DTYPES]
OTHER_ENDS = {"betas": (0.0, 0.5), "eps": 0.1}
"""Moving averages that take their step from the other end."""


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
        for more in ({}, OTHER_ENDS):
            jobs.append(captured_job(rng, flags, dtype, more))
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
            h = AdamHyperparameters(**flags)
            expected[size] = expect(before, [h] * 2, **scales(flags))
        assert_same(after, expected[size])


@pytest.mark.parametrize(("flags", "dtype"), BOTH, ids=lambda v: v if isinstance(v, str) else flags_id(v))
def test_captured_steps_have_the_bits_of_eager_ones(simulated, flags, dtype):
    """Those that are taken; one that is skipped writes nothing but zeros where gradients are cleared."""
    for (before, after), more in zip(
        simulated["captured", flags_id(flags), dtype], ({}, OTHER_ENDS), strict=True
    ):
        by_step = [AdamHyperparameters(**{**flags, **more, "lr": lr}) for lr in LRS[:-1]]
        assert after["step"].tolist() == [len(by_step)]
        takes = [grads for grads, skip in zip(before["gradients"], SKIPS, strict=True) if not skip]
        params, _, states = expect({**before, "gradients": takes}, by_step, **scales(flags))
        clears = by_step[0].zero_grads
        gradients = [np.zeros_like(grads) if clears else grads for grads in before["gradients"]]
        assert_same(after, (params, gradients, states))
