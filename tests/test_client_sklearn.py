"""scikit-learn's ``MLPClassifier`` with its Adam replaced, as ``docs/clients.md`` shows it."""

from __future__ import annotations

import pickle
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from clients import Nudges, assert_finds_a_defect, assert_trains_as_its_own

clone = pytest.importorskip("sklearn.base").clone
load_digits = pytest.importorskip("sklearn.datasets").load_digits
MLPClassifier = pytest.importorskip("sklearn.neural_network").MLPClassifier

PAGE = Path(__file__).parents[1] / "docs" / "clients.md"
EPOCHS = 8


@cache
def fused_classifier():
    """The class of the page."""
    page = PAGE.read_text(encoding="utf-8")
    (code,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        if "class FusedMLPClassifier" in block
    ]
    names = {"__name__": __name__, "points": np.eye(3, 2)}
    exec(compile(code, str(PAGE), "exec"), names)
    for name in ("FusedMLPClassifier", "FusedUpdates"):
        globals()[name] = names[name]  # where a pickle looks for it
    return names["FusedMLPClassifier"]


class NudgedMLPClassifier(MLPClassifier):
    """Its own Adam, and every step nudged."""

    def _fit_stochastic(self, *args):
        self.nudge = Nudges(self.random_state)
        super()._fit_stochastic(*args)

    @property
    def _optimizer(self):
        return self._own

    @_optimizer.setter
    def _optimizer(self, own):
        step = own.update_params

        def update_params(params, grads):
            before = [param.copy() for param in params]
            step(params, grads)
            for param, old in zip(params, before, strict=True):
                self.nudge(param, old)

        own.update_params = update_params
        self._own = own


@cache
def digits(dtype="float32"):
    images, labels = load_digits(return_X_y=True)
    return (images[:600] / 16).astype(dtype), labels[:600]


def classifier(kind, seed=0, **changes):
    kinds = {"fused": fused_classifier(), "own": MLPClassifier, "nudged": NudgedMLPClassifier}
    options = {"hidden_layer_sizes": (16,), "activation": "tanh", "batch_size": 50, "max_iter": EPOCHS}
    return kinds[kind](random_state=seed, learning_rate_init=5e-3, **{**options, **changes})


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
def train(kind, seed):
    return np.array(classifier(kind, seed).fit(*digits()).loss_curve_)


quiet = pytest.mark.filterwarnings("ignore:Stochastic Optimizer")


@quiet
def test_curve_is_that_of_sklearn():
    assert_trains_as_its_own(train)


@quiet
def test_a_defect_is_found(monkeypatch):
    assert_finds_a_defect(train, monkeypatch)


@quiet
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_it_is_an_estimator_as_before(dtype):
    """Cloned, pickled, trained on in parts, with early stopping, in both dtypes."""
    images, labels = digits(dtype)
    own, fused = (classifier(kind).fit(images, labels) for kind in ("own", "fused"))
    assert own.score(images, labels) == fused.score(images, labels) > 0.8
    assert [array.dtype for array in fused.coefs_] == [np.dtype(dtype)] * 2
    copy = pickle.loads(pickle.dumps(fused))
    for model in (fused, copy, own):
        model.partial_fit(images, labels)
    np.testing.assert_array_equal(fused.coefs_[0], copy.coefs_[0])
    np.testing.assert_allclose(
        fused.coefs_[0], own.coefs_[0], rtol=0, atol=1e-4 if dtype == "float32" else 1e-12
    )
    early = clone(fused).set_params(early_stopping=True, max_iter=3).fit(images, labels)
    theirs = classifier("own", early_stopping=True, max_iter=3).fit(images, labels)
    assert early.validation_scores_ == theirs.validation_scores_
