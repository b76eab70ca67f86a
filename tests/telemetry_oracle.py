"""What telemetry has to tell, spelled out, and steps that are compared with it."""

from __future__ import annotations

from math import sqrt

import numpy as np
from segment_steps import runs, slices
from trees import array_tree

from fastadam import FusedAdam
from fastadam.last_step import Done


def squares(terms):
    with np.errstate(all="ignore"):
        return np.square(terms.astype(np.float64))


def difference(before, after):
    with np.errstate(all="ignore"):
        return after.astype(np.float64) - before.astype(np.float64)


def has_vanished(before, after, exp_avg, lr):
    return (after == before) & (exp_avg != 0) & (lr != 0)


def tree_of_runs(terms, between):
    return array_tree([array_tree(terms[start:stop]) for start, stop in between])


def told(before, after, grads, exp_avg, segments=(), lr=1e-3, scale=None, **wrong):
    """Return the telemetry of a step as a dict; what is wrong on purpose takes the place of a part."""
    parts = {"tree": tree_of_runs, "difference": difference, "has_vanished": has_vanished, **wrong}
    between = runs(segments, before.size)
    counts, rates = np.zeros(before.size, bool), np.zeros(before.size)
    for start, stop, overrides in slices(segments, before.size):
        if overrides is not None:
            counts[start:stop], rates[start:stop] = True, overrides.get("lr", lr)
    moved = parts["difference"](before, after)
    return {
        "grad_norm": sqrt(parts["tree"](squares(grads), between)) / (1.0 if scale is None else scale),
        "nonfinite": int((counts & ~np.isfinite(grads)).sum()),
        "update_norm": sqrt(parts["tree"](squares(moved), between)),
        "param_norm": sqrt(parts["tree"](squares(after), between)),
        "vanished": int((counts & parts["has_vanished"](before, after, exp_avg, rates)).sum()),
    }


def fields(last, names=("grad_norm", "nonfinite", "update_norm", "param_norm", "vanished")):
    return {name: getattr(last, name) for name in names}


def assert_same(actual, expected):
    """Bit for bit; any NaN is NaN."""
    assert repr(actual) == repr(expected)
    assert [type(value) for value in actual.values()] == [type(value) for value in expected.values()]


def observe(opt, params, grads, scale=None):
    """Step, and assert that all of it is told; return what was told."""
    before, given = params.copy(), grads.copy()
    opt.step(params, grads, grad_scale=scale)
    lr = opt.lr(opt.state.step) if callable(opt.lr) else opt.lr
    expected = told(before, params, given, opt.state.exp_avg, opt.segments, lr, scale)
    last = opt.last_step
    assert_same(fields(last), expected)
    assert (last.step, last.lr, last.skipped) == (opt.state.step, lr, False)
    return last


def stepped(params, gradients, scale=None, **options):
    """Return all that steps have written, and what the last of them told."""
    opt, params = FusedAdam(**options), params.copy()
    gradients = [grads.copy() for grads in gradients]
    for grads in gradients:
        opt.step(params, grads, grad_scale=scale)
    return [params, *gradients, *opt.state.arrays], opt.last_step


def plain(last):
    """Return what is told without telemetry, too."""
    return Done(last.step, last.lr, None, last.clip_factor, last.skipped)
