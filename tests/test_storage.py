"""Steps of any storage: the bits of the rule in float32, whatever holds the numbers."""

from __future__ import annotations

from itertools import pairwise

import numba
import numpy as np
import pytest
from storage_cases import CASES, DTYPES, case_id, encoded, literal_storage, options
from tolerances import assert_same_bits
from trees import literal_sum

from fastadam import FusedAdam, Segment
from fastadam.kernels import cpu, norms, threads

N = 45
SIXTEEN = ["float16", "bfloat16"]


def assert_same_codes(found, expected, name=""):
    assert found.dtype == expected.dtype, name
    assert_same_bits(found.astype(np.float32), expected.astype(np.float32), name)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_step_has_the_bits_of_the_rule(rng, case):
    segments = [Segment(3, 17), Segment(17, 18)] if case["segments"] else []
    opt = FusedAdam(0.01, rounding="nearest", segments=segments, **options(case))
    params = encoded(rng.standard_normal(N), case["params"])
    expected = literal_storage(params, lr=0.01, **options(case))
    out = None if case["out"] is None else np.full(N, 7, DTYPES[case["out"]])
    for _ in range(4):
        given = encoded((rng.standard_normal(N) + 0.3) * (case["grad_scale"] or 1), case["grads"])
        grads = given.copy()
        opt.step(params, grads, grad_scale=case["grad_scale"], out=out)
        scales = {"grad_scale": case["grad_scale"], "clip_factor": opt.last_step.clip_factor}
        expected.step(given, **scales)
        if expected.h.master_params == "split":  # ties away from zero: another half, the same sum
            assert_same_bits(
                (params.view(np.int16).astype(np.int64) << 16 & 0xFFFFFFFF).astype(np.uint32)
                + opt.state.param_remainder.astype(np.uint32),
                expected.exact.view(np.uint32),
            )
        else:
            assert_same_codes(params, expected.params, "params")
        assert_same_codes(grads, np.zeros_like(given) if case["zero_grads"] else given, "grads")
        for name, wanted in zip(expected.h.state, expected.states, strict=True):
            assert_same_codes(getattr(opt.state, name), wanted, name)
        if out is not None:
            assert_same_codes(out, encoded(expected.new, case["out"]), "out")
        if case["master_params"] == "float32":
            assert_same_bits(opt.state.param_master, expected.exact)


def test_cases_have_every_pair():
    assert all(len({str(case[name]) for case in CASES}) > 1 for name in CASES[0])
    assert {(case["params"], case["grads"]) for case in CASES} == {(a, b) for a in DTYPES for b in DTYPES}


# --- Masters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "master"), [("bfloat16", "float32"), ("bfloat16", "split"), ("float16", "float32")]
)
def test_masters_have_the_bits_of_a_float32_run(rng, kind, master):
    params = encoded(rng.standard_normal(300), kind)
    exact = params.astype(np.float32)
    flags = {"weight_decay": 0.1, "decoupled_weight_decay": True, "ema_decay": 0.9, "amsgrad": True}
    opt, plain = FusedAdam(1e-3, master_params=master, **flags), FusedAdam(1e-3, **flags)
    for _ in range(50):
        grads = rng.standard_normal(300).astype(np.float32)
        opt.step(params, grads)
        plain.step(exact, grads)
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "param_ema"):
        assert_same_bits(getattr(opt.state, name), getattr(plain.state, name))
    if master == "float32":
        assert_same_bits(opt.state.param_master, exact)
        assert_same_codes(params, encoded(exact, kind))
    else:
        high = params.view(np.int16).astype(np.int64) << 16
        bits = (high + opt.state.param_remainder) & 0xFFFFFFFF
        assert_same_bits(bits.astype(np.uint32), exact.view(np.uint32))
        assert np.abs(params.astype(np.float32) - exact).max() <= np.abs(exact).max() * 2**-8


def test_a_change_of_the_parameters_counts_without_a_float32_master(rng):
    grads = np.zeros(N, np.float32)  # a step of nothing
    for master, counts in ((None, True), ("split", True), ("float32", False)):
        params = encoded(rng.standard_normal(N), "bfloat16")
        opt = FusedAdam(0.1, master_params=master)
        opt.step(params, grads)
        before = params.copy()
        params[:] = 3
        opt.step(params, grads)
        assert_same_codes(params, np.full_like(params, 3) if counts else before)


# --- What else reads codes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIXTEEN)
@pytest.mark.parametrize("size", [0, 1, 31, 33, 2048, 2 * 2048 + 45])
def test_norm_of_codes(rng, kind, size):
    grads = encoded(rng.standard_normal(size) * 100, kind)
    codes = grads.view(np.uint16 if kind == "float16" else np.int16)
    scratch = np.empty(norms.scratch_size(size))
    squares, nonfinite = norms.measure(codes, scratch)
    assert squares == literal_sum(grads.astype(np.float32))
    assert nonfinite == 0
    if size > 1:
        grads[[0, size - 1]] = np.nan, -np.inf
        squares, nonfinite = norms.measure(codes, scratch)
        assert nonfinite == 2
        assert not np.isfinite(squares)


@pytest.mark.parametrize("kind", SIXTEEN)
def test_accumulated_codes_are_summed_in_float32(rng, kind):
    gradients = [encoded(rng.standard_normal(N), kind) for _ in range(3)]
    params = np.linspace(-1, 1, N, dtype=np.float32).astype(DTYPES["bfloat16"])
    expected = params.astype(np.float32)
    opt, plain = FusedAdam(0.1, master_params="float32"), FusedAdam(0.1)
    for grads in gradients:
        opt.accumulate(grads)
        plain.accumulate(grads.astype(np.float32))
    opt.step(params)
    plain.step(expected)
    assert_same_bits(opt.state.param_master, expected)


