"""The functional form for JAX: new arrays, the bits of FusedAdam, and nothing is written to."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from tolerances import assert_same_bits, exchange_tolerance

from fastadam import FusedAdam, Segment, schedules

jax = pytest.importorskip("jax")

import fastadam.jax  # noqa: E402

OPTIONS = {
    "adam": {},
    "adamw": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "amsgrad": {"amsgrad": True, "maximize": True},
    "phase": {"max_grad_norm": 0.5, "ema_decay": 0.9, "skip_nonfinite": True},
    "segments": {"segments": [Segment(3, 9, lr=0.5), Segment(20, 25, frozen=True)]},
    "schedule": {"lr": schedules.cosine(0.1, steps=5)},
    "bfloat16 moments": {"state_dtype": "bfloat16", "seed": 3},
    "8-bit moments": {"state_dtype": ("bfloat16", "8bit")},
}


def bits(array):
    found = np.asarray(array)
    return found.view(np.uint16) if found.dtype == ml_dtypes.bfloat16 else found


def assert_same_state(state, opt):
    own = opt.state_dict()
    assert int(state.step) == own["step"]
    for name, array in state.arrays.items():
        assert_same_bits(np.asarray(array), own[name], name)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_bits_are_those_of_fusedadam(rng, options):
    options = {"lr": 0.1, **options}
    params = rng.standard_normal(300).astype(np.float32)
    opt, ours = FusedAdam(**options), jax.numpy.asarray(params)
    state = fastadam.jax.init(ours, **options)
    for k in range(4):
        grads = rng.standard_normal(300).astype(np.float32)
        grads[k] = np.inf if k == 2 and "skip_nonfinite" in options else 1.0
        opt.step(params, grads, grad_scale=2.0)
        ours, state = fastadam.jax.step(ours, jax.numpy.asarray(grads), state, grad_scale=2.0)
        assert isinstance(ours, jax.Array)
        assert_same_bits(np.asarray(ours), params)
        assert_same_state(state, opt)


@pytest.mark.parametrize("master", [None, "split", "float32"])
def test_16_bit_parameters(rng, master):
    params = rng.standard_normal(50).astype(ml_dtypes.bfloat16)
    opt, ours = FusedAdam(lr=1e-3, master_params=master), jax.numpy.asarray(params)
    state = fastadam.jax.init(ours, lr=1e-3, master_params=master)
    for _ in range(3):
        grads = rng.standard_normal(50).astype(ml_dtypes.bfloat16)
        opt.step(params, grads)
        ours, state = fastadam.jax.step(ours, jax.numpy.asarray(grads), state)
    assert ours.dtype == jax.numpy.bfloat16
    assert_same_bits(bits(ours), bits(params))
    assert_same_state(state, opt)


@pytest.mark.parametrize("size", [5, 100_000])
def test_nothing_given_is_written_to(rng, size):
    """Several steps from one state: were its memory shared with what they return, they would differ."""
    params = jax.numpy.asarray(rng.standard_normal(size).astype(np.float32))
    grads = jax.numpy.asarray(rng.standard_normal(size).astype(np.float32))
    params, state = fastadam.jax.step(params, grads, fastadam.jax.init(params, ema_decay=0.5))
    given = [params, grads, *jax.tree_util.tree_leaves(state)]
    before = [np.array(leaf) for leaf in given]
    results = [fastadam.jax.step(params, grads, state) for _ in range(2)]
    new, then = fastadam.jax.step(*results[0][:1], grads, results[0][1])
    assert int(then.step) == int(state.step) + 2
    assert not np.array_equal(new, params)
    for leaf, old in zip(given, before, strict=True):
        np.testing.assert_array_equal(leaf, old)
    for one, other in zip(*map(jax.tree_util.tree_leaves, results), strict=True):
        np.testing.assert_array_equal(one, other)


def test_numpy_arrays_are_read_only_too(rng):
    params, grads = rng.standard_normal((2, 7)).astype(np.float32)
    params.flags.writeable = grads.flags.writeable = False
    new, _ = fastadam.jax.step(params, grads, fastadam.jax.init(params))
    assert isinstance(new, jax.Array)
    assert not np.shares_memory(np.asarray(new), params)


def test_the_state_is_a_pytree(rng):
    params = jax.numpy.ones(6)
    _, state = fastadam.jax.step(params, params, fastadam.jax.init(params, lr=0.5, amsgrad=True))
    leaves, treedef = jax.tree_util.tree_flatten(state)
    assert [leaf.shape for leaf in leaves] == [(), (6,), (6,), (6,)]
    again = jax.tree_util.tree_unflatten(treedef, leaves)
    assert again.hyperparameters == state.hyperparameters
    moved = jax.device_put(state, jax.devices()[0])
    assert int(moved.step) == 1
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    assert paths == [".step", ".exp_avg", ".exp_avg_sq", ".max_exp_avg_sq"]
    assert jax.tree_util.tree_structure(fastadam.jax.init(params)) != treedef
    with pytest.raises(AttributeError, match="step"):
        state.step = 3


def test_a_run_goes_on_with_numpy_buffers(rng):
    params, grads = rng.standard_normal((2, 40)).astype(np.float32)
    ours, state = fastadam.jax.step(params, grads, fastadam.jax.init(params, lr=0.2, state_dtype="8bit"))
    opt = FusedAdam(state_dtype="8bit")
    opt.load_state_dict(state.state_dict())
    assert opt.lr == 0.2
    buffer = np.array(ours)
    opt.step(buffer, grads)
    ours, _ = fastadam.jax.step(ours, grads, state)
    assert_same_bits(buffer, np.asarray(ours))


def test_lr_of_one_step(rng):
    params, grads = rng.standard_normal((2, 40)).astype(np.float32)
    state = fastadam.jax.init(params, lr=0.2)
    ours, after = fastadam.jax.step(params, grads, state, lr=0.05)
    FusedAdam(lr=0.05).step(params, grads)
    assert_same_bits(np.asarray(ours), params)
    assert after.hyperparameters.lr == 0.2


def test_a_model_trains_to_the_loss_of_optax(rng):
    """A perceptron in float64 for its curve; then rounding decides nothing that one could see."""
    optax = pytest.importorskip("optax")
    with jax.enable_x64(True):
        x = rng.standard_normal((32, 3))
        y = np.sin(x.sum(1, keepdims=True))
        layers = {
            "w": 0.5 * rng.standard_normal((3, 8)),
            "b": np.zeros(8),
            "out": rng.standard_normal((8, 1)),
        }
        layers = jax.tree_util.tree_map(jax.numpy.asarray, layers)
        flat_params, unravel = jax.flatten_util.ravel_pytree(layers)

        def loss(layers):
            hidden = jax.numpy.tanh(x @ layers["w"] + layers["b"])
            return ((hidden @ layers["out"] - y) ** 2).mean()

        value_and_grad = jax.jit(jax.value_and_grad(lambda flat: loss(unravel(flat))))
        optimizer = optax.adam(0.02)
        theirs, opt_state, state = (
            flat_params,
            optimizer.init(flat_params),
            fastadam.jax.init(flat_params, lr=0.02),
        )
        curves, gradients = [], []
        for _ in range(100):
            value, grads = value_and_grad(flat_params)
            flat_params, state = fastadam.jax.step(flat_params, grads, state)
            their_value, their_grads = value_and_grad(theirs)
            updates, opt_state = optimizer.update(their_grads, opt_state)
            theirs = optax.apply_updates(theirs, updates)
            curves.append((float(value), float(their_value)))
            gradients.append(np.asarray(grads))
        curves = np.array(curves)
        assert curves[-1, 0] < 0.2 * curves[0, 0]
        # The loss differs by its gradient times what the parameters do. The bound of those is for equal
        # gradients; here they differ by what rounding makes of the parameters, which it exceeds by far.
        bound = exchange_tolerance(gradients, 0.02, 0.999, 4.0, np.float64)["params"]
        bound *= max(np.abs(g).sum() for g in gradients)
        assert bound < 1e-6
        np.testing.assert_allclose(curves[:, 0], curves[:, 1], rtol=0, atol=bound)


def test_float64_needs_x64():
    params = np.ones(3)
    message = (
        "flat_params must be of at most 32 bits while jax_enable_x64 is off; got float64."
        " Use FusedAdam, or jax.config.update('jax_enable_x64', True)."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        fastadam.jax.init(params)
    with jax.enable_x64(True):
        new, state = fastadam.jax.step(params, params, fastadam.jax.init(params))
        assert new.dtype == state.arrays["exp_avg"].dtype == np.float64


ONES = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fastadam.jax.init(ONES, zero_grads=True),
            "zero_grads must be False in fastadam.jax, where gradients are not written to; got True.",
        ),
        (
            lambda: fastadam.jax.init(ONES, telemetry=True),
            "telemetry must be False in fastadam.jax, where there is no last_step; got True.",
        ),
        (lambda: fastadam.jax.init(ONES, lr=-1.0), "lr must be at least 0; got -1.0."),
        (lambda: fastadam.jax.init([1.0]), "flat_params must be an array of JAX or NumPy; got list."),
        (
            lambda: fastadam.jax.init(ONES, segments=[Segment(0, 4)]),
            "segments[0].stop must be at most the size of flat_params (3); got 4.",
        ),
        (
            lambda: fastadam.jax.init(ONES, master_params="split"),
            "master_params must be None for float32 parameters; got 'split'.",
        ),
        (
            lambda: fastadam.jax.step(ONES, ONES, None),
            "state must be what fastadam.jax.init returns; got NoneType.",
        ),
        (
            lambda: fastadam.jax.step(ONES, ONES[:2], fastadam.jax.init(ONES)),
            "flat_grads must have the size of flat_params (3); got 2.",
        ),
        (
            lambda: fastadam.jax.step(ONES[:2], ONES[:2], fastadam.jax.init(ONES)),
            "flat_params must have the size of the state (3); got 2.",
        ),
        (
            lambda: fastadam.jax.step(ONES, ONES, fastadam.jax.init(ONES), grad_scale=0.0),
            "grad_scale must be greater than 0; got 0.0.",
        ),
        (
            lambda: jax.jit(fastadam.jax.step)(ONES, ONES, fastadam.jax.init(ONES)),
            "flat_params must be an array outside of jax.jit; got a tracer. Compile the function that returns"
            " the gradients, and step with its result.",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert error.value.args[0] == message  # JAX adds a note
