"""Every rule of the family in GPU memory: cases, and steps on the CPU and on a device together."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
from block_cases import ODD, assert_same_state
from own_rules import FusedTriple, FusedYogi
from phase_cases import pairwise
from storage_cases import encoded
from tolerances import assert_same_bits

import fastadam
from fastadam import Segment
from fastadam.optimizer import FusedOptimizer


class Member(NamedTuple):
    """An optimizer with arguments of its own that select a rule."""

    kind: type[FusedOptimizer]
    options: dict[str, Any]

    def __call__(self, **options: Any) -> FusedOptimizer:
        return self.kind(**self.options, **options)


_RMSPROPS = {
    "rmsprop": {},
    "rmsprop-centered": {"centered": True},
    "rmsprop-momentum": {"momentum": 0.8},
    "rmsprop-centered-momentum": {"centered": True, "momentum": 0.8},
}

FAMILY = {
    "adamw": Member(fastadam.FusedAdamW, {}),
    "nadam": Member(fastadam.FusedNAdam, {"momentum_decay": 0.1}),
    "radam": Member(fastadam.FusedRAdam, {"betas": (0.9, 0.7)}),  # rectified from step 6 on
    "adamax": Member(fastadam.FusedAdamax, {}),
    "lion": Member(fastadam.FusedLion, {}),
    "sgd": Member(fastadam.FusedSGD, {}),
    "momentum": Member(fastadam.FusedSGD, {"momentum": 0.9, "dampening": 0.3}),
    "nesterov": Member(fastadam.FusedSGD, {"momentum": 0.9, "nesterov": True}),
    "adagrad": Member(fastadam.FusedAdagrad, {"initial_accumulator_value": 0.1}),
    **{name: Member(fastadam.FusedRMSprop, options) for name, options in _RMSPROPS.items()},
    "adadelta": Member(fastadam.FusedAdadelta, {}),
}
"""Every rule but AMSGrad, which the tests of Adam have."""

FACTORS = {
    "rule": list(FAMILY),
    "units": ["", "segments", "telemetry"],
    "storage": ["float32", "float64", "bfloat16"],
    "capturable": [False, True],
    "decides": [False, True],
    "ema_decay": [None, 0.9],
}

CASES = [
    {name: values[i] for (name, values), i in zip(FACTORS.items(), case, strict=True)}
    for case in pairwise(list(FACTORS.values()))
]
"""Every pair of levels of two factors is in one of these."""


def some_cases(first):
    """Of each rule one, of other levels for each: ``first`` makes others."""
    of_rule = defaultdict(list)
    for case in CASES:
        of_rule[case["rule"]].append(case)
    return [cases[(k + first) % len(cases)] for k, cases in enumerate(of_rule.values())]


def case_id(case):
    parts = [case["rule"], case["units"], case["storage"], "captured" if case["capturable"] else ""]
    parts += ["decides" if case["decides"] else "", "average" if case["ema_decay"] else ""]
    return "-".join(filter(None, parts))


def parts(opt, size):
    """Segments with every hyperparameter that the rule has, one frozen."""
    has = opt._hyperparameters.numbers()
    betas = {"betas": (0.3, 0.5)} if "beta1" in has else {}
    eps = {"eps": 1e-3} if "eps" in has else {}
    return [
        Segment(0, 3, lr=0.05),
        Segment(3, 4, weight_decay=0.0),
        Segment(5, size // 3, weight_decay=0.3, **betas),
        Segment(size // 3, size // 3 + 2, frozen=True),
        Segment(size // 2, size - 3, lr=0.0, **eps),
    ]


def problem(rng, case, size, steps=4):
    """Parameters of which updates vanish, gradients of which are zero, and one that is skipped."""
    values = rng.standard_normal(size).astype("f4")
    values[7:9] = 1e18
    gradients = (10.0 ** rng.uniform(-6, 3, (steps, size)) * rng.standard_normal((steps, size))).astype("f4")
    gradients[:, 8] = gradients[:, 10] = 0
    if case["decides"]:
        gradients[1][2] = np.inf
    if case["storage"] == "bfloat16":
        return encoded(values, "bfloat16"), [encoded(grads, "bfloat16") for grads in gradients]
    return values.astype(case["storage"]), list(gradients.astype(case["storage"]))


_8BIT = {"storage": "8bit", "units": "", "capturable": False, "decides": False, "ema_decay": None}
_OF_RULES_IN_8_BITS = {
    "adamax": {"units": "segments"},
    "lion": {"units": "telemetry"},
    "momentum": {"capturable": True, "ema_decay": 0.9, "more": ODD},
    "nesterov": {"more": {"rounding": "nearest"}},
    "adagrad": {"units": "telemetry"},
    "rmsprop": {"ema_decay": 0.9, "more": {"rounding": "nearest"}},
    "rmsprop-momentum": {"units": "segments", "more": {"state_dtype": ("8bit", "bfloat16")}},
    "rmsprop-centered-momentum": {"units": "segments", "capturable": True},
    "adadelta": {"units": "segments", "more": {"rounding": "nearest", "zero_grads": True}},
    "yogi": {"more": {"state_dtype": ("bfloat16", "8bit")}},
    "triple": {"units": "segments", "more": {"maximize": True}},
}
IN_8_BITS = [{**_8BIT, "rule": rule, **case} for rule, case in _OF_RULES_IN_8_BITS.items()]
"""States in 8 bits of every rule of which the new ones are computed before a block has its scale."""

OWN = {"yogi": Member(FusedYogi, {}), "triple": Member(FusedTriple, {})}
"""Of states with a sign, and said to be never negative, at other places than the others have them."""


class Pair:
    """An optimizer on the CPU and one on the device, with the same parameters."""

    def __init__(self, case, params, put, backend=None):
        member = (FAMILY | OWN)[case["rule"]]
        options = {
            "weight_decay": 0.0 if case["units"] == "telemetry" else 0.1,
            "ema_decay": case["ema_decay"],
            "telemetry": case["units"] == "telemetry",
            "max_grad_norm": 1.0 if case["decides"] else None,
            "skip_nonfinite": case["decides"],
            "zero_grads": case["decides"],
            "state_dtype": case["storage"] if case["storage"] in {"bfloat16", "8bit"} else "float32",
            **case.get("more", {}),
        }
        self.cpu = member(backend="cpu", **options)
        self.device = member(backend=backend, capturable=case["capturable"], **options)
        if case["units"] == "segments":
            self.cpu.segments = self.device.segments = parts(self.cpu, params.size)
        self.put, self.params, self.buffer = put, params.copy(), put(params)

    def step(self, grads, *, there=lambda array: array.host, **scale):
        """Step both; ``there`` returns the contents of an array on the device."""
        sent, left = self.put(grads), grads.copy()
        self.cpu.step(self.params, left, **scale)
        self.device.step(self.buffer, sent, **scale)
        assert_same_bits(there(sent), left, "gradients")
        assert_same_bits(there(self.buffer), self.params, "params")
        self.compare_states()
        assert repr(self.device.last_step) == repr(self.cpu.last_step)  # NaN is NaN
        if self.cpu.last_step.vanished is not None:
            assert self.cpu.last_step.vanished >= 1
            if not self.cpu._hyperparameters.rule.states:  # by the gradient: of one of both, it is 0
                assert self.cpu.last_step.vanished == 1

    def compare_states(self):
        found, wanted = self.device.state_dict(), self.cpu.state_dict()
        if any(name.endswith("_scales") for name in wanted):
            assert_same_state(found, wanted)
            return
        assert found["step"] == wanted["step"]
        for name in self.cpu.state.moments:
            assert_same_bits(found[name], wanted[name], name)


def step_in_8_bits(rng, case, put, size=300, *, backend=None, **how):
    """Step whole blocks and cut ones; the first gets what is not finite. Then parts are frozen.

    Of the second block these have the least states. Of the first two the last gradients are small; of the
    third the least state grows when all gradients become smaller.
    """
    params, gradients = problem(rng, {**case, "storage": "float32"}, size)
    params[[7, 8, 200]] = 1.0, 1.0, 1e18 if case["units"] == "telemetry" else 1.0  # of all others, it decays
    pair = Pair(case, params, put, backend)
    for k, grads in enumerate(gradients):
        grads[128:300] = rng.uniform(1, 8, 172)
        grads[140:145] = 2.0**-8
        grads[256:300] *= 2.0 ** (-4 * (k > 1))
        if k < 2:
            grads[270] = 2.0**-12
        if k == 3:
            grads[:256] *= 2.0**-9
        if 0 < k < 3:
            grads[[105, 106]] = 1e30, np.nan
        if k == 2:
            grads[5] = np.inf
        if k == 2 and case["units"] and not case["capturable"]:
            frozen = [Segment(a, b, frozen=True) for a, b in ((110, 112), (140, 145), (260, 262))]
            pair.cpu.segments = pair.device.segments = [*parts(pair.cpu, 300)[:4], *frozen]
        pair.step(grads, **how)