def test_skipped_steps_write_no_copy(rng):
    params, out = np.ones(N, DTYPES["bfloat16"]), np.full(N, 7, np.float16)
    grads = np.full(N, np.inf, DTYPES["bfloat16"])
    opt = FusedAdam(skip_nonfinite=True, zero_grads=True)
    opt.step(params, grads, out=out)
    assert opt.last_step.skipped
    assert opt.last_step.nonfinite == N
    assert (out == 7).all()
    assert (params == 1).all()
    assert not grads.any()
    assert opt.state.step == 0


@pytest.mark.parametrize("kind", SIXTEEN)
def test_tensors_are_stepped_in_place(rng, kind):
    torch = pytest.importorskip("torch")
    start = rng.standard_normal(N).astype(np.float32)
    tensor, grads = (torch.from_numpy(start.copy()).to(getattr(torch, kind)) for _ in range(2))
    array = encoded(start, kind)
    out = torch.zeros(N, dtype=torch.bfloat16)
    FusedAdam(0.1).step(tensor, grads, out=out)
    FusedAdam(0.1).step(array, array.copy())
    assert_same_bits(tensor.float().numpy(), array.astype(np.float32))
    assert out.any()


# --- Threads and splits, to the nearest and at random -------------------------------------------------------


def run(params, gradients, cuts=(), **flags):
    """Step parts of the buffers, each by an optimizer with its offset; return all that was written."""
    params, out = params.copy(), np.empty(params.size, np.float16)
    edges, found = [0, *cuts, params.size], []
    for a, b in pairwise(edges):
        opt = FusedAdam(0.1, **{**flags, "offset": flags.get("offset", 0) + a})
        for grads in gradients:
            opt.step(params[a:b], grads[a:b], out=out[a:b])
        found.append(opt.state.arrays)
    return [params, out, *map(np.concatenate, zip(*found, strict=True))]


FLAGS = {
    "stochastic": {"state_dtype": "bfloat16", "amsgrad": True},
    "split": {"state_dtype": "bfloat16", "master_params": "split"},
    "nearest": {"rounding": "nearest", "state_dtype": ("bfloat16", "float32"), "ema_decay": 0.5},
}


def problem(rng, size):
    gradients = [rng.standard_normal(size).astype(np.float16) for _ in range(2)]
    return encoded(rng.standard_normal(size).astype(np.float32), "bfloat16"), gradients


def assert_same(one, other):
    for k, (found, expected) in enumerate(zip(one, other, strict=True)):
        assert_same_codes(found, expected, str(k))


@pytest.mark.parametrize("name", FLAGS)
def test_any_number_of_threads(rng, all_threads, name, monkeypatch):
    size = 3 * threads.MIN_PIECE + 11
    params, gradients = problem(rng, size)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "PARALLEL_FROM", size + 1)
        patch.setattr("fastadam.kernels.stored.PARALLEL_FROM", size + 1)
        expected = run(params, gradients, **FLAGS[name])
    for numba_is_safe in (True, False):
        monkeypatch.setattr(threads, "numba_is_safe", lambda safe=numba_is_safe: safe)
        for count in sorted({n for n in (1, 2, all_threads) if n <= all_threads}):
            numba.set_num_threads(count)
            assert_same(run(params, gradients, **FLAGS[name]), expected)


@pytest.mark.parametrize("name", FLAGS)
def test_any_split_with_its_offset(rng, name):
    params, gradients = problem(rng, 1000)
    expected = run(params, gradients, **FLAGS[name])
    for cuts in ([1], [500], [3, 20, 999]):
        assert_same(run(params, gradients, cuts, **FLAGS[name]), expected)


@pytest.mark.parametrize("size", [1000, cpu.PARALLEL_FROM + 3])
@pytest.mark.parametrize("numba_is_safe", [True, False])
def test_behind_the_first_four_billion_elements(rng, size, numba_is_safe, monkeypatch):
    """Where the upper half of the index changes, in all paths."""
    monkeypatch.setattr(threads, "numba_is_safe", lambda: numba_is_safe)
    params, gradients = problem(rng, size)
    flags = {**FLAGS["stochastic"], "offset": 2**32 - 400}
    expected = run(params, gradients, **flags)
    assert_same(run(params, gradients, [400], **flags), expected)
    assert_same(run(params, gradients, [7, 300, 500], **flags), expected)
    assert_same(run(params, gradients, segments=[Segment(100, 700)], **flags), expected)
    first, second = (
        run(params[400:], [g[400:] for g in gradients], **{**flags, "offset": k * 2**32}) for k in (0, 1)
    )
    assert (first[0] != second[0]).any()
    assert_same([array[400:] for array in expected], second)


@pytest.mark.parametrize("name", FLAGS)
def test_segments_have_the_same_bits(rng, name):
    params, gradients = problem(rng, 1000)
    segments = [Segment(17, 300), Segment(300, 301), Segment(900, 1000)]
    assert_same(
        run(params, gradients, segments=segments, **FLAGS[name]), run(params, gradients, **FLAGS[name])
    )


def test_frozen_elements_stay(rng):
    params, gradients = problem(rng, 100)
    before = params.copy()
    found, *_ = run(params, gradients, segments=[Segment(30, 60, frozen=True)], **FLAGS["stochastic"])
    assert_same_codes(found[30:60], before[30:60])
    assert (found[:30] != before[:30]).all()
