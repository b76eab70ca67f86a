"""Dynamic loss scaling: against PyTorch, hysteresis against its definition, checkpoints, errors."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest

from fastadam import DynamicLossScale

CONFIGS = [
    {},
    {"growth_interval": 1},
    {"growth_interval": 5},
    {"growth_interval": 5, "growth_factor": 4.0, "backoff_factor": 0.25},
    {"init_scale": 1000.0, "growth_interval": 3, "growth_factor": 1.5, "backoff_factor": 0.7},
    {"init_scale": 0.1, "growth_interval": 7, "growth_factor": 1.0001, "backoff_factor": 0.9999},
]


def config_id(config):
    return "-".join(f"{name}={value:g}" for name, value in config.items()) or "defaults"


def scales(scaler, overflows):
    seen = []
    for found_inf in overflows:
        scaler.update(bool(found_inf))
        seen.append(scaler.scale)
    return seen


def pytorch_scales(overflows, **config):
    torch = pytest.importorskip("torch")
    theirs = torch.amp.GradScaler("cpu", **config)
    param = torch.zeros(3, requires_grad=True)
    opt = torch.optim.SGD([param], lr=0.0)
    seen = []
    for found_inf in overflows:
        theirs.scale(torch.ones(()))  # makes its scale, the first time
        param.grad = torch.tensor([1.0, np.inf if found_inf else 2.0, np.nan if found_inf else 3.0])
        theirs.step(opt)
        theirs.update()
        seen.append(theirs.get_scale())
    return seen


# --- Against PyTorch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.02, 0.15, 0.5])
@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_equals_pytorch(rng, config, share):
    config = {"init_scale": 2.0**16, **config}
    overflows = rng.random(600) < share
    theirs = pytorch_scales(overflows, **config)
    normal = next((k for k, scale in enumerate(theirs) if scale < 2.0**-126), len(theirs))  # there ours stays
    assert normal > 100
    assert scales(DynamicLossScale(**config), overflows[:normal]) == theirs[:normal]


@pytest.mark.parametrize("growth_factor", [2.0, 3.0, 1e30])
def test_equals_pytorch_up_to_the_largest_scale(growth_factor):
    config = {"init_scale": 2.0**100, "growth_factor": growth_factor, "growth_interval": 2}
    overflows = [False] * 80
    seen = scales(DynamicLossScale(**config), overflows)
    assert seen == pytorch_scales(overflows, **config)
    assert np.isfinite(np.float32(seen)).all()
    assert seen[-1] == seen[-20]


def test_default_growth_interval():
    scaler = DynamicLossScale()
    assert set(scales(scaler, [False] * 1999)) == {2.0**16}
    assert scales(scaler, [False] * 2001) == [2.0**17] * 2000 + [2.0**18]


def test_never_becomes_zero():
    assert scales(DynamicLossScale(), [True] * 200)[-1] == 2.0**-126


# --- Hysteresis ---------------------------------------------------------------------------------------------


def by_definition(overflows, init_scale, growth_interval, hysteresis, low, high):
    """Each scale from the whole history so far, by counting in it. Factors 2 and 1/2."""
    scale, begin, seen = init_scale, 0, []  # `begin`: the step after the last growth
    for now, found_inf in enumerate(overflows):
        if found_inf:
            if sum(overflows[begin : now + 1]) >= hysteresis:
                scale = max(scale / 2, low)
        else:
            last_overflow = max((step for step in range(now) if overflows[step]), default=-1)
            if now - max(last_overflow, begin - 1) == growth_interval:
                scale, begin = min(scale * 2, high), now + 1
        seen.append(scale)
    return seen


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("growth_interval", [1, 2, 5])
@pytest.mark.parametrize("hysteresis", [1, 2, 3, 8])
def test_hysteresis_is_what_it_is_defined_to_be(rng, hysteresis, growth_interval, share):
    overflows = [bool(found_inf) for found_inf in rng.random(400) < share]
    scaler = DynamicLossScale(
        2.0**10,
        growth_interval=growth_interval,
        hysteresis=hysteresis,
        min_scale=1.0,
        max_scale=2.0**20,
    )
    expected = by_definition(overflows, 2.0**10, growth_interval, hysteresis, 1.0, 2.0**20)
    assert scales(scaler, overflows) == expected
    assert len(set(expected)) > 3


def test_hysteresis_by_hand():
    scaler = DynamicLossScale(64.0, growth_interval=3, hysteresis=2)
    no, inf = False, True
    # One is tolerated; a finite step between does not make up for it; from the second on each backs off.
    assert scales(scaler, [inf, no, inf, inf]) == [64.0, 64.0, 32.0, 16.0]
    # A growth makes up for all.
    assert scales(scaler, [no, no, no, inf, inf]) == [16.0, 16.0, 32.0, 32.0, 16.0]


def test_a_tolerated_overflow_restarts_the_growth_interval():
    scaler = DynamicLossScale(64.0, growth_interval=3, hysteresis=9)
    assert scales(scaler, [False, False, True, False, False, False]) == [64.0] * 5 + [128.0]


def test_bounds():
    scaler = DynamicLossScale(100.0, growth_interval=1, min_scale=30.0, max_scale=300.0)
    assert scales(scaler, [False, False, False, True]) == [200.0, 300.0, 300.0, 150.0]
    assert scales(scaler, [True, True, True, False]) == [75.0, 37.5, 30.0, 60.0]
    fixed = DynamicLossScale(64.0, growth_interval=1, min_scale=64.0, max_scale=64.0)
    assert scales(fixed, [False, True, False]) == [64.0] * 3


def test_scale_is_a_float32_number():
    scaler = DynamicLossScale(0.1, growth_interval=1, growth_factor=1.1)
    assert scaler.scale == np.float32(0.1)
    for scale in [scaler.scale, *scales(scaler, [False] * 20)]:
        assert type(scale) is float
        assert scale == np.float32(scale)


# --- Checkpoints --------------------------------------------------------------------------------------------


def through_savez(scaler):
    file = io.BytesIO()
    np.savez(file, **scaler.state_dict())
    file.seek(0)
    other = DynamicLossScale()
    with np.load(file) as entries:
        other.load_state_dict(entries)
    return other


def through_state_dict(scaler):
    other = DynamicLossScale(3.0, growth_interval=77, hysteresis=5)
    other.load_state_dict(scaler.state_dict())
    return other


@pytest.mark.parametrize(
    "resume",
    [through_savez, through_state_dict, copy.deepcopy, lambda scaler: pickle.loads(pickle.dumps(scaler))],
    ids=["savez", "state_dict", "deepcopy", "pickle"],
)
@pytest.mark.parametrize(
    "config", [*CONFIGS, {"hysteresis": 3, "growth_interval": 4, "max_scale": 1e9}], ids=config_id
)
def test_resume_is_as_if_uninterrupted(rng, config, resume):
    overflows = rng.random(300) < 0.2
    whole = DynamicLossScale(**config)
    expected = scales(whole, overflows)
    for cut in (0, 1, 50, 151):
        first = DynamicLossScale(**config)
        assert scales(first, overflows[:cut]) == expected[:cut]
        second = resume(first)
        assert second.state_dict() == first.state_dict()
        assert scales(second, overflows[cut:]) == expected[cut:]
        assert second.state_dict() == whole.state_dict()


def test_state_dict_is_plain_numbers():
    scaler = DynamicLossScale(growth_interval=9, hysteresis=2, min_scale=1, max_scale=2**24)
    scales(scaler, [True, False, False])
    state = scaler.state_dict()
    assert state == {
        "scale": 65536.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 9,
        "hysteresis": 2,
        "min_scale": 1.0,
        "max_scale": 16777216.0,
        "growth_tracker": 2,
        "hysteresis_tracker": 1,
    }
    assert {type(value) for value in state.values()} == {int, float}
    state["scale"] = 1.0
    assert scaler.scale == 65536.0
    assert repr(scaler) == (
        "DynamicLossScale(scale=65536.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=9,"
        " hysteresis=2, min_scale=1.0, max_scale=16777216.0, growth_tracker=2, hysteresis_tracker=1)"
    )
