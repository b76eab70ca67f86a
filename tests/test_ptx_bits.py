"""The PTX of both backends, run on NumPy scalars: the bits of the rule, and addresses of 64 bits."""

from __future__ import annotations

from itertools import cycle, product

import numpy as np
import pytest
from cuda_builds import BACKENDS, DTYPES, EAGER_STEPS, EVERY_PART, MOST, Build, ptx_of
from host_gpu import HostGpu, make_clock, program
from oracles import interpret
from ptx import Memory, Program
from tolerances import assert_same_bits

from fastadam.coefficients import Coefficients
from fastadam.kernels import grids
from fastadam.kernels.cuda import Look

LRS = [1e-3, 0.5]
"""The learning rate of each step."""

TOGETHER = [(0, 0, 0, 0, 0, 0), (1, 1, 1, 1, 1, 1), (3, 3, 3, 3, 3, 3)]
APART = (0, 1, 0, 0, 0, 0)
"""Places of the buffers, in elements from a 16-byte boundary: so that packs are taken, and not."""

BETAS = [(0.9, 0.999), (0.3, 0.99), (0.8, 0.4), (0.0, 0.5)]
"""Of which each moving average takes a step from either end; kernels have code for each pair of ends."""

RUNS = [
    *zip(range(9), cycle([*TOGETHER, APART]), cycle(BETAS[::-1])),
    *((23, places, betas) for places, betas in zip(cycle(TOGETHER), BETAS)),
    *((23, APART, betas) for betas in BETAS),
]
"""Sizes, places and betas."""

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


# --- Bits ---------------------------------------------------------------------------------------------------


def problem(rng, dtype, size, steps):
    """Numbers of all magnitudes, subnormal and not finite ones among them: (params, gradients)."""
    finfo = np.finfo(dtype)
    special = [0.0, -0.0, 1.0, finfo.tiny / 2, finfo.smallest_subnormal, finfo.max, -np.inf, np.nan]
    shape = steps + 1, size
    numbers = 10.0 ** rng.uniform(-12, 6, shape) * rng.standard_normal(shape)
    numbers = np.where(rng.random(shape) < 0.3, rng.choice(special, shape), numbers)
    with np.errstate(all="ignore"):
        params, *gradients = numbers.astype(dtype)
    return params, gradients


GRAD_SCALE = 3.0


def scales(build):
    """Return what a step is given besides the step number; a kernel takes of it what its variant has."""
    scale = {"grad_scale": GRAD_SCALE} if build.unscales else {}
    return scale if build.entry == "step_captured" else {**scale, "clip_factor": 0.7}


def expect(h, params, gradients, **scales):
    """Return [params, grads, *states] after a step of each learning rate, by the rule on NumPy scalars."""
    states = tuple(np.zeros_like(params) for _ in h.state)
    for step, (lr, grads) in enumerate(zip(LRS, gradients, strict=True), start=1):
        params, states = interpret(h.changed(lr=lr), params, grads, states, step, **scales)
    return [params, np.zeros_like(grads) if h.zero_grads else grads, *states]


def take_steps(gpu, build, h, params, gradients, places):
    """Return [params, grads, *states] after a step of each learning rate, by the PTX of a build."""
    zeros = [np.zeros_like(params) for _ in h.state]
    assert len(zeros) + 2 <= len(places)
    buffers = zip([params, gradients[0], *zeros], places, strict=False)
    param, grad, *states = (gpu.buffer(values, place) for values, place in buffers)
    clock = make_clock(gpu, build, h) if build.entry == "step_captured" else None
    for step, (lr, values) in enumerate(zip(LRS, gradients, strict=True), start=1):
        grad.owner[:] = values
        if clock is None:
            c = Coefficients(h.changed(lr=lr), params.dtype)
            gpu.plan(param, grad, states, c.update(step, **scales(build)), c.clear)()
        else:
            clock.set_lr(lr, stream=0)
            gpu.plan_on_clock(param, grad, states, clock, Look(**scales(build)))()
            assert clock.step() == step
    if clock is not None:
        assert_skips(gpu, clock, param, grad, states, clears=h.zero_grads)
    return [buffer.owner for buffer in (param, grad, *states)]


def assert_skips(gpu, clock, param, grad, states, *, clears):
    """A step whose flag is set writes nothing but zeros to gradients that are to be cleared."""
    before, taken = [buffer.owner.copy() for buffer in (param, grad, *states)], clock.step()
    used = before[1].copy()
    grad.owner[:] = 7
    kernel = gpu.kernel("step_captured", clock.types, 0)
    pointers = (param.pointer, grad.pointer, *(state.pointer for state in states))
    flag = np.ones(1, np.int64)
    gpu.memory.add(flag)
    gpu.launch(kernel, 1, 256, (*pointers, param.size, 0, 0, *clock.arguments[:2], flag.ctypes.data), 0, 0)
    assert clock.step() == taken
    before[1][:] = 0 if clears else 7
    for buffer, wanted in zip((param, grad, *states), before, strict=True):
        assert_same_bits(buffer.owner, wanted, "skipped")
    grad.owner[:] = used


