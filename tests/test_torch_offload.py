"""Steps on the host of parameters that live elsewhere: the bits, state, changes, and what is refused."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
from fake_copies import LateCopies
from offloads import LATE, assert_equal, give, make, masters_of, train

torch = pytest.importorskip("torch")

from fastadam.torch import FusedAdam, OffloadedAdam, offload  # noqa: E402


@pytest.fixture(params=LATE, ids="late={0}".format)
def copies(request, monkeypatch):
    fake = LateCopies(request.param)
    monkeypatch.setattr(offload, "copies_for", lambda _: fake)
    return fake


def refuses(message, kind):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize("chunk", [64, 1000, 2**22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_the_bits_of_a_step_of_masters(copies, dtype, chunk):
    params = make(dtype)
    masters = masters_of(params)
    options = {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": not dtype.is_complex}
    both = [
        [{"params": of[::2]}, {"params": of[1::2], "lr": 0.1, "betas": (0.8, 0.9)}]
        for of in (params, masters)
    ]
    ours = OffloadedAdam(both[0], **options, decoupled_weight_decay=True, chunk=chunk)
    theirs = FusedAdam(both[1], **options, decoupled_weight_decay=True)
    train(params, masters, ours, theirs, copies, without=(1, 4))
    for param, master in zip(params, masters, strict=True):
        state = ours.state[param]
        if dtype.itemsize == 2:
            assert torch.equal(state["master_param"], master)
        for name, value in theirs.state[master].items():
            assert torch.equal(state[name], value), name


def test_changed_parameters_are_seen(copies):
    params = make(torch.bfloat16)
    masters = masters_of(params)
    ours, theirs = OffloadedAdam(params), FusedAdam(masters)
    train(params, masters, ours, theirs, copies, 2)
    with torch.no_grad():
        for of in (params, masters):
            of[0][:7] = 0.5  # one that was not changed is still stepped from its master
    params[3].data = params[3].data.clone()
    train(params, masters, ours, theirs, copies, 2)
    assert not torch.equal(masters[0], params[0].float())


def test_state_goes_on_here_and_in_torch(copies):
    params = make(torch.bfloat16)
    masters = masters_of(params)
    ours, theirs = OffloadedAdam(params), FusedAdam(masters)
    train(params, masters, ours, theirs, copies, 2)
    again = [param.detach().clone().requires_grad_() for param in params]
    resumed = OffloadedAdam(again, lr=1.0)
    saved = copy.deepcopy(ours.state_dict())
    resumed.load_state_dict(saved)
    assert list(saved["state"][0]) == ["step", "exp_avg", "exp_avg_sq", "master_param"]
    train(again, masters, resumed, theirs, copies, 2)
    before = ours.state_dict()["state"]
    for key, state in saved["state"].items():  # nothing of what was loaded is written
        assert all(torch.equal(before[key][name], value) for name, value in state.items())
    torch_opt = torch.optim.Adam(again)
    torch_opt.load_state_dict(resumed.state_dict())
    torch_opt.step()
    for k, state in enumerate(torch_opt.state_dict()["state"].values()):
        assert state["step"] == 5
        assert state["exp_avg"].shape == again[k].shape


def test_state_of_fused_adam_and_back(copies):
    params = make()
    masters = masters_of(params)
    torch_opt = torch.optim.Adam(masters)
    give(params, masters)
    torch_opt.step()
    for param, master in zip(params, masters, strict=True):
        with torch.no_grad():
            param.copy_(master)
    ours, theirs = OffloadedAdam(params), FusedAdam(masters)
    for opt in (ours, theirs):
        opt.load_state_dict(copy.deepcopy(torch_opt.state_dict()))
    train(params, masters, ours, theirs, copies, 3)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(params, masters, ours, theirs, copies, 2)


def test_groups_copies_and_pickles(copies):
    params = make(torch.bfloat16)
    masters = masters_of(params)
    ours, theirs = OffloadedAdam(params[:3], chunk=64), FusedAdam(masters[:3])
    for opt, rest in ((ours, params[3:]), (theirs, masters[3:])):
        give(params, masters)
        opt.add_param_group({"params": rest, "lr": 0.1})
    train(params, masters, ours, theirs, copies)
    params, ours = copy.deepcopy((params, ours))
    train(params, masters, ours, theirs, copies)
    params, ours = pickle.loads(pickle.dumps((params, ours)))
    train(params, masters, ours, theirs, copies)


def test_loss_scale(copies):
    params = make()
    masters = masters_of(params)
    ours, theirs = OffloadedAdam(params), FusedAdam(masters)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for k in range(3):
        give(params, masters, scale=8.0)
        params[3].grad.fill_(float("inf") if k == 1 else 1.0)
        for opt, of in ((ours, params), (theirs, masters)):
            scaler.scale(torch.ones(()))
            if of is masters:
                of[3].grad.copy_(params[3].grad)
            scaler.step(opt)
        scaler.update()
        for of in (params, masters):
            assert of[3].grad is not None
    copies.synchronize()
    assert ours.state[params[0]]["step"] == theirs.state[masters[0]]["step"] == 2
    assert_equal(params, masters)


def test_masters_begin_as_the_parameters_and_may_get_lost():
    param = torch.tensor([-0.0, 1.5, float("inf")], dtype=torch.bfloat16, requires_grad=True)
    opt = OffloadedAdam([param])
    for _ in range(2):
        param.grad = torch.zeros_like(param)
        opt.step()
        master = opt.state[param]["master_param"]
        assert torch.equal(master, torch.tensor([0.0, 1.5, float("inf")]))
        assert torch.signbit(master).tolist() == torch.signbit(param).tolist() == [True, False, False]
        del opt.state[param]["master_param"]


def test_autograd_knows_that_parameters_were_written():
    param = torch.ones(3, requires_grad=True)
    opt = OffloadedAdam([param])
    loss = param.square().sum()
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


REFUSED = [
    ({"exp_avg": [1.0]}, TypeError, "must be a dense tensor; got list."),
    (
        {"exp_avg": torch.zeros(4)},
        ValueError,
        "must have the shape of its parameter (3,); got (4,).",
    ),
    (
        {"exp_avg": torch.zeros(3, dtype=torch.float64)},
        TypeError,
        "must have a dtype that goes with torch.bfloat16; got torch.float64.",
    ),
]


@pytest.mark.parametrize(("change", "kind", "message"), REFUSED)
def test_what_is_refused_changes_nothing(change, kind, message):
    params = [torch.ones(3, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    opt = OffloadedAdam(params)
    give(params, masters_of(params))
    opt.step()
    opt.state[params[1]].update(change)
    before = [param.detach().clone() for param in params]
    with refuses(f"state of param_groups[0]['params'][1]['exp_avg'] {message}", kind):
        opt.step()
    opt.param_groups[0]["lr"] = "1"
    assert_equal(params, before)
    assert opt.state[params[0]]["step"] == 1


def test_arguments():
    with refuses("chunk must be in [1, 2**53); got 0.", ValueError):
        OffloadedAdam([torch.zeros(3)], chunk=0)
    param = torch.zeros(3, device="meta", requires_grad=True)
    param.grad = torch.zeros(3, device="meta")
    message = (
        "param_groups[0]['params'][0] must be in CPU memory or on a CUDA device; got meta. Move the model, or"
        " take torch.optim.Adam."
    )
    with refuses(message, NotImplementedError):
        OffloadedAdam([param]).step()
    same = torch.zeros(8, requires_grad=True)
    halves = [same.detach()[:6].requires_grad_(), same.detach()[2:].requires_grad_()]
    for half in halves:
        half.grad = torch.ones(6)
    opt = OffloadedAdam(halves)
    with refuses("params must not share memory; got it between those of shapes (6,) and (6,).", ValueError):
        opt.step()
    assert not opt.state
