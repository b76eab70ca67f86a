"""The family of optimizers against PyTorch's, and against the papers where PyTorch has none."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
from family_cases import LION, RULES, VARIANTS, make
from tolerances import EPS, trajectory_tolerance

import fastadam
from fastadam import schedules

torch = pytest.importorskip("torch")

N, STEPS = 67, 1000


@pytest.fixture
def double():
    """PyTorch keeps NAdam's product of momenta in its default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def peer(kind, start, flags):
    """Return a parameter of PyTorch, and its optimizer."""
    flags = dict(flags)
    parameter = torch.tensor(start, requires_grad=True)
    return parameter, getattr(torch.optim, kind)([parameter], **flags, foreach=False)


def problem(rng, dtype):
    return rng.standard_normal(N).astype(dtype), rng.standard_normal((STEPS, N)).astype(dtype)


def trajectory(kind, flags, start, gradients):
    """Return our parameters after every step."""
    opt, params, found = getattr(fastadam, f"Fused{kind}")(**flags), start.copy(), []
    for grads in gradients:
        opt.step(params, grads)
        found.append(params.copy())
    return np.array(found), opt


def torch_trajectory(kind, flags, start, gradients):
    """Return PyTorch's, and its state."""
    parameter, opt = peer(kind, start, flags)
    found = []
    for grads in gradients:
        parameter.grad = torch.from_numpy(grads.copy())
        opt.step()
        found.append(parameter.detach().numpy().copy())
    return np.array(found), opt.state[parameter]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", VARIANTS)
def test_a_thousand_steps_are_those_of_pytorch(rng, name):
    kind, flags = VARIANTS[name]
    start, gradients = problem(rng, "float64")
    found, opt = trajectory(kind, flags, start, gradients)
    expected, state = torch_trajectory(kind, flags, start, gradients)
    steps = np.arange(1, STEPS + 1)[:, None]
    assert (np.abs(found - expected) <= trajectory_tolerance(start, expected)).all()
    assert np.abs(expected[-1] - start).min() > 0
    moments = {key: value for key, value in state.items() if key not in {"step", "mu_product"}}
    if not opt.state.moments:
        assert all(value is None for value in moments.values())
        return
    assert set(moments) == set(opt.state.moments)
    for key, value in moments.items():
        # Four half roundings a step, of both, of numbers that are no larger than the gradients' squares.
        wanted = value.numpy()
        bound = 4 * STEPS * EPS[np.dtype("float64")] * max((gradients**2).max(), np.abs(wanted).max())
        assert (np.abs(opt.state.moments[key] - wanted) <= bound).all(), key
    assert steps[-1, 0] == opt.state.step


@pytest.mark.parametrize("name", VARIANTS)
def test_float32_is_as_near_to_float64_as_pytorch_is(rng, name):
    """By the root of the mean square over elements, after a thousand steps; a quarter more is chance."""
    kind, flags = VARIANTS[name]
    start, gradients = problem(rng, "float32")
    exact, _ = trajectory(kind, flags, start.astype(np.float64), gradients.astype(np.float64))
    found, _ = trajectory(kind, flags, start, gradients)
    theirs, _ = torch_trajectory(kind, flags, start, gradients)
    ours, peers = (float(np.sqrt(np.mean((one[-1] - exact[-1]) ** 2))) for one in (found, theirs))
    assert found.dtype == np.float32
    assert 0 < ours <= 1.25 * peers


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", LION)
def test_lion_is_that_of_the_paper(rng, name, dtype):
    """Program 1 of the paper, line by line, in float64, where no sign is one of rounding."""
    flags = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0, "maximize": False, **LION[name]}
    start, gradients = problem(rng, dtype)
    found, opt = trajectory("Lion", LION[name], start, gradients)
    (beta1, beta2), lr = flags["betas"], flags["lr"]
    weight, momentum = start.astype(np.float64), np.zeros(N)
    expected, nearest, largest = [], np.full(N, np.inf), 0.0
    for gradient in gradients.astype(np.float64) * (-1 if flags["maximize"] else 1):
        mixed = beta1 * momentum + (1 - beta1) * gradient
        nearest = np.minimum(nearest, np.abs(mixed))
        update = np.sign(mixed)
        momentum = beta2 * momentum + (1 - beta2) * gradient
        largest = max(largest, np.abs(momentum).max())
        weight = weight - lr * (update + flags["weight_decay"] * weight)
        expected.append(weight)
    eps = EPS[np.dtype(dtype)]
    # A momentum has four half roundings a step of numbers as large as itself, which fade as it does, and
    # those of a gradient. A sign may be another where it is that of a number as small.
    error = eps * (2 * largest / (1 - beta2) + 4 * np.abs(gradients).max())
    certain = nearest > error
    assert certain.mean() > 0.5
    # lr, the decay and their product are rounded, a parameter twice a step.
    furthest = np.dtype(dtype).type(np.abs(expected).max() + np.abs(start).max())
    bound = STEPS * (2 * float(np.spacing(furthest)) + 4 * eps * lr)
    assert np.abs(found - np.array(expected))[:, certain].max() <= bound
    assert np.abs(opt.state.exp_avg - momentum).max() <= error


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_sign_of_zero_is_zero(dtype):
    opt, params = fastadam.FusedLion(0.1), np.ones(3, dtype)
    opt.step(params, np.array([0.0, -0.0, np.nan], dtype))
    assert params[:2].tolist() == [1, 1]
    assert np.isnan(params[2])


