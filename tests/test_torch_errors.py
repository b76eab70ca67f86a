"""What ``fastadam.torch.FusedAdam`` refuses, and that nothing has changed then."""

from __future__ import annotations

import copy
import re

import pytest
from torch_twins import copies, give, make

torch = pytest.importorskip("torch")

from fastadam.torch import FusedAdam  # noqa: E402

ARGUMENTS = [
    ({"lr": -1.0}, ValueError, "lr must be at least 0; got -1.0."),
    ({"lr": "1"}, TypeError, "lr must be a real number; got str."),
    ({"lr": torch.ones(2)}, ValueError, "lr must be a number or a tensor of one; got 2 elements."),
    ({"lr": torch.tensor(-1.0)}, ValueError, "lr must be at least 0; got -1.0."),
    ({"betas": (1.0, 0.9)}, ValueError, "betas[0] must be in [0, 1); got 1.0."),
    ({"betas": (0.9, -0.5)}, ValueError, "betas[1] must be in [0, 1); got -0.5."),
    ({"betas": 0.9}, TypeError, "betas must be a pair of real numbers; got float."),
    ({"eps": -1e-8}, ValueError, "eps must be at least 0; got -1e-08."),
    ({"weight_decay": -0.1}, ValueError, "weight_decay must be at least 0; got -0.1."),
    ({"amsgrad": 1}, TypeError, "amsgrad must be True or False; got int."),
    (
        {"capturable": True},
        ValueError,
        "capturable must be False; got True. Leave it out: steps are counted in CPU memory, and none is"
        " captured.",
    ),
    (
        {"differentiable": True},
        ValueError,
        "differentiable must be False; got True. Leave it out: a step is no part of a graph.",
    ),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), ARGUMENTS)
def test_arguments(arguments, kind, message):
    params = [torch.zeros(3), torch.zeros(4)]
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        FusedAdam(params, **arguments)
    opt = FusedAdam(params[:1])
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        opt.add_param_group({"params": params[1:], **arguments})
    assert len(opt.param_groups) == 1


def test_parameters_that_torch_refuses():
    with pytest.raises(ValueError, match="empty parameter list"):
        FusedAdam([])
    with pytest.raises(TypeError, match="iterable of Tensors"):
        FusedAdam(torch.zeros(3))
    with pytest.raises(ValueError, match="non-leaf"):
        FusedAdam([torch.zeros(3, requires_grad=True) * 2])
    with pytest.raises(ValueError, match="more than one parameter group"):
        FusedAdam([{"params": [param := torch.zeros(3)]}, {"params": [param]}])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = FusedAdam([param, param])
    with_grad(param)
    with pytest.raises(ValueError, match="params must not share memory"):
        opt.step()


LAST = "param_groups[0]['params'][6]"


def with_grad(param, grad=None):
    param.grad = torch.zeros_like(param) if grad is None else grad
    return param


def meta():
    return with_grad(torch.zeros(3, device="meta"))


def gaps():
    return with_grad(torch.zeros(3, 4)[:, :2])


def sparse():
    return with_grad(torch.zeros(3), torch.zeros(3).to_sparse())


def integers():
    return with_grad(torch.zeros(3, dtype=torch.int64))


TENSORS = [
    (
        meta,
        NotImplementedError,
        f"{LAST} must be in CPU memory or on a CUDA device; got meta. Move the model, or take"
        " torch.optim.Adam.",
    ),
    (
        gaps,
        ValueError,
        f"{LAST} must fill its memory without gaps; got shape (3, 2) with strides (4, 1). Clone it.",
    ),
    (
        sparse,
        RuntimeError,
        f"{LAST}.grad must be dense; got torch.sparse_coo. Use torch.optim.SparseAdam for this parameter.",
    ),
    (
        integers,
        TypeError,
        f"{LAST} must be float32, float64, float16, bfloat16 or complex; got torch.int64.",
    ),
]


class Unchanged:
    """Fails unless parameters and state are afterwards what they were, to the bit."""

    def __init__(self, params, opt):
        self.params, self.opt, self.before = params, opt, copies(params)
        self.state = copy.deepcopy(opt.state_dict()["state"])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        assert all(torch.equal(a, b) for a, b in zip(self.params, self.before, strict=True))
        after = self.opt.state_dict()["state"]
        assert after.keys() == self.state.keys()
        for key, values in self.state.items():
            assert all(torch.equal(after[key][name], value) for name, value in values.items())


