"""Steps with segments, and the same with separate optimizers on the slices."""

from __future__ import annotations

from math import sqrt

import numpy as np
from tolerances import assert_same_bits
from trees import array_tree

from fastadam import FusedAdam, schedules
from fastadam.adam import AdamHyperparameters
from fastadam.coefficients import Coefficients
from fastadam.kernels import cpu, norms

N = 60

FEATURES = {
    "plain": {},
    "l2": {"weight_decay": 0.1},
    "adamw": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "clipped": {"max_grad_norm": 0.5, "weight_decay": 0.1},
    "all": {
        "lr": schedules.linear(0.1, steps=2),
        "amsgrad": True,
        "maximize": True,
        "decoupled_weight_decay": True,
        "max_grad_norm": 2.0,
        "max_grad_value": 0.5,
        "ema_decay": 0.9,
        "zero_grads": True,
    },
}
"""Combinations of features; with the defaults of those that are not named."""

OVERRIDES = ("lr", "weight_decay", "betas", "eps")


def slices(segments, size):
    """All parts of a buffer, in order: ``(start, stop, overrides)``, and None for overrides where frozen."""
    parts, at = [], 0
    for segment in sorted(segments, key=lambda segment: segment.start):
        parts.append((at, segment.start, {}))
        own = {name: getattr(segment, name) for name in OVERRIDES if getattr(segment, name) is not None}
        parts.append((segment.start, segment.stop, None if segment.frozen else own))
        at = segment.stop
    return [part for part in [*parts, (at, size, {})] if part[0] < part[1]]


def runs(segments, size):
    """The stretches between frozen segments."""
    found = []
    for start, stop, overrides in slices(segments, size):
        if overrides is None:
            continue
        if found and found[-1][1] == start:
            found[-1][1] = stop
        else:
            found.append([start, stop])
    return found


def norm(grads, segments):
    """The global norm, as documented."""
    sums = []
    for start, stop in runs(segments, grads.size):
        part = np.ascontiguousarray(grads[start:stop])
        sums.append(norms.measure(part, np.empty(norms.scratch_size(part.size)))[0])
    return sqrt(array_tree(sums))


def one_pass(params, gradients, segments, scales=None, **hyperparameters):
    """Return parameters, gradients after the steps, and the optimizer."""
    opt, params = FusedAdam(segments=segments, **hyperparameters), params.copy()
    left = [grads.copy() for grads in gradients]
    for grads, scale in zip(left, scales or [None] * len(left), strict=True):
        opt.step(params, grads, grad_scale=scale)
    return params, left, opt


def separate(params, gradients, segments, scales=None, **hyperparameters):
    """Return parameters, gradients after the steps, and the state, of the plain loop on each slice."""
    names = AdamHyperparameters(**hyperparameters).state
    params, left = params.copy(), [grads.copy() for grads in gradients]
    states = {name: np.zeros_like(params) for name in names}
    if "param_ema" in names:
        states["param_ema"][:] = params
    parts = slices(segments, params.size)
    for number, (grads, scale) in enumerate(zip(left, scales or [None] * len(left), strict=True), start=1):
        whole = norm(grads, segments) / (1.0 if scale is None else scale)
        for start, stop, overrides in parts:
            if overrides is None:
                continue
            c = Coefficients(AdamHyperparameters(**{**hyperparameters, **overrides}), params.dtype)
            update = c.update(number, grad_scale=scale, clip_factor=c.clip_factor(whole))
            state = tuple(array[start:stop] for array in states.values())
            cpu.plan(params[start:stop], grads[start:stop], state, update, c.clear)()
    return params, left, states


def assert_one_pass_is_separate_steps(params, gradients, segments, scales=None, **hyperparameters):
    actual, left, opt = one_pass(params, gradients, segments, scales, **hyperparameters)
    expected, expected_left, states = separate(params, gradients, segments, scales, **hyperparameters)
    assert_same_bits(actual, expected, "parameters")
    for name, state in states.items():
        assert_same_bits(opt.state.moments[name], state, name)
    for grads, expected_grads in zip(left, expected_left, strict=True):
        assert_same_bits(grads, expected_grads, "gradients")
