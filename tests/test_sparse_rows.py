"""Steps of some rows: a dense step's bits on those rows, torch's SparseAdam, and nothing else touched."""

from __future__ import annotations

import copy
import pickle

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_same_bits

import fastadam
from fastadam import FusedAdam, Segment, schedules
from fastadam.kernels import norms, sparse_rows, threads
from fastadam.kernels.touched import touched

R, D = 40, 24

RULES = {
    "adam": (fastadam.FusedAdam, {}),
    "amsgrad": (fastadam.FusedAdam, {"amsgrad": True, "maximize": True}),
    "l2": (fastadam.FusedAdam, {"weight_decay": 0.1}),
    "adamw": (fastadam.FusedAdamW, {"weight_decay": 0.1}),
    "clipped": (fastadam.FusedAdam, {"max_grad_norm": 0.5, "max_grad_value": 0.04, "skip_nonfinite": True}),
    "schedule": (fastadam.FusedAdam, {"lr": schedules.linear(0.1, steps=2), "weight_decay": 0.1}),
    "nadam": (fastadam.FusedNAdam, {}),
    "radam": (fastadam.FusedRAdam, {}),
    "adamax": (fastadam.FusedAdamax, {}),
    "lion": (fastadam.FusedLion, {}),
    "sgd": (fastadam.FusedSGD, {}),
    "momentum": (fastadam.FusedSGD, {"momentum": 0.9, "dampening": 0.1}),
    "nesterov": (fastadam.FusedSGD, {"momentum": 0.9, "nesterov": True}),
    "adagrad": (fastadam.FusedAdagrad, {"initial_accumulator_value": 0.1}),
    "rmsprop": (fastadam.FusedRMSprop, {}),
    "rmsprop-centered": (fastadam.FusedRMSprop, {"centered": True, "momentum": 0.9}),
    "adadelta": (fastadam.FusedAdadelta, {}),
}

every_rule = pytest.mark.parametrize(("optimizer", "options"), RULES.values(), ids=RULES)
both_dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


def table(rng, dtype="float32", rows=R, width=D):
    return rng.standard_normal((rows, width)).astype(dtype)


def sums(rows, grad_rows, n_rows=R):
    """Gradients of all rows, added in the order in which they are given."""
    dense = np.full((n_rows, grad_rows.shape[1]), -0.0, grad_rows.dtype)  # -0 + x is x, for -0 too
    for row, grads in zip(rows, grad_rows, strict=True):
        dense[row] += grads
    return dense


def assert_same_state(opt, other):
    assert opt.state.step == other.state.step
    for name, moment in other.state.moments.items():
        assert_same_bits(opt.state.moments[name], moment, name)


@every_rule
@both_dtypes
def test_all_rows_are_a_dense_step(rng, optimizer, options, dtype):
    params = table(rng, dtype)
    expected, opt, dense = params.copy(), optimizer(**options), optimizer(**options)
    for _ in range(4):
        grads, rows = table(rng, dtype), rng.permutation(R)
        opt.step_rows(params, rows, grads[rows], grad_scale=2.0)
        dense.step(expected, grads, grad_scale=2.0)
        assert opt.last_step == dense.last_step
    assert_same_bits(params, expected)
    assert_same_state(opt, dense)


