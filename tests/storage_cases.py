"""Steps of any storage by the rule on NumPy scalars, converted by NumPy and ml_dtypes, to the nearest."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from oracles import initial_states, interpret
from phase_cases import DECAYS, pairwise

from fastadam.adam import AdamHyperparameters

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

FACTORS = {
    "params": ["bfloat16", "float32", "float16"],
    "grads": ["float32", "bfloat16", "float16"],
    "state_dtype": ["float32", "bfloat16", ("bfloat16", "float32"), ("float32", "bfloat16")],
    "master_params": [None, "float32", "split"],
    "out": [None, "bfloat16", "float16", "float32"],
    "decay": ["none", "l2", "adamw"],
    "amsgrad": [False, True],
    "maximize": [False, True],
    "ema_decay": [None, 0.9],
    "max_grad_norm": [None, 0.5],
    "max_grad_value": [None, 0.02],
    "grad_scale": [None, 3.0],
    "skip_nonfinite": [False, True],
    "zero_grads": [False, True],
    "segments": [False, True],
}
CASES = [
    {name: values[i] for (name, values), i in zip(FACTORS.items(), case, strict=True)}
    for case in pairwise(list(FACTORS.values()))
]
"""Every pair of levels, but for masters of parameters that have none: those have no master."""
for case in CASES:
    if case["params"] == "float32" or (case["params"] == "float16" and case["master_params"] == "split"):
        case["master_params"] = None


def case_id(case):
    return "-".join(str(value) for value in case.values() if value not in {None, False, "none"})


def options(case):
    """Return the arguments of FusedAdam, without the segments."""
    names = ("params", "grads", "out", "grad_scale", "segments", "decay")
    return {**{k: v for k, v in case.items() if k not in names}, **DECAYS[case["decay"]]}


def encoded(values, kind):
    with np.errstate(over="ignore"):
        return values.astype(DTYPES[kind])


class literal_storage:  # noqa: N801
    """Decode, step in float32, encode to the nearest; a master is a float32 that stays as it is."""

    def __init__(self, params, h=None, **options):
        self.h = h or AdamHyperparameters(**options)
        self.kinds = self.h.formats()
        self.dtype = params.dtype
        self.exact = params.astype(np.float32)
        states = initial_states(self.h, self.exact)
        self.states = [encoded(state, kind) for state, kind in zip(states, self.kinds, strict=True)]
        self.t = 0

    def step(self, grads, **scales):
        self.t += 1
        states = tuple(state.astype(np.float32) for state in self.states)
        grads = grads.astype(np.float32)
        self.new, states = interpret(self.h, self.exact, grads, states, self.t, **scales)
        self.states = [encoded(state, kind) for state, kind in zip(states, self.kinds, strict=True)]
        with np.errstate(over="ignore"):
            self.params = self.new.astype(self.dtype)
        self.exact = self.new if self.h.master_params else self.params.astype(np.float32)
