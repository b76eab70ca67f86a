"""Beside ``torch.optim.Adam`` and ``AdamW`` over 1,000 steps: no less exact, and the same state."""

from __future__ import annotations

import numpy as np
import pytest
from oracles import FLAGS, WIDER, algorithm_1, flags_id
from tolerances import LONG_DOUBLE_IS_WIDER

from fastadam import FusedAdam

torch = pytest.importorskip("torch")

STEPS, SIZE = 1000, 512


def make_torch(params, flags, *, fused, **hyperparameters):
    flags = dict(flags)
    kind = torch.optim.AdamW if flags.pop("decoupled_weight_decay", False) else torch.optim.Adam
    flags.setdefault("weight_decay", 0.0)
    parameter = torch.from_numpy(params.copy()).requires_grad_()
    return parameter, kind([parameter], **hyperparameters, **flags, fused=fused)


needs_long_double = pytest.mark.skipif(not LONG_DOUBLE_IS_WIDER, reason="no type wider than float64 here")


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=needs_long_double)])
@pytest.mark.parametrize("flags", FLAGS, ids=flags_id)
def test_update_error_is_no_worse_than_torch(rng, flags, dtype, fused):
    """Root mean square error of the update of each step, all three driven by the same gradients.

    Each implementation stores its parameter in ``dtype``: that costs both the same. Parameters start small,
    so that it does not hide the rest.
    """
    lr = 1e-3
    params = (1e-2 * rng.standard_normal(SIZE)).astype(dtype)
    wide = WIDER[params.dtype]
    paper = algorithm_1(params, lr=lr, dtype=wide, **flags)
    parameter, torch_opt = make_torch(params, flags, fused=fused, lr=lr)
    ours, opt = params.copy(), FusedAdam(lr=lr, **flags)

    squared = np.zeros(2)
    for _ in range(STEPS):
        grads = (rng.standard_normal(SIZE) + 0.2).astype(dtype)
        before = paper.theta, ours.astype(wide), parameter.detach().numpy().astype(wide)
        paper.step(grads)
        opt.step(ours, grads)
        parameter.grad = torch.from_numpy(grads)
        torch_opt.step()
        exact = paper.theta - before[0]
        squared += [
            np.mean((ours - before[1] - exact) ** 2),
            np.mean((parameter.detach().numpy() - before[2] - exact) ** 2),
        ]
    error, torch_error = np.sqrt(squared / STEPS)
    assert np.isfinite([error, torch_error]).all()
    # Two independent estimates from 512,000 rounding errors each: 1 % is seven standard deviations.
    assert error <= 1.01 * torch_error
    assert error < 1e-3 * lr if dtype == "float32" else error < 1e-12 * lr


@pytest.mark.parametrize("flags", FLAGS, ids=flags_id)
def test_state_means_what_torchs_means(rng, flags):
    params = rng.standard_normal(SIZE)
    parameter, torch_opt = make_torch(params, flags, fused=False, lr=1e-3)
    opt = FusedAdam(**flags)
    for _ in range(50):
        grads = rng.standard_normal(SIZE)
        opt.step(params, grads)
        parameter.grad = torch.from_numpy(grads)
        torch_opt.step()
    state = torch_opt.state[parameter]
    assert int(state["step"]) == opt.state.step == 50
    names = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"} & state.keys()
    assert names == opt.state.moments.keys()
    for name in names:
        np.testing.assert_allclose(opt.state.moments[name], state[name].numpy(), rtol=1e-12, atol=1e-15)


def test_defaults_are_torchs():
    opt, torch_opt = FusedAdam(), torch.optim.Adam([torch.zeros(1)])
    names = ["lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "amsgrad", "maximize"]
    assert {name: getattr(opt, name) for name in names} == {name: torch_opt.defaults[name] for name in names}
