"""Steps that a signal or a missing compiler interrupts: each is taken whole and counted, or not at all."""

from __future__ import annotations

import signal

import numpy as np
import pytest
from phase_cases import WHOLE, N, assert_same, gradients, stepped
from tolerances import assert_same_bits

from fastadam import FusedAdam, state
from fastadam.kernels import cpu, norms


@pytest.mark.parametrize("steps", [0, 2])
def test_an_interrupt_during_the_kernel_loses_no_step(rng, monkeypatch, steps):
    grads = gradients(rng, 4)
    opt, params = FusedAdam(**WHOLE), np.linspace(-1, 1, N, dtype=np.float32)
    for g in grads[:steps]:
        opt.step(params, g.copy())
    loop, given = cpu.whole_serial, grads[steps].copy()

    def interrupted(*arguments):
        loop(*arguments)
        if arguments[0].size:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cpu, "whole_serial", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step(params, given)
    assert not given.any()
    assert (opt.last_step.step, opt.last_step.skipped) == (steps + 1, False)
    opt.step(params, grads[steps + 1].copy())
    assert_same((opt, params), stepped(grads[: steps + 2], **WHOLE))


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("loop", ["serial", "fold"])
def test_an_interrupt_before_the_kernel_changes_nothing(rng, monkeypatch, steps, loop):
    """In the pass over the gradients, nothing is written yet."""
    grads = gradients(rng, 3)
    opt, params = FusedAdam(**WHOLE), np.linspace(-1, 1, N, dtype=np.float32)
    for g in grads[:steps]:
        opt.step(params, g.copy())
    before, last = (opt.state_dict(), params.copy()), opt.last_step
    measured, given = getattr(norms, loop), grads[steps].copy()

    def interrupted(*arguments):
        measured(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(norms, loop, interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step(params, given)
    np.testing.assert_equal(opt.state_dict(), before[0])
    assert_same_bits(params, before[1])
    assert_same_bits(given, grads[steps])
    assert opt.last_step == last
    opt.step(params, given)
    assert_same((opt, params), stepped(grads[: steps + 1], **WHOLE))


@pytest.mark.parametrize("loop", ["whole_serial", "measure"])
def test_a_kernel_that_does_not_compile_changes_nothing(rng, monkeypatch, loop):
    opt, params = stepped(gradients(rng, 2))
    for name in ("max_grad_norm", "max_grad_value"):
        setattr(opt, name, 0.5)
    before, params_before, last = opt.state_dict(), params.copy(), opt.last_step

    def fails(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpu, loop, fails)
    with pytest.raises(RuntimeError, match="no compiler"):
        opt.step(params, np.ones(N, np.float32))
    np.testing.assert_equal(opt.state_dict(), before)
    assert_same_bits(params, params_before)
    assert opt.last_step == last


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_an_interrupted_swap_is_whole(rng, monkeypatch):
    """Many signals while many small blocks are exchanged: all are, or none."""
    monkeypatch.setattr(state, "_SWAPPED", 64)
    opt, params = FusedAdam(ema_decay=0.9), rng.standard_normal(2**16).astype(np.float32)
    opt.step(params, rng.standard_normal(2**16).astype(np.float32))
    pair = [params.copy(), opt.state.param_ema.copy()]

    def interrupt(*_):
        raise KeyboardInterrupt

    handler, interrupts = signal.signal(signal.SIGALRM, interrupt), 0
    try:
        for number in range(200):
            swapped = False
            try:
                signal.setitimer(signal.ITIMER_REAL, 2e-5 * (number % 50 + 1))
                opt.swap_ema(params)
                signal.setitimer(signal.ITIMER_REAL, 0)
                swapped = True
            except KeyboardInterrupt:
                interrupts += 1
            now = [params, opt.state.param_ema]
            assert any(
                all(np.array_equal(a, b) for a, b in zip(now, order, strict=True))
                for order in (pair, pair[::-1])
            )
            if swapped:
                assert np.array_equal(now[0], pair[1])
            pair = [array.copy() for array in now]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert interrupts > 10
