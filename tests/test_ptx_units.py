"""The PTX of steps over units and what surrounds them, run on NumPy scalars: bits of CPU and oracle."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_builds import BACKENDS, DTYPES, MOST, Build, ptx_of
from host_gpu import HostGpu, program
from ptx import Program
from tolerances import assert_same_bits

from fastadam import FusedAdam, Segment, clocks
from fastadam.coefficients import Coefficients
from fastadam.kernels.cuda import Look
from fastadam.last_step import LastStep
from fastadam.segments import Segments

SCALE, MAX_NORM = 3.0, 20.0

SEGMENTS = [
    Segment(3, 5, lr=0.5),
    Segment(5, 40, weight_decay=0.0, betas=(0.3, 0.5)),
    Segment(70, 71, frozen=True),
    Segment(71, 200, lr=0.01, betas=(0.8, 0.4), eps=1e-3),
    Segment(230, 240, frozen=True),
    Segment(240, 241, lr=0.0, weight_decay=0.7),
]
SIZE = 250

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_entry = pytest.mark.parametrize("entry", ["step_units", "step_units_observed"])


def problem(rng, dtype, steps=3):
    params = rng.standard_normal(SIZE).astype(dtype)
    params[150:160] = 1e14  # of which updates vanish
    gradients = [
        (10.0 ** rng.uniform(-6, 3, SIZE) * rng.standard_normal(SIZE)).astype(dtype) for _ in range(steps)
    ]
    gradients[0][20:30] = 0
    gradients[1][70] = np.nan  # frozen
    gradients[2][[5, 99]] = np.inf, np.nan
    return params, gradients


class Run:
    """An optimizer on the CPU, and the kernels of a build."""

    def __init__(self, build, params, programs=program):
        self.gpu, flags = HostGpu(build, programs), vars(build.hyperparameters)
        names = ("max_grad_norm", "skip_nonfinite", "segments")
        flags = {name: value for name, value in flags.items() if name not in names}
        flags["telemetry"] = build.entry == "step_units_observed"
        self.cpu = FusedAdam(max_grad_norm=MAX_NORM, skip_nonfinite=True, segments=SEGMENTS, **flags)
        self.params, self.clock = params.copy(), None
        self.h = self.cpu._hyperparameters
        self.segments = Segments(SEGMENTS)
        self.param, self.grad = self.gpu.buffer(params, 1), self.gpu.buffer(params, 2)
        zeros = np.zeros_like(params)
        starts = [params if name == "param_ema" else zeros for name in self.h.state]
        self.states = [self.gpu.buffer(start, 0) for start in starts]

    def step(self, grads, *, summed=False):
        left = grads.copy()
        self.cpu.step(self.params, left, grad_scale=SCALE)
        self.grad.owner[:] = grads
        c = Coefficients(self.h, grads.dtype)
        place = (self.gpu, self.param, self.h, c)
        self.clock = clocks.fitting(self.clock, *place, c.scaled_types, 0, self.segments)
        look = Look(SCALE, None, MAX_NORM, skips=True, clears_all=summed)
        take = self.gpu.plan_on_clock(self.param, self.grad, self.states, self.clock, look)
        report = self.gpu.plan_report(self.param, self.clock)
        take()
        report()
        if summed:
            left[:] = 0
        self.compare(left)

    def compare(self, left):
        for buffer, wanted in zip(
            (self.param, self.grad, *self.states), (self.params, left, *self.cpu.state.arrays), strict=True
        ):
            assert_same_bits(buffer.owner, wanted)
        assert self.clock.step() == self.cpu.state.step
        done = LastStep(lambda: clocks.done(self.clock, self.clock.attempts - 1))
        assert repr(done) == repr(self.cpu.last_step)  # NaN is NaN


def assert_runs(rng, build, programs=program):
    params, gradients = problem(rng, build.dtype)
    run = Run(build, params, programs)
    for grads in gradients:
        run.step(grads)
    if build.hyperparameters.zero_grads:
        run.step(gradients[0], summed=True)
    assert run.cpu.state.step == 2 + build.hyperparameters.zero_grads
    assert np.isfinite(run.params).all(), "nothing can be told apart"


@each_entry
@each_dtype
@each_backend
def test_bits_of_the_cpu(rng, backend, dtype, entry):
    assert_runs(rng, Build(backend, entry, dtype, MOST))


@pytest.mark.parametrize(
    ("entry", "right", "wrong"),
    [
        ("step_units", "sub.rn.f32", "add.rn.f32"),
        ("step_units", "sqrt.rn.f32", "neg.f32"),
        ("step_units_observed", "sub.rn.f64", "add.rn.f64"),
        ("step_units_observed", "mul.rn.f64", "add.rn.f64"),
        ("step_units_observed", "setp.eq.f32", "setp.ne.f32"),
        ("measure_units", "mul.rn.f64", "add.rn.f64"),
        ("form_rows", "div.rn.f64", "mul.rn.f64"),
        ("conclude", "sqrt.rn.f64", "neg.f64"),
        ("conclude", "div.rn.f64", "mul.rn.f64"),
        ("clear_units", "st.global.u32", "ld.global.u32"),
    ],
)
@each_backend
def test_wrong_instructions_are_seen(rng, backend, entry, right, wrong):
    built = entry if entry.startswith("step") else "step_units_observed"

    def spoilt(build):
        if build.entry != entry:
            return program(build)
        code = ptx_of(build)
        assert f"{right} " in code
        if entry == "clear_units":
            return Program("\n".join(line for line in code.splitlines() if right not in line))
        return Program(code.replace(f"{right} ", f"{wrong} "))

    with pytest.raises(AssertionError):
        assert_runs(rng, Build(backend, built, "float32", MOST), spoilt)


@each_backend
def test_a_missing_barrier_is_seen(rng, backend):
    def hasty(build):
        if build.entry != "step_units_observed":
            return program(build)
        return Program(ptx_of(build).replace("bar.sync", "// bar.sync"))

    with pytest.raises(AssertionError):
        assert_runs(rng, Build(backend, "step_units_observed", "float32", MOST), hasty)


# --- Accesses -----------------------------------------------------------------------------------------------


EACH = 7 * 32
"""Elements, of which each lane has as many: some in batches, some alone."""


@each_entry
@each_dtype
@each_backend
def test_neighbours_of_a_warp_access_neighbours(backend, dtype, entry):
    """With each load and store of elements: 128 bytes of a warp of float32 at once."""
    build = Build(backend, entry, dtype, MOST)
    one = np.dtype(dtype).itemsize
    gpu = HostGpu(build)
    seen = []
    find = gpu.memory._find

    def logged(address, n, kind):
        seen[-1].append(address)
        return find(address, n, kind)

    buffer = gpu.buffer(np.ones(EACH, dtype), 0)
    c = Coefficients(build.hyperparameters, np.dtype(dtype))
    h = build.hyperparameters.changed(telemetry=entry == "step_units_observed")
    segments = Segments([Segment(0, EACH, lr=0.5)])
    clock = clocks.fitting(None, gpu, buffer, h, c, c.scaled_types, 0, segments)
    states = tuple(gpu.buffer(np.ones(EACH, dtype), 0) for _ in h.state)
    pointers = [array.pointer for array in (buffer, gpu.buffer(np.ones(EACH, dtype), 0), *states)]
    ((kernel, blocks, threads, arguments),) = clock.units.steps(tuple(pointers), clock.arguments)
    gpu.memory._find = logged
    for lane in range(32):
        seen.append([])
        runs = kernel.thread(0, lane, blocks, threads, arguments, gpu.memory, _Nothing())
        next(runs, None) if kernel.waits else None
    places = [[a for a in lane if any(p <= a < p + EACH * one for p in pointers)] for lane in seen]
    for k in range(len(places[0])):
        at = [lane[k] for lane in places if k < len(lane)]
        assert at == [at[0] + one * lane for lane in range(len(at))]
    assert sum(map(len, places)) == EACH * (2 * len(pointers))


class _Nothing:
    """Shared memory of which nothing is read before the first barrier."""

    def store(self, *_):
        pass
