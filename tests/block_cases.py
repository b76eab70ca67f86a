"""Cases of storage with moments in 8 bits, and gradients that blocks of them have to cope with."""

from __future__ import annotations

import numpy as np
from phase_cases import pairwise
from storage_cases import encoded

from fastadam.rule import NONNEGATIVE

FACTORS = {
    "state_dtype": [
        "8bit",
        ("8bit", "float32"),
        ("bfloat16", "8bit"),
        ("8bit", "bfloat16"),
        ("float32", "8bit"),
    ],
    "params": ["float32", "bfloat16", "float16"],
    "grads": ["float32", "bfloat16", "float16"],
    "decay": ["none", "l2", "adamw"],
    "master_params": [None, "float32", "split"],
    "out": [None, "float32", "float16", "bfloat16"],
    "rounding": ["stochastic", "nearest"],
    "amsgrad": [False, True],
    "maximize": [False, True],
    "ema_decay": [None, 0.9],
    "max_grad_norm": [None, 5.0],
    "max_grad_value": [None, 0.4],
    "grad_scale": [None, 3.0],
    "skip_nonfinite": [False, True],
    "zero_grads": [False, True],
    "segments": [False, True],
}
BLOCK_CASES = [
    {name: values[i] for (name, values), i in zip(FACTORS.items(), case, strict=True)}
    for case in pairwise(list(FACTORS.values()))
]
"""Every pair of levels, but for masters; the same for each backend: the CPU's loops are compiled once."""
for case in BLOCK_CASES:  # masters for what has them; at random to float16: test_rounding
    if case["params"] == "float16":
        case["master_params"] = "float32"
    if case["params"] == "float32":
        case["master_params"] = None

ODD = {"seed": 3, "offset": 2**32 - 20}
"""Other random bits than by default, and two keys for one buffer."""


def gradients_of(rng, size, kind, steps=4):
    """Return gradients of all magnitudes; from the second step on some are not finite, or their squares."""
    found = 10.0 ** rng.uniform(-6, 3, (steps, size)) * rng.standard_normal((steps, size))
    found[1:, [size // 3, size - 1]] = np.array([1e30, np.nan])
    found[2:, 5 % size] = np.inf
    return [encoded(each.astype("f4"), kind) for each in found]


def assert_same_state(saved, expected):
    """Fail unless state dicts are the same; of the codes of NaN, the sign carries nothing."""
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        assert np.asarray(saved[name]).dtype == np.asarray(value).dtype
        np.testing.assert_equal(_unsigned(saved, name), _unsigned(expected, name), name)


def _unsigned(state, name):
    codes, scales = state[name], state.get(f"{name}_scales")
    if getattr(codes, "dtype", None) == np.uint16:  # bfloat16
        return np.where(codes & 0x7FFF > 0x7F80, 0x7FFF, codes)
    if name in NONNEGATIVE or scales is None:
        return codes
    is_flagged = np.repeat(np.signbit(scales), 128)[: codes.size]
    return np.where(is_flagged & (codes & 127 == 127), 127, codes)


ORDERS = {"block": (3, 5, 1.0, range(133, 2051, 32)), "border": (127, 128, 1.25, range(2048, 2175, 32))}
"""How many elements are frozen, one that is large, a number, and where that lies: in its lane.

Behind it and by itself, the square of each is lost in the large sum; together they are not. Lanes that are
all turned around have the same sum. So it takes two blocks: the first and others, and one with elements of
the next chunk."""


def gradients_in_order(name):
    """Return gradients whose norm is 2**27, if they are summed in the order of the tree."""
    _, large, number, places = ORDERS[name]
    grads = np.zeros(2300, np.float32)
    grads[large], grads[list(places)] = 2.0**27, number
    return grads