@every_rule
@both_dtypes
def test_only_the_rows_that_are_given_are_stepped(rng, optimizer, options, dtype):
    """Each by the rule, with the sum of its gradients; no other is even read: they are poisoned."""
    options = {name: value for name, value in options.items() if name != "max_grad_norm"}
    params = table(rng, dtype)
    opt, dense = optimizer(**options), optimizer(**options)
    opt.step_rows(params, range(R), grads := table(rng, dtype))
    dense.step(expected := params.copy(), grads)
    for _ in range(3):
        rows = rng.integers(0, R // 2, R) * 2 + 1  # some more than once, no even one
        grads = table(rng, dtype)
        assert len(set(rows.tolist())) < R
        poisoned = np.arange(R) % 2 == 0
        # The dense step of the same state, and of it what was touched.
        dense._state = pickle.loads(pickle.dumps(opt.state))
        dense._kernels = None
        expected = params.copy()
        dense.step(expected, sums(rows, grads))
        moments = [moment.reshape(R, D) for moment in opt.state.arrays]
        for array in (params, *moments):
            array[poisoned] = np.nan
        opt.step_rows(params, rows, grads)
        is_touched = np.zeros(R, bool)
        is_touched[rows] = True
        untouched_odd = ~is_touched & ~poisoned
        assert_same_bits(params[is_touched], expected[is_touched])
        for moment, other in zip(moments, dense.state.arrays, strict=True):
            assert_same_bits(moment[is_touched], other.reshape(R, D)[is_touched])
        for array in (params, *moments):
            assert np.isnan(array[poisoned]).all()
            assert np.isfinite(array[untouched_odd]).all()
        for array in (params, *moments):
            array[poisoned] = 0.5
        assert opt.last_step.skipped is False
    assert opt.state.step == 4


def torch_steps(params, batches, coalesced=False, **options):
    torch = pytest.importorskip("torch")
    tensor = torch.nn.Parameter(torch.from_numpy(params.copy()))
    opt = torch.optim.SparseAdam([tensor], **options)
    for rows, grads in batches:
        indices, values = torch.from_numpy(np.array(rows))[None], torch.from_numpy(grads)
        tensor.grad = torch.sparse_coo_tensor(indices, values, params.shape, check_invariants=True)
        if coalesced:
            tensor.grad = tensor.grad.coalesce()
        opt.step()
    state = opt.state[tensor]
    return tensor.detach().numpy(), state["exp_avg"].numpy(), state["exp_avg_sq"].numpy()


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("coalesced", [False, True])
def test_sparse_adam_of_torch(rng, maximize, coalesced):
    """It adds eps to the root of the second moment before that is debiased: here eps follows that."""
    params, eps, beta2 = table(rng, "float64"), 1e-3, 0.99
    batches = [(rng.integers(0, R, 30), rng.standard_normal((30, D))) for _ in range(200)]
    expected = torch_steps(
        params, batches, coalesced, lr=0.01, betas=(0.9, beta2), eps=eps, maximize=maximize
    )
    opt = FusedAdam(lr=0.01, betas=(0.9, beta2), maximize=maximize)
    for number, (rows, grads) in enumerate(batches, start=1):
        opt.eps = eps / np.sqrt(1 - beta2**number)
        opt.step_rows(params, rows, grads)
    # 200 updates of at most 0.01 and of sums of at most 6,000 gradients, with some eps of error each.
    np.testing.assert_allclose(params, expected[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(opt.state.exp_avg.reshape(R, D), expected[1], rtol=0, atol=1e-13)
    np.testing.assert_allclose(opt.state.exp_avg_sq.reshape(R, D), expected[2], rtol=1e-12)


def test_a_dense_step_is_another_one(rng):
    """The comparison above can fail: rows that are left out do not decay."""
    params, opt = table(rng), FusedAdam()
    opt.step_rows(params, range(R), table(rng))
    before, moments = params.copy(), opt.state.exp_avg.copy()
    opt.step_rows(params, [3], np.ones((1, D), np.float32))
    others = np.arange(R) != 3
    assert_same_bits(params[others], before[others])
    assert_same_bits(opt.state.exp_avg.reshape(R, D)[others], moments.reshape(R, D)[others])
    dense = copy.deepcopy(opt)
    dense.step(before, sums([3], np.ones((1, D), np.float32)))
    assert (before[others] != params[others]).all()


# --- The order of rows, and threads -------------------------------------------------------------------------


@given(rows=st.lists(st.integers(0, 2**40 - 1) | st.integers(0, 5), max_size=80))
def test_rows_are_sorted_stably(rows):
    wrong, found = touched(np.array(rows, np.int64), 2**40)
    order = sorted(range(len(rows)), key=rows.__getitem__)
    assert wrong == -1
    assert found.places.tolist() == order
    assert found.rows.tolist() == sorted(set(rows))
    of_each = [found.places[a:b].tolist() for a, b in zip(found.first, found.first[1:], strict=False)]
    assert of_each == [[k for k in order if rows[k] == row] for row in sorted(set(rows))]


@pytest.mark.parametrize("size", [1, 7, 2047, 2049, 50_000])
def test_many_rows_are_sorted_stably(rng, size):
    rows = rng.integers(0, 2**33, size) // 3 % max(size // 2, 1)
    _, found = touched(rows.copy(), 2**33)
    assert found.places.tolist() == np.argsort(rows, kind="stable").tolist()
    assert found.rows.tolist() == np.unique(rows).tolist()


def test_the_first_row_that_is_not_there():
    assert touched(np.array([3, 0, 4, -1, 9]), 4)[0] == 2
    assert touched(np.array([3, 0, 2, -1, 9]), 4)[0] == 3
    assert touched(np.array([], np.int64), 0)[0] == -1


@pytest.mark.parametrize(
    "segments",
    [(), (Segment(100, 5000, lr=0.1), Segment(5000, 9000, frozen=True))],
    ids=["plain", "segments"],
)
@pytest.mark.parametrize("safe", [True, False], ids=["numba", "pool"])
def test_threads_do_not_change_a_bit(rng, all_threads, monkeypatch, safe, segments):
    """Of many rows and of few, by the loops of Numba and by our own threads."""
    monkeypatch.setattr(threads, "numba_is_safe", lambda: safe)
    monkeypatch.setattr(threads, "MIN_PIECE", 64)
    monkeypatch.setattr(norms, "MIN_PIECE", 64)
    rows = rng.zipf(1.3, 9000) % 4000
    params, grads = table(rng, rows=4000, width=50), table(rng, rows=rows.size, width=50)
    found = []
    for count in (1, all_threads):
        numba.set_num_threads(count)
        opt, stepped = FusedAdam(max_grad_norm=1.0, segments=segments), params.copy()
        for part in (slice(None), slice(0, 5), slice(100, 2000)):
            opt.step_rows(stepped, rows[part], grads[part])
        found.append((stepped, opt))
    assert_same_bits(found[0][0], found[1][0])
    assert found[0][1].last_step == found[1][1].last_step
    assert_same_state(found[0][1], found[1][1])


def test_shares_are_of_equal_work():
    rows = np.concatenate([np.zeros(300, np.int64), np.arange(1, 101)])
    _, found = touched(rows, 101)
    assert sparse_rows._bounds(found, 2).tolist() == [
        0,
        13,
        101,
    ]  # 312 gradients and 13 rows: half of 400 + 3 * 101
    assert sparse_rows._bounds(found, 1).tolist() == [0, 101]
    assert sparse_rows._bounds(touched(rows[:0], 101)[1], 3).tolist() == [0, 0, 0, 0]


# --- The phase ----------------------------------------------------------------------------------------------


def test_the_norm_is_that_of_the_sums(rng):
    rows, grads = rng.integers(0, R, 100), table(rng, rows=100)
    opt, dense, params = FusedAdam(max_grad_norm=1.0), FusedAdam(max_grad_norm=1.0), table(rng)
    used = np.unique(rows)
    compact = params[used].copy()
    opt.step_rows(params, rows, grads, grad_scale=4.0)
    dense.step(compact, sums(rows, grads)[used], grad_scale=4.0)
    assert opt.last_step == dense.last_step
    assert 0 < opt.last_step.clip_factor < 1
    assert_same_bits(params[used], compact)


def test_a_sum_that_is_not_finite_is_skipped(rng):
    """Each of the two is finite. No row is stepped, and the step is not counted."""
    params, opt = table(rng), FusedAdam(skip_nonfinite=True)
    opt.step_rows(params, [0, 1], table(rng, rows=2))
    before, state = params.copy(), opt.state_dict()
    large = np.full((3, D), 3e38, np.float32)
    opt.step_rows(params, [2, 5, 2], large)
    assert (opt.last_step.skipped, opt.last_step.nonfinite, opt.last_step.step) == (True, D, 1)
    assert_same_bits(params, before)
    np.testing.assert_equal(opt.state_dict(), state)


@pytest.mark.parametrize(
    "features",
    [{}, {"weight_decay": 0.1}, {"max_grad_norm": 0.1, "maximize": True}],
    ids=["plain", "l2", "clipped"],
)
def test_segments_that_cut_rows(rng, features):
    """The bits of the dense step with the same segments, where its norm is the same."""
    segments = [
        Segment(10, 30, lr=0.1),
        Segment(30, 31, weight_decay=0.5),
        Segment(100, 400, betas=(0.5, 0.6)),
        Segment(401, 420, lr=schedules.linear(0.1, steps=2), eps=1e-3),
        Segment(R * D - 5, R * D, weight_decay=0.0),
    ]
    params, opt, dense = table(rng), *(FusedAdam(segments=segments, **features) for _ in range(2))
    expected = params.copy()
    for _ in range(3):
        rows, grads = rng.permutation(R), table(rng)
        opt.step_rows(params, rows, grads[rows])
        dense.step(expected, grads)
        assert opt.last_step == dense.last_step
    assert_same_bits(params, expected)
    assert_same_state(opt, dense)


def test_frozen_elements_are_left_alone(rng):
    """They count in no norm, and may be NaN."""
    segments = [Segment(5, 30, frozen=True), Segment(3 * D, 4 * D, frozen=True), Segment(100, 101, lr=0.5)]
    frozen = np.zeros(R * D, bool)
    for segment in segments[:2]:
        frozen[segment.start : segment.stop] = True
    params, grads = table(rng), table(rng)
    poisoned = grads.copy()
    poisoned[frozen.reshape(R, D)] = np.nan
    opt, dense = (FusedAdam(segments=segments, max_grad_norm=1.0, skip_nonfinite=True) for _ in range(2))
    expected = params.copy()
    opt.step_rows(params, range(R), poisoned)
    dense.step(expected, grads)
    assert not opt.last_step.skipped
    assert opt.last_step.grad_norm == pytest.approx(dense.last_step.grad_norm, rel=1e-15)
    np.testing.assert_allclose(params, expected, rtol=1e-6)
    assert (opt.state.exp_avg[frozen] == 0).all()


def test_gradients_of_16_bits(rng):
    params, grads = table(rng), table(rng, rows=6).astype(np.float16)
    rows, opt, other = [3, 3, 1, 8, 1, 3], FusedAdam(), FusedAdam()
    expected = params.copy()
    opt.step_rows(params, rows, grads)
    other.step_rows(expected, rows, grads.astype(np.float32))
    assert_same_bits(params, expected)


# --- What may be given --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple, np.uint8, np.int32, np.uint64, np.int64, "strided", "torch"])
def test_indices_of_any_kind(rng, kind):
    params, grads = table(rng), table(rng, rows=4)
    grads.flags.writeable = False
    expected, rows = params.copy(), np.array([7, 0, 39, 7])
    FusedAdam().step_rows(expected, rows, grads)
    if kind == "torch":
        given = pytest.importorskip("torch").from_numpy(rows)
    elif kind == "strided":
        given = np.repeat(rows, 2)[::2]
    else:
        given = kind(rows.tolist()) if kind in (list, tuple) else rows.astype(kind)
    FusedAdam().step_rows(params.reshape(-1), given, grads)
    assert_same_bits(params, expected)
    assert rows.tolist() == [7, 0, 39, 7]


def test_no_rows_are_a_step(rng):
    params, opt = table(rng), FusedAdam(max_grad_norm=1.0, segments=[Segment(0, 3, lr=0.1)])
    before = params.copy()
    opt.step_rows(params, np.empty(0, np.int64), np.empty((0, D), np.float32))
    assert opt.last_step.grad_norm == 0
    assert opt.state.step == 1
    assert_same_bits(params, before)


def test_steps_of_rows_and_of_all_take_turns(rng):
    """With one state, which is saved and loaded like any other."""
    params, opt = table(rng), FusedAdam(lr=0.01)
    opt.step(params, table(rng))
    opt.step_rows(params, [1, 2], table(rng, rows=2))
    resumed, continued = FusedAdam(), params.copy()
    resumed.load_state_dict(opt.state_dict())
    grads = table(rng, rows=3)
    for optimizer, array in ((opt, params), (resumed, continued)):
        optimizer.step_rows(array, [2, 2, 9], grads)
        optimizer.step(array, array.copy())
    assert_same_bits(params, continued)
    assert_same_state(opt, resumed)
    assert opt.state.step == 4


def test_every_call_steps_the_rows_that_it_gets(rng):
    """Of a view that begins anywhere, more rows and fewer than before."""
    memory = np.zeros(1 + R * D, np.float32)
    params, opt = memory[1:].reshape(R, D), FusedAdam(lr=1.0)
    for rows in ([0], list(range(R)), [5, 5], [39]):
        before = params.copy()
        opt.step_rows(params, rows, np.ones((len(rows), D), np.float32))
        assert np.flatnonzero((params != before).all(axis=1)).tolist() == sorted(set(rows))
        assert np.flatnonzero((params != before).any(axis=1)).tolist() == sorted(set(rows))
    assert memory[0] == 0
