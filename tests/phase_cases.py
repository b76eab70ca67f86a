"""What the tests of the phase have in common: all pairs of its features, and problems to solve with them."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from oracles import PHASES
from tolerances import assert_same_bits

from fastadam import FusedAdam, schedules

FACTORS = {
    "grad_scale": [None, 3.0, 2.0**16],
    "max_grad_norm": [None, 0.5, 1e4],
    "max_grad_value": [None, 0.02],
    "skip_nonfinite": [False, True],
    "ema_decay": [None, 0.9, 0.3],
    "zero_grads": [False, True],
    "telemetry": [False, True],
    "maximize": [False, True],
    "decay": ["none", "l2", "adamw"],
    "amsgrad": [False, True],
    "lr": [0.01, schedules.linear_warmup(schedules.cosine(0.01, steps=9), steps=3)],
    "dtype": ["float64", "float32"],
}
"""Features, and the levels of each: a norm that clips and one that does not, averages from either end."""

DECAYS = {
    "none": {},
    "l2": {"weight_decay": 0.05},
    "adamw": {"weight_decay": 0.05, "decoupled_weight_decay": True},
}

LARGEST_LR = 0.01


def pairs_of(case):
    """Return all pairs of (feature, level) of a case."""
    return set(combinations(enumerate(case), 2))


def pairwise(levels):
    """Return few cases that have every pair of levels of two features, found greedily."""
    numbers = [range(len(values)) for values in levels]
    left = set().union(
        *(
            product(((a, i) for i in numbers[a]), ((b, j) for j in numbers[b]))
            for a, b in combinations(range(len(levels)), 2)
        )
    )
    rng, cases = np.random.default_rng(1), []
    while left:
        start = min(left)
        best = None
        for _ in range(50):
            case = [int(rng.integers(len(values))) for values in levels]
            case[start[0][0]], case[start[1][0]] = start[0][1], start[1][1]
            covered = len(pairs_of(case) & left)
            if best is None or covered > best[0]:
                best = covered, case
        cases.append(best[1])
        left -= pairs_of(best[1])
    return cases


PAIRWISE = pairwise(list(FACTORS.values()))

CASES = [
    {name: values[i] for (name, values), i in zip(FACTORS.items(), case, strict=True)} for case in PAIRWISE
]
"""Every pair of levels of two features is in one of these."""


def case_id(case):
    parts = [f"scale{case['grad_scale']:g}" if case["grad_scale"] else "", case["decay"].replace("none", "")]
    parts += [
        f"{key}{case[name]:g}"
        for key, name in (("norm", "max_grad_norm"), ("value", "max_grad_value"), ("ema", "ema_decay"))
        if case[name]
    ]
    parts += [
        name.split("_")[0]
        for name in ("skip_nonfinite", "zero_grads", "telemetry", "maximize", "amsgrad")
        if case[name]
    ]
    parts += ["schedule"] if callable(case["lr"]) else []
    return "-".join([*filter(None, parts), case["dtype"]])


def options(case):
    """Return the arguments of FusedAdam, without those of a step."""
    case = {**case, **DECAYS[case["decay"]]}
    return {name: value for name, value in case.items() if name not in ("grad_scale", "decay", "dtype")}


def problem(rng, case, size=300, steps=6):
    """Return params and gradients; those of the third step are not finite where that is skipped."""
    dtype = case["dtype"]
    params = rng.standard_normal(size).astype(dtype)
    scale = case["grad_scale"] or 1.0
    gradients = [(scale * (rng.standard_normal(size) + 0.3)).astype(dtype) for _ in range(steps)]
    if case["skip_nonfinite"]:
        gradients[2][rng.integers(size)] = np.inf
    return params, gradients


# --- A small problem with all of it -------------------------------------------------------------------------

N = 37
WHOLE = {
    **PHASES[-1],
    "lr": 0.01,
    "betas": (0.8, 0.99),
    "skip_nonfinite": True,
    "max_grad_norm": 1.0,
    "max_grad_value": 0.25,
}


def gradients(rng, count, dtype="float32"):
    return [rng.standard_normal(N).astype(dtype) for _ in range(count)]


def stepped(grads, grad_scale=None, **flags):
    opt, params = FusedAdam(**flags), np.linspace(-1, 1, N, dtype=grads[0].dtype)
    for g in grads:
        opt.step(params, g.copy(), grad_scale=grad_scale)
    return opt, params


def assert_same(one, other):
    (opt, params), (expected, expected_params) = one, other
    assert_same_bits(params, expected_params)
    assert opt.state.step == expected.state.step
    for a, b in zip(opt.state.arrays, expected.state.arrays, strict=True):
        assert_same_bits(a, b)


def assert_changes_nothing(opt, buffers, error, message, call):
    """Assert that a call raises this, whole, and that nothing is another than before."""
    before = [buffer.copy() for buffer in buffers]
    entries, last, text = opt.state_dict(), opt.last_step, repr(opt)
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value) == message
    for buffer, old in zip(buffers, before, strict=True):
        assert_same_bits(buffer, old)
    np.testing.assert_equal(opt.state_dict(), entries)
    assert opt.last_step == last
    assert repr(opt) == text
