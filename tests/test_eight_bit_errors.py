"""Bad state in 8 bits: the whole message of every error, and that nothing was changed."""

from __future__ import annotations

import numpy as np
import pytest
from phase_cases import assert_changes_nothing

from fastadam import FusedAdam, Segment

N = 300


def saved(**changes):
    opt = FusedAdam(state_dtype="8bit")
    opt.step(np.ones(N, np.float32), np.linspace(-1, 1, N, dtype=np.float32))
    entries = {**opt.state_dict(), **changes}
    return {name: value for name, value in entries.items() if value is not None}


def with_scale(name, value):
    entries = saved()
    entries[f"{name}_scales"][1] = value
    return entries


CHECKPOINTS = {
    "no-scales": (
        lambda: saved(exp_avg_scales=None),
        ValueError,
        "state_dict must have the key 'exp_avg_scales';"
        " got ['step', 'exp_avg', 'exp_avg_sq', 'exp_avg_sq_scales'].",
    ),
    "scales-of-nothing": (
        lambda: saved(max_exp_avg_sq_scales=np.ones(3, np.float32)),
        ValueError,
        "state_dict must have no key 'max_exp_avg_sq_scales'.",
    ),
    "scales-of-numbers": (
        lambda: saved(state_dtype="float32"),
        ValueError,
        "state_dict must have no key 'exp_avg_scales'.",
    ),
    "numbers": (
        lambda: saved(exp_avg=np.ones(N, np.float32)),
        TypeError,
        "state_dict['exp_avg'] must be codes of 8 bits in a uint8 array; got float32.",
    ),
    "list": (
        lambda: saved(exp_avg=[1, 2]),
        TypeError,
        "state_dict['exp_avg'] must be codes of 8 bits in a uint8 array; got list.",
    ),
    "size-of-codes": (
        lambda: saved(exp_avg_sq=np.ones(N - 1, np.uint8)),
        ValueError,
        "state_dict['exp_avg_sq'] must have the size of state_dict['exp_avg'] (300); got 299.",
    ),
    "dtype-of-scales": (
        lambda: saved(exp_avg_sq_scales=np.ones(3)),
        TypeError,
        "state_dict['exp_avg_sq_scales'] must be float32; got float64.",
    ),
    "count-of-scales": (
        lambda: saved(exp_avg_scales=np.ones(2, np.float32)),
        ValueError,
        "state_dict['exp_avg_scales'] must have 3 elements, one for each block; got 2.",
    ),
    **{
        f"{name}-{value}": (
            lambda name=name, value=value: with_scale(name, value),
            ValueError,
            f"state_dict['{name}_scales'] must be scales of the codes beside them; got others.",
        )
        for name in ("exp_avg", "exp_avg_sq")
        for value in (np.nan, np.inf, 3e38)
    },
    "codes-beyond": (
        lambda: {**with_scale("exp_avg_sq", 1.0), "exp_avg_sq": np.full(N, 255, np.uint8)},
        ValueError,
        "state_dict['exp_avg_sq_scales'] must be scales of the codes beside them; got others.",
    ),
}


@pytest.mark.parametrize("state_dtype", ["8bit", "float32"])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_bad_checkpoint(case, state_dtype):
    make, error, message = CHECKPOINTS[case]
    opt, entries = FusedAdam(state_dtype=state_dtype), make()
    assert_changes_nothing(opt, [], error, message, lambda: opt.load_state_dict(entries))


def test_no_8_bits_for_float64():
    opt, entries = FusedAdam(state_dtype="8bit"), FusedAdam()
    entries.step(np.ones(N), np.ones(N))
    message = "state_dtype must be 'float32', the default, for float64 moments; got '8bit'."
    assert_changes_nothing(opt, [], ValueError, message, lambda: opt.load_state_dict(entries.state_dict()))
    wide = FusedAdam()
    wide.load_state_dict(saved())
    bad = [np.ones(N), np.ones(N)]
    message = "flat_params must have the dtype of the state (float32); got float64."
    assert_changes_nothing(wide, bad, TypeError, message, lambda: wide.step(*bad))


def test_8_bit_arrays_are_no_buffers():
    for dtype in (np.uint8, np.int8):
        bad = [np.ones(N, dtype), np.ones(N, np.float32)]
        opt = FusedAdam(state_dtype="8bit")
        message = f"flat_params must be float32, float64, float16 or bfloat16; got {np.dtype(dtype)}."
        assert_changes_nothing(opt, bad, TypeError, message, lambda o=opt, b=bad: o.step(*b))


def test_reset_and_another_size():
    opt = FusedAdam(state_dtype="8bit", segments=[Segment(0, 10, lr=0.1)])
    opt.step(np.ones(N, np.float32), np.ones(N, np.float32))
    opt.reset()
    assert opt.state.exp_avg is None
    opt.step(np.ones(2 * N, np.float32), np.ones(2 * N, np.float32))
    assert opt.state.exp_avg.size == 2 * N
    assert FusedAdam(state_dtype=["8bit", "8bit"]).state_dtype == "8bit"
