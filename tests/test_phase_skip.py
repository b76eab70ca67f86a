"""Steps that are not taken: inf and NaN anywhere write nothing, and dynamic loss scaling from end to end."""

from __future__ import annotations

import numpy as np
import pytest
from oracles import PHASES
from tolerances import EPS, assert_same_bits

from fastadam import DynamicLossScale, FusedAdam
from fastadam.kernels import cpu, norms

SIZE = 131
BAD = [np.inf, -np.inf, np.nan]
WHOLE = {**PHASES[-1], "skip_nonfinite": True, "max_grad_norm": 1.0}


def spoilt(grads, place, value):
    grads = grads.copy()
    grads[place] = value
    return grads


def assert_skips(opt, params, grads, **scale):
    before, given, last = (opt.state_dict(), params.copy()), grads.copy(), opt.last_step
    opt.step(params, grads, **scale)
    assert_same_bits(params, before[1], "params")
    for name, value in opt.state_dict().items():
        if isinstance(value, np.ndarray):
            assert_same_bits(value, before[0][name], name)
        else:
            assert value == before[0][name], name
    assert_same_bits(grads, np.zeros_like(given) if opt.zero_grads else given, "grads")
    assert opt.last_step.skipped
    assert opt.last_step.step == opt.state.step == (0 if last is None else last.step)
    assert not np.isfinite(opt.last_step.grad_norm)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("flags", [{"skip_nonfinite": True}, WHOLE], ids=["alone", "whole"])
@pytest.mark.parametrize("value", BAD)
def test_at_every_place(rng, dtype, value, flags):
    """Each place of a vector, the first, the last, chunks and tails of them."""
    params, grads = (rng.standard_normal(SIZE).astype(dtype) for _ in range(2))
    opt = FusedAdam(**flags)
    opt.step(params, grads.copy())
    for place in range(SIZE):
        assert_skips(opt, params, spoilt(grads, place, value), grad_scale=7.0)
    opt.step(params, grads.copy())
    assert not opt.last_step.skipped
    assert opt.state.step == 2


@pytest.mark.parametrize("place", [0, 2047, 2048, 5000, cpu.PARALLEL_FROM, norms.PARALLEL_FROM, -1])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_in_a_large_buffer(rng, dtype, place):
    size = norms.PARALLEL_FROM + 77
    params, grads = (rng.standard_normal(size).astype(dtype) for _ in range(2))
    opt = FusedAdam(**WHOLE)
    opt.step(params, grads.copy())
    assert_skips(opt, params, spoilt(grads, place, np.nan))


