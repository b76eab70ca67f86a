"""``fastadam.torch.FusedAdam`` within training: schedulers, loss scaling, hooks, closures, graphs, errors."""

from __future__ import annotations

import copy

import pytest
from torch_twins import assert_close, assert_same_state, copies, give, make

torch = pytest.importorskip("torch")

from torch.optim import lr_scheduler  # noqa: E402

from fastadam.torch import FusedAdam, FusedAdamW  # noqa: E402


def twins(rng, lr=0.1, **options):
    ours = make(rng)
    theirs = copies(ours)
    kinds = FusedAdam, torch.optim.Adam
    return (ours, FusedAdam(ours, lr, **options)), (theirs, kinds[1](theirs, lr, foreach=False, **options))


SCHEDULERS = {
    "step": lambda opt: lr_scheduler.StepLR(opt, 2),
    "one-cycle": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.2, total_steps=6),
    "cyclic": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=2, cycle_momentum=True),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 4),
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0),
    "sequential": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.5)], [2]
    ),
}


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(rng, name, as_tensor):
    both = []
    for params, opt in twins(rng):
        if as_tensor:
            opt.param_groups[0]["lr"] = torch.tensor(0.1, dtype=torch.float64)
        both.append((params, opt, SCHEDULERS[name](opt)))
    for _ in range(5):
        give([params for params, _, _ in both], rng)
        for _, opt, scheduler in both:
            opt.step()
            scheduler.step(*([1.0] if name == "plateau" else []))
    assert_close(both[0][0], both[1][0])
    rates = [float(opt.param_groups[0]["lr"]) for _, opt, _ in both]
    assert rates[0] == rates[1] != 0.1


@pytest.mark.parametrize("unscaled", [False, True], ids=["in the pass", "before"])
def test_loss_scaling(rng, unscaled):
    """Gradients are divided in the pass, or were; a step is left out where one of them is not finite."""
    (ours, opt), (theirs, torch_opt) = twins(rng)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    scales = []
    for step in range(5):
        scale = scaler.scale(torch.ones(())).item()
        give((ours, theirs), rng)
        scaled = []
        for param in ours:
            param.grad *= scale
            scaled.append(param.grad.clone())
        if step == 2:
            ours[3].grad[2] = torch.inf
        if unscaled:
            scaler.unscale_(opt)
        before = copies(ours)
        scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
        if step == 2:
            assert_close(ours, before)
        else:
            torch_opt.step()
            if not unscaled:
                assert all(torch.equal(p.grad, g) for p, g in zip(ours, scaled, strict=True))
        assert not hasattr(opt, "found_inf")
    assert scales == [1024.0, 2048.0, 1024.0, 1024.0, 2048.0]
    assert_close(ours, theirs)
    assert_same_state(opt.state_dict()["state"], torch_opt.state_dict()["state"])


def test_a_scale_beside_float16(rng):
    """A step computes in float32: with a second moment here that is zero in float16."""
    params = make(rng, [(5,)], torch.float16)
    opt = FusedAdam(params, 0.1, eps=0.0)
    before = params[0].detach().clone()
    params[0].grad = torch.full((5,), 0.5, dtype=torch.float16)
    opt.grad_scale = torch.tensor(2.0**10)
    opt.step()
    assert opt.state[params[0]]["exp_avg_sq"].count_nonzero() == 0
    torch.testing.assert_close(params[0].detach(), before - 0.1, rtol=0, atol=2e-3)


def test_a_model_is_trained(rng):
    """A compiled call of the step, a closure, channels last, and gradients of autograd."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 1))
    model = model.to(torch.float64, memory_format=torch.channels_last)
    other = copy.deepcopy(model)
    inputs = torch.randn(8, 2, 4, 4, dtype=torch.float64)
    losses = []
    for net, kind in ((model, FusedAdamW), (other, torch.optim.AdamW)):
        opt = kind(net.named_parameters(), 0.01)

        def closure(net=net, opt=opt):
            opt.zero_grad()
            loss = (net(inputs) - 1).square().mean()
            loss.backward()
            return loss

        losses.append([opt.step(closure).item() for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < 0.9 * losses[0][0]
    names = opt.param_groups[0]["param_names"]
    assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for param, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(param, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_function_may_step(rng):
    params = make(rng)
    others = copies(params)
    opt, other = FusedAdam(params), FusedAdam(others)

    def step_all():
        opt.step()

    step = torch.compile(step_all, backend="eager")
    for _ in range(2):
        give((params, others), rng)
        step()
        other.step()
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)


def test_hooks_are_called(rng):
    params = make(rng)
    opt, seen = FusedAdam(params), []
    opt.register_step_pre_hook(lambda o, _args, _kwargs: seen.append(("pre", len(o.state))))
    opt.register_step_post_hook(lambda o, _args, _kwargs: seen.append(("post", len(o.state))))
    opt.register_state_dict_post_hook(lambda _, saved: {**saved, "more": 1})
    opt.register_load_state_dict_pre_hook(
        lambda _, saved: {k: v for k, v in saved.items() if k != "more"} if seen.append("load") else saved
    )
    give((params,), rng)
    opt.step()
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    assert saved["more"] == 1
    assert seen == [("pre", 0), ("post", 6), "load"]


def test_autograd_knows_what_was_written(rng):
    """A graph that needs a parameter as it was refuses to go backward."""
    (param,) = make(rng, [(3,)])
    loss = (param * param).sum()
    loss.backward(retain_graph=True)
    opt = FusedAdam([param])
    versions = param._version
    opt.step()
    assert param._version == versions + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert param.grad_fn is None
    assert param.requires_grad


def test_zero_grad_and_parameters_that_are_frozen(rng):
    params = make(rng)
    params[1].requires_grad_(False)
    opt = FusedAdam(params)
    give((params,), rng, without=(1,))
    opt.step()
    assert params[1] not in opt.state
    opt.zero_grad(set_to_none=False)
    assert params[0].grad.count_nonzero() == 0
    opt.zero_grad()
    assert params[0].grad is None


def test_learning_rates_of_rounding_errors(rng):
    """What schedulers may end with beside zero: a little below it, or no number in float32."""
    (param,) = make(rng, [(5,)], torch.float32)
    opt = FusedAdam([param])
    for lr, sign in ((-0.5, 1), (-1e-20, 0), (1e-46, 0)):
        opt.param_groups[0]["lr"] = lr
        before = param.detach().clone()
        param.grad = torch.ones(5)
        opt.step()
        assert torch.equal((param.detach() - before).sign(), torch.full((5,), float(sign)))


def test_an_interrupt_loses_no_step(rng, monkeypatch):
    """Ctrl-C behind the first of two kernels: both were taken and counted when it is raised."""
    from fastadam.kernels import tensors

    params = [*make(rng, [(9,)]), *make(rng, [(9,)], torch.float32)]
    others = copies(params)
    opt, other = FusedAdam(params), FusedAdam(others)
    loop, calls = tensors.serial, []

    def interrupted(*arguments):
        loop(*arguments)
        if arguments[4].size:  # not when compiled
            calls.append(len(calls))
            if calls == [0]:
                raise KeyboardInterrupt

    give((params, others), rng)
    other.step()
    with monkeypatch.context() as patch:
        patch.setattr(tensors, "serial", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step()
    assert calls == [0, 1]
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)
        assert int(opt.state[a]["step"]) == 1
    give((params, others), rng)
    opt.step()
    other.step()
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)
