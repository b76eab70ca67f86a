"""Telemetry between steps: what was told stays, copies, interrupts, what is refused, what is compiled."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
from phase_cases import assert_changes_nothing
from telemetry_oracle import assert_same, fields, observe, plain, stepped, told
from tolerances import assert_same_bits

import fastadam
from fastadam import FusedAdam, Segment, schedules
from fastadam.kernels import segment_norms, segments, telemetry
from fastadam.last_step import LastStep

N = 5000
COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda opt: pickle.loads(pickle.dumps(opt)),
}


def problem(rng, steps=3):
    return rng.standard_normal(N).astype(np.float32), [
        rng.standard_normal(N).astype(np.float32) for _ in range(steps)
    ]


def test_what_was_told_stays(rng):
    params, gradients = problem(rng)
    opt, kept = FusedAdam(telemetry=True), []
    for grads in gradients:
        opt.step(params, grads)
        kept.append((opt.last_step, repr(copy.deepcopy(opt.last_step))))
    late, params = FusedAdam(telemetry=True), problem(rng)[0]
    unread = []
    for grads in gradients:
        late.step(params, grads)
        unread.append(late.last_step)
    assert [repr(last) for last, _ in kept] == [told for _, told in kept]
    assert len({last.grad_norm for last in unread}) == 3
    assert [last.grad_norm for last in unread] == [last.grad_norm for last, _ in kept]
    assert unread[-1] is late.last_step


def test_what_was_read_keeps_nothing_else(rng):
    params, (grads, *_) = problem(rng)
    opt = FusedAdam(telemetry=True)
    opt.step(params, grads)
    last, owner = opt.last_step, weakref.ref(opt._segmented._telemetry)
    assert last.nonfinite == 0
    del opt
    gc.collect()
    assert owner() is None
    assert last.step == 1


def test_a_failed_step_changes_nothing_that_was_told():
    """Of the learning rate, too, where another schedule fails after the optimizer's own."""
    fails = Segment(0, 2, lr=lambda step: 0.1 if step == 1 else -1.0)
    opt, params = FusedAdam(lambda step: 0.1 / step, segments=[fails]), np.ones(4)
    opt.step(params, np.ones(4))
    with pytest.raises(ValueError, match="segments"):
        opt.step(params, np.ones(4))
    assert opt.last_step.lr == 0.1


