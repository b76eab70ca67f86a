"""State, checkpoints and hyperparameters between steps."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from checkpoints import WAYS, resume
from oracles import FLAGS, flags_id
from tolerances import assert_same_bits

from fastadam import FusedAdam
from fastadam.kernels import cpu

N = 37


def gradients(rng, count, dtype="float32"):
    return [rng.standard_normal(N).astype(dtype) for _ in range(count)]


def stepped(grads, **flags):
    opt = FusedAdam(**flags)
    params = np.ones(N, grads[0].dtype)
    for g in grads:
        opt.step(params, g)
    return opt, params


def test_before_the_first_step():
    state = FusedAdam(amsgrad=True).state
    assert state.step == 0
    assert state.exp_avg is None
    assert state.exp_avg_sq is None
    assert state.max_exp_avg_sq is None
    assert state.moments == {}
    assert repr(state) == "State(step=0)"


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_state_after_steps(rng, dtype, amsgrad):
    opt, _ = stepped(gradients(rng, 3, dtype), amsgrad=amsgrad)
    state = opt.state
    assert state.step == 3
    assert type(state.step) is int
    names = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"][: 2 + amsgrad]
    assert list(state.moments) == names
    for name in names:
        moment = getattr(state, name)
        assert np.shares_memory(moment, state.moments[name])
        assert moment.dtype == dtype
        assert moment.shape == (N,)
    assert (state.max_exp_avg_sq is None) is not amsgrad
    assert repr(state) == f"State(step=3, {', '.join(f'{name}={dtype}[37]' for name in names)})"


@pytest.mark.parametrize("size", [1, 37, 2**18, 2**22])
def test_moments_start_on_cache_lines_and_large_ones_apart(size):
    opt, params = FusedAdam(amsgrad=True), np.ones(size, np.float32)
    opt.step(params, params.copy())
    addresses = [moment.__array_interface__["data"][0] for moment in opt.state.arrays]
    assert {address % 64 for address in addresses} == {0}
    if params.nbytes >= 2**24:
        offsets = {address % 2**20 for address in addresses}
        assert len(offsets) == 3  # not the same cache set


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("flags", FLAGS, ids=flags_id)
def test_resume_is_bit_exact(rng, flags, dtype, how):
    grads = gradients(rng, 9, dtype)
    whole, expected = stepped(grads, lr=0.01, betas=(0.8, 0.99), eps=1e-6, **flags)
    first, params = stepped(grads[:4], lr=0.01, betas=(0.8, 0.99), eps=1e-6, **flags)
    second = resume(first, how, FusedAdam(lr=99.0, maximize=True))
    for g in grads[4:]:
        second.step(params, g)
    assert_same_bits(params, expected)
    assert second.state.step == 9
    for resumed, uninterrupted in zip(second.state.arrays, whole.state.arrays, strict=True):
        assert_same_bits(resumed, uninterrupted)
    assert repr(second) == repr(whole)
    assert first.state.step == 4


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_nothing_is_shared(rng, how):
    first, params = stepped(gradients(rng, 2))
    second = resume(first, how, FusedAdam(lr=99.0, maximize=True))
    for a in first.state.arrays:
        for b in second.state.arrays:
            assert not np.may_share_memory(a, b)
    before = copy.deepcopy(second.state_dict())
    first.step(params, np.ones(N, np.float32))
    np.testing.assert_equal(second.state_dict(), before)
    # A copy knows its own memory: the overlap check still works.
    with pytest.raises(ValueError, match="must not overlap the state"):
        second.step(params, second.state.exp_avg)


def test_state_dict_is_a_snapshot(rng):
    opt, params = stepped(gradients(rng, 2))
    entries = opt.state_dict()
    before = copy.deepcopy(entries)
    opt.step(params, np.ones(N, np.float32))
    np.testing.assert_equal(entries, before)
    opt.load_state_dict(entries)
    entries["exp_avg"][:] = 7
    np.testing.assert_equal(opt.state_dict(), before)


def test_contents_of_the_state_dict(rng):
    opt, _ = stepped(gradients(rng, 2), amsgrad=True)
    entries = opt.state_dict()
    assert list(entries) == [
        *HYPERPARAMETERS,
        *["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
    ]
    assert type(entries) is dict
    assert type(entries["step"]) is int


def test_a_fresh_state_dict_loads(rng):
    fresh = FusedAdam(lr=0.5)
    opt, _ = stepped(gradients(rng, 2))
    opt.load_state_dict(fresh.state_dict())
    assert opt.state.step == 0
    assert opt.state.exp_avg is None
    assert opt.lr == 0.5


def test_reset(rng):
    grads = gradients(rng, 3)
    opt, first = stepped(grads)
    opt.reset()
    assert opt.state.step == 0
    second = np.ones(N, np.float32)
    for g in grads:
        opt.step(second, g)
    assert_same_bits(second, first)
    opt.reset()
    opt.step(np.ones(5), np.ones(5))  # another size and dtype


def without(key):
    return lambda entries: {name: value for name, value in entries.items() if name != key}


def replaced(**values):
    return lambda entries: {**entries, **values}


HYPERPARAMETERS = [
    *["lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "amsgrad", "maximize"],
    *["skip_nonfinite", "zero_grads", "telemetry"],
    *["state_dtype", "rounding", "seed", "offset"],
]
"""Those that are never None."""

BAD = {
    "list": (list, TypeError, "state_dict must be a mapping; got list."),
    "missing-step": (
        without("step"),
        ValueError,
        "state_dict must have the key 'step'; got ['exp_avg', 'exp_avg_sq'].",
    ),
    "missing-lr": (
        without("lr"),
        ValueError,
        f"state_dict must have the key 'lr'; got {[*HYPERPARAMETERS[1:], 'step', 'exp_avg', 'exp_avg_sq']}.",
    ),
    "missing-moment": (
        without("exp_avg_sq"),
        ValueError,
        "state_dict must have the key 'exp_avg_sq'; got ['step', 'exp_avg'].",
    ),
    "missing-moments": (
        lambda entries: without("exp_avg")(without("exp_avg_sq")(entries)),
        ValueError,
        "state_dict must have the key 'exp_avg'; got ['step'].",
    ),
    "unknown": (replaced(momentum=0.9), ValueError, "state_dict must have no key 'momentum'."),
    "amsgrad-state-for-adam": (
        replaced(max_exp_avg_sq=np.ones(N, np.float32)),
        ValueError,
        "state_dict must have no key 'max_exp_avg_sq'.",
    ),
    "adam-state-for-amsgrad": (
        replaced(amsgrad=True),
        ValueError,
        "state_dict must have the key 'max_exp_avg_sq'; got ['step', 'exp_avg', 'exp_avg_sq'].",
    ),
    "size": (
        replaced(exp_avg=np.ones(N + 1, np.float32), exp_avg_sq=np.ones(N + 1, np.float32)),
        ValueError,
        "state_dict['exp_avg'] must have the size of the state (37); got 38.",
    ),
    "dtype": (
        replaced(exp_avg=np.ones(N), exp_avg_sq=np.ones(N)),
        TypeError,
        "state_dict['exp_avg'] must have the dtype of the state (float32); got float64.",
    ),
    "unequal-moments": (
        replaced(exp_avg_sq=np.ones(3, np.float32)),
        ValueError,
        "state_dict['exp_avg_sq'] must have the size of the state (37); got 3.",
    ),
    "moment-of-integers": (
        replaced(exp_avg=np.ones(N, int)),
        TypeError,
        "state_dict['exp_avg'] must be float32 or float64; got int64.",
    ),
    "negative-step": (replaced(step=-1), ValueError, "state_dict['step'] must be in [0, 2**53); got -1."),
    "huge-step": (
        replaced(step=2**53),
        ValueError,
        "state_dict['step'] must be in [0, 2**53); got 9007199254740992.",
    ),
    "float-step": (replaced(step=1.5), TypeError, "state_dict['step'] must be an integer; got float."),
    "bad-lr": (replaced(lr=-1.0), ValueError, "lr must be at least 0; got -1.0."),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_state_dict_changes_nothing(rng, case):
    corrupt, error, message = BAD[case]
    opt, _ = stepped(gradients(rng, 2))
    other, _ = stepped(gradients(rng, 3), lr=0.25)
    before = opt.state_dict()
    with pytest.raises(error) as caught:
        opt.load_state_dict(corrupt(other.state_dict()))
    assert str(caught.value) == message
    np.testing.assert_equal(opt.state_dict(), before)


def test_unequal_moments_for_a_fresh_optimizer(rng):
    opt, _ = stepped(gradients(rng, 2))
    with pytest.raises(ValueError, match=r"must have the size of state_dict\['exp_avg'\] \(37\); got 3"):
        FusedAdam().load_state_dict({**opt.state_dict(), "exp_avg_sq": np.ones(3, np.float32)})


def test_repr():
    assert repr(FusedAdam(lr=0.1, weight_decay=1, decoupled_weight_decay=True)) == (
        "FusedAdam(lr=0.1, betas=(0.9, 0.999), eps=1e-08, weight_decay=1.0, decoupled_weight_decay=True,"
        " amsgrad=False, maximize=False)"
    )


@pytest.mark.parametrize(
    ("name", "value"), [("lr", 0.5), ("betas", (0.5, 0.75)), ("eps", 0.25), ("weight_decay", 0.125)]
)
def test_hyperparameters_set_between_steps(rng, name, value):
    grads = gradients(rng, 2)
    opt, params = stepped(grads[:1])
    setattr(opt, name, value)
    assert getattr(opt, name) == value
    opt.step(params, grads[1])

    other, expected = stepped(grads[:1])
    other.load_state_dict({**other.state_dict(), name: value})
    other.step(expected, grads[1])
    assert_same_bits(params, expected)
    unchanged, same = stepped(grads[:1])
    unchanged.step(same, grads[1])
    assert (same != params).any()


@pytest.mark.parametrize("lr", [np.float32(0.5), np.float64(0.5), np.int64(2), 1, 0])
def test_numbers_of_other_types(lr):
    assert FusedAdam(lr=lr).lr == float(lr)
    assert type(FusedAdam(lr=lr).lr) is float


def test_what_a_user_does_to_the_views_of_the_moments(rng):
    """Their contents are the state's, their flags are the user's own."""
    opt, params = stepped(gradients(rng, 2))
    moment = opt.state.exp_avg
    moment[:] = 0.25
    moment.flags.writeable = False
    assert (opt.state.exp_avg == 0.25).all()
    opt.step(params, np.ones(N, np.float32))
    assert opt.state.exp_avg.shape == (N,)


@pytest.mark.parametrize("steps", [0, 2])
def test_an_interrupt_during_the_kernel_loses_no_step(rng, monkeypatch, steps):
    """Python raises KeyboardInterrupt when the kernel has returned: the step is taken, and counted."""
    grads = gradients(rng, 4)
    opt, params = stepped(grads[:steps]) if steps else (FusedAdam(), np.ones(N, np.float32))
    serial = cpu.serial

    def interrupted(*arguments):
        serial(*arguments)
        if arguments[0].size:
            raise KeyboardInterrupt

    monkeypatch.setattr(cpu, "serial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opt.step(params, grads[steps])
    monkeypatch.setattr(cpu, "serial", serial)
    opt.step(params, grads[steps + 1])
    assert opt.state.step == steps + 2
    assert_same_bits(params, stepped(grads[: steps + 2])[1])


@pytest.mark.parametrize("steps", [0, 2])
def test_a_kernel_that_does_not_compile_changes_nothing(rng, monkeypatch, steps):
    """New flags need another kernel: it is compiled before anything is counted or written."""
    opt, params = stepped(gradients(rng, steps)) if steps else (FusedAdam(), np.ones(N, np.float32))
    opt.weight_decay = 0.5
    before, params_before = opt.state_dict(), params.copy()

    def fails(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpu, "serial", fails)
    with pytest.raises(RuntimeError, match="no compiler"):
        opt.step(params, np.ones(N, np.float32))
    np.testing.assert_equal(opt.state_dict(), before)
    assert_same_bits(params, params_before)


def test_a_copy_compiles_before_it_counts(monkeypatch):
    from fastadam.kernels import cpu

    opt = FusedAdam()
    opt.step(np.ones(8), np.ones(8))
    prepared, prepare = [], cpu.prepare
    monkeypatch.setattr(cpu, "prepare", lambda *arguments: prepared.append(1) or prepare(*arguments))
    opt.step(np.ones(8), np.ones(8))
    assert not prepared
    pickle.loads(pickle.dumps(opt)).step(np.ones(8), np.ones(8))
    assert prepared
