"""Bad arguments of DynamicLossScale: every message whole, and that the call changed nothing."""

from __future__ import annotations

import numpy as np
import pytest

from fastadam import DynamicLossScale

INF, NAN = float("inf"), float("nan")
BOUNDS = "[1.175494e-38, 3.402823e+38]"

ARGUMENTS = [
    ({"init_scale": 0}, ValueError, f"init_scale must be in {BOUNDS}; got 0."),
    ({"init_scale": -2.0}, ValueError, f"init_scale must be in {BOUNDS}; got -2."),
    ({"init_scale": 1e39}, ValueError, f"init_scale must be in {BOUNDS}; got 1e+39."),
    ({"init_scale": INF}, ValueError, "init_scale must be finite; got inf."),
    ({"init_scale": "big"}, TypeError, "init_scale must be a real number; got str."),
    ({"init_scale": 0.5, "min_scale": 1}, ValueError, "init_scale must be in [1, 3.402823e+38]; got 0.5."),
    ({"max_scale": 2**15}, ValueError, "init_scale must be in [1.175494e-38, 32768]; got 65536."),
    ({"growth_factor": 1}, ValueError, "growth_factor must be greater than 1; got 1.0."),
    ({"growth_factor": NAN}, ValueError, "growth_factor must be finite; got nan."),
    ({"growth_factor": None}, TypeError, "growth_factor must be a real number; got NoneType."),
    ({"backoff_factor": 0}, ValueError, "backoff_factor must be in (0, 1); got 0.0."),
    ({"backoff_factor": 1.0}, ValueError, "backoff_factor must be in (0, 1); got 1.0."),
    ({"backoff_factor": True}, TypeError, "backoff_factor must be a real number; got bool."),
    ({"growth_interval": 0}, ValueError, "growth_interval must be in [1, 2**53); got 0."),
    ({"growth_interval": 2e3}, TypeError, "growth_interval must be an integer; got float."),
    ({"hysteresis": 0}, ValueError, "hysteresis must be in [1, 2**53); got 0."),
    ({"hysteresis": None}, TypeError, "hysteresis must be an integer; got NoneType."),
    ({"min_scale": 0}, ValueError, f"min_scale must be in {BOUNDS}; got 0."),
    ({"min_scale": NAN}, ValueError, "min_scale must be finite; got nan."),
    ({"max_scale": 1e39}, ValueError, f"max_scale must be in {BOUNDS}; got 1e+39."),
    ({"min_scale": 2, "max_scale": 1}, ValueError, "max_scale must be in [2, 3.402823e+38]; got 1."),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ARGUMENTS, ids=[row[2] for row in ARGUMENTS])
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error) as caught:
        DynamicLossScale(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("found_inf", "got"), [(1, "int"), (0.0, "float"), (None, "NoneType"), (np.ones(1), "ndarray")]
)
def test_bad_found_inf(found_inf, got):
    scaler = DynamicLossScale()
    before = scaler.state_dict()
    with pytest.raises(TypeError) as caught:
        scaler.update(found_inf)
    assert str(caught.value) == f"found_inf must be True or False; got {got}."
    assert scaler.state_dict() == before
    scaler.update(np.True_)
    assert scaler.scale == 2.0**15


KEYS = list(DynamicLossScale().state_dict())

STATES = [
    ({"scale": 0.0}, ValueError, f"state_dict['scale'] must be in {BOUNDS}; got 0."),
    ({"scale": "1"}, TypeError, "state_dict['scale'] must be a real number; got str."),
    ({"growth_tracker": 7}, ValueError, "state_dict['growth_tracker'] must be in [0, 6]; got 7."),
    ({"growth_tracker": -1}, ValueError, "state_dict['growth_tracker'] must be in [0, 2**53); got -1."),
    ({"growth_tracker": 1.0}, TypeError, "state_dict['growth_tracker'] must be an integer; got float."),
    ({"hysteresis_tracker": 4}, ValueError, "state_dict['hysteresis_tracker'] must be in [1, 3]; got 4."),
    (
        {"hysteresis_tracker": 0},
        ValueError,
        "state_dict['hysteresis_tracker'] must be in [1, 2**53); got 0.",
    ),
    ({"growth_factor": 0.5}, ValueError, "growth_factor must be greater than 1; got 0.5."),
    ({"enabled": True}, ValueError, "state_dict must have no key 'enabled'."),
]


@pytest.mark.parametrize(("changes", "error", "message"), STATES, ids=[row[2] for row in STATES])
def test_bad_state_dict_changes_nothing(changes, error, message):
    scaler = DynamicLossScale(growth_interval=7, hysteresis=3)
    before = scaler.state_dict()
    with pytest.raises(error) as caught:
        scaler.load_state_dict({**before, **changes})
    assert str(caught.value) == message
    assert scaler.state_dict() == before


@pytest.mark.parametrize("key", KEYS)
def test_state_dict_without_a_key(key):
    state = DynamicLossScale().state_dict()
    del state[key]
    with pytest.raises(ValueError, match="must have the key") as caught:
        DynamicLossScale().load_state_dict(state)
    assert str(caught.value) == f"state_dict must have the key {key!r}; got {list(state)}."


def test_state_dict_that_is_none():
    with pytest.raises(TypeError) as caught:
        DynamicLossScale().load_state_dict([1.0])
    assert str(caught.value) == "state_dict must be a mapping; got list."
