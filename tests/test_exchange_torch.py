"""State of torch.optim.Adam and AdamW, here and back: k steps there and k here are 2 k there."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
from exchange_cases import SIZES, STEPS, assert_close, run, split, start
from tolerances import assert_same_bits

import fastadam
from fastadam import FusedAdam, Segment
from fastadam.exchange import from_torch, to_torch

torch = pytest.importorskip("torch")

LR = 0.05
KINDS = {
    "adam": (torch.optim.Adam, {}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "maximize": (torch.optim.Adam, {"maximize": True}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1, "betas": (0.8, 0.99)}),
    "fused": (torch.optim.AdamW, {"fused": True}),
}


class Torch:
    """Parameters in two groups, which are not in the order of the buffer: c, then b and a."""

    order = (1, 2, 0)  # b, a, c

    def __init__(self, params, kind="adam", second_lr=LR / 2, **options):
        make, defaults = KINDS[kind]
        views = split(params.copy())
        self.tensors = {name: torch.from_numpy(view.copy()).requires_grad_() for name, view in views.items()}
        groups = [
            {"params": [self.tensors["c"]]},
            {"params": [self.tensors["b"], self.tensors["a"]], "lr": second_lr},
        ]
        self.opt = make(groups, lr=LR, **{**defaults, **options})

    def run(self, gradients):
        for grads in gradients:
            for name, grad in split(grads.copy()).items():
                self.tensors[name].grad = torch.from_numpy(grad)
            self.opt.step()

    @property
    def flat(self):
        return np.concatenate([t.detach().numpy().reshape(-1) for t in self.tensors.values()])

    def moment(self, name):
        state = [self.opt.state[t][name] for t in self.tensors.values()]
        return np.concatenate([one.numpy().reshape(-1) for one in state])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_there_here_and_back(rng, kind, dtype):
    params, gradients = start(rng, dtype)
    theirs, whole = Torch(params, kind), Torch(params, kind)
    theirs.run(gradients[:STEPS])
    flat, opt = theirs.flat, FusedAdam(max_grad_value=100.0)
    from_torch(opt, theirs.opt.state_dict(), order=theirs.order)
    for name in opt.state.moments:
        assert_same_bits(opt.state.moments[name], theirs.moment(name), name)
    assert opt.max_grad_value == 100.0
    assert (opt.state.step, opt.lr) == (STEPS, LR)
    assert opt.segments == (Segment(0, 15, lr=LR / 2),)  # b and a, one behind the other
    run(opt, flat, gradients[STEPS : 2 * STEPS])
    whole.run(gradients[: 2 * STEPS])
    used = gradients[: 2 * STEPS] + (0.2 * np.sign(gradients[: 2 * STEPS]) if kind == "adamw" else 0)
    assert_close(flat, whole.flat, used, lr=LR, beta2=opt.betas[1])
    for name in ("exp_avg", "exp_avg_sq"):
        assert_close(opt.state.moments[name], whole.moment(name), used, lr=LR, what=name)

    back = Torch(flat, kind, second_lr=7.0)
    back.opt.load_state_dict(to_torch(opt, back.opt, order=back.order))
    for name in opt.state.moments:
        assert_same_bits(opt.state.moments[name], back.moment(name), name)
    assert [group["lr"] for group in back.opt.param_groups] == [LR, LR / 2]
    assert back.opt.param_groups[0]["fused"] == (True if kind == "fused" else None)
    back.run(gradients[2 * STEPS :])
    whole.run(gradients[2 * STEPS :])
    assert_close(back.flat, whole.flat, gradients, lr=LR, beta2=opt.betas[1])


def test_a_round_trip_keeps_every_bit(rng):
    params, gradients = start(rng)
    theirs = Torch(params, "adamw")
    theirs.run(gradients[:STEPS])
    before = copy.deepcopy(theirs.opt.state_dict())
    opt = FusedAdam()
    from_torch(opt, before)  # in the order of the groups, as nothing else is said
    after = to_torch(opt, theirs.opt)
    assert after["param_groups"] == before["param_groups"]
    for number, state in before["state"].items():
        for name, value in state.items():
            assert torch.equal(value, after["state"][number][name])


def test_padded_buffers_and_stored_moments(rng):
    params, gradients = start(rng)
    theirs = Torch(params)
    theirs.run(gradients[:STEPS])
    flat = fastadam.flatten({name: t.detach() for name, t in theirs.tensors.items()}, align=16)
    opt = FusedAdam(state_dtype="bfloat16", rounding="nearest")
    from_torch(opt, theirs.opt.state_dict(), order=theirs.order, flat=flat)
    assert opt.state_dtype == "bfloat16"
    assert opt.segments == (Segment(0, 12, lr=LR / 2), Segment(16, 19, lr=LR / 2))
    assert opt.state.exp_avg.size == flat.params.numel() == 38
    found = to_torch(opt, theirs.opt, order=theirs.order, flat=flat)
    for number, tensor in enumerate([theirs.tensors[name] for name in ("c", "b", "a")]):
        kept = theirs.opt.state[tensor]["exp_avg"].bfloat16().float()
        assert torch.equal(found["state"][number]["exp_avg"], kept)


def test_16_bit_states_of_torch_come_as_float32():
    parameter = torch.ones(4, dtype=torch.bfloat16).requires_grad_()
    theirs = torch.optim.Adam([parameter])
    parameter.grad = torch.full_like(parameter, 0.3)
    theirs.step()
    opt = FusedAdam()
    from_torch(opt, theirs.state_dict())
    assert opt.state.exp_avg.dtype == np.float32
    assert opt.state.exp_avg.tolist() == theirs.state[parameter]["exp_avg"].float().tolist()


def test_a_schedule_stays_and_goes_as_its_present_value(rng):
    params, gradients = start(rng)
    theirs = Torch(params)
    theirs.run(gradients[:STEPS])
    opt = FusedAdam(lr=schedule)
    from_torch(opt, theirs.opt.state_dict(), order=theirs.order)
    assert opt.lr is schedule
    assert to_torch(opt, theirs.opt, order=theirs.order)["param_groups"][0]["lr"] == 0.125


def schedule(step):
    return 1 / step


def without_state(state_dict):
    del state_dict["state"][2]


def other_step(state_dict):
    state_dict["state"][1]["step"] += 1


def other_flag(state_dict):
    state_dict["param_groups"][1]["amsgrad"] = True


def sgd(state_dict):
    del state_dict["param_groups"][0]["eps"]


def no_groups(state_dict):
    del state_dict["param_groups"]


def integers(state_dict):
    state_dict["state"][2]["exp_avg"] = state_dict["state"][2]["exp_avg"].int()


def doubles(state_dict):
    state_dict["state"][2]["exp_avg_sq"] = state_dict["state"][2]["exp_avg_sq"].double()


def short(state_dict):
    state_dict["state"][2]["exp_avg_sq"] = torch.ones(2)


REFUSED = [
    (
        without_state,
        "state_dict['state'] must have 'exp_avg' of parameter 2; got []."
        " Leave parameters that have no gradients out of both.",
    ),
    (
        other_step,
        "state_dict['state'][1]['step'] must be 8, as state_dict['state'][0]['step'] is; got 9."
        " One step counter is for the whole buffer.",
    ),
    (
        other_flag,
        "state_dict['param_groups'][1]['amsgrad'] must be False, as in the first group; got True.",
    ),
    (no_groups, "state_dict must have the key 'param_groups'; got ['state']."),
    (integers, "state_dict['state'][2] must be an array of floating-point numbers; got int32."),
    (doubles, "state_dict['state'][2] must be float32, as the first is; got float64."),
    (short, "state_dict['state'][2] must have 3 elements, as its first moment has; got 2."),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_errors_change_nothing(rng, change, message):
    params, gradients = start(rng)
    theirs = Torch(params)
    theirs.run(gradients[:STEPS])
    state_dict = copy.deepcopy(theirs.opt.state_dict())
    change(state_dict)
    opt = FusedAdam(lr=0.7)
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}$"):
        from_torch(opt, state_dict)
    assert (opt.lr, opt.state.step, opt.segments) == (0.7, 0, ())


def test_more_errors(rng):
    params, gradients = start(rng)
    theirs = Torch(params)
    theirs.run(gradients[:STEPS])
    state_dict, opt = theirs.opt.state_dict(), FusedAdam()
    for call, message in (
        (lambda: from_torch(None, state_dict), "opt must be a FusedAdam; got NoneType."),
        (lambda: from_torch(opt, [1]), "state_dict must be a mapping; got list."),
        (
            lambda: from_torch(opt, state_dict, order=(0, 1)),
            "order must have each of 3 parameters once; got [0, 1].",
        ),
        (
            lambda: from_torch(opt, state_dict, flat=fastadam.flatten([params])),
            "flat must have 3 arrays, one for each parameter; got 1.",
        ),
        (
            lambda: from_torch(opt, state_dict, flat=params),
            "flat must be what fastadam.flatten returns; got ndarray.",
        ),
        (
            lambda: from_torch(FusedAdam(ema_decay=0.9), state_dict),
            "opt must have ema_decay=None, for no average is taken over; got 0.9.",
        ),
        (lambda: to_torch(opt, theirs.opt), "opt must have taken a step; got no moments."),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}$"):
            call()


def test_errors_of_the_way_back(rng):
    params, gradients = start(rng)

    def stepped(**options):
        opt = FusedAdam(**options)
        run(opt, params.copy(), gradients[:1])
        return opt

    theirs = Torch(params).opt
    for opt, optimizer, message in (
        (
            stepped(segments=[Segment(2, 5, lr=0.1)]),
            theirs,
            "opt.segments[0] must hold whole parameters; got a part of elements 0 to 6.",
        ),
        (
            stepped(segments=[Segment(0, 6, frozen=True)]),
            theirs,
            "opt.segments[0] must not be frozen; got True. Leave it out of PyTorch's.",
        ),
        (
            stepped(weight_decay=0.1),
            Torch(params, "adamw").opt,
            "optimizer must be torch.optim.Adam, as opt is; got another decay.",
        ),
        (
            stepped(),
            torch.optim.Adam([torch.zeros(sum(SIZES) + 1)]),
            "optimizer must have 21 elements, as many as the moments; got 22.",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            to_torch(opt, optimizer)
    with pytest.raises(ValueError, match=r"^opt must have one set of hyperparameters for optimizer\.param_g"):
        to_torch(stepped(segments=[Segment(6, 18, lr=0.1)]), theirs)