@pytest.mark.parametrize("stepped", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize(("make_one", "kind", "message"), TENSORS, ids=lambda x: getattr(x, "__name__", ""))
def test_tensors(rng, make_one, kind, message, stepped):
    params = make(rng)
    wrong = make_one()
    opt = FusedAdam([*params, wrong])
    give((params,), rng)
    if stepped:
        grad, wrong.grad = wrong.grad, None
        opt.step()
        wrong.grad = grad
    with Unchanged(params, opt), pytest.raises(kind, match=f"^{re.escape(message)}$"):
        opt.step()


@pytest.mark.parametrize("stepped", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            lambda param: setattr(param, "grad", param.grad.to_sparse()),
            RuntimeError,
            "must be dense; got torch.sparse_coo. Use torch.optim.SparseAdam for this parameter.",
        ),
        (
            lambda param: param.grad.resize_(3),
            ValueError,
            "must have the shape of its parameter (7,); got (3,).",
        ),
    ],
    ids=["sparse", "resized"],
)
def test_gradients_that_changed(rng, change, kind, message, stepped):
    params = make(rng)
    opt = FusedAdam(params)
    give((params,), rng)
    if stepped:
        opt.step()
    change(params[3])
    message = f"param_groups[0]['params'][3].grad {message}"
    with Unchanged(params, opt), pytest.raises(kind, match=f"^{re.escape(message)}$"):
        opt.step()


def test_memory_that_is_shared():
    memory = torch.zeros(10)
    params = [with_grad(memory[:6]), with_grad(memory[5:])]
    message = "params must not share memory, nor their states; got it between those of shapes (6,) and (5,)."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        FusedAdam(params).step()
    FusedAdam([with_grad(memory[:5]), with_grad(memory[5:])]).step()  # side by side


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"betas": (0.9, 1.0)}, "betas[1] must be in [0, 1); got 1.0."),
        ({"lr": float("nan")}, "lr must be finite; got nan."),
        ({"lr": 1e39}, "lr must be at most 3.402823e+38 for float32 buffers; got 1e+39."),
    ],
)
def test_options_that_become_wrong(rng, change, message):
    """In the second of two groups, of another dtype: the first one is not stepped either."""
    params = [*make(rng), make(rng, [(3,)], torch.float32)[0]]
    opt = FusedAdam([{"params": params[:-1]}, {"params": params[-1:]}])
    give((params,), rng)
    opt.step()
    opt.param_groups[1].update(change)
    with Unchanged(params, opt), pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        opt.step()


def test_a_scale_that_is_wrong(rng):
    params = make(rng)
    opt = FusedAdam(params)
    give((params,), rng)
    opt.grad_scale = torch.tensor(0.0)
    with (
        Unchanged(params, opt),
        pytest.raises(ValueError, match=r"^grad_scale must be greater than 0; got 0.0.$"),
    ):
        opt.step()


STATE = "state of param_groups[0]['params'][0]"


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"step": -1}, ValueError, f"{STATE}['step'] must be a count of steps; got -1.0."),
        ({"step": torch.tensor(0.5)}, ValueError, f"{STATE}['step'] must be a count of steps; got 0.5."),
        (
            {"exp_avg": torch.zeros(4)},
            ValueError,
            f"{STATE}['exp_avg'] must have the shape of its parameter (3,); got (4,).",
        ),
        (
            {"exp_avg_sq": 0.0},
            TypeError,
            f"{STATE}['exp_avg_sq'] must be a dense tensor on cpu; got float.",
        ),
    ],
)
def test_states_that_are_loaded(change, kind, message):
    (param,) = params = [with_grad(torch.zeros(3), torch.ones(3))]
    opt = FusedAdam(params)
    opt.step()
    saved = opt.state_dict()
    saved["state"][0] = {**saved["state"][0], **change}
    opt.load_state_dict(saved)
    before = param.clone()
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        opt.step()
    assert torch.equal(param, before)


def test_a_state_of_another_dtype():
    (param,) = params = [with_grad(torch.zeros(3), torch.ones(3))]
    opt = FusedAdam(params)
    opt.state[param]["exp_avg"] = torch.zeros(3, dtype=torch.float64)
    message = f"{STATE}['exp_avg'] must have a dtype that goes with torch.float32; got torch.float64."
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        opt.step()
    opt.state[param]["exp_avg"] = torch.zeros(3, dtype=torch.bfloat16)
    opt.step()
    assert opt.state[param]["exp_avg"].tolist() == [torch.tensor(0.1).bfloat16().item()] * 3
