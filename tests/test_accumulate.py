"""Gradients added up over calls: their mean, in every memory."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from checkpoints import WAYS, resume
from cuda_steps import DTYPES, MODES, assert_same, problem
from tolerances import assert_same_bits

from fastadam import FusedAdam, Segment
from fastadam.kernels import cpu, segments, threads

SIZES = [0, 1, 33, cpu.PARALLEL_FROM + 5]


def stepped(params, gradients, calls, *, scale=1.0, **options):
    """Step with sums of so many gradients by hand; the reference."""
    opt, params = FusedAdam(**options), params.copy()
    for start in range(0, len(gradients), calls):
        total = np.zeros_like(params)
        for grads in gradients[start : start + calls]:
            total = total + grads
        opt.step(params, total, grad_scale=scale * calls)
    return opt, params


def accumulated(params, gradients, calls, *, put=np.array, scale=None, **options):
    opt, params = FusedAdam(**options), put(params)
    for k, grads in enumerate(gradients, start=1):
        opt.accumulate(put(grads))
        if k % calls == 0:
            opt.step(params, grad_scale=scale)
    return opt, params


@pytest.mark.parametrize("how", ["numba", "pool"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_takes_the_mean(rng, monkeypatch, dtype, how):
    if how == "pool":
        monkeypatch.setattr(threads, "numba_is_safe", lambda: False)
    for size in SIZES:
        params, gradients = problem(rng, size, dtype, steps=6)
        opt, new = accumulated(params, gradients, 3, scale=4.0, max_grad_norm=1.0)
        expected, wanted = stepped(params, gradients, 3, scale=4.0, max_grad_norm=1.0)
        assert_same_bits(new, wanted)
        assert opt.state.step == 2
        assert opt.last_step == expected.last_step


@MODES
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_gpu_memory(cupy, rng, dtype, capturable):
    for size in SIZES[:3]:
        params, gradients = problem(rng, size, dtype, steps=6)
        for options in ({}, {"max_grad_norm": 1.0, "skip_nonfinite": True}):
            device = accumulated(
                params, gradients, 2, put=cupy.asarray, scale=4.0, capturable=capturable, **options
            )
            assert_same(device, stepped(params, gradients, 2, scale=4.0, **options))


def test_a_scale_in_device_memory(cupy, rng):
    params, gradients = problem(rng, 33, steps=4)
    scale = cupy.asarray(np.full(1, 3.0, np.float32))
    device = accumulated(params, gradients, 2, put=cupy.asarray, scale=scale)
    assert_same(device, stepped(params, gradients, 2, scale=3.0))


def test_sums_and_steps_on_different_streams_are_ordered(cupy):
    first, second, third = (cupy.cuda.Stream() for _ in range(3))
    opt, params = FusedAdam(), cupy.asarray(np.ones(9))
    grads = cupy.asarray(np.ones(9))
    opt.accumulate(grads, stream=first)
    before = len(cupy.log)
    opt.accumulate(grads, stream=second)
    opt.step(params, stream=third)
    queued = [(entry[0], *entry[2:]) for entry in cupy.log[before:] if entry[0] != "allocate"]
    assert queued == [
        ("wait", second.ptr, first.ptr),
        ("accumulate", second.ptr, 1),
        ("wait", first.ptr, second.ptr),
        ("wait", third.ptr, second.ptr),
        ("step", third.ptr, 1),
        ("wait", second.ptr, third.ptr),
    ]


def test_gradients_are_cleared_when_they_are_added(cupy, rng):
    for put, get in ((np.array, np.asarray), (cupy.asarray, lambda array: array.host)):
        opt, grads = FusedAdam(zero_grads=True), put(np.ones(9))
        opt.accumulate(grads)
        assert not get(grads).any()
        opt.accumulate(put(np.full(9, 3.0)))
        params = put(np.zeros(9))
        opt.step(params)
        assert opt.last_step.step == 1
        assert (get(params) < 0).all()


def test_a_skipped_sum_is_dropped(rng):
    opt, params = FusedAdam(skip_nonfinite=True), np.ones(9)
    opt.accumulate(np.full(9, np.nan))
    opt.step(params)
    assert opt.last_step.skipped
    opt.accumulate(np.ones(9))
    opt.step(params)
    assert_same_bits(params, stepped(np.ones(9), [np.ones(9)], 1)[1])


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("on_device", [False, True])
def test_a_checkpoint_in_the_middle_of_a_sum(cupy, rng, how, on_device):
    params, gradients = problem(rng, 33, steps=4)
    put = cupy.asarray if on_device else np.array
    opt = accumulated(params, gradients[:3], 2, put=put)
    other = resume(opt[0], how, FusedAdam())
    for one in (other, copy.deepcopy(other)):
        rest = put(getattr(opt[1], "host", opt[1]))
        one.accumulate(put(gradients[3]))
        one.step(rest)
        expected = stepped(params, gradients, 2)[1]
        assert_same_bits(getattr(rest, "host", rest), expected)


def test_a_loaded_sum_needs_no_further_call(cupy, rng):
    params, gradients = problem(rng, 33, steps=1)
    opt = FusedAdam()
    opt.accumulate(gradients[0])
    for put in (np.array, cupy.asarray):
        other, buffer = FusedAdam(), put(params)
        other.load_state_dict(opt.state_dict())
        other.step(buffer)
        assert_same_bits(getattr(buffer, "host", buffer), stepped(params, gradients, 1)[1])


def test_reset_drops_the_sum():
    opt = FusedAdam()
    opt.accumulate(np.ones(3))
    opt.reset()
    with pytest.raises(ValueError, match="nothing was accumulated"):
        opt.step(np.ones(3))


def test_what_is_refused():
    def fresh(calls=1):
        opt = FusedAdam()
        for _ in range(calls):
            opt.accumulate(np.ones(4))
        return opt

    own = fresh()
    own.step(np.ones(4))
    cases = [
        (lambda: fresh(0).step(np.ones(4)), ValueError,
         "flat_grads must be given where nothing was accumulated; got None."),
        (lambda: fresh().step(np.ones(4), np.ones(4)), ValueError,
         "flat_grads must be None after accumulate; got ndarray. Accumulate it, too."),
        (lambda: fresh().step(np.ones(5)), ValueError,
         "flat_params must have the size of the accumulated gradients (4); got 5."),
        (lambda: fresh().accumulate(np.ones(5)), ValueError,
         "flat_grads must have the size of the accumulated gradients (4); got 5."),
        (lambda: fresh().accumulate(np.ones(4, np.float32)), TypeError,
         "flat_grads must have the dtype of the accumulated gradients (float64); got float32."),
        (lambda: own.accumulate(np.ones(5)), ValueError,
         "flat_grads must have the size of the state (4); got 5."),
        (lambda: own.accumulate(own.state.exp_avg), ValueError,
         "flat_grads must not overlap the state; got buffers that share memory. Pass a copy."),
        (lambda: fresh().accumulate(np.ones(4), stream=1), TypeError,
         "stream must be None for buffers in CPU memory; got a stream."),
        (lambda: FusedAdam(capturable=True).accumulate(np.ones(4)), TypeError,
         "flat_grads must be in GPU memory with capturable=True; got CPU memory."),
    ]  # fmt: skip
    for call, error, message in cases:
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == message


def test_a_frozen_segment_does_not_keep_its_sum(rng):
    """Thawed, it starts from nothing."""
    opt, params = FusedAdam(segments=[Segment(0, 2, frozen=True)]), np.zeros(4)
    opt.accumulate(np.full(4, 5.0))
    opt.step(params)
    assert_same_bits(params[:2], np.zeros(2))
    opt.segments = ()
    opt.accumulate(np.array([0.0, 0.0, 1.0, 1.0]))
    opt.step(params)
    assert_same_bits(params[:2], np.zeros(2))


def test_an_interrupted_step_has_spent_the_whole_sum(monkeypatch):
    """What frozen segments have added up, too: it must not be in a later mean."""
    opt, params = FusedAdam(segments=[Segment(0, 2, frozen=True)]), np.zeros(4)
    opt.accumulate(np.ones(4))
    loop = segments.serial

    def interrupted(*arguments):
        loop(*arguments)
        if arguments[3].size:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(segments, "serial", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step(params)
    assert opt.state.step == 1
    opt.segments = ()
    opt.accumulate(np.ones(4))
    opt.step(params)
    np.testing.assert_allclose(opt.state.exp_avg, [0.1, 0.1, 0.19, 0.19])