def assert_bits_of_the_rule(rng, build, programs=program):
    ends = [None] if build.hyperparameters.ema_decay is None else [0.9, 0.3]  # as the betas
    for (size, places, betas), ema_decay in product(RUNS, ends):
        h = build.hyperparameters.changed(betas=betas, ema_decay=ema_decay)
        params, gradients = problem(rng, build.dtype, size, len(LRS))
        found = take_steps(HostGpu(build, programs), build, h, params, gradients, places)
        expected = expect(h, params, gradients, **scales(build))
        for k, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
            assert_same_bits(actual, wanted, f"buffers {k} at {size=}, {places=}, {betas=}, {ema_decay=}")
    assert programs(build).unreached == set(), "code that never ran"


@pytest.mark.parametrize("build", EAGER_STEPS, ids=str)
def test_bits_of_the_rule(rng, build):
    assert_bits_of_the_rule(rng, build)


@pytest.mark.parametrize("variant", EVERY_PART)
@each_dtype
@each_backend
def test_captured_steps_have_the_bits_of_the_rule(rng, backend, dtype, variant):
    assert_bits_of_the_rule(rng, Build(backend, "step_captured", dtype, variant))


@pytest.mark.parametrize(
    ("entry", "right", "wrong"),
    [
        ("step", "sub.rn.f32", "add.rn.f32"),
        ("step", "sqrt.rn.f32", "neg.f32"),
        ("step", "setp.lt.f32", "setp.gt.f32"),
        ("form_coefficients", "div.rn.f64", "mul.rn.f64"),
    ],
)
@each_backend
def test_one_wrong_instruction_is_seen(rng, backend, entry, right, wrong):
    def spoilt(build):
        if build.entry != entry:
            return program(build)
        before, found, after = ptx_of(build).rpartition(f"{right} ")
        assert found, "no such instruction"
        return Program(f"{before}{wrong} {after}")

    built = "step" if entry == "step" else "step_captured"
    with pytest.raises(AssertionError, match="differ in"):
        assert_bits_of_the_rule(rng, Build(backend, built, "float32", MOST), spoilt)


# --- Addresses ----------------------------------------------------------------------------------------------

BLOCKS, THREADS = 2**31 - 1, 1024
"""The largest grid."""

EVERYONE = BLOCKS * THREADS
HEAD = 1


def accesses(thread, packs, tail, lanes):
    """Yield (first element, elements) of each access of a thread, as the kernels are meant to do it."""
    for pack in range(thread, packs, EVERYONE):
        yield HEAD + pack * lanes, lanes
    for single in range(thread, HEAD + tail, EVERYONE):
        yield (single if single < HEAD else single + packs * lanes), 1


@pytest.mark.parametrize(
    ("thread", "packs", "tail"),
    [
        (2**31 + 5, 2**31 + 6, 0),
        (2**32 + 1, 2**32 + 2, 0),
        (EVERYONE - 1, EVERYONE, 0),
        (3, EVERYONE + 4, 0),  # comes round once
        (2, 2**33, 2),  # a pack, and an element behind all packs
        (0, 0, 2**33),
        (2**32 + 3, 0, 2**33),
    ],
)
@each_dtype
@each_backend
def test_addresses_are_of_64_bits(rng, backend, dtype, thread, packs, tail):
    """One thread, at elements beyond 2**31, 2**32 and 2**40 of buffers: nothing else is in memory."""
    build = Build(backend, "step", dtype, MOST)
    c = Coefficients(build.hyperparameters, np.dtype(dtype))
    itemsize = np.dtype(dtype).itemsize
    lanes = grids.PACK // itemsize
    params, gradients = problem(rng, dtype, lanes, 1)
    zeros = [np.zeros(lanes, dtype) for _ in build.hyperparameters.state]
    scaled = scales(build)
    new_params, new_states = interpret(build.hyperparameters, params, gradients[0], zeros, 1, **scaled)
    touched = list(accesses(thread, packs, tail, lanes))
    assert touched

    memory, pointers, seen = Memory(), [], []
    before = [params, gradients[0], *zeros]
    after = [new_params, np.zeros_like(params), *new_states]
    for number, (values, wanted) in enumerate(zip(before, after, strict=True), start=1):
        pointer = (number << 50) + grids.PACK - HEAD * itemsize
        pointers.append(pointer)
        for first, count in touched:
            window = values[:count].copy()
            memory.add(window, pointer + first * itemsize)
            seen.append((window, wanted[:count]))
    size = HEAD + packs * lanes + tail
    values = (value for part in c.update(1, **scaled) if part for value in part)
    arguments = (*pointers, size, HEAD, packs, *values)
    program(build).thread(*divmod(thread, THREADS), BLOCKS, THREADS, arguments, memory)
    for window, wanted in seen:
        assert_same_bits(window, wanted)
