"""Bad arguments of schedules: every message whole."""

from __future__ import annotations

import numpy as np
import pytest

from fastadam.schedules import (
    chain,
    constant,
    cosine,
    exponential,
    inverse_sqrt,
    inverse_time,
    linear,
    linear_warmup,
    piecewise,
)

INF, NAN = float("inf"), float("nan")

ERRORS = [
    (lambda: constant(-0.1), ValueError, "lr must be at least 0; got -0.1."),
    (lambda: constant(NAN), ValueError, "lr must be finite; got nan."),
    (lambda: constant(10**400), ValueError, "lr must be finite; got an integer beyond float64."),
    (lambda: constant("0.1"), TypeError, "lr must be a real number; got str."),
    (lambda: constant(True), TypeError, "lr must be a real number; got bool."),
    (lambda: constant(np.ones(1)), TypeError, "lr must be a real number; got ndarray."),
    (lambda: constant(constant(1.0)), TypeError, "lr must be a real number; got Schedule."),
    (lambda: cosine(-1, 9), ValueError, "lr must be at least 0; got -1.0."),
    (lambda: cosine(1.0, 0), ValueError, "steps must be in [1, 2**53); got 0."),
    (lambda: cosine(1.0, 9.0), TypeError, "steps must be an integer; got float."),
    (lambda: cosine(1.0, 9, -0.1), ValueError, "final_lr must be at least 0; got -0.1."),
    (lambda: cosine(1.0, 9, None), TypeError, "final_lr must be a real number; got NoneType."),
    (lambda: linear(INF, 9), ValueError, "lr must be finite; got inf."),
    (lambda: linear(1.0, 2**53), ValueError, "steps must be in [1, 2**53); got 9007199254740992."),
    (lambda: linear(1.0, 10**5000), ValueError, "steps must be in [1, 2**53); got an integer beyond it."),
    (lambda: linear(1.0, True), TypeError, "steps must be an integer; got bool."),
    (lambda: linear(1.0, 9, NAN), ValueError, "final_lr must be finite; got nan."),
    (lambda: exponential(-1, 0.9), ValueError, "lr must be at least 0; got -1.0."),
    (lambda: exponential(1.0, 0), ValueError, "decay_rate must be in (0, 1]; got 0.0."),
    (lambda: exponential(1.0, 1.1), ValueError, "decay_rate must be in (0, 1]; got 1.1."),
    (lambda: exponential(1.0, NAN), ValueError, "decay_rate must be finite; got nan."),
    (lambda: exponential(1.0, "x"), TypeError, "decay_rate must be a real number; got str."),
    (lambda: exponential(1.0, 0.9, -1), ValueError, "steps must be in [1, 2**53); got -1."),
    (lambda: exponential(1.0, 0.9, staircase=1), TypeError, "staircase must be True or False; got int."),
    (lambda: inverse_time(-1, 0.1), ValueError, "lr must be at least 0; got -1.0."),
    (lambda: inverse_time(1.0, -0.1), ValueError, "decay must be at least 0; got -0.1."),
    (lambda: inverse_time(1.0, INF), ValueError, "decay must be finite; got inf."),
    (lambda: inverse_sqrt(-1, 9), ValueError, "lr must be at least 0; got -1.0."),
    (lambda: inverse_sqrt(1.0, 0), ValueError, "steps must be in [1, 2**53); got 0."),
    (lambda: inverse_sqrt(1.0, 9, warmup="no"), TypeError, "warmup must be True or False; got str."),
    (lambda: linear_warmup(-1, 9), ValueError, "lr must be at least 0; got -1.0."),
    (lambda: linear_warmup("1", 9), TypeError, "lr must be a schedule or a real number; got str."),
    (lambda: linear_warmup(True, 9), TypeError, "lr must be a schedule or a real number; got bool."),
    (lambda: linear_warmup(1.0, 0), ValueError, "steps must be in [1, 2**53); got 0."),
    (lambda: piecewise(1.0, []), TypeError, "values must be a list or tuple of real numbers; got float."),
    (lambda: piecewise("1", []), TypeError, "values must be a list or tuple of real numbers; got str."),
    (lambda: piecewise([], []), ValueError, "values must have at least one entry; got none."),
    (lambda: piecewise([1.0, -1], [9]), ValueError, "values[1] must be at least 0; got -1.0."),
    (lambda: piecewise([9, 1], [1.0]), TypeError, "boundaries[0] must be an integer; got float."),
    (lambda: piecewise([1.0, 0.1], [0]), ValueError, "boundaries[0] must be in [1, 2**53); got 0."),
    (lambda: piecewise([1.0, 0.1], 9), TypeError, "boundaries must be a list or tuple of integers; got int."),
    (
        lambda: piecewise([1.0, 0.1], [1, 2]),
        ValueError,
        "boundaries must have one entry fewer than values (2); got 2.",
    ),
    (
        lambda: piecewise([3, 2, 1], [9, 9]),
        ValueError,
        "boundaries[1] must be greater than boundaries[0] (9); got 9.",
    ),
    (
        lambda: chain(constant(1.0), []),
        TypeError,
        "schedules must be a list or tuple of schedules; got Schedule.",
    ),
    (lambda: chain([], []), ValueError, "schedules must have at least one entry; got none."),
    (lambda: chain([None], []), TypeError, "schedules[0] must be a schedule or a real number; got NoneType."),
    (lambda: chain([1.0, NAN], [9]), ValueError, "schedules[1] must be finite; got nan."),
    (
        lambda: chain([1.0], [9]),
        ValueError,
        "boundaries must have one entry fewer than schedules (1); got 1.",
    ),
    (
        lambda: chain([3, 2, 1, 0], [1, 9, 8]),
        ValueError,
        "boundaries[2] must be greater than boundaries[1] (9); got 8.",
    ),
    (lambda: constant(1.0)(0), ValueError, "step must be in [1, 2**53); got 0."),
    (lambda: constant(1.0)(-1), ValueError, "step must be in [1, 2**53); got -1."),
    (lambda: constant(1.0)(2**53), ValueError, "step must be in [1, 2**53); got 9007199254740992."),
    (lambda: constant(1.0)(1.0), TypeError, "step must be an integer; got float."),
    (lambda: constant(1.0)(True), TypeError, "step must be an integer; got bool."),
    (lambda: constant(1.0)(np.ones(1)), TypeError, "step must be an integer; got ndarray."),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[row[2][:60] for row in ERRORS])
def test_errors(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value) == message
