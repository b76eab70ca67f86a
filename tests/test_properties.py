"""Properties that hold for any input (Hypothesis)."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracles import FLAGS
from tolerances import assert_same_bits

from fastadam import FusedAdam

dtypes = st.sampled_from([np.float32, np.float64])
flags = st.sampled_from(FLAGS)
betas = st.tuples(st.floats(0, 0.999), st.floats(0, 0.9999))
sizes = st.integers(0, 200)


@st.composite
def runs(draw, *, specials=False):
    """A dtype, the start and three gradients."""
    dtype, size = draw(dtypes), draw(sizes)
    bound = 2.0 ** (50 if dtype is np.float32 else 400)  # squares do not overflow
    elements = st.floats(-bound, bound, width=np.dtype(dtype).itemsize * 8)
    grads = st.floats(width=np.dtype(dtype).itemsize * 8) if specials else elements
    params = draw(hnp.arrays(dtype, size, elements=elements))
    return params, [draw(hnp.arrays(dtype, size, elements=grads)) for _ in range(3)]


def run(params, gradients, **hyperparameters):
    opt, params = FusedAdam(**hyperparameters), params.copy()
    for grads in gradients:
        opt.step(params, np.ascontiguousarray(grads))
    return params, opt


@given(runs(), st.integers(0, 200), flags, betas)
def test_a_step_on_a_concatenation_is_the_concatenation_of_steps(problem, cut, flags, betas):
    params, gradients = problem
    parts = [
        run(params[part], [g[part] for g in gradients], betas=betas, **flags)[0]
        for part in (slice(cut), slice(cut, None))
    ]
    assert_same_bits(np.concatenate(parts), run(params, gradients, betas=betas, **flags)[0])


@given(runs(), st.randoms(use_true_random=False), flags)
def test_elements_are_independent_of_their_order(problem, random, flags):
    params, gradients = problem
    order = np.array(random.sample(range(params.size), params.size), int)
    permuted = run(params[order], [g[order] for g in gradients], **flags)[0]
    assert_same_bits(permuted, run(params, gradients, **flags)[0][order])


@given(runs(), flags)
def test_the_same_input_gives_the_same_bits(problem, flags):
    assert_same_bits(run(*problem, **flags)[0], run(*problem, **flags)[0])


@given(runs(), st.integers(0, 3), flags)
def test_saving_and_loading_between_steps_changes_nothing(problem, at, flags):
    params, gradients = problem
    first, opt = run(params, gradients[:at], **flags)
    resumed = FusedAdam()
    resumed.load_state_dict(opt.state_dict())
    for grads in gradients[at:]:
        resumed.step(first, grads)
    assert_same_bits(first, run(params, gradients, **flags)[0])


@given(runs(), st.booleans(), betas)
def test_zero_gradients_without_decay_leave_parameters(problem, amsgrad, betas):
    params, gradients = problem
    stepped, _ = run(params, [np.zeros_like(g) for g in gradients], amsgrad=amsgrad, betas=betas)
    np.testing.assert_array_equal(stepped, params)


@given(runs(), flags)
def test_zero_lr_leaves_parameters(problem, flags):
    params, gradients = problem
    np.testing.assert_array_equal(run(params, gradients, lr=0.0, **flags)[0], params)


@given(runs(), st.sampled_from([0.5, 2.0, 1024.0]))
def test_updates_do_not_depend_on_the_scale_of_gradients(problem, scale):
    """With eps = 0 and a power of two, exactly; elements whose squares are subnormal aside."""
    params, gradients = problem
    finfo = np.finfo(params.dtype)
    gradients = [np.where(np.abs(g) < np.sqrt(finfo.tiny) * 2**20, 1, g).astype(g.dtype) for g in gradients]
    scaled = [(g * params.dtype.type(scale)) for g in gradients]
    assert_same_bits(run(params, scaled, eps=0.0)[0], run(params, gradients, eps=0.0)[0])


@given(runs(specials=True), flags)
def test_nan_and_inf_stay_in_their_elements(problem, flags):
    params, gradients = problem
    tame = np.all([np.abs(g) <= 2.0**50 for g in gradients], axis=0)
    stepped, opt = run(params, gradients, **flags)
    expected, other = run(params, [np.where(tame, g, 0).astype(g.dtype) for g in gradients], **flags)
    assert_same_bits(stepped[tame], expected[tame])
    for a, b in zip(opt.state.arrays, other.state.arrays, strict=True):
        assert_same_bits(a[tame], b[tame])


@given(runs(), flags)
def test_moments_stay_in_range(problem, flags):
    _, opt = run(*problem, **flags)
    assert (opt.state.exp_avg_sq >= 0).all()
    if flags["amsgrad"]:
        assert (opt.state.max_exp_avg_sq >= opt.state.exp_avg_sq).all()


@given(runs(), st.floats(1e-6, 1.0), st.tuples(st.floats(0, 0.95), st.floats(0, 0.9999)))
def test_the_first_update_is_at_most_lr(problem, lr, betas):
    params, gradients = problem
    stepped, _ = run(np.zeros_like(params), gradients[:1], lr=lr, betas=betas)
    assert (np.abs(stepped) <= lr * (1 + 1e-5)).all()
