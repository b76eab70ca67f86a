"""The CPU loop computes the bits of the rule on NumPy scalars: any size, split, alignment, thread count."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from oracles import FLAGS, flags_id, interpret, interpret_steps
from tolerances import assert_same_bits

from fastadam import FusedAdam
from fastadam.adam import AdamHyperparameters
from fastadam.kernels import cpu, threads

DTYPES = ["float32", "float64"]

# Around the vector widths: 4 to 16 lanes, unrolled four times.
SIZES = [0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 257]
LARGE = cpu.PARALLEL_FROM + 37


def problem(rng, size, dtype, steps=3):
    params = rng.standard_normal(size).astype(dtype)
    return params, [
        (10.0 ** rng.uniform(-6, 3, size) * rng.standard_normal(size)).astype(dtype) for _ in range(steps)
    ]


def run(params, gradients, flags, step=None):
    opt = FusedAdam(**flags)
    params = params.copy()
    for grads in gradients:
        (step or opt.step)(params, grads)
    return params, opt.state.arrays


def assert_same(actual, expected):
    for name, a, e in zip(
        ["params", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
        [actual[0], *actual[1]],
        [expected[0], *expected[1]],
        strict=False,
    ):
        assert_same_bits(a, e, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", FLAGS, ids=flags_id)
def test_loop_has_the_bits_of_the_rule(rng, flags, dtype):
    for size in SIZES:
        params, gradients = problem(rng, size, dtype)
        assert_same(
            run(params, gradients, flags), interpret_steps(AdamHyperparameters(**flags), params, gradients)
        )


@pytest.mark.parametrize(
    "betas", [(0.0, 0.0), (0.0, 0.999), (0.3, 0.4), (0.5, 0.5), (0.95, 0.99), (0.999, 0.99999)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_for_other_betas(rng, dtype, betas):
    flags = {"betas": betas, "lr": 0.3, "eps": 0.1}
    params, gradients = problem(rng, 100, dtype, steps=5)
    assert_same(
        run(params, gradients, flags), interpret_steps(AdamHyperparameters(**flags), params, gradients)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [FLAGS[0], FLAGS[-1]], ids=flags_id)
def test_parallel_loop_has_the_bits_of_the_rule(rng, flags, dtype):
    params, gradients = problem(rng, LARGE, dtype, steps=1)
    assert_same(
        run(params, gradients, flags), interpret_steps(AdamHyperparameters(**flags), params, gradients)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_at_a_late_step(rng, dtype):
    h = AdamHyperparameters()
    params, (grads,) = problem(rng, 100, dtype, steps=1)
    opt = FusedAdam()
    states = (rng.standard_normal(100).astype(dtype), rng.random(100).astype(dtype))
    late = {**opt.state_dict(), "step": 123_456, "exp_avg": states[0], "exp_avg_sq": states[1]}
    opt.load_state_dict(late)
    expected = interpret(h, params, grads, states, 123_457)
    opt.step(params, grads)
    assert_same((params, opt.state.arrays), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", FLAGS, ids=flags_id)
def test_special_values(flags, dtype):
    finfo = np.finfo(dtype)
    values = [0.0, 1.0, finfo.tiny, finfo.tiny / 2, finfo.smallest_subnormal, finfo.max, finfo.max / 2]
    values += [np.sqrt(finfo.max), np.sqrt(finfo.max) * 2, np.sqrt(finfo.tiny), 1e-20, np.inf, np.nan]
    values = np.array([sign * value for value in values for sign in (1, -1)]).astype(dtype)
    params, grads = (a.ravel() for a in np.meshgrid(values, values))
    gradients = [grads, np.roll(grads, 1), grads]
    assert_same(
        run(params, gradients, flags), interpret_steps(AdamHyperparameters(**flags), params, gradients)
    )


@pytest.mark.parametrize("size", [LARGE, 5 * threads.MIN_PIECE + 11])
@pytest.mark.parametrize("flags", [FLAGS[0], FLAGS[-1]], ids=flags_id)
def test_any_number_of_threads(rng, all_threads, flags, size, monkeypatch):
    params, gradients = problem(rng, size, "float32", steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "PARALLEL_FROM", size + 1)
        serial = run(params, gradients, flags)
    for numba_is_safe in (True, False):
        monkeypatch.setattr(threads, "numba_is_safe", lambda safe=numba_is_safe: safe)
        for count in sorted({n for n in (1, 2, 3, all_threads) if n <= all_threads}):
            numba.set_num_threads(count)
            assert_same(run(params, gradients, flags), serial)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_split_into_separate_calls(rng, dtype):
    params, gradients = problem(rng, LARGE, dtype)
    whole = run(params, gradients, FLAGS[0])
    for cuts in ([1], [5000], [3, 20, 1000, LARGE - 1]):
        ranges = list(zip([0, *cuts], [*cuts, LARGE], strict=True))
        parts = [run(params[a:b], [g[a:b] for g in gradients], FLAGS[0]) for a, b in ranges]
        joined = np.concatenate([part[0] for part in parts])
        assert_same_bits(joined, whole[0])
        for k, state in enumerate(whole[1]):
            assert_same_bits(np.concatenate([part[1][k] for part in parts]), state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [257, LARGE])
def test_any_alignment(rng, size, dtype):
    params, gradients = problem(rng, size, dtype)
    aligned = run(params, gradients, FLAGS[0])
    for offset in (1, 2, 3):  # whole elements, so off the vector grid
        shifted = np.empty(size + offset, dtype)[offset:]
        shifted[:] = params
        moved = [np.concatenate([np.zeros(1, dtype), g])[1:] for g in gradients]
        opt = FusedAdam()
        for grads in moved:
            opt.step(shifted, grads)
        assert_same((shifted, opt.state.arrays), aligned)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [257, LARGE])
def test_elements_at_odd_addresses(rng, size, dtype):
    """Not even aligned to an element: a packed file or network buffer."""
    params, gradients = problem(rng, size, dtype)
    aligned = run(params, gradients, FLAGS[0])
    packed = np.frombuffer(bytearray(1 + params.nbytes), dtype, offset=1)
    assert not packed.flags.aligned
    packed[:] = params
    opt = FusedAdam()
    for grads in gradients:
        opt.step(packed, grads)
    assert_same((packed, opt.state.arrays), aligned)


def test_the_comparison_bites():
    a = np.ones(3, np.float32)
    b = a.copy()
    b[1] = np.nextafter(b[1], np.float32(2))
    with pytest.raises(AssertionError, match="first at 1"):
        assert_same_bits(a, b)
    with pytest.raises(AssertionError):
        assert_same_bits(np.zeros(1), np.array([-0.0]))
    assert_same_bits(np.array([np.nan]), -np.array([np.nan]))
