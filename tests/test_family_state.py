"""The state of every optimizer of the family: it comes back bit for bit, and nothing else comes for it."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
from checkpoints import WAYS, resume
from family_cases import HAS_BETAS, HAS_EPS, RELATIVES, RULES, make
from phase_cases import assert_changes_nothing
from tolerances import assert_same_bits

import fastadam
from fastadam import FusedAdam, FusedAdamW, FusedLion, FusedSGD, Segment, checkpoint, schedules

N = 41

OPTIONS = {
    "plain": {},
    "whole": {
        "ema_decay": 0.9,
        "max_grad_norm": 1.0,
        "weight_decay": 0.1,
        "segments": [Segment(3, 17, lr=0.3), Segment(20, 30, frozen=True)],
    },
    "bfloat16": {"state_dtype": "bfloat16", "seed": 7},
}


def gradients(rng, count, dtype="float32"):
    return [rng.standard_normal(N).astype(dtype) for _ in range(count)]


def stepped(name, grads, **options):
    opt, params = make(name, **options), np.linspace(-1, 1, N, dtype=grads[0].dtype)
    for g in grads:
        opt.step(params, g)
    return opt, params


def assert_goes_on(opt, params, other, grads):
    """Both have the bits of each other, now and after more steps."""
    copied = params.copy()
    for g in grads:
        opt.step(params, g)
        other.step(copied, g)
    assert_same_bits(params, copied)
    assert other.state.step == opt.state.step
    assert other.state.moments.keys() == opt.state.moments.keys()
    for key, moment in opt.state.moments.items():
        assert_same_bits(moment.view(np.uint8), other.state.moments[key].view(np.uint8), key)
    assert other.segments == opt.segments
    assert repr(other) == repr(opt)


SOME = ["nadam", "lion", "sgd", "rmsprop-centered-momentum"]
"""Of every number of states: what takes long to compile is compiled for these."""


@pytest.mark.parametrize("how", [*WAYS, "file"])
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for options in OPTIONS for name in (SOME if options == "bfloat16" else RULES)],
)
def test_comes_back_bit_for_bit(rng, tmp_path, name, options, how):
    grads = gradients(rng, 6)
    opt, params = stepped(name, grads[:3], **OPTIONS[options])
    if how == "file":
        opt.save(tmp_path / "run", params=params)
        back = np.empty_like(params)
        other = type(opt).load(tmp_path / "run", params=back)
        assert_same_bits(back, params)
    else:
        # What it is loaded into has other numbers; how it stores them stays.
        own = {key: value for key, value in OPTIONS[options].items() if key == "state_dtype"}
        other = resume(opt, how, type(opt)(lr=0.7, weight_decay=0.5, **own))
    assert_goes_on(opt, params, other, grads[3:])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", RELATIVES)
def test_before_the_first_step(rng, tmp_path, name, dtype):
    segments = [Segment(3, 17, lr=0.3), Segment(20, 30, frozen=True)]
    for way in ("state_dict", "file"):
        opt, params = make(name, segments=segments), np.linspace(-1, 1, N, dtype=dtype)
        assert opt.state.step == 0
        assert opt.state.moments == {}
        if way == "file":
            opt.save(tmp_path / "run")
            other = type(opt).load(tmp_path / "run")
        else:
            other = resume(opt, way, type(opt)())
        assert_goes_on(opt, params, other, gradients(rng, 3, dtype))


@pytest.mark.parametrize("name", RELATIVES)
def test_a_state_dict_is_plain_and_says_whose_it_is(rng, name):
    opt, _ = stepped(name, gradients(rng, 2))
    entries = opt.state_dict()
    assert entries["rule"] == name.split("-")[0].replace("nesterov", "sgd").replace("momentum", "sgd")
    assert entries["step"] == 2
    kept = {key for key, value in entries.items() if isinstance(value, np.ndarray)}
    assert kept == set(opt._hyperparameters.rule.states)
    assert all(isinstance(v, (int, float, str, tuple, np.ndarray)) for v in entries.values())
    moments = opt.state.moments
    for key in kept:
        assert_same_bits(getattr(opt.state, key), moments[key])
    if kept:
        with pytest.raises(AttributeError, match="state must have 'nothing'"):
            _ = opt.state.nothing
    opt.reset()
    assert opt.state.step == 0
    assert opt.state.moments == {}
    assert opt.last_step is None


@pytest.mark.parametrize("name", RELATIVES)
def test_reset_begins_again(rng, name):
    grads = gradients(rng, 4)
    opt, _ = stepped(name, grads)
    opt.reset()
    expected = stepped(name, grads)[1]
    params = np.linspace(-1, 1, N, dtype=np.float32)
    for g in grads:
        opt.step(params, g)
    assert_same_bits(params, expected)


@pytest.mark.parametrize("name", RELATIVES)
def test_another_rule_is_refused(rng, tmp_path, name):
    """By its name: two rules may keep what has the same names."""
    grads = gradients(rng, 2)
    opt, _ = stepped(name, grads)
    other = FusedLion() if not isinstance(opt, FusedLion) else FusedAdam()
    params = np.linspace(-1, 1, N, dtype=np.float32)
    other.step(params, grads[0])
    kind, wanted = opt._hyperparameters.KIND, other._hyperparameters.KIND
    message = f"state_dict['rule'] must be {wanted!r} for a {type(other).__name__}; got {kind!r}."
    call = lambda: other.load_state_dict(opt.state_dict())  # noqa: E731
    assert_changes_nothing(other, [params], ValueError, message, call)
    opt.save(tmp_path / "run")
    message = (
        f"path must be of a {type(other).__name__}; got '{tmp_path / 'run'}', {kind!r}."
        " Load it with the class that has saved it."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        type(other).load(tmp_path / "run")


def test_state_dicts_of_adam_are_for_adam(rng):
    opt, _ = stepped("adam", gradients(rng, 2))
    assert "rule" not in opt.state_dict()
    message = r"^state_dict\['rule'\] must be 'nadam' for a FusedNAdam; got 'adam'\.$"
    with pytest.raises(ValueError, match=message):
        make("nadam").load_state_dict(opt.state_dict())


def test_adamw_stays_adamw(rng, tmp_path):
    grads = gradients(rng, 3)
    params = np.linspace(-1, 1, N, dtype=np.float32)
    opt, plain = FusedAdamW(), FusedAdam(weight_decay=0.1)
    opt.step(params, grads[0])
    plain.step(params.copy(), grads[0])
    message = "decoupled_weight_decay must be True for a FusedAdamW; got False."
    call = lambda: opt.load_state_dict(plain.state_dict())  # noqa: E731
    assert_changes_nothing(opt, [params], ValueError, message, call)
    plain.save(tmp_path / "plain")
    with pytest.raises(ValueError, match=f"^{message}$"):
        FusedAdamW.load(tmp_path / "plain")
    opt.save(tmp_path / "run")
    for cls in (FusedAdam, FusedAdamW):
        other = cls.load(tmp_path / "run")
        assert other.decoupled_weight_decay
        assert other.weight_decay == 0.01
    assert_goes_on(opt, params, other, grads[1:])


MISSING = {"momentum": "momentum_buffer", "rmsprop-centered": "grad_avg", "adadelta": "acc_delta"}


@pytest.mark.parametrize("name", MISSING)
def test_a_state_must_be_whole(rng, name):
    grads = gradients(rng, 2)
    opt, params = stepped(name, grads)
    entries = opt.state_dict()
    state = entries.pop(MISSING[name])
    message = f"state_dict must have the key {MISSING[name]!r}; got {{}}."
    keys = [key for key in ("step", *opt._hyperparameters.rule.states) if key in entries]
    call = lambda: opt.load_state_dict(entries)  # noqa: E731
    assert_changes_nothing(opt, [params], ValueError, message.format(keys), call)
    entries[MISSING[name]] = state[:-1]
    first = opt._hyperparameters.rule.states[0]
    call = lambda: opt.load_state_dict(entries)  # noqa: E731
    message = f"state_dict['{MISSING[name]}'] must have the size of the state ({N}); got {N - 1}."
    assert first
    assert_changes_nothing(opt, [params], ValueError, message, call)


# --- Nothing is kept ----------------------------------------------------------------------------------------


def test_sgd_keeps_nothing_but_its_steps(rng):
    opt, params = stepped("sgd", gradients(rng, 3))
    assert opt.state.step == 3
    assert opt.state.moments == {}
    entries = opt.state_dict()
    assert not any(isinstance(value, np.ndarray) for value in entries.values())
    other = FusedSGD()
    other.load_state_dict(entries)
    assert other.state.step == 3
    other.step(params, params.copy())
    assert other.state.step == 4


def test_sgd_knows_its_size(rng, tmp_path):
    """From the first step on, and from a checkpoint."""
    opt, params = stepped("sgd", gradients(rng, 1))
    opt.save(tmp_path / "run")
    other = FusedSGD.load(tmp_path / "run")
    short = np.ones(N - 1, np.float32)
    message = f"flat_grads must have the size of the state ({N}); got {N - 1}."
    for one in (opt, other):
        assert_changes_nothing(
            one, [params, short], ValueError, message, lambda one=one: one.accumulate(short)
        )
    message = f"flat_params must have the size of the state ({N}); got {N - 1}."
    for one in (opt, other):
        call = lambda one=one: one.step(short, short.copy())  # noqa: E731
        assert_changes_nothing(one, [params, short], ValueError, message, call)
    with checkpoint.Checkpoint(tmp_path / "run") as file:
        assert file.size == N


@pytest.mark.parametrize("name", ["sgd", "momentum"])
def test_shards_have_the_bits_of_the_whole(rng, tmp_path, name):
    segments = [Segment(3, 17, lr=schedules.constant(0.3)), Segment(20, 30, frozen=True)]
    grads = gradients(rng, 3)
    opt, params = stepped(name, grads[:1], segments=segments)
    opt.accumulate(grads[1])
    opt.save(tmp_path / "run")
    start = params.copy()
    opt.step(params)
    opt.step(params, grads[2])
    for cut in ((0, 10), (10, 25), (25, N)):
        part = start[slice(*cut)].copy()
        shard = FusedSGD.load(tmp_path / "run", shard=cut)
        assert shard.offset == cut[0]
        shard.step(part)
        shard.step(part, grads[2][slice(*cut)])
        assert_same_bits(part, params[slice(*cut)])


def test_a_checkpoint_of_sgd_in_the_old_form_has_its_segments(rng, tmp_path, monkeypatch):
    """Without a size: all of it comes back."""
    segments = [Segment(3, 17, lr=0.3), Segment(20, 30, frozen=True)]
    opt, params = stepped("sgd", gradients(rng, 1), segments=segments)
    opt.save(tmp_path / "run")
    from fastadam.containers import Container

    class Old(Container):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.texts["optimizer"] = re.sub(r'"size": \d+, ', "", self.texts["optimizer"])

    monkeypatch.setattr(checkpoint, "Container", Old)
    with checkpoint.Checkpoint(tmp_path / "run") as file:
        assert file.size is None
    other = FusedSGD()
    other.load_state_dict(checkpoint.read(tmp_path / "run"))
    assert other.segments == opt.segments
    assert_goes_on(opt, params, FusedSGD.load(tmp_path / "run"), gradients(rng, 2))


@pytest.mark.parametrize("master", ["float32", "split"])
@pytest.mark.parametrize("how", [*WAYS, "file"])
@pytest.mark.parametrize("name", ["sgd", "momentum"])
def test_masters_come_back(rng, tmp_path, name, how, master):
    import ml_dtypes

    grads = gradients(rng, 6)
    opt = make(name, master_params=master, lr=1e-4)
    params = np.linspace(-1, 1, N).astype(ml_dtypes.bfloat16)
    for g in grads[:3]:
        opt.step(params, g)
    if how == "file":
        opt.save(tmp_path / "run")
        other = FusedSGD.load(tmp_path / "run")
    else:
        other = resume(opt, how, make(name, master_params=master))
    copied = params.copy()
    for g in grads[3:]:
        opt.step(params, g)
        other.step(copied, g)
    assert_same_bits(params.view(np.int16), copied.view(np.int16))
    key = "param_master" if master == "float32" else "param_remainder"
    assert_same_bits(getattr(opt.state, key), getattr(other.state, key))


# --- What must stay -----------------------------------------------------------------------------------------

KEEPS = [
    ("momentum", "momentum", 0.0, ["momentum_buffer"], []),
    ("sgd", "momentum", 0.9, [], ["momentum_buffer"]),
    ("rmsprop", "momentum", 0.9, ["square_avg"], ["square_avg", "momentum_buffer"]),
    ("rmsprop-momentum", "momentum", 0.0, ["square_avg", "momentum_buffer"], ["square_avg"]),
]


@pytest.mark.parametrize(("name", "attribute", "value", "old", "new"), KEEPS, ids=str)
def test_what_is_kept_cannot_change(rng, name, attribute, value, old, new):
    opt, params = make(name), np.linspace(-1, 1, N, dtype=np.float32)
    setattr(opt, attribute, value)  # before the first step it can
    assert getattr(opt, attribute) == value
    opt, params = stepped(name, gradients(rng, 1))
    message = (
        f"{attribute} must keep what the state has, {old}; got {value}, which needs {new}."
        " Reset the optimizer first."
    )
    call = lambda: setattr(opt, attribute, value)  # noqa: E731
    assert_changes_nothing(opt, [params], ValueError, message, call)
    opt.reset()
    setattr(opt, attribute, value)
    opt.step(params, params.copy())
    assert list(opt.state.moments) == new


def test_momentum_of_nesterov_cannot_be_0():
    opt = FusedSGD(momentum=0.9, nesterov=True)
    message = r"^momentum must be greater than 0 with nesterov=True; got 0\.0\.$"
    with pytest.raises(ValueError, match=message):
        opt.momentum = 0
    with pytest.raises(ValueError, match=r"^dampening must be 0 with nesterov=True; got 0\.5\.$"):
        opt.dampening = 0.5
    assert (opt.momentum, opt.dampening) == (0.9, 0.0)


def test_an_optimizer_with_a_schedule_is_copied(rng):
    grads = gradients(rng, 4)
    opt, params = stepped("nadam", grads[:2], lr=schedules.linear_warmup(0.1, steps=3))
    assert_goes_on(opt, params, copy.deepcopy(opt), grads[2:])


# --- Segments -----------------------------------------------------------------------------------------------

FIELDS = [
    *((name, "betas", (0.5, 0.6)) for name in RULES if name not in HAS_BETAS),
    *((name, "eps", 0.1) for name in RULES if name not in HAS_EPS),
]


@pytest.mark.parametrize(("name", "field", "value"), FIELDS, ids=str)
def test_segments_have_no_field_that_the_optimizer_has_not(rng, name, field, value):
    opt, params = stepped(name, gradients(rng, 1))
    segments = [Segment(0, 2), Segment(2, 3, **{field: value})]
    kind = opt._hyperparameters.KIND
    message = f"segments[1].{field} must be None, as {kind} has no {field}; got a value."
    call = lambda: setattr(opt, "segments", segments)  # noqa: E731
    assert_changes_nothing(opt, [params], ValueError, message, call)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(name, segments=segments)
    array = FusedAdam(segments=segments).state_dict()["segments"]
    entries = {**opt.state_dict(), "segments": array}
    call = lambda: opt.load_state_dict(entries)  # noqa: E731
    assert_changes_nothing(opt, [params], ValueError, message, call)


def test_segments_of_a_checkpoint_must_fit(rng, tmp_path):
    opt, _ = stepped("lion", gradients(rng, 1))
    opt.save(tmp_path / "run")
    message = r"^segments\[0\]\.eps must be None, as lion has no eps; got a value\.$"
    with pytest.raises(ValueError, match=message):
        FusedLion.load(tmp_path / "run", segments=[Segment(0, 3, eps=0.1)])


@pytest.mark.parametrize("name", ["lion", "sgd", "nadam"])
def test_compiled_code_is_for_adam(rng, name):
    from fastadam.numba import compiled

    opt, params = stepped(name, gradients(rng, 1))
    kind = opt._hyperparameters.KIND
    message = f"^opt must be a FusedAdam for .*; got one of '{kind}'\\.$"
    with pytest.raises(ValueError, match=message), compiled(opt, params):
        pass


def test_public_classes_are_documented():
    for name in fastadam.__all__:
        if name.startswith("Fused"):
            assert "Parameters\n" in getattr(fastadam, name).__doc__
            assert "References\n" in getattr(fastadam, name).__doc__
