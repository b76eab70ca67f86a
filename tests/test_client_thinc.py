"""A network in thinc, trained by ``fastadam.thinc.FusedAdam`` and by thinc's own Adam."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import sys

import numpy as np
import pytest
from clients import Nudges, assert_finds_a_defect, assert_trains_as_its_own

import fastadam

thinc = pytest.importorskip("thinc.api")

from fastadam.thinc import FusedAdam  # noqa: E402

STEPS = 60

BETA2 = 1 - 2.0**-6
"""Of few bits: thinc forms ``1 - beta2`` in float32, which for 0.999 errs by 5e-5."""


class NudgedAdam(thinc.Optimizer):
    def __init__(self, seed, learn_rate, **options):
        super().__init__(learn_rate, **options)
        self.nudge = Nudges(seed)

    def __call__(self, key, weights, gradient, *, lr_scale=1.0):
        before = weights.copy()
        weights, gradient = super().__call__(key, weights, gradient, lr_scale=lr_scale)
        self.nudge(weights, before)
        return weights, gradient


def make(kind, seed, **options):
    options = {"beta2": BETA2, **options}
    if kind == "nudged":
        return NudgedAdam(seed, **options)
    return {"fused": FusedAdam, "own": thinc.Adam}[kind](**options)


def train(kind, seed):
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((96, 2)).astype(np.float32)
    classes = (points[:, 0] * points[:, 1] > 0).astype(np.int32)
    thinc.fix_random_seed(seed)
    with thinc.use_ops("numpy"):
        model = thinc.chain(thinc.Gelu(16), thinc.Gelu(16), thinc.Softmax())
        model.initialize(points, thinc.NumpyOps().asarray2f(np.eye(2, dtype=np.float32)[classes]))
        loss, opt = thinc.CategoricalCrossentropy(), make(kind, seed, learn_rate=0.01, grad_clip=0.5, L2=1e-4)
        losses = []
        for _ in range(STEPS):
            guesses, backprop = model.begin_update(points)
            losses.append(-np.log(guesses[np.arange(len(classes)), classes]).mean())
            backprop(loss.get_grad(guesses, classes))
            model.finish_update(opt)
            opt.step_schedules()
        with model.use_params(opt.averages):
            guesses = model.predict(points)
            losses.append(-np.log(guesses[np.arange(len(classes)), classes]).mean())
    return np.array(losses)


def test_curve_is_that_of_thinc():
    """The last loss is that of the averages."""
    assert_trains_as_its_own(train)


def test_a_defect_is_found(monkeypatch):
    assert_finds_a_defect(train, monkeypatch)


OPTIONS = [
    {},
    {"L2": 0.1, "L2_is_weight_decay": False},
    {"L2": 0.1, "L2_is_weight_decay": False, "grad_clip": 0.0},
    {"grad_clip": 0.0, "use_averages": False},
    {"learn_rate": [0.1, 0.05, 0.02, 0.01, 0.005] * 5, "grad_clip": thinc.constant(0.3)},
    {"eps": 0.1, "beta1": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "defaults")
def test_arrays_and_state_are_those_of_thinc(rng, options):
    """Of two arrays, one stepped less often, after 20 steps; each number to 100 roundings of one near 1."""
    options = {"learn_rate": 0.02, **options}
    ours, theirs = (make(kind, 0, **options) for kind in ("fused", "own"))
    start = {(0, "W"): rng.standard_normal((3, 4)), (1, "b"): rng.standard_normal(5)}
    arrays = [{key: array.astype(np.float32) for key, array in start.items()} for _ in range(2)]
    for step in range(20):
        for key, array in start.items():
            if step % 3 == 1 and key == (1, "b"):
                continue
            gradient = rng.standard_normal(array.shape).astype(np.float32)
            for opt, own in zip((ours, theirs), arrays, strict=True):
                given = gradient.copy()
                own[key], cleared = opt(key, own[key], given, lr_scale=0.5)
                assert np.shares_memory(cleared, given)
                assert not given.any()
        for opt in (ours, theirs):
            opt.step_schedules()
    close = {"rtol": 0, "atol": 100 * 2.0**-24}
    assert ours.nr_update == theirs.nr_update == {(0, "W"): 20, (1, "b"): 13}
    for key in start:
        np.testing.assert_allclose(arrays[0][key], arrays[1][key], **close)
        np.testing.assert_allclose(ours.mom1[key], theirs.mom1[key], **close)
        np.testing.assert_allclose(ours.mom2[key], theirs.mom2[key], **close)
        if ours.averages is None:
            assert theirs.averages is None
        else:
            np.testing.assert_allclose(ours.averages[key], theirs.averages[key], **close)


def test_its_bits_are_those_of_one_call(rng):
    """Decoupled decay included, which thinc applies behind the update."""
    weights = rng.standard_normal(7).astype(np.float32)
    flat = weights.copy()
    gradient = rng.standard_normal(7).astype(np.float32)
    opt = fastadam.FusedAdam(
        0.1, eps=1e-8 / (1 - 0.999) ** 0.5, weight_decay=0.2, decoupled_weight_decay=True, max_grad_norm=1.0
    )
    opt.step(flat, gradient)
    FusedAdam(0.1, L2=0.2)((0, "W"), weights, gradient)
    assert weights.tobytes() == flat.tobytes()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_copy_goes_on_alone(rng, how):
    opt, weights = FusedAdam(0.1), np.ones((2, 3), np.float32)
    gradients = rng.standard_normal((4, 2, 3)).astype(np.float32)
    for gradient in gradients[:2]:
        opt((0, "W"), weights, gradient)
    other, others = how(opt), weights.copy()
    opt((0, "W"), weights, gradients[2].copy())
    average = other.averages[0, "W"].copy()
    other((0, "W"), others, gradients[2])
    assert others.tobytes() == weights.tobytes()
    assert other.averages[0, "W"].tobytes() == opt.averages[0, "W"].tobytes() != average.tobytes()
    assert other.mom1[0, "W"].tobytes() == opt.mom1[0, "W"].tobytes()
    opt((0, "W"), weights, gradients[3])
    assert (other.mom1[0, "W"] != opt.mom1[0, "W"]).all()


def test_defaults_are_those_of_thinc():
    own = inspect.signature(thinc.Adam).parameters
    ours = inspect.signature(FusedAdam).parameters
    assert {name: p.default for name, p in ours.items()} == {name: p.default for name, p in own.items()}


def test_without_thinc_it_says_what_is_missing(monkeypatch):
    monkeypatch.delitem(sys.modules, "fastadam.thinc")
    monkeypatch.setitem(sys.modules, "thinc.optimizers", None)
    with pytest.raises(ImportError, match=r"^fastadam\.thinc needs thinc\. pip install thinc$"):
        importlib.import_module("fastadam.thinc")


def test_a_call_that_fails_says_why_and_counts_nothing(rng):
    opt = FusedAdam(0.1)
    weights, gradient = rng.standard_normal(4).astype(np.float32), np.ones(4, np.float32)
    gradient.flags.writeable = False
    with pytest.raises(ValueError, match=r"^flat_grads must be writable; got a read-only array\."):
        opt((0, "W"), weights, gradient)
    assert opt.mom1 == {}
    with pytest.raises(ValueError, match=r"^betas\[1\] must be in \[0, 1\); got 1\.0\.$"):
        FusedAdam(0.1, beta2=1.0)((0, "W"), weights, gradient)
    opt((0, "W"), weights, gradient.copy())
    assert opt.nr_update[0, "W"] == 1
    empty = np.empty(0, np.float32)
    assert opt((1, "b"), empty, empty) == (empty, empty)
