"""The measurement that users run: its contenders are right, its turns are fair, its ratios are pairwise."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import walled_numpy
from oracles import algorithm_1

from fastadam import FusedAdam, benchmark, devices
from fastadam.benchmark import NumpyAdam, Row, measure, roofline
from fastadam.kernels import threads
from fastadam.kernels.cpu import PARALLEL_FROM


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Blocks of the fewest calls: times mean nothing here."""
    monkeypatch.setattr(benchmark, "WARM_SECONDS", 0.0)
    monkeypatch.setattr(benchmark, "TIMED_SECONDS", 0.0)


def test_numpy_adam_is_algorithm_1(rng):
    params = rng.standard_normal(100)
    oracle, adam = algorithm_1(params), NumpyAdam(params.size, params.dtype)
    for _ in range(5):
        grads = rng.standard_normal(params.size)
        oracle.step(grads)
        adam.step(params, grads)
    np.testing.assert_allclose(params, oracle.theta, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("safe", [True, False], ids=["numba", "pool"])
@pytest.mark.parametrize("size", [100, PARALLEL_FROM, 3 * threads.MIN_PIECE + 1])
def test_roofline_adds_the_gradient_to_three_arrays(rng, monkeypatch, safe, size):
    if safe and not threads.numba_is_safe():
        pytest.skip("Numba's threading layer is not safe here")
    monkeypatch.setattr(threads, "numba_is_safe", lambda: safe)
    arrays = list(rng.standard_normal((4, size), np.float32))
    before = [array.copy() for array in arrays]
    roofline(*arrays)
    for i, expected in enumerate(
        (before[0] + before[1], before[1], before[2] + before[1], before[3] + before[1])
    ):
        np.testing.assert_array_equal(arrays[i], expected)


@pytest.mark.parametrize("size", [1, 1000, PARALLEL_FROM + 1])
@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 28), ("float64", 56)])
def test_measure(size, dtype, bytes_each):
    rounds = []
    row = measure(size, dtype, rounds=3, on_round=lambda: rounds.append(None))
    assert (row.size, row.bytes, len(rounds)) == (size, bytes_each * size, 3)
    assert all(0 < x < np.inf for x in (row.seconds, row.times_numpy, row.of_roofline))


@pytest.mark.parametrize("size", [1, 2, 1001])
def test_measure_on_a_gpu(monkeypatch, size):
    fake = walled_numpy.install(monkeypatch, benchmark)
    monkeypatch.setattr(benchmark, "roofline", None)
    row = measure(size, rounds=3, device=devices.cuda())
    assert row.size == size
    assert all(0 < x < np.inf for x in (row.seconds, row.times_numpy, row.of_roofline))
    assert fake.reads == 0


def test_a_wrong_update_on_a_gpu_is_not_timed(monkeypatch):
    walled_numpy.install(monkeypatch, benchmark)
    wrong = benchmark.FusedAdam
    monkeypatch.setattr(benchmark, "FusedAdam", lambda lr, *others: wrong(1.001 * lr, *others))
    monkeypatch.setattr(benchmark, "_interleave", None)
    with pytest.raises(AssertionError, match=r"^the update must be NumPy's \(.+\); got .+ at element \d+\.$"):
        measure(1000, rounds=1, device=devices.cuda())


@pytest.mark.parametrize(("size", "elements"), [(1, 4), (2, 7), (1000, 3500)])
def test_roofline_of_a_gpu_is_a_copy_of_as_many_bytes(monkeypatch, rng, size, elements):
    """Half of them read, half written: 14 of 28 bytes, 3.5 elements of float32 for each of a step."""
    walled_numpy.install(monkeypatch, benchmark)
    device, copies = devices.cuda(), []
    params, grads = (device.xp.asarray(rng.standard_normal(size, np.float32)) for _ in range(2))
    move = benchmark._bound(device, params, grads)
    monkeypatch.setattr(
        device.xp, "copyto", lambda target, source: copies.append((target, source)), raising=False
    )
    move()
    [(target, source)] = copies
    assert len(target) == len(source) == elements
    assert target.flags.c_contiguous
    assert source.flags.c_contiguous
    np.testing.assert_array_equal(source.host, np.tile(grads.host, 4)[:elements])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda lr, betas, eps: FusedAdam(lr * 1.001, betas, eps),
        lambda lr, betas, eps: FusedAdam(lr, (0.901, betas[1]), eps),
        lambda lr, betas, eps: FusedAdam(lr, (betas[0], 0.9991), eps),
        lambda lr, betas, eps: FusedAdam(lr, betas, eps, maximize=True),
        lambda *_: SimpleNamespace(step=lambda params, _: params.fill(np.nan)),
    ],
    ids=["lr", "beta1", "beta2", "sign", "nan"],
)
def test_a_wrong_update_is_not_timed(monkeypatch, dtype, wrong):
    monkeypatch.setattr(benchmark, "FusedAdam", wrong)
    monkeypatch.setattr(benchmark, "_interleave", None)
    with pytest.raises(AssertionError, match=r"^the update must be NumPy's \(.+\); got .+ at element \d+\.$"):
        measure(1000, dtype, rounds=1)


def test_contenders_take_turns_in_both_orders():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = benchmark._interleave(contenders, 3, lambda: calls.append("|"))
    block = 2 * benchmark.LEAST_CALLS  # untimed and timed
    assert (
        "".join(calls)
        == "|".join("".join(name * block for name in order) for order in ("abc", "cba", "abc")) + "|"
    )
    assert [seconds[name].shape for name in "abc"] == [(3,)] * 3


def test_ratios_are_formed_within_a_round(monkeypatch):
    seconds = {
        "fused": np.array([1.0, 2.0, 4.0]),
        "numpy": np.array([3.0, 4.0, 40.0]),
        "roofline": np.array([0.5, 2.0, 3.0]),
    }
    monkeypatch.setattr(benchmark, "_interleave", lambda *_: seconds)
    assert measure(10) == Row(10, 280, seconds=2.0, times_numpy=3.0, of_roofline=0.75)


def test_row_units():
    row = Row(size=10, bytes=280, seconds=2e-6, times_numpy=1.0, of_roofline=1.0)
    assert row.microseconds == pytest.approx(2.0)
    assert row.gigabytes_per_second == pytest.approx(0.14)


@pytest.mark.parametrize(
    ("sizes", "rounds", "message"),
    [
        ([8, 0], 1, "size must be at least 1; got 0."),
        ([8], 0, "rounds must be at least 1; got 0."),
    ],
)
def test_options_out_of_range(sizes, rounds, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        benchmark.require_options(sizes, rounds)
    assert str(caught.value) == message
    with pytest.raises(ValueError, match="must be at least 1"):
        measure(sizes[-1], rounds=rounds)