@pytest.mark.parametrize("name", ["radam", "nadam"])
def test_schedules_of_coefficients_go_on_for_ever(name):
    """From a step on that no table reaches they are what they tend to."""
    opt = make(name, betas=(0.9, 0.99), lr=0.1)
    params, grads = np.zeros(1), np.ones(1)
    opt.step(params, grads)
    opt.load_state_dict({**opt.state_dict(), "step": 10**15, "exp_avg": grads, "exp_avg_sq": grads})
    before = params.copy()
    opt.step(params, grads)
    np.testing.assert_allclose(before - params, 0.1, rtol=1e-6)


def test_centered_rmsprop_has_no_negative_variance():
    """PyTorch's parameter becomes NaN where rounding makes one."""
    params, grads = np.ones(64, np.float32), np.linspace(0.1, 3, 64, dtype=np.float32)
    opt = fastadam.FusedRMSprop(centered=True, alpha=0.5)
    for _ in range(60):
        opt.step(params, grads)
    variance = opt.state.square_avg - opt.state.grad_avg**2
    assert (variance <= 0).any()
    assert np.isfinite(params).all()


# --- Arguments ----------------------------------------------------------------------------------------------

CLASSES = sorted({kind for kind, _ in VARIANTS.values()})
THEIRS = {"params", "foreach", "fused", "capturable", "differentiable", "amsgrad"}
"""What is PyTorch's alone, and what stands elsewhere in Adam's signature."""