@pytest.mark.parametrize("value", BAD)
def test_opposite_infinities_and_all_of_them(rng, value):
    params, opt = np.ones(64, np.float32), FusedAdam(skip_nonfinite=True)
    opt.step(params, np.ones(64, np.float32))
    assert_skips(opt, params, np.full(64, value, np.float32))
    assert_skips(opt, params, np.array([np.inf, -np.inf] * 32, np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_finite_is_not_skipped(dtype):
    """Where squares overflow, and where a division by the scale does: the gradient is looked at as given."""
    largest = np.finfo(dtype).max
    for grads, scale in (([largest, -largest, 1e-45, 0], None), ([largest, 1, 1, 1], 1e-3)):
        opt = FusedAdam(skip_nonfinite=True)
        opt.step(np.ones(4, dtype), np.array(grads, dtype), grad_scale=scale)
        assert opt.state.step == 1
        assert not opt.last_step.skipped


@pytest.mark.parametrize("flags", [{"skip_nonfinite": True}, WHOLE], ids=["alone", "whole"])
@pytest.mark.parametrize("places", [{0}, {0, 1, 2}, {3}, {0, 3, 4, 7}])
def test_goes_on_as_if_it_had_not_been(rng, flags, places):
    """The first step, too: the average begins with the parameters before the first that was taken."""
    start = rng.standard_normal(SIZE).astype(np.float32)
    gradients = [rng.standard_normal(SIZE).astype(np.float32) for _ in range(8)]
    opt, params = FusedAdam(lr=lambda step: 0.1 / step, **flags), start.copy()
    for number, grads in enumerate(gradients):
        if number in places:
            assert_skips(opt, params, spoilt(grads, number, np.inf))
            assert opt.last_step.lr == 0.1 / (opt.state.step + 1)
        else:
            opt.step(params, grads.copy())
    other, expected = FusedAdam(lr=lambda step: 0.1 / step, **flags), start.copy()
    for number, grads in enumerate(gradients):
        if number not in places:
            other.step(expected, grads.copy())
    assert_same_bits(params, expected)
    assert opt.state.step == 8 - len(places)
    assert opt.last_step == other.last_step or opt.last_step.skipped
    for name, moment in other.state.moments.items():
        assert_same_bits(opt.state.moments[name], moment, name)


def test_an_empty_buffer_is_finite():
    opt = FusedAdam(**WHOLE)
    opt.step(np.empty(0, np.float32), np.empty(0, np.float32))
    assert (opt.last_step.step, opt.last_step.grad_norm, opt.last_step.clip_factor) == (1, 0.0, 1.0)


def test_a_skipped_step_on_buffers_of_another_kind_is_refused_first():
    opt = FusedAdam(skip_nonfinite=True)
    opt.step(np.ones(8), np.ones(8))
    with pytest.raises(ValueError, match="size of the state"):
        opt.step(np.ones(9), np.full(9, np.inf))
    assert not opt.last_step.skipped


# --- Dynamic loss scaling, end to end -----------------------------------------------------------------------

STEPS = 200


@pytest.mark.parametrize("zero_grads", [False, True])
def test_dynamic_loss_scaling_against_gradscaler(rng, zero_grads):
    """The loss of a linear model in float16, whose gradients overflow where the scale is too large.

    Both see the same true gradients, so the scales are equal, and the parameters as near as two float32 steps
    of AdamW are: 40 eps of lr and two roundings of the parameter a step (see ``phase_tolerance``).
    """
    torch = pytest.importorskip("torch")
    config = {"init_scale": 2.0**16, "growth_interval": 7}
    lr, size = 1e-2, 64
    start = rng.standard_normal(size).astype(np.float32)
    theirs = torch.amp.GradScaler("cpu", **config)
    parameter = torch.from_numpy(start.copy()).requires_grad_()
    adamw = torch.optim.AdamW([parameter], lr=lr, weight_decay=0.1, foreach=False)
    ours, params, grads = DynamicLossScale(**config), start.copy(), np.empty(size, np.float32)
    opt = FusedAdam(
        lr, weight_decay=0.1, decoupled_weight_decay=True, skip_nonfinite=True, zero_grads=zero_grads
    )

    skipped = 0
    for _ in range(STEPS):
        true = (rng.standard_normal(size) + 0.2).astype(np.float16)
        loss = (parameter.half() * torch.from_numpy(true)).float().sum()
        parameter.grad = None
        theirs.scale(loss).backward()
        with np.errstate(over="ignore"):
            grads[:] = np.float16(ours.scale) * true
        assert_same_bits(grads, parameter.grad.numpy())
        theirs.step(adamw)
        theirs.update()
        opt.step(params, grads, grad_scale=ours.scale)
        ours.update(opt.last_step.skipped)
        skipped += opt.last_step.skipped
        assert ours.scale == theirs.get_scale()
        assert not (zero_grads and grads.any())
    assert 5 < skipped < STEPS / 2
    assert opt.state.step == STEPS - skipped == int(adamw.state[parameter]["step"])
    room = STEPS * (40 * EPS[params.dtype] * lr + np.spacing(np.float32(4)))
    np.testing.assert_allclose(params, parameter.detach().numpy(), rtol=0, atol=room)
    assert room < lr / 10