def test_reading_again_tells_the_same(rng, monkeypatch):
    """A reading that was interrupted has used nothing up."""
    params, (grads, *_) = problem(rng)
    opt, before, fold = FusedAdam(telemetry=True), params.copy(), telemetry.fold
    opt.step(params, grads)

    def interrupted(*arguments):
        fold(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(telemetry, "fold", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.last_step.grad_norm  # noqa: B018
    assert_same(fields(opt.last_step), told(before, params, grads, opt.state.exp_avg))


def test_on_and_off_between_steps(rng):
    params, gradients = problem(rng, steps=4)
    opt, actual = FusedAdam(), params.copy()
    assert opt.telemetry is False
    for grads, on in zip(gradients, [False, True, True, False], strict=True):
        opt.telemetry = on
        assert opt.telemetry is on
        if on:
            observe(opt, actual, grads)
        else:
            opt.step(actual, grads)
            assert set(fields(opt.last_step).values()) == {None}
    assert_same_bits(actual, stepped(params, gradients)[0][0])


@pytest.mark.parametrize("segments", [[], [Segment(7, 90, frozen=True), Segment(90, 95, lr=0.1)]])
def test_a_new_learning_rate(rng, segments):
    params, gradients = problem(rng, steps=6)
    options = {"segments": segments, "weight_decay": 0.1, "decoupled_weight_decay": True}
    opt, other = FusedAdam(telemetry=True, **options), FusedAdam(**options)
    actual, expected = params.copy(), params.copy()
    schedule = schedules.linear(0.1, steps=4)
    for grads, lr in zip(gradients, [0.1, 0.1, 0.3, schedule, schedule, 0.2], strict=True):
        opt.lr = other.lr = lr
        assert observe(opt, actual, grads).lr == (lr(opt.state.step) if callable(lr) else lr)
        other.step(expected, grads)
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)
def test_copies(rng, way):
    params, (first, *gradients) = problem(rng)
    opt = FusedAdam(telemetry=True)
    opt.step(params, first)
    other, their_params, last = way(opt), params.copy(), opt.last_step
    assert other.last_step == last
    for grads in gradients:
        if way is copy.copy:  # they share the state
            other.step(their_params, grads)
            continue
        observe(opt, params, grads)
        observe(other, their_params, grads)
        assert_same_bits(params, their_params)
    assert last == LastStep(lambda: last._done)
    assert (other.last_step == last) is False


def test_checkpoints_and_resets(rng):
    params, gradients = problem(rng)
    opt = FusedAdam(telemetry=True)
    observe(opt, params, gradients[0])
    entries = opt.state_dict()
    assert entries["telemetry"] is True
    assert "segments" not in entries
    resumed, copied = FusedAdam(), params.copy()
    resumed.load_state_dict(entries)
    assert (resumed.telemetry, resumed.last_step, resumed.segments) == (True, None, ())
    for grads in gradients[1:]:
        observe(opt, params, grads)
        observe(resumed, copied, grads)
        assert_same_bits(params, copied)
    resumed.load_state_dict({**entries, "telemetry": False})
    resumed.step(copied, grads)
    assert resumed.last_step.grad_norm is None
    opt.reset()
    assert opt.last_step is None
    observe(opt, params, gradients[0])
    assert repr(opt).endswith("telemetry=True)")


# --- Interrupts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "features", [{}, {"max_grad_norm": 1.0, "zero_grads": True}], ids=["plain", "clipped"]
)
def test_an_interrupt_during_the_kernel_loses_no_step(rng, monkeypatch, features):
    params, gradients = problem(rng)
    opt, actual, loop = FusedAdam(telemetry=True, **features), params.copy(), telemetry.serial
    given = [grads.copy() for grads in gradients]
    opt.step(actual, given[0])

    def interrupted(*arguments):
        loop(*arguments)
        if arguments[0].size and arguments[3].size:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(telemetry, "serial", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step(actual, given[1])
    written, last = stepped(params, gradients[:2], telemetry=True, **features)
    assert opt.last_step == last
    assert_same_bits(actual, written[0])
    assert given[1].any() is np.bool_(not features)
    opt.step(actual, given[2])
    assert_same_bits(actual, stepped(params, gradients, **features)[0][0])


@pytest.mark.parametrize(
    ("module", "name"),
    [(telemetry, "serial"), (telemetry.Telemetry, "plan"), (segment_norms.norms, "serial")],
)
def test_a_failure_before_the_kernel_changes_nothing(rng, monkeypatch, module, name):
    params, (grads, *_) = problem(rng)
    opt = FusedAdam(telemetry=True)
    opt.step(params, grads)
    opt.max_grad_norm = 1.0
    kept = opt.last_step

    def fails(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(module, name, fails)
    assert_changes_nothing(opt, [params, grads], RuntimeError, "no compiler", lambda: opt.step(params, grads))
    assert opt.last_step is kept


# --- Refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_no_flag(value):
    message = f"telemetry must be True or False; got {type(value).__name__}."
    for set_ in (lambda: FusedAdam(telemetry=value), lambda: setattr(FusedAdam(), "telemetry", value)):
        with pytest.raises(TypeError) as caught:
            set_()
        assert str(caught.value) == message


def test_a_learning_rate_out_of_range():
    opt, params, grads = FusedAdam(telemetry=True), np.ones(8, np.float32), np.ones(8, np.float32)
    opt.step(params, grads)
    opt.lr = 1e39
    message = "lr must be at most 3.402823e+38 for float32 buffers; got 1e+39."
    assert_changes_nothing(opt, [params, grads], ValueError, message, lambda: opt.step(params, grads))
    opt.lr = 0.5
    assert observe(opt, params, grads).lr == 0.5


def test_a_schedule_that_raises():
    opt = FusedAdam(lambda step: 0.1 if step < 2 else -1.0, telemetry=True)
    params, grads = np.ones(8, np.float32), np.ones(8, np.float32)
    opt.step(params, grads)
    message = "lr(2) must be at least 0; got -1.0."
    assert_changes_nothing(opt, [params, grads], ValueError, message, lambda: opt.step(params, grads))


# --- Compiling ----------------------------------------------------------------------------------------------


def signatures():
    loops = telemetry.serial, telemetry.parallel, telemetry.fold, segments.serial, segments.parallel
    return [len(loop.signatures) for loop in loops]


def test_a_step_after_warmup_compiles_nothing(rng):
    options = {"telemetry": True, "amsgrad": True, "ema_decay": 0.9}
    fastadam.warmup(**options)
    before = signatures()
    for size in (100, telemetry.PARALLEL_FROM):
        params, grads = np.ones(size, np.float32), np.ones(size, np.float32)
        opt = FusedAdam(**options)
        for lr in (0.1, 0.2, schedules.linear(0.1, steps=4)):
            opt.lr = lr
            opt.step(params, grads)
            assert opt.last_step.vanished == 0
        opt.segments = [Segment(3, 50, lr=0.4)]
        opt.step(params, grads)
        grads.flags.writeable = False
        opt.step(params, grads)
    assert signatures() == before


def test_without_it_nothing_of_it_is_used(rng, monkeypatch):
    def fails(*_):
        raise AssertionError

    monkeypatch.setattr(telemetry.Telemetry, "__init__", fails)
    params, gradients = problem(rng)
    options = {"segments": [Segment(0, 9, lr=0.3)], "max_grad_norm": 1.0}
    last = stepped(params, gradients, **options)[1]
    assert plain(last)._replace(grad_norm=last.grad_norm, nonfinite=0) == last._done
