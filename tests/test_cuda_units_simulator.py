"""Numba's kernels of steps over units in numba-cuda's simulator: the bits of the CPU, and of the oracle."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from segment_steps import separate
from telemetry_oracle import told
from tolerances import assert_same_bits
from trees import array_tree

from fastadam import Segment
from fastadam.adam import AdamHyperparameters
from fastadam.coefficients import Coefficients
from fastadam.kernels.run_chunks import RunChunks
from fastadam.rows import Rows
from fastadam.segments import Segments

pytest.importorskip("numba_cuda", reason="needs numba-cuda", exc_type=ImportError)

SIZE = 2048 + 90
SEGMENTS = [
    Segment(3, 5, lr=0.5),
    Segment(5, 40, weight_decay=0.0, betas=(0.3, 0.5)),
    Segment(70, 71, frozen=True),
    Segment(71, 2000, lr=0.01, eps=1e-3),
]
FLAGS = [
    {},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"weight_decay": 0.1, "amsgrad": True, "maximize": True, "ema_decay": 0.9, "zero_grads": True},
]

SIMULATE = """
import pickle, sys
import numpy as np
from numba import cuda
from fastadam.kernels import cuda_units_decide as around, cuda_units_loop, rules

rules.sqrt = np.sqrt  # math.sqrt of an np.float32 is a float64
jobs = pickle.load(sys.stdin.buffer)
for job in jobs:
    cuda.jit(around.form_rows)[2, 8](*job["rows"])
    cuda.jit(around.measure_units)[2, 256](*job["measure"])
    cuda.jit(around.sum_groups)[1, 256](*job["levels"])
    for observed, step in zip((False, True), job["steps"]):
        kernel = cuda.jit(cuda_units_loop.make_step_units(job["kinds"], observed=observed))
        kernel[2, 256](*step)
    cuda.jit(around.conclude)[1, 256](*job["conclude"])
    cuda.jit(around.clear_units)[1, 256](*job["clear"])
sys.stdout.buffer.write(pickle.dumps(jobs))
"""


def job(rng, flags, dtype, skip):
    """One step by each kernel: form its rows, take it observed and not, and what surrounds that."""
    h, segments = AdamHyperparameters(lr=0.1, **flags), Segments(SEGMENTS)
    c = Coefficients(h, np.dtype(dtype))
    rows, units = Rows(segments, h, c), segments.units(SIZE)
    tables, chunks = rows.tables(), RunChunks(units)
    params = rng.standard_normal(SIZE).astype(dtype)
    grads = (10.0 ** rng.uniform(-6, 3, SIZE) * rng.standard_normal(SIZE)).astype(dtype)
    update = rows.with_decay(c.update(1))
    shared = np.array([value for part in update if part for value in part], dtype)
    formed, skipped = tables.coefficients.flatten(), np.array([skip])
    apart = len(chunks.bounds) + 8
    sums, report = np.zeros(6 * apart), np.zeros(10)
    report[6] = 2.0
    measured = np.zeros(2 * apart)

    def step(*more):
        states = tuple(params.copy() if name == "param_ema" else np.zeros(SIZE, dtype) for name in h.state)
        pieces = (chunks.pieces.ravel(), chunks.first_piece, len(chunks.bounds))
        return (params.copy(), grads.copy(), states, *pieces, formed, shared, np.array([0]), skipped, *more)

    gaps = RunChunks(units.gaps(SIZE)).bounds
    return {
        "flags": flags,
        "kinds": c.types._replace(decay=type(rows.decay)),
        "before": (params.copy(), grads.copy()),
        "skip": skip,
        "rows": (
            *(
                formed,
                len(tables.sources),
                tables.coefficients.shape[1],
                tables.sources,
                tables.weight_decays,
            ),
            *(tables.columns.table.ravel(), tables.columns.table.shape[1], tables.columns.numbers),
            *(int(tables.decoupled), np.array([0]), rows.lrs(1), 0, 1),
        ),
        "measure": (grads.copy(), chunks.bounds.ravel(), len(chunks.bounds), measured),
        "levels": (measured, chunks.levels[0].ravel(), len(chunks.levels[0]), np.zeros(2 * apart), 1, apart),
        "steps": (step(), step(sums, apart)),
        "conclude": (sums, len(chunks.bounds), apart, skipped, report),
        "clear": (np.ones(SIZE, dtype), gaps.ravel(), len(gaps)),
    }


@pytest.fixture(scope="module")
def simulated():
    rng = np.random.default_rng(7)
    jobs = [job(rng, flags, dtype, 0) for flags in FLAGS for dtype in ("float32", "float64")]
    jobs.append(job(rng, FLAGS[-1], "float32", 1))
    process = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", "-c", SIMULATE],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        input=pickle.dumps(jobs),
        stdout=subprocess.PIPE,
        check=True,
    )
    return pickle.loads(process.stdout)


def test_bits_of_the_cpu(simulated):
    for job in simulated:
        params, grads = job["before"]
        wanted, (left,), states = separate(params, [grads], SEGMENTS, lr=0.1, **job["flags"])
        if job["skip"]:
            wanted = params
        for step in job["steps"]:
            assert_same_bits(step[0], wanted, "params")
            assert_same_bits(step[1], left, "gradients")
            assert step[8] == [1 - job["skip"]]
            for found, state in zip(step[2], states.values(), strict=True):
                if not job["skip"]:
                    assert_same_bits(found, state, "state")


def test_what_is_seen(simulated):
    for job in simulated:
        report = job["conclude"][-1]
        if job["skip"]:
            assert report.tolist() == [0] * 6 + [2.0] + [0] * 3
            continue
        (before, grads), step = job["before"], job["steps"][1]
        seen = told(before, step[0], grads, step[2][0], SEGMENTS, lr=0.1, scale=2.0)
        # By the chunks as they are: this has no launch for the levels of the tree.
        norms = [seen["grad_norm"], seen["update_norm"], seen["param_norm"]]
        np.testing.assert_allclose(report[[0, 7, 8]], norms, rtol=1e-12)
        assert report[[3, 9]].tolist() == [seen["nonfinite"], seen["vanished"]]


def test_sums_and_gaps(simulated):
    for job in simulated:
        sums, count = job["levels"][3], job["levels"][2]
        grads = job["before"][1].astype(np.float64)
        by_run = [array_tree(grads[a:b] ** 2) for a, b in ((0, 70), (71, SIZE))]
        assert sums[: 2 * count : 2].tolist() == by_run
        cleared = job["clear"][0]
        assert np.flatnonzero(cleared == 0).tolist() == [70]