@pytest.mark.parametrize("kind", CLASSES)
def test_arguments_are_those_of_pytorch(kind):
    """In the same order, with the same defaults; keywords where they are keywords there."""
    ours = inspect.signature(getattr(fastadam, f"Fused{kind}")).parameters
    theirs = inspect.signature(getattr(torch.optim, kind)).parameters
    wanted = [name for name in theirs if name not in THEIRS and name != "decoupled_weight_decay"]
    found = [name for name in ours if name in wanted]
    assert found == wanted
    for name in wanted:
        default = theirs[name].default
        assert ours[name].default == default, name
        assert isinstance(ours[name].default, type(default)) or default == 0, name
    if "decoupled_weight_decay" in theirs:
        assert ours["decoupled_weight_decay"].default is False
    assert ours["maximize"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("kind", CLASSES)
def test_positional_arguments_are_those_of_pytorch(kind):
    ours = inspect.signature(getattr(fastadam, f"Fused{kind}")).parameters.values()
    positional = [one.name for one in ours if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    theirs = [name for name in inspect.signature(getattr(torch.optim, kind)).parameters if name != "params"]
    assert theirs[: len(positional)] == positional


@pytest.mark.parametrize("kind", [*CLASSES, "Lion"])
def test_arguments_are_attributes(kind):
    cls = getattr(fastadam, f"Fused{kind}")
    parameters = inspect.signature(cls).parameters.values()
    own = [one for one in parameters if one.kind is not inspect.Parameter.VAR_KEYWORD]
    opt = cls()
    for one in own:
        if one.name != "segments":  # an iterable there, a tuple here
            assert getattr(opt, one.name) == one.default, one.name
    assert repr(opt).startswith(f"Fused{kind}(lr=")
    assert eval(repr(opt), vars(fastadam)) is not None
    with pytest.raises(TypeError, match="unexpected keyword argument 'nothing'"):
        cls(nothing=1)


CHANGES = {
    "adam": {"betas": (0.5, 0.6), "eps": 0.1},
    "nadam": {"betas": (0.5, 0.6), "eps": 0.1, "momentum_decay": 0.1},
    "radam": {"betas": (0.5, 0.6), "eps": 0.1},
    "adamax": {"betas": (0.5, 0.6), "eps": 0.1},
    "lion": {"betas": (0.5, 0.6)},
    "momentum": {"momentum": 0.5, "dampening": 0.2},
    "nesterov": {"momentum": 0.5},
    "adagrad": {"eps": 0.1, "lr_decay": 0.3},
    "rmsprop": {"alpha": 0.5, "eps": 0.1},
    "rmsprop-centered-momentum": {"alpha": 0.5, "eps": 0.1, "momentum": 0.2},
    "adadelta": {"rho": 0.5, "eps": 0.1},
}
COMMON = {"lr": 0.3, "weight_decay": 0.2, "max_grad_norm": 0.4, "max_grad_value": 0.1}


@pytest.mark.parametrize(
    ("name", "attribute", "value"),
    [(name, *pair) for name, own in CHANGES.items() for pair in {**own, **COMMON}.items()],
    ids=str,
)
def test_attributes_count_from_the_next_step_on(rng, name, attribute, value):
    start, gradients = rng.standard_normal(17), rng.standard_normal((9, 17))
    opt, params = make(name), start.copy()
    for grads in gradients[2:]:  # so many that RAdam has a variance
        opt.step(params, grads)
    entries, middle = opt.state_dict(), params.copy()
    unchanged = params.copy()
    setattr(opt, attribute, value)
    assert getattr(opt, attribute) == value
    opt.step(params, gradients[1])
    # As an optimizer that was made with it, from the same state.
    other = make(name, **{attribute: value})
    other.load_state_dict({**entries, attribute: value})
    other.step(middle, gradients[1])
    assert (params == middle).all()
    same = make(name)
    same.load_state_dict(entries)
    same.step(unchanged, gradients[1])
    assert (params != unchanged).any()


@pytest.mark.parametrize("name", RULES)
def test_schedules_set_the_learning_rate(rng, name):
    start, gradients = rng.standard_normal(17), rng.standard_normal((8, 17))
    schedule = schedules.linear_warmup(schedules.cosine(0.1, steps=7), steps=3)
    scheduled, by_hand = make(name, lr=schedule), make(name)
    params, expected = start.copy(), start.copy()
    for step, grads in enumerate(gradients, start=1):
        scheduled.step(params, grads)
        by_hand.lr = schedule(step)
        by_hand.step(expected, grads)
        assert scheduled.last_step.lr == schedule(step)
    assert (params == expected).all()


BAD = [
    ("NAdam", {"momentum_decay": -1}, "momentum_decay must be at least 0; got -1.0."),
    ("NAdam", {"betas": (0.9, 1.0)}, "betas[1] must be in [0, 1); got 1.0."),
    ("NAdam", {"lr": -1.0}, "lr must be at least 0; got -1.0."),
    ("RAdam", {"betas": (1.0, 0.9)}, "betas[0] must be in [0, 1); got 1.0."),
    ("RAdam", {"weight_decay": -1.0}, "weight_decay must be at least 0; got -1.0."),
    ("Adamax", {"eps": -1.0}, "eps must be at least 0; got -1.0."),
    ("SGD", {"momentum": -0.9}, "momentum must be at least 0; got -0.9."),
    ("SGD", {"nesterov": True}, "momentum must be greater than 0 with nesterov=True; got 0.0."),
    (
        "SGD",
        {"momentum": 0.9, "nesterov": True, "dampening": 0.1},
        "dampening must be 0 with nesterov=True; got 0.1.",
    ),
    ("Adagrad", {"lr_decay": -1.0}, "lr_decay must be at least 0; got -1.0."),
    (
        "Adagrad",
        {"initial_accumulator_value": -1.0},
        "initial_accumulator_value must be at least 0; got -1.0.",
    ),
    ("RMSprop", {"alpha": -0.1}, "alpha must be in [0, 1); got -0.1."),
    ("RMSprop", {"momentum": -0.1}, "momentum must be at least 0; got -0.1."),
    ("RMSprop", {"eps": -1e-8}, "eps must be at least 0; got -1e-08."),
    ("Adadelta", {"rho": -0.1}, "rho must be in [0, 1); got -0.1."),
    ("Adadelta", {"rho": 1.5}, "rho must be in [0, 1); got 1.5."),
    ("Adadelta", {"lr": -0.1}, "lr must be at least 0; got -0.1."),
]


@pytest.mark.parametrize(("kind", "flags", "message"), BAD, ids=str)
def test_what_pytorch_refuses_is_refused(kind, flags, message):
    with pytest.raises(ValueError, match=r"Invalid|Nesterov|should be"):
        peer(kind, np.ones(1), flags)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(fastadam, f"Fused{kind}")(**flags)


BAD_HERE = [
    ("SGD", {"dampening": -1.0}, ValueError, "dampening must be at least 0; got -1.0."),
    ("SGD", {"nesterov": 1}, TypeError, "nesterov must be True or False; got int."),
    ("SGD", {"momentum": "a"}, TypeError, "momentum must be a real number; got str."),
    ("RMSprop", {"centered": 0}, TypeError, "centered must be True or False; got int."),
    ("RMSprop", {"alpha": 1.0}, ValueError, "alpha must be in [0, 1); got 1.0."),
    ("RMSprop", {"maximize": 1}, TypeError, "maximize must be True or False; got int."),
    ("Lion", {"betas": (0.9, 1.0)}, ValueError, "betas[1] must be in [0, 1); got 1.0."),
    ("Lion", {"betas": 0.9}, TypeError, "betas must be a pair of real numbers; got float."),
    ("Adagrad", {"eps": float("nan")}, ValueError, "eps must be finite; got nan."),
    (
        "Lion",
        {"state_dtype": "4bit"},
        ValueError,
        "state_dtype must be 'float32', 'bfloat16', '8bit' or a pair of them; got '4bit'.",
    ),
]


@pytest.mark.parametrize(("kind", "flags", "error", "message"), BAD_HERE, ids=str)
def test_what_is_refused_besides(kind, flags, error, message):
    with pytest.raises(error) as caught:
        getattr(fastadam, f"Fused{kind}")(**flags)
    assert type(caught.value) is error
    assert str(caught.value) == message


RANGES = [
    ("adagrad", {"eps": 1e-60}, "eps must be 0 or at least 1.401298e-45 for float32 buffers; got 1e-60."),
    ("momentum", {"momentum": 1e60}, "momentum must be at most 3.402823e+38 for float32 buffers; got 1e+60."),
    (
        "adagrad",
        {"initial_accumulator_value": 1e60},
        "initial_accumulator_value must be at most 3.402823e+38 for float32 buffers; got 1e+60.",
    ),
    ("lion", {"lr": 1e60}, "lr must be at most 3.402823e+38 for float32 buffers; got 1e+60."),
    (
        "nadam",
        {"lr": 1e38, "betas": (0.999, 0.9)},
        "lr / (1 - betas[0]) must be at most 3.402823e+38 for float32 buffers; got 1e+41.",
    ),
    (
        "sgd",
        {"weight_decay": 1e-60},
        "weight_decay must be 0 or at least 1.401298e-45 for float32 buffers; got 1e-60.",
    ),
]


@pytest.mark.parametrize(("name", "flags", "message"), RANGES, ids=str)
def test_numbers_must_fit_the_dtype(name, flags, message):
    params, grads, opt = np.ones(3, np.float32), np.ones(3, np.float32), make(name, **flags)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        opt.step(params, grads)
    assert (params == 1).all()
    assert opt.state.step == 0
