"""The PTX before a step on a clock, run on NumPy scalars: sums, decisions and coefficients as on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_builds import BACKENDS, DTYPES, MOST, Build, ptx_of
from host_gpu import HostGpu, make_clock, program
from ptx import Program
from tolerances import assert_same_bits

from fastadam.coefficients import Coefficients
from fastadam.kernels import norms, rules
from fastadam.kernels.cuda import Look
from fastadam.kernels.tree import CHUNK

SIZES = [0, 1, 33, 70, 250, CHUNK - 1, CHUNK, 9 * CHUNK + 300]
"""Of none, one and two rounds of the eight warps of a block, and of loops of every remainder."""

MAX_NORM, SCALE = 0.75, 3.7

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def problem(rng, dtype, size, spoilt=()):
    """Numbers of which squares differ by their order, and subnormal ones."""
    grads = (10.0 ** rng.uniform(-3, 3, size) * rng.standard_normal(size)).astype(dtype)
    grads[3::7] = np.finfo(dtype).smallest_subnormal * 5
    for place, value in enumerate(spoilt):
        grads[place * 37 % size] = value
    return grads


def assert_decides(build, grads, look, programs=program):
    h = build.hyperparameters.changed(max_grad_norm=look.max_grad_norm)
    gpu = HostGpu(build, programs)
    clock = make_clock(gpu, build, h)
    if look.scale_there is not None:
        look = look._replace(scale_there=gpu.buffer(look.scale_there, 0))
    clock.plan(gpu.buffer(grads, 1), look, 0)()
    c = Coefficients(h, grads.dtype)
    with np.errstate(all="ignore"):
        squares, nonfinite = norms.measure(grads, np.empty(norms.scratch_size(grads.size)))
        scale = look.grad_scale
        if look.scale_there is not None:
            scale *= float(look.scale_there.owner[0])
        norm = rules.grad_norm(squares, scale)
    factor = c.clip_factor(norm)
    skipped = look.skips and nonfinite > 0
    wanted = [norm, factor, skipped, nonfinite, 1 - skipped, h.lr, scale, 0, 0, 0]  # the last, where observed
    assert_same_bits(np.array(clock.report(0)), np.array(wanted, float), f"report of {grads.size}")
    at_coefficients, at_step, at_skip = clock.arguments
    assert gpu.memory.load(at_skip, 1, np.int64) == [skipped]
    assert gpu.memory.load(at_step, 1, np.int64) == [0]
    update = c.update(1, grad_scale=scale, clip_factor=factor)
    values = [value for part in update if part for value in part]
    size = grads.dtype.itemsize
    found = [gpu.memory.load(at_coefficients + k * size, 1, grads.dtype.type)[0] for k in range(len(values))]
    assert_same_bits(np.array(found), np.array(values), f"coefficients at {grads.size}")


def cases(rng, dtype):
    for size in SIZES:
        yield problem(rng, dtype, size), Look(SCALE, None, MAX_NORM, skips=True)
    for spoilt in ([np.nan], [np.inf, np.nan, -np.inf]):
        for skips in (True, False):
            yield problem(rng, dtype, 300, spoilt), Look(SCALE, None, MAX_NORM, skips=skips)
    yield problem(rng, dtype, 300), Look(SCALE, skips=True)
    yield np.full(300, np.finfo(dtype).smallest_subnormal), Look(SCALE, None, MAX_NORM)
    for kind in DTYPES:
        yield problem(rng, dtype, 40), Look(SCALE, np.array([1.7], kind), MAX_NORM)


def assert_all_decide(rng, build, programs=program):
    for grads, look in cases(rng, build.dtype):
        assert_decides(build, grads, look, programs)


def build_of(backend, dtype):
    return Build(backend, "step_captured", dtype, MOST)


@each_dtype
@each_backend
def test_decisions_are_those_of_the_cpu(rng, backend, dtype):
    build = build_of(backend, dtype)
    assert_all_decide(rng, build)
    # decide has a loop for more than 224 chunks, the same additions eight times.
    assert program(build._replace(entry="measure")).unreached == set(), "code that never ran"


@pytest.mark.parametrize(
    ("entry", "right", "wrong"),
    [
        ("measure", "add.rn.f64", "sub.rn.f64"),
        ("measure", "setp.neu.f64", "setp.ne.f64"),
        ("measure", "mul.rn.f64", "add.rn.f64"),
        ("decide", "sqrt.rn.f64", "neg.f64"),
        ("decide", "setp.gt.f64", "setp.lt.f64"),
        ("decide", "add.rn.f64", "sub.rn.f64"),
    ],
)
@each_dtype
@each_backend
def test_wrong_instructions_are_seen(rng, backend, dtype, entry, right, wrong):
    def spoilt(build):
        if build.entry != entry:
            return program(build)
        assert f"{right} " in ptx_of(build)
        return Program(ptx_of(build).replace(f"{right} ", f"{wrong} "))

    with pytest.raises(AssertionError, match="differ in"):
        assert_all_decide(rng, build_of(backend, dtype), spoilt)


@each_backend
def test_a_missing_barrier_is_seen(rng, backend):
    def hasty(build):
        if build.entry != "measure":
            return program(build)
        return Program(ptx_of(build).replace("bar.sync", "// bar.sync"))

    build = build_of(backend, "float32")
    with pytest.raises(AssertionError):
        assert_decides(build, problem(rng, "float32", 300), Look(SCALE, None, MAX_NORM), hasty)
