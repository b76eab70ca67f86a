"""``fastadam.torch.FusedAdam`` in place of ``torch.optim.Adam``: equations, groups, state, layouts."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from oracles import PAIRS_OF_FLAGS, flags_id
from torch_twins import SHAPES, assert_close, assert_same_state, copies, give, make

import fastadam

torch = pytest.importorskip("torch")

from fastadam.torch import FusedAdam, FusedAdamW  # noqa: E402


@pytest.mark.parametrize("flags", PAIRS_OF_FLAGS, ids=flags_id)
def test_every_equation(rng, flags):
    """Twice with lr as a number, twice as a tensor; all shapes and memory formats."""
    ours = make(rng)
    theirs = copies(ours)
    for lr in (0.01, torch.tensor(0.02, dtype=torch.float64)):
        opt = FusedAdam(ours, lr, **flags)
        torch_opt = torch.optim.Adam(theirs, lr, **flags, foreach=False)
        for _ in range(2):
            give((ours, theirs), rng)
            opt.step()
            torch_opt.step()
        assert_close(ours, theirs)
        assert_same_state(opt.state_dict()["state"], torch_opt.state_dict()["state"])


@pytest.mark.parametrize(
    ("dtype", "options"), [("float32", {"weight_decay": 0.1, "amsgrad": True}), ("bfloat16", {})]
)
def test_the_bits_of_flat_buffers(rng, dtype, options):
    """Those of ``fastadam.FusedAdam`` on each tensor; one is large enough for several threads."""
    params = make(rng, [*SHAPES, (20_000,)], getattr(torch, dtype))
    flat = [torch.empty(p.numel(), dtype=p.dtype) for p in params]
    as_stored = {"state_dtype": dtype, "rounding": "nearest"} if dtype == "bfloat16" else {}
    separate = [fastadam.FusedAdam(lr=0.01, **options, **as_stored) for _ in flat]
    in_memory = [p.detach().as_strided((p.numel(),), (1,)) for p in params]
    for a, b in zip(flat, in_memory, strict=True):
        a.copy_(b)
    opt = FusedAdam(params, 0.01, **options)
    for _ in range(3):
        give((params,), rng)
        opt.step()
        for one, values, param in zip(separate, flat, params, strict=True):
            one.step(values, param.grad.as_strided((param.numel(),), (1,)))
    for values, expected, param, one in zip(in_memory, flat, params, separate, strict=True):
        assert torch.equal(values, expected)
        if values.numel() and dtype != "bfloat16":
            moment = opt.state[param]["exp_avg_sq"].as_strided((values.numel(),), (1,))
            np.testing.assert_array_equal(moment.numpy(), one.state.exp_avg_sq)


def test_adamw_is_a_change_of_one_word(rng):
    ours = make(rng)
    theirs = copies(ours)
    opt, torch_opt = FusedAdamW(ours), torch.optim.AdamW(theirs)
    assert opt.defaults == torch_opt.defaults
    assert FusedAdam(ours).defaults == torch.optim.Adam(theirs).defaults
    give((ours, theirs), rng)
    opt.step()
    torch_opt.step()
    assert_close(ours, theirs)


def options_of_groups(params):
    first, second, third, fourth, fifth = params[0], params[1:3], params[3], params[4], params[5]
    return [
        {"params": [first], "lr": 0.1, "weight_decay": 0.1},
        {"params": second, "betas": (0.5, 0.6)},
        {"params": third, "amsgrad": True, "eps": 1e-3},
        {"params": [fourth], "maximize": True, "lr": torch.tensor(0.02, dtype=torch.float64)},
        {"params": [fifth], "weight_decay": 0.3, "decoupled_weight_decay": True},
    ]


def test_groups_with_options_of_their_own(rng):
    """And one that is added later: it counts its own steps."""
    ours = make(rng, [*SHAPES, (4,)])
    theirs = copies(ours)
    opt = FusedAdam(options_of_groups(ours[:-1]), lr=0.05)
    torch_opt = torch.optim.Adam(options_of_groups(theirs[:-1]), lr=0.05, foreach=False)
    for step in range(4):
        if step == 2:
            opt.add_param_group({"params": ours[-1], "lr": 0.2})
            torch_opt.add_param_group({"params": theirs[-1], "lr": 0.2})
        give((ours, theirs), rng)
        opt.step()
        torch_opt.step()
    assert_close(ours, theirs)
    assert_same_state(opt.state_dict()["state"], torch_opt.state_dict()["state"])


def test_options_that_change_between_steps(rng):
    ours = make(rng)
    theirs = copies(ours)
    opt, torch_opt = FusedAdam(ours), torch.optim.Adam(theirs, foreach=False)
    for change in ({"lr": 0.1}, {"betas": (0.8, 0.9)}, {"weight_decay": 0.1}, {"maximize": True}, {"eps": 1}):
        opt.param_groups[0].update(change)
        torch_opt.param_groups[0].update(change)
        give((ours, theirs), rng)
        opt.step()
        torch_opt.step()
        assert_close(ours, theirs)


def test_missing_gradients_count_no_step(rng):
    ours = make(rng)
    theirs = copies(ours)
    opt, torch_opt = FusedAdam(ours), torch.optim.Adam(theirs, foreach=False)
    opt.step()
    assert not opt.state
    for without in ((0, 3), (), (1,), (0, 1, 2, 3, 4, 5)):
        give((ours, theirs), rng, without=without)
        opt.step()
        torch_opt.step()
    assert [int(opt.state[p]["step"]) for p in ours] == [2, 2, 3, 2, 3, 3]
    assert_close(ours, theirs)
    assert_same_state(opt.state_dict()["state"], torch_opt.state_dict()["state"])


def test_several_dtypes_in_a_group(rng):
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.complex64, torch.complex128]
    params = [make(rng, [(9,)], dtype)[0] for dtype in dtypes]
    before, alone = copies(params), copies(params)
    give((params, alone), rng)
    FusedAdam(params, 0.1).step()
    for param, start, one in zip(params, before, alone, strict=True):
        FusedAdam([one], 0.1).step()
        assert torch.equal(param, one)
        assert not torch.equal(param, start)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_complex_numbers_are_two_real_ones(rng, amsgrad):
    ours = make(rng, dtype=torch.complex128)
    theirs = copies(ours)
    opt = FusedAdam(ours, 0.1, amsgrad=amsgrad)
    torch_opt = torch.optim.Adam(theirs, 0.1, amsgrad=amsgrad, foreach=False)
    for _ in range(3):
        give((ours, theirs), rng)
        ours[0].grad = ours[0].grad.conj()  # not in memory as it reads: torch refuses it
        theirs[0].grad = theirs[0].grad.conj().resolve_conj()
        opt.step()
        torch_opt.step()
    assert_close(ours, theirs)
    assert_same_state(opt.state_dict()["state"], torch_opt.state_dict()["state"])


def test_gradients_that_lie_otherwise(rng):
    """In another memory format, expanded, negated lazily, or in the memory of the parameter."""
    ours = make(rng)
    theirs = copies(ours)
    opt, torch_opt = FusedAdam(ours, 0.1), torch.optim.Adam(theirs, 0.1, foreach=False)
    for _ in range(2):
        give((ours, theirs), rng)
        for params in (ours, theirs):
            params[0].grad = params[0].grad.contiguous()
            params[4].grad = torch.ones((), dtype=torch.float64).expand(params[4].shape)
            params[3].grad = torch.complex(params[3].grad, params[3].grad).conj().imag
        ours[5].grad, theirs[5].grad = ours[5].detach(), theirs[5].detach().clone()
        assert ours[3].grad.is_neg()
        opt.step()
        torch_opt.step()
        assert_close(ours, theirs)


# --- State --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_run_goes_on_with_either(rng, amsgrad):
    """From torch to ours and back: the state that is loaded is the one that was saved, to the bit."""
    theirs = make(rng)
    torch_opt = torch.optim.AdamW(theirs, 0.1, amsgrad=amsgrad, fused=True)
    give((theirs,), rng)
    torch_opt.step()
    for _ in range(2):
        ours = copies(theirs)
        opt = FusedAdamW(ours)
        opt.load_state_dict(copy.deepcopy(torch_opt.state_dict()))
        again = copies(theirs)
        back = torch.optim.AdamW(again)
        back.load_state_dict(copy.deepcopy(opt.state_dict()))
        for param, other in zip(theirs, again, strict=True):
            for name, value in torch_opt.state[param].items():
                assert torch.equal(value, back.state[other][name])
        assert back.param_groups[0]["amsgrad"] is amsgrad
        for _ in range(2):
            give((theirs, ours, again), rng)
            torch_opt.step()
            opt.step()
            back.step()
        assert_close(ours, theirs)
        assert_close(again, theirs)
        back.load_state_dict(copy.deepcopy(opt.state_dict()))  # of steps that ours took
        assert_same_state(back.state_dict()["state"], torch_opt.state_dict()["state"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_go_on_by_themselves(rng, copied):
    params = make(rng)
    opt = FusedAdam(params, 0.1)
    give((params,), rng)
    opt.step()
    others, other = copied((params, opt))
    assert other.state[others[0]]["exp_avg"].data_ptr() != opt.state[params[0]]["exp_avg"].data_ptr()
    give((params, others), rng)
    opt.step()
    assert int(other.state[others[0]]["step"]) == 1
    other.step()
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)


def test_state_of_another_kind_is_loaded(rng):
    """Steps as numbers, groups without the newer options, states in another memory format."""
    ours = make(rng)
    theirs = copies(ours)
    opt, torch_opt = FusedAdam(ours), torch.optim.Adam(theirs, foreach=False)
    give((ours, theirs), rng)
    opt.step()
    torch_opt.step()
    saved = copy.deepcopy(torch_opt.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"])
        state["exp_avg"] = state["exp_avg"].contiguous()
    for name in ("maximize", "amsgrad", "fused", "foreach", "capturable", "differentiable"):
        del saved["param_groups"][0][name]
    opt.load_state_dict(saved)
    assert torch.is_tensor(opt.state[ours[0]]["step"])
    give((ours, theirs), rng)
    opt.step()
    torch_opt.step()
    assert_close(ours, theirs)


def test_whatever_is_replaced_between_steps_is_found(rng):
    ours = make(rng)
    theirs = copies(ours)
    opt, torch_opt = FusedAdam(ours), torch.optim.Adam(theirs, foreach=False)
    for change in range(6):
        give((ours, theirs), rng)
        opt.step()
        torch_opt.step()
        for params, one in ((ours, opt), (theirs, torch_opt)):
            state = one.state[params[0]]
            if change == 0:
                params[0].data = params[0].data.clone().contiguous()
            elif change == 1:
                state["exp_avg"] = torch.ones_like(params[0])
            elif change == 2:
                state["exp_avg"].share_memory_()
            elif change == 3:
                state["step"] = torch.tensor(7.0)
            elif change == 4:
                state["step"].fill_(3.0)
        assert_close(ours, theirs)
    assert int(opt.state[ours[0]]["step"]) == 4
