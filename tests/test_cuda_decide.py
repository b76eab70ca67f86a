"""Numba's kernels before a step, in the simulator of numba-cuda: sums and decisions as on the CPU."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from tolerances import assert_same_bits

from fastadam.adam import AdamHyperparameters
from fastadam.coefficients import Coefficients
from fastadam.kernels import norms, rules
from fastadam.kernels.tree import CHUNK

pytest.importorskip("numba_cuda", reason="needs numba-cuda", exc_type=ImportError)

DTYPES = ["float32", "float64"]
SIZES = [0, 1, 33, CHUNK, 9 * CHUNK + 5]
LR, STEP, MAX_NORM, SCALE = 0.25, 6, 0.75, 3.7

SIMULATE = """
import math, pickle, sys
import numpy as np
from numba import cuda
from fastadam.kernels import cuda_decide, rules
measure, decide = cuda.jit(cuda_decide.measure), cuda.jit(cuda_decide.decide)
form = cuda.jit(cuda_decide.form_coefficients)
jobs = pickle.load(sys.stdin.buffer)
for job in jobs:
    grads, sums = job["grads"], job["sums"]
    if job["looks"]:
        measure[2, 256](grads, grads.size, sums)
        decide[1, 256](sums, -(-grads.size // 2048), job["clips"], 0.75, job["skips"], *job["form"])
    else:
        form[1, job["threads"]](*job["form"])
sys.stdout.buffer.write(pickle.dumps(jobs))
"""


def job(rng, dtype, size, *, looks=True, clips=1, skips=1, spoilt=None, scale_bytes=0, threads=32):
    h = AdamHyperparameters(lr=LR, max_grad_norm=MAX_NORM, weight_decay=0.1, decoupled_weight_decay=True)
    c = Coefficients(h, np.dtype(dtype))
    names = c.scaled_types.coefficients
    grads = (10.0 ** rng.uniform(-3, 3, size) * rng.standard_normal(size)).astype(dtype)
    if spoilt is not None:
        grads[size // 3] = spoilt
    memory = np.array([v for part in c.update(1, grad_scale=1.0) if part for v in part], dtype)
    table, numbers = c.columns().moved(names.index("step_size"))
    formed = ("lr_times_weight_decay", "grad_scale", "clip_factor")
    value = 1.0 if scale_bytes else SCALE
    narrow, wide = np.array([SCALE], np.float32), np.array([SCALE])
    report, skip = np.zeros(10), np.full(1, -1)
    return {
        "c": (h, dtype),
        "grads": grads,
        "sums": np.zeros(2 * (2 * (size // CHUNK) + 4)),
        "looks": looks,
        "threads": threads,
        "clips": clips,
        "skips": skips,
        "scale": float(np.float32(SCALE)) if scale_bytes == 4 else SCALE,
        "memory": memory,
        "report": report,
        "skip": skip,
        "form": (
            *(value, narrow, wide, scale_bytes, np.array([STEP]), np.array([9.0, LR, 7.0]), STEP - 1, 3),
            *(h.weight_decay, table.ravel(), table.shape[1], numbers, memory),
            *(*map(names.index, formed), skip, report),
        ),
    }


@pytest.fixture(scope="module")
def simulated():
    rng = np.random.default_rng(5)
    jobs = []
    for dtype in DTYPES:
        jobs += [job(rng, dtype, size) for size in SIZES]
        jobs += [job(rng, dtype, 100, spoilt=spoilt) for spoilt in (np.inf, np.nan)]
        jobs += [job(rng, dtype, 100, spoilt=np.nan, skips=0), job(rng, dtype, 100, clips=0)]
        jobs += [job(rng, dtype, 100, scale_bytes=nbytes) for nbytes in (4, 8)]
        jobs += [job(rng, dtype, 100, looks=False, threads=threads) for threads in (1, 32)]
    jobs.append(job(rng, "float64", 100, spoilt=1e200))
    process = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", "-c", SIMULATE],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        input=pickle.dumps(jobs),
        stdout=subprocess.PIPE,
        check=True,
    )
    # Pickle has kept what the arguments share with the job.
    return pickle.loads(process.stdout)


def test_decisions_are_those_of_the_cpu(simulated):
    for job in simulated:
        h, dtype = job["c"]
        c, grads = Coefficients(h, np.dtype(dtype)), job["grads"]
        norm, factor, nonfinite = 0.0, 1.0, 0
        if job["looks"]:
            with np.errstate(all="ignore"):
                squares, nonfinite = norms.measure(grads, np.empty(norms.scratch_size(grads.size)))
            norm = rules.grad_norm(squares, job["scale"])
            factor = c.clip_factor(norm) if job["clips"] else 1.0
        skipped = bool(job["skips"] and nonfinite)
        assert job["skip"] == [skipped]
        wanted = [norm, factor, skipped, nonfinite, STEP + 1 - skipped, LR, job["scale"], 0, 0, 0]
        assert_same_bits(job["report"], np.array(wanted, np.float64), f"report of {grads.size}")
        update = c.update(STEP + 1, grad_scale=job["scale"], clip_factor=factor)
        coefficients = np.array([value for part in update if part for value in part])
        assert_same_bits(job["memory"], coefficients, f"coefficients at {grads.size}")


def test_the_jobs_differ(simulated):
    """Clipped and not, skipped and not, of one chunk and of more."""
    reports = np.array([job["report"] for job in simulated])
    assert {0, 1} == set(reports[:, 2])
    assert {0, 1} == set(reports[:, 3])
    assert (reports[:, 1] < 1).any()
    assert (reports[:, 1] == 1).any()
