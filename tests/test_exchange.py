"""State of optax, Keras and thinc, here and back: k steps there and k here are 2 k there."""

from __future__ import annotations

import re

import numpy as np
import pytest
from exchange_cases import SHAPES, SIZE, STEPS, assert_close, run, split, start
from tolerances import assert_same_bits

import fastadam
from fastadam import FusedAdam
from fastadam.exchange import (
    eps_of_hat,
    from_keras,
    from_optax,
    from_thinc,
    hat_of_eps,
    to_keras,
    to_optax,
    to_thinc,
)

LR = 0.05


@pytest.fixture
def optax():
    pytest.importorskip("jax")
    return pytest.importorskip("optax")


def optax_run(optimizer, params, state, gradients):
    import jax
    import optax

    params = {name: jax.numpy.asarray(view) for name, view in split(params).items()}
    for grads in gradients:
        updates, state = optimizer.update(split(grads), state, params)
        params = optax.apply_updates(params, updates)
    return np.concatenate([np.asarray(params[name]).reshape(-1) for name in SHAPES]), state


def chains(optax):
    schedule = optax.piecewise_constant_schedule(LR, {2 * STEPS: 0.5})
    return {
        "adam": optax.adam(LR),
        "adamw": optax.chain(optax.clip(100.0), optax.adamw(schedule, weight_decay=0.1)),
        "injected": optax.inject_hyperparams(optax.adam)(learning_rate=LR),
        "partition": optax.partition({"it": optax.adam(LR)}, dict.fromkeys(SHAPES, "it")),
    }


@pytest.mark.parametrize("kind", ["adam", "adamw", "injected", "partition"])
def test_optax(rng, optax, kind):
    params, gradients = start(rng)
    optimizer = chains(optax)[kind]
    fresh = optimizer.init(split(params))
    there, state = optax_run(optimizer, params, fresh, gradients[:STEPS])
    whole, whole_state = optax_run(optimizer, there, state, gradients[STEPS : 2 * STEPS])
    decay = {"weight_decay": 0.1, "decoupled_weight_decay": True} if kind == "adamw" else {}
    opt, flat = FusedAdam(lr=LR, **decay), fastadam.flatten(split(params))
    from_optax(opt, state, flat=flat)
    ours = there.copy()
    run(opt, ours, gradients[STEPS : 2 * STEPS])
    assert opt.state.step == 2 * STEPS
    assert_close(ours, whole, gradients[: 2 * STEPS], lr=LR)

    back = to_optax(opt, fresh, flat=flat)
    again, _ = optax_run(optimizer, ours, back, gradients[2 * STEPS :])
    whole, _ = optax_run(optimizer, whole, whole_state, gradients[2 * STEPS :])
    assert_close(again, whole, gradients, lr=LR)  # with half the learning rate, if the schedule went on


