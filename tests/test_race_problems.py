"""The problems of the race: gradients, minima, noise; the registry of optimizers."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import fastadam
from fastadam.race import online
from fastadam.race.optimizers import OPTIMIZERS, Entrant
from fastadam.race.problem import Problem
from fastadam.race.problems import PROBLEMS
from fastadam.race.surfaces import Surface

EXACT = {"rosenbrock", "quadratic", "saddle"}
"""Every step gets the gradient itself."""

NAMES = ["rosenbrock", "quadratic", "saddle", "noisy", "logistic", "digits", "reddi"]


@pytest.fixture(scope="module", params=NAMES)
def problem(request):
    if request.param == "digits":
        pytest.importorskip("sklearn")
    return PROBLEMS[request.param]()


def test_problems_are_these_in_this_order():
    assert list(PROBLEMS) == NAMES


def slope(function, params, direction, h):
    """Central difference of a function along a direction."""
    return (function(params + h * direction) - function(params - h * direction)) / (2 * h)


def test_gradient_is_that_of_finite_differences(problem, rng):
    for seed in (0, 1):
        params = problem.start(seed)
        params += 0.1 * rng.standard_normal(params.size)
        gradient = problem.gradient(params)
        loss, again = problem.loss_and_gradient(params)
        assert loss == problem.loss(params)
        np.testing.assert_array_equal(again, gradient)
        # Each axis of the small ones; of the large ones random directions, which meet every element.
        axes = np.eye(params.size) if params.size <= 4 else rng.standard_normal((5, params.size))
        for axis in axes:
            # Truncation is h^2 times a third derivative (at most some 3,000, of Rosenbrock), rounding
            # 1e-16 / h times the loss: below 1e-6 of the slope. Kinks of ReLU are met with probability 0.
            expected = slope(problem.loss, params, axis, 1e-6)
            assert gradient @ axis == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert np.abs(gradient).max() > 1e-3  # so that nothing was compared with zero


def test_the_mean_of_a_steps_gradients_is_the_gradient(problem):
    """But for the noise, of which there must be some where there should be."""
    params = problem.start(0)
    steps = 3000
    draws = problem.draws(0, steps)
    assert len(draws) == steps
    grads = np.empty((steps, problem.dims))
    for draw, row in zip(draws, grads, strict=True):
        problem.write_grads(params, draw, row)
    assert (np.ptp(grads, axis=0).max() == 0) == (problem.name in EXACT)
    if problem.name == "noisy":  # without a variance the mean says little; the median is right by symmetry
        middle, tolerance = np.median(grads, axis=0), 5 * 1.5 / np.sqrt(steps)
    else:
        middle, tolerance = grads.mean(axis=0), 5 * grads.std(axis=0).max() / np.sqrt(steps) + 1e-10
    assert np.abs(middle - problem.gradient(params)).max() < tolerance


def test_seeds_differ_and_are_the_same_each_time(problem):
    np.testing.assert_array_equal(problem.start(3), problem.start(3))
    np.testing.assert_array_equal(problem.draws(3, 20), problem.draws(3, 20))
    assert not np.array_equal(problem.start(3), problem.start(4))
    assert problem.start(3).shape == (problem.dims,)
    assert problem.start(3).dtype == np.float64
    if problem.name not in EXACT | {"reddi"}:  # its order is part of the theorem
        assert not np.array_equal(problem.draws(3, 20), problem.draws(4, 20))
        # More steps do not change the first ones of the data problems and of the noise.
        np.testing.assert_array_equal(problem.draws(3, 20), problem.draws(3, 50)[:20])


def test_starts_are_above_the_target_and_told_about(problem):
    for seed in range(5):
        assert problem.loss(problem.start(seed)) > 2 * problem.target
    assert problem.steps >= 100
    assert problem.title
    assert problem.lesson.endswith(".")
    assert "  " not in problem.lesson


@pytest.mark.parametrize("name", [name for name in NAMES if issubclass(PROBLEMS[name], Surface)])
def test_goals_are_minima_and_in_view(name, rng):
    surface = PROBLEMS[name]()
    view = surface.view
    for goal in surface.goals:
        at = np.array(goal)
        assert surface.loss(at) == pytest.approx(0, abs=1e-15)
        np.testing.assert_allclose(surface.gradient(at), 0, atol=1e-12)
        for step in 1e-3 * rng.standard_normal((20, 2)):
            assert surface.loss(at + step) > 0
        assert view.left < goal[0] < view.right
        assert view.bottom < goal[1] < view.top
    x, y = np.meshgrid([-0.5, 0.7], [0.1, 1.3])
    each = [surface.loss(np.array(point)) for point in zip(x.ravel(), y.ravel(), strict=True)]
    np.testing.assert_array_equal(surface.value(x, y).ravel(), each)


def test_saddle_is_one():
    saddle = PROBLEMS["saddle"]()
    at = saddle.loss(np.zeros(2))
    np.testing.assert_array_equal(saddle.gradient(np.zeros(2)), 0)
    assert saddle.loss(np.array([0.1, 0.0])) > at > saddle.loss(np.array([0.0, 0.1]))


def test_sparse_features_are_sparse():
    logistic = PROBLEMS["logistic"]()
    there = (logistic._inputs != 0).mean(axis=0)
    assert there[0] == 1
    assert 0 < np.median(there) < 0.02


def test_counterexample_is_that_of_the_theorem():
    """Theorem 1: 3 x in every third round, -x in the others; betas 0 and 1 / (1 + 3^2); x in [-1, 1]."""
    reddi = PROBLEMS["reddi"]()
    assert reddi.draws(0, 7).ravel().tolist() == [3, -1, -1, 3, -1, -1, 3]
    assert reddi.bounds == (-1, 1)
    assert online.BETAS == (0, 0.1)
    assert reddi.loss(np.array([-1.0])) == 0
    assert reddi.loss(np.array([1.0])) == pytest.approx((3 - 1 - 1) / 3 * 2)
    assert {name for name, given in reddi.arguments.items() if given == {"betas": (0, 0.1)}} == {
        *("adam", "adamw", "amsgrad", "nadam", "radam", "adamax")
    }
    assert set(reddi.arguments) <= {entrant.name for entrant in OPTIMIZERS.values()}


# --- The registry -------------------------------------------------------------------------------------------

ALL_NAMES = [
    *("sgd", "sgd-momentum", "nesterov", "adagrad", "rmsprop", "adadelta", "adam", "adamw", "amsgrad"),
    *("nadam", "radam", "adamax", "lion", "lbfgs"),
]


def test_everybody_is_known():
    assert [entrant.name for entrant in OPTIMIZERS.values()] == ALL_NAMES
    titles = [entrant.title for entrant in OPTIMIZERS.values()]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("entrant", [e for e in OPTIMIZERS.values() if e.rule], ids=lambda e: e.name)
def test_default_lr_is_one_that_is_tried(entrant):
    assert entrant.lowest_lr <= entrant.default_lr <= entrant.highest_lr
    assert entrant.highest_lr == pytest.approx(1e4 * entrant.lowest_lr)


TORCH = {
    name: name.removeprefix("Fused") for name in {entrant.rule for entrant in OPTIMIZERS.values()} - {""}
}


@pytest.mark.parametrize(
    "entrant", [e for e in OPTIMIZERS.values() if e.rule not in {"", "FusedLion"}], ids=lambda e: e.name
)
def test_arguments_and_learning_rates_are_those_of_torch(entrant):
    torch = pytest.importorskip("torch")
    parameters = inspect.signature(getattr(torch.optim, TORCH[entrant.rule])).parameters
    prescribed = PROBLEMS["reddi"].arguments.get(entrant.name, {})
    known = {*parameters} | {"decoupled_weight_decay"}
    assert {*entrant.arguments, *prescribed} <= known
    assert entrant.default_lr == parameters["lr"].default


@pytest.mark.parametrize("entrant", [e for e in OPTIMIZERS.values() if e.rule], ids=lambda e: e.name)
def test_listed_ones_step(entrant):
    for cls in PROBLEMS.values():
        params, grads = np.ones(3), np.ones(3)
        entrant.make(entrant.default_lr, cls.arguments.get(entrant.name, {})).step(params, grads)
        assert np.all(params < 1)


def test_arguments_of_a_problem_are_above_those_of_an_entrant(monkeypatch):
    monkeypatch.setattr(fastadam, "FusedThing", lambda **given: given, raising=False)
    entrant = Entrant("thing", "Thing", "FusedThing", arguments={"alpha": 0.9, "momentum": 0.5})
    assert entrant.make(0.1, {"alpha": 0.1}) == {"lr": 0.1, "alpha": 0.1, "momentum": 0.5}


def test_a_problem_must_say_all():
    with pytest.raises(TypeError, match="abstract"):
        Problem()
