"""The step inside users' own compiled functions: the bits of FusedAdam, whatever they are compiled with."""

from __future__ import annotations

from contextlib import ExitStack
from threading import Thread

import numpy as np
import pytest
from numba import njit, prange, typed
from phase_cases import DECAYS, case_id, pairwise
from tolerances import assert_same_bits

from fastadam import FusedAdam, coefficients, compiled_state, compiled_steps
from fastadam.adam import AdamHyperparameters
from fastadam.bias_correction import BLOCK
from fastadam.coefficients import Coefficients
from fastadam.numba import compiled, step, step_parallel
from fastadam.rule import BiasCorrection, InverseBiasCorrection

FACTORS = {
    "grad_scale": [None, 3.0],
    "max_grad_norm": [None, 0.5],
    "max_grad_value": [None, 0.02],
    "skip_nonfinite": [False, True],
    "ema_decay": [None, 0.9],
    "zero_grads": [False, True],
    "telemetry": [False],
    "maximize": [False, True],
    "decay": ["none", "adamw", "l2"],
    "amsgrad": [False, True],
    "lr": [0.01],
    "dtype": ["float32", "float64"],
}
CASES = [
    {name: values[i] for (name, values), i in zip(FACTORS.items(), case, strict=True)}
    for case in pairwise(list(FACTORS.values()))
]
"""Every pair of levels of two features is in one of these."""

SIZE, STEPS = 301, 120


@njit
def train(params, targets, lrs, adam, grad_scale, grads):
    """A whole training loop: a gradient, a schedule, a step; return how many were taken."""
    taken = 0
    for k in range(lrs.size):
        grads[:] = params - targets[k]
        adam.lr[0] = lrs[k]
        taken += step(params, grads, adam, grad_scale)
    return taken


def train_in_python(params, targets, lrs, opt, grad_scale, grads):
    for target, lr in zip(targets, lrs, strict=True):
        grads[:] = params - target
        opt.lr = float(lr)
        opt.step(params, grads, grad_scale=grad_scale)


def assert_same(one, other):
    assert one.state.step == other.state.step
    assert one.last_step == other.last_step
    assert one.lr == other.lr
    for a, b in zip(one.state.arrays, other.state.arrays, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_compiled_loop_is_the_loop_in_python(case, rng):
    """Between steps in Python before and after it, which go on with what it left."""
    flags = {name: value for name, value in case.items() if name not in ("grad_scale", "decay", "dtype")}
    one, other = (FusedAdam(**flags, **DECAYS[case["decay"]]) for _ in range(2))
    params = rng.standard_normal(SIZE).astype(case["dtype"])
    targets = rng.standard_normal((STEPS, SIZE)).astype(case["dtype"])
    if case["skip_nonfinite"]:
        targets[[50, STEPS - 20], 7] = np.inf
    lrs = 0.01 * rng.random(STEPS)
    lrs[30] = 0
    mine, mine_grads, theirs, their_grads = (params.copy() for _ in range(4))

    first, last = slice(5), slice(STEPS - 15, None)
    between = slice(first.stop, last.start)
    train_in_python(mine, targets[first], lrs[first], one, case["grad_scale"], mine_grads)
    with compiled(one, mine) as adam:
        taken = train(mine, targets[between], lrs[between], adam, case["grad_scale"], mine_grads)
    train_in_python(theirs, targets[: last.start], lrs[: last.start], other, case["grad_scale"], their_grads)
    assert_same(one, other)
    assert taken == STEPS - 20 - 2 * case["skip_nonfinite"]
    assert_same_bits(mine_grads, their_grads)
    train_in_python(mine, targets[last], lrs[last], one, case["grad_scale"], mine_grads)
    train_in_python(theirs, targets[last], lrs[last], other, case["grad_scale"], their_grads)
    assert_same(one, other)
    assert_same_bits(mine, theirs)


form_block = njit(compiled_steps.form_block, fastmath=False, error_model="numpy")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.99999, 1 - 2.0**-40)], ids=str)
def test_corrections(betas, dtype):
    h = AdamHyperparameters(betas=betas)
    state = compiled_state.State(h.state, 3, dtype)
    adam = compiled_state.compiled_adam(Coefficients(h, np.dtype(dtype)), h, state)
    _, powers, first, inverse_second = adam.corrections
    for number in (0, 1, 977, 2**31):
        form_block(number, *betas, powers, first, inverse_second)
        assert_same_bits(first, np.array(coefficients._block(BiasCorrection(betas[0]), number)))
        sequence = InverseBiasCorrection(betas[1])
        wanted = np.array(coefficients._rounded(sequence, number, np.dtype(dtype)))
        assert_same_bits(inverse_second, wanted)


