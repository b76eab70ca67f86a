"""Steps during backward: the bits of a step after it, and gradients that are not there all at once."""

from __future__ import annotations

import copy
import gc
import re
import weakref

import pytest

torch = pytest.importorskip("torch")

from fastadam.torch import FusedAdam, FusedAdamW, backward  # noqa: E402


@pytest.fixture(params=[1, 100, 2**20], ids="together={}".format)
def together(request, monkeypatch):
    """Gradients that wait for each other: none, some of them, and all until ``step``."""
    monkeypatch.setattr(backward, "TOGETHER", request.param)
    return request.param


def network(depth=4):
    torch.manual_seed(0)
    return torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(depth)])


def loss_of(model):
    return model(torch.linspace(-1, 1, 64).reshape(8, 8)).square().mean()


def groups_of(model, bias_lr=1e-2):
    params = list(model.parameters())
    return [{"params": params[::2]}, {"params": params[1::2], "lr": bias_lr}]


def assert_equal(ours, theirs):
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def refuses(message, kind=RuntimeError):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize("kind", [FusedAdam, FusedAdamW])
def test_the_bits_of_a_step_after_backward(together, kind):
    models = network(), network()
    options = {"weight_decay": 0.1, "amsgrad": True}
    optimizers = [
        kind(groups_of(model), **options, step_in_backward=flag)
        for model, flag in zip(models, (True, False), strict=True)
    ]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.9) for opt in optimizers]
    for k in range(5):
        for model, opt, scheduler in zip(models, optimizers, schedulers, strict=True):
            opt.zero_grad()
            if k == 3:  # a closure is evaluated before the step, as ever
                opt.step(lambda m=model: loss_of(m).backward())
            else:
                loss_of(model[k % 2 :]).backward()  # the first layer has no gradient every other time
                opt.step()
            scheduler.step()
        assert_equal(*models)
        assert all(param.grad is None for param in models[0].parameters())
    ours, theirs = (opt.state_dict() for opt in optimizers)
    assert ours["param_groups"] == theirs["param_groups"]
    for key, state in theirs["state"].items():
        assert all(torch.equal(ours["state"][key][name], value) for name, value in state.items())


@pytest.mark.parametrize("in_backward", [True, False])
def test_gradients_do_not_exist_all_at_once(monkeypatch, in_backward):
    monkeypatch.setattr(backward, "TOGETHER", 64)
    model = network(depth=10)
    alive, counts = weakref.WeakSet(), []

    def look(param):
        alive.add(param.grad)
        counts.append(len(alive))

    for param in model.parameters():  # before those of the optimizer
        param.register_post_accumulate_grad_hook(look)
    opt = FusedAdam(model.parameters(), step_in_backward=in_backward)
    for _ in range(2):
        opt.zero_grad()
        loss_of(model).backward()
        opt.step()
    assert max(counts) <= 3 if in_backward else max(counts) == 20


def test_plans_are_kept(together):
    model = network()
    opt = FusedAdam(model.parameters(), step_in_backward=True)
    kept = []
    for _ in range(4):
        loss_of(model).backward()
        opt.step()
        kept.append({key: id(plan) for key, plan in opt._plans.items()})
    # The first backward adds states, so that the second finds everything anew; after that all is known.
    assert kept[1] == kept[2] == kept[3]
    assert len(kept[3]) == {1: 8, 100: 2, 2**20: 1}[together]


def test_frozen_and_later_parameters(together):
    models = network(), network()
    for model in models:
        model[1].requires_grad_(False)
    optimizers = [FusedAdam(m[:3].parameters(), step_in_backward=m is models[0]) for m in models]
    for k in range(4):
        for model, opt in zip(models, optimizers, strict=True):
            opt.zero_grad()
            loss_of(model).backward()
            opt.step()
            if k == 0:
                opt.add_param_group({"params": model[3].parameters(), "lr": 1e-2})
                model.zero_grad()
            if k == 1:
                model[1].requires_grad_(True)
        assert_equal(*models)


def test_goes_on_with_a_state_dict(together):
    models = network(), network()
    optimizers = [FusedAdam(m.parameters(), step_in_backward=m is models[0]) for m in models]
    for k in range(4):
        for model, opt in zip(models, optimizers, strict=True):
            opt.zero_grad()
            loss_of(model).backward()
            opt.step()
        if k == 1:
            saved = [copy.deepcopy(opt.state_dict()) for opt in optimizers]
            optimizers[0].load_state_dict(saved[1])
    assert_equal(*models)


def test_hooks_end_with_the_optimizer():
    model = network()
    gone = weakref.ref(FusedAdam(model.parameters(), step_in_backward=True))
    gc.collect()
    assert gone() is None
    loss_of(model).backward()
    assert all(param.grad is not None for param in model.parameters())


def test_a_copy_steps_when_step_is_called():
    model, reference = network(), network()
    opt = FusedAdam(model.parameters(), step_in_backward=True)
    both, plain = copy.deepcopy((model, opt)), FusedAdam(reference.parameters())
    for m, o in (both, (reference, plain)):
        loss_of(m).backward()
        o.step()
    assert_equal(both[0], reference)


def test_several_backwards_of_one_step_are_refused(together):
    model = network()
    opt = FusedAdam(model.parameters(), step_in_backward=True)
    loss_of(model).backward()
    before = copy.deepcopy(model)
    with refuses(
        "step must follow each backward with step_in_backward=True; got param_groups[0]['params'][7] a second"
        " gradient. Call step after backward; to accumulate gradients, leave step_in_backward out."
    ):
        loss_of(model).backward()
    assert_equal(model, before)
    opt.zero_grad()
    opt.step()
    loss_of(model).backward()  # goes on


def test_gradients_written_after_backward_are_refused(monkeypatch):
    monkeypatch.setattr(backward, "TOGETHER", 1)
    model = network(depth=1)
    opt = FusedAdam(model.parameters(), step_in_backward=True)
    loss_of(model).backward()
    model[0].bias.grad = torch.ones(8)
    with refuses(
        "param_groups[0]['params'][1].grad must be None after a step in backward; got a tensor. Set it before"
        " backward."
    ):
        opt.step()


def test_a_scaler_is_refused():
    model = network()
    opt = FusedAdam(model.parameters(), step_in_backward=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model)).backward()
    with refuses(
        "step_in_backward must be False for a GradScaler; got True. Parameters were stepped with scaled"
        " gradients: leave it out, or train in bfloat16 without a scaler."
    ):
        scaler.step(opt)


def test_what_cannot_be_stepped_is_an_error_in_backward(monkeypatch):
    monkeypatch.setattr(backward, "TOGETHER", 1)
    table = torch.nn.Embedding(4, 3, sparse=True)
    before = table.weight.detach().clone()
    opt = FusedAdam(table.parameters(), step_in_backward=True)
    with refuses(
        "param_groups[0]['params'][0].grad must be dense; got torch.sparse_coo. Use torch.optim.SparseAdam"
        " for this parameter."
    ):
        table(torch.tensor([1])).sum().backward()
    assert torch.equal(table.weight, before)
    assert not opt.state


def test_the_option_is_a_flag():
    with refuses("step_in_backward must be True or False; got int.", TypeError):
        FusedAdam(network().parameters(), step_in_backward=1)