def test_optax_without_names_is_in_the_order_of_ravel_pytree(rng, optax):
    import jax

    params, gradients = start(rng)
    optimizer = optax.adam(LR)
    _, state = optax_run(optimizer, params, optimizer.init(split(params)), gradients[:STEPS])
    opt = FusedAdam()
    from_optax(opt, state)
    assert_same_bits(opt.state.exp_avg, np.asarray(jax.flatten_util.ravel_pytree(state[0].mu)[0]))
    assert_same_bits(opt.state.exp_avg_sq, np.asarray(jax.flatten_util.ravel_pytree(state[0].nu)[0]))
    back = to_optax(opt, optimizer.init(split(params)))
    assert jax.tree_util.tree_structure(back) == jax.tree_util.tree_structure(state)
    for one, other in zip(*map(jax.tree_util.tree_leaves, (back, state)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_optax_errors(rng, optax):
    params, gradients = start(rng)
    views = split(params)
    adam = optax.adam(LR).init(views)
    opt = FusedAdam()
    run(opt, params.copy(), gradients[:1])
    for call, message in (
        (
            lambda: from_optax(opt, optax.amsgrad(LR).init(views)),
            "opt_state must have one ScaleByAdamState; got ScaleByAmsgradState, EmptyState.",
        ),
        (lambda: from_optax(opt, (adam, adam)), "opt_state must have one ScaleByAdamState; got 2 of it."),
        (lambda: from_optax(opt, 3), "opt_state must have one ScaleByAdamState; got int."),
        (
            lambda: from_optax(FusedAdam(amsgrad=True), adam),
            "opt must have amsgrad=False for the state of optax.adam; got True.",
        ),
        (
            lambda: from_optax(opt, adam, flat=fastadam.flatten({"a": params})),
            "flat must have the names of opt_state, ['a', 'b', 'c']; got ['a'].",
        ),
        (
            lambda: to_optax(opt, optax.adam(LR).init(views["a"])),
            "opt_state must have 21 elements, as many as the moments; got 3.",
        ),
        (
            lambda: from_optax(opt, optax.adam(LR).init(views["a"])),
            "state_dict['exp_avg'] must have the size of the state (21); got 3.",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call()
    assert opt.state.step == 1


class Variable:
    """As far as Keras 3 documents its variables."""

    def __init__(self, path, value):
        self.path, self.value = path, np.array(value)
        self.shape = self.value.shape

    def numpy(self):
        return self.value


class KerasAdam:
    """Adam as Keras 3 documents it, in float64. It stands in for the library, which is not installed here."""

    def __init__(self, params, amsgrad=False, epsilon=1e-7, interleaved=False):
        self.views, self.epsilon = split(params), epsilon
        kinds = ["momentum", "velocity"]
        paths = [(kind, name) for kind in kinds for name in SHAPES]
        if interleaved:  # another order: newer versions have each kind together
            paths = [(kind, name) for name in SHAPES for kind in kinds]
        paths += [("velocity_hat", name) for name in SHAPES if amsgrad]
        self.variables = [
            Variable("adam/iteration", 0),
            Variable("adam/learning_rate", np.float32(LR)),
            *(Variable(f"adam/net_{name}_{kind}", np.zeros(SHAPES[name])) for kind, name in paths),
        ]
        self.of = {variable.path.partition("_")[2]: variable for variable in self.variables[2:]}

    def load_own_variables(self, store):
        assert list(store) == [str(k) for k in range(len(self.variables))]
        for k, variable in enumerate(self.variables):
            assert store[str(k)].shape == variable.shape
            variable.value = np.array(store[str(k)])

    def run(self, gradients):
        lr = float(self.variables[1].value)
        for grads in gradients:
            t = int(self.variables[0].value) + 1
            self.variables[0].value = np.array(t)
            for name, g in split(grads).items():
                m, v = self.of[f"{name}_momentum"], self.of[f"{name}_velocity"]
                alpha = lr * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
                m.value = m.value + (g - m.value) * (1 - 0.9)
                v.value = v.value + (g**2 - v.value) * (1 - 0.999)
                root = v.value
                if f"{name}_velocity_hat" in self.of:
                    hat = self.of[f"{name}_velocity_hat"]
                    root = hat.value = np.maximum(hat.value, v.value)
                self.views[name] -= alpha * m.value / (np.sqrt(root) + self.epsilon)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_keras(rng, amsgrad, interleaved):
    """With an epsilon as large as its gradients: converted wrongly, or once for all, it would show."""
    params, gradients = start(rng, np.float64)
    epsilon, options = 0.1, {"amsgrad": amsgrad, "interleaved": interleaved}
    there, whole = params.copy(), params.copy()
    theirs, reference = (
        KerasAdam(there, epsilon=epsilon, **options),
        KerasAdam(whole, epsilon=epsilon, **options),
    )
    theirs.run(gradients[:STEPS])
    reference.run(gradients[: 2 * STEPS])
    opt, ours = FusedAdam(), there.copy()
    from_keras(opt, theirs.variables, epsilon=epsilon)
    assert opt.lr == np.float32(LR)
    assert opt.amsgrad == amsgrad
    assert opt.eps == eps_of_hat(epsilon, 0.999, STEPS + 1)

    def set_eps():
        opt.eps = eps_of_hat(epsilon, opt.betas[1], opt.state.step + 1)

    run(opt, ours, gradients[STEPS : 2 * STEPS], set_eps)
    assert_close(ours, whole, gradients[: 2 * STEPS], lr=LR)

    back = KerasAdam(ours, epsilon=epsilon, **options)
    back.load_own_variables(to_keras(opt, back.variables))
    back.run(gradients[2 * STEPS :])
    reference.run(gradients[2 * STEPS :])
    assert_close(ours, whole, gradients, lr=LR)


def test_keras_takes_pairs_and_says_what_is_wrong():
    moments = [("adam/x_momentum", np.ones(3, np.float32)), ("adam/x_velocity", np.ones(3, np.float32))]
    opt = FusedAdam(lr=0.25)
    from_keras(opt, [("adam/iteration", 7), *moments])
    assert (opt.state.step, opt.lr, opt.state.exp_avg.tolist()) == (7, 0.25, [1, 1, 1])
    store = to_keras(opt, [*moments, ("adam/iteration", 0), ("adam/learning_rate", 0.0)])
    assert [np.asarray(value).tolist() for value in store.values()] == [[1] * 3, [1] * 3, 7, 0.25]
    kinds = "('velocity_hat', 'momentum', 'velocity', 'iteration', 'learning_rate')"
    for call, message in (
        (lambda: from_keras(opt, moments), "variables must have one iteration; got 0."),
        (
            lambda: from_keras(opt, [("adam/x_average", 1)]),
            f"variables[0] must have a path that ends in one of {kinds}; got 'adam/x_average'.",
        ),
        (
            lambda: from_keras(opt, [np.ones(3)]),
            f"variables[0] must have a path that ends in one of {kinds}; got 'ndarray'.",
        ),
        (
            lambda: from_keras(opt, moments[:1]),
            "variables must have a velocity for each momentum (1); got 0.",
        ),
        (
            lambda: to_keras(opt, [*moments, ("x_velocity_hat", np.ones(3))]),
            "variables must be those of an Adam without amsgrad, as opt is; got others.",
        ),
        (lambda: from_keras(opt, moments, epsilon=-1.0), "epsilon must be at least 0; got -1.0."),
        (lambda: eps_of_hat(1e-7, 1.0, 1), "betas[1] must be in [0, 1); got 1.0."),
        (lambda: hat_of_eps(1e-7, 0.9, 0), "step must be in [1, 2**53); got 0."),
    ):
        if message.startswith("epsilon"):
            moments.append(("adam/iteration", 1))
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call()


def test_conversions_undo_each_other():
    for step in (1, 10, 100_000):
        assert hat_of_eps(eps_of_hat(1e-7, 0.999, step), 0.999, step) == pytest.approx(1e-7, rel=1e-15)


@pytest.fixture
def thinc():
    return pytest.importorskip("thinc.api", exc_type=ImportError)


def thinc_run(optimizer, params, gradients):
    views = {(k, name): view for k, (name, view) in enumerate(split(params).items())}
    for grads in gradients:
        for (key, view), grad in zip(views.items(), split(grads.copy()).values(), strict=True):
            new, _ = optimizer(key, view, grad)
            view[...] = new
    return views


def test_thinc(rng, thinc):
    params, gradients = start(rng)

    def adam():
        return thinc.Adam(LR, eps=0.1, grad_clip=0.0, use_averages=False, L2=0.0)

    there, whole = params.copy(), params.copy()
    theirs, reference = adam(), adam()
    thinc_run(theirs, there, gradients[:STEPS])
    thinc_run(reference, whole, gradients[: 2 * STEPS])
    opt, ours = FusedAdam(), there.copy()
    from_thinc(opt, theirs)
    assert (opt.lr, opt.betas, opt.state.step) == (LR, (0.9, 0.999), STEPS)
    for name, moments in (("exp_avg", theirs.mom1), ("exp_avg_sq", theirs.mom2)):
        assert_same_bits(opt.state.moments[name], np.concatenate(list(moments.values())))

    def set_eps():
        opt.eps = eps_of_hat(0.1, opt.betas[1], opt.state.step + 1)

    run(opt, ours, gradients[STEPS : 2 * STEPS], set_eps)
    assert_close(ours, whole, gradients[: 2 * STEPS], lr=LR)

    back, weights = adam(), {(k, name): view for k, (name, view) in enumerate(split(ours).items())}
    for name, of_keys in to_thinc(opt, weights).items():
        getattr(back, name).update(of_keys)
    thinc_run(back, ours, gradients[2 * STEPS :])
    thinc_run(reference, whole, gradients[2 * STEPS :])
    assert_close(ours, whole, gradients, lr=LR)


def test_thinc_keys_give_the_order(rng, thinc):
    params, gradients = start(rng)
    theirs = thinc.Adam(LR)
    views = thinc_run(theirs, params, gradients[:1])
    opt, keys = FusedAdam(), list(reversed(views))
    from_thinc(opt, theirs, keys=keys)
    expected = np.concatenate([theirs.mom1[key] for key in keys])
    assert_same_bits(opt.state.exp_avg, expected)
    theirs.nr_update[keys[1]] = 9
    for call, message in (
        (
            lambda: from_thinc(opt, theirs),
            f"optimizer.nr_update[{keys[1]!r}] must be 1, as optimizer.nr_update[{keys[2]!r}] is; got 9."
            " One step counter is for the whole buffer.",
        ),
        (lambda: from_thinc(opt, theirs, keys=["x"]), "keys must be those of optimizer.mom1; got 'x'."),
        (lambda: from_thinc(opt, thinc.Adam(LR)), "optimizer must have taken a step; got no moments."),
        (lambda: from_thinc(opt, 3), "optimizer must be a thinc Optimizer; got int."),
        (
            lambda: to_thinc(opt, {"x": params[:2]}),
            f"weights must have {SIZE} elements, as many as the moments; got 2.",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}$"):
            call()