@pytest.mark.parametrize("before", [BLOCK - 3, 3 * BLOCK - 3, 10**9])
def test_blocks_of_steps(before, rng):
    """The bias corrections of a compiled loop, from one block of them to the next."""
    params, targets = rng.standard_normal(SIZE), rng.standard_normal((6, SIZE))
    moments = {"step": before, "exp_avg": rng.standard_normal(SIZE), "exp_avg_sq": rng.random(SIZE)}
    one, other = FusedAdam(betas=(0.9, 1 - 1e-9)), FusedAdam(betas=(0.9, 1 - 1e-9))
    for opt in (one, other):
        opt.load_state_dict({**opt.state_dict(), **moments})
    mine, theirs, grads, lrs = params.copy(), params.copy(), params.copy(), np.full(6, 0.01)
    with compiled(one, mine) as adam:
        train(mine, targets, lrs, adam, None, grads)
    train_in_python(theirs, targets, lrs, other, None, grads)
    assert_same(one, other)
    assert_same_bits(mine, theirs)


# --- How users compile --------------------------------------------------------------------------------------


def in_one_thread(params, grads, adam, steps):
    for _ in range(steps):
        step(params, grads, adam)


def in_all_threads(params, grads, adam, steps):
    for _ in range(steps):
        for i in prange(grads.size):
            grads[i] = -grads[i]
        step_parallel(params, grads, adam)


def in_python(opt, params, grads, steps):
    for _ in range(steps):
        np.negative(grads, out=grads)
        opt.step(params, grads)


LARGE = 200_003


@pytest.mark.parametrize(
    "flags", [{}, {"weight_decay": 0.1, "max_grad_norm": 1.0, "ema_decay": 0.9}], ids=["plain", "clipped"]
)
@pytest.mark.parametrize("size", [SIZE, LARGE])
def test_parallel_steps(size, flags, rng, all_threads):
    """In a function that is parallel and fast-and-loose itself, with all threads and one."""
    import numba

    loop = njit(in_all_threads, parallel=True, fastmath=True, nogil=True)
    params, grads = (rng.standard_normal(size).astype("float32") for _ in range(2))
    theirs, opt = params.copy(), FusedAdam(**flags)
    in_python(opt, theirs, grads.copy(), 4)
    for threads in {1, all_threads}:
        numba.set_num_threads(threads)
        mine, one = params.copy(), FusedAdam(**flags)
        with compiled(one, mine) as adam:
            loop(mine, grads.copy(), adam, 4)
        assert_same(one, opt)
        assert_same_bits(mine, theirs)


def test_many_models_in_one_prange(rng):
    """A list of what tuples would be refused for."""

    @njit(parallel=True)
    def train_all(params, grads, adams):
        for k in prange(len(adams)):
            for _ in range(3):
                step(params[k], grads[k], adams[np.int64(k)])

    params, grads = rng.standard_normal((2, 3, SIZE))
    theirs, opts, others = params.copy(), *([FusedAdam(lr=0.1 * k) for k in range(3)] for _ in range(2))
    with ExitStack() as stack:
        adams = [stack.enter_context(compiled(opt, row)) for opt, row in zip(opts, params, strict=True)]
        train_all(params, grads, typed.List(adams))
    for opt, other, row, row_grads in zip(opts, others, theirs, grads, strict=True):
        for _ in range(3):
            other.step(row, row_grads)
        assert_same(opt, other)
    assert_same_bits(params, theirs)


def test_threads_of_python(rng):
    """Functions without the GIL, at once."""
    loop = njit(in_one_thread, nogil=True)
    params, grads = rng.standard_normal((2, 4, 10_000))
    wanted, opt = params[0].copy(), FusedAdam()
    for _ in range(30):
        opt.step(wanted, grads[0])
    params[:], grads[:] = params[0], grads[0]

    def run(k):
        with compiled(FusedAdam(), params[k]) as adam:
            loop(params[k], grads[k], adam, 30)

    threads = [Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(4):
        assert_same_bits(params[k], wanted)


@pytest.mark.parametrize("function", [step, step_parallel])
def test_called_by_python(function, rng):
    """As it is by a function whose compilation is switched off."""
    params, grads = rng.standard_normal((2, SIZE))
    theirs, one, opt = params.copy(), FusedAdam(), FusedAdam()
    with compiled(one, params) as adam:
        assert function(params, grads, adam) is True
        assert function(params, grads, adam, 2.0) is True
    opt.step(theirs, grads)
    opt.step(theirs, grads, grad_scale=2.0)
    assert_same(one, opt)
    assert_same_bits(params, theirs)
