"""On a real GPU: ``fastadam.torch.FusedAdam`` has the bits of the CPU, and the state of PyTorch's Adam."""

from __future__ import annotations

import copy

import pytest
from oracles import PAIRS_OF_FLAGS, flags_id
from torch_twins import SHAPES, make
from torch_twins import generator as seeded

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

from fastadam import backends  # noqa: E402
from fastadam.torch import FusedAdam, FusedAdamW, backward  # noqa: E402

LARGE = [*SHAPES, (3, 1001), (70_001,), (1 << 21,)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]


@pytest.fixture(autouse=True)
def _needs_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no GPU")
    status = backends.status()["cupy"]
    if status != "ready":
        pytest.skip(f"cupy: {status}")


def on_gpu(params):
    return [torch.empty_like(p, device="cuda").copy_(p).detach().requires_grad_() for p in params]


def hand(params, others, rng, *, without=()):
    """Give the same new gradients, in new memory."""
    for k, (param, other) in enumerate(zip(params, others, strict=True)):
        grad = torch.randn(other.shape, generator=seeded(rng), dtype=other.dtype)
        param.grad, other.grad = (None, None) if k in without else (grad.to(param.device), grad)


def assert_equal(params, others, opt=None, other_opt=None):
    for param, other in zip(params, others, strict=True):
        assert torch.equal(param.cpu(), other)
        if opt is not None:
            assert opt.state[param]["step"].device.type == "cpu"
            for name, value in other_opt.state[other].items():
                assert torch.equal(opt.state[param][name].cpu(), value), name


def train(params, others, opt, other_opt, rng, steps=3):
    for k in range(steps):
        hand(params, others, rng, without=(1, 4) if k == 1 else ())
        opt.step()
        other_opt.step()
    assert_equal(params, others, opt, other_opt)


@pytest.mark.parametrize("flags", PAIRS_OF_FLAGS, ids=flags_id)
def test_every_equation(rng, flags):
    others = make(rng, LARGE, torch.float32)
    params = on_gpu(others)
    train(params, others, FusedAdam(params, 0.1, **flags), FusedAdam(others, 0.1, **flags), rng)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(rng, dtype):
    others = make(rng, LARGE[:-1], dtype)
    params = on_gpu(others)
    train(params, others, FusedAdam(params, 0.1), FusedAdam(others, 0.1), rng)


def test_groups_with_options_of_their_own_and_the_host_beside(rng):
    others = make(rng, LARGE, torch.float32)
    params = on_gpu(others)
    params[2], params[6] = (others[k].detach().clone().requires_grad_() for k in (2, 6))
    groups = (
        [
            {"params": of[:3], "lr": 0.1, "weight_decay": 0.1},
            {"params": of[3:6], "betas": (0.5, 0.6)},
            {"params": of[6:], "amsgrad": True, "eps": 1e-3},
        ]
        for of in (params, others)
    )
    opt, other = map(FusedAdamW, groups)
    for _ in range(3):
        hand(params, others, rng)
        opt.step()
        other.step()
    assert_equal(params, others, opt, other)


def test_many_tensors_beside_torch(rng):
    """Close to PyTorch's fused Adam, whose state it takes over, and gives back."""
    others = make(rng, [(1000,)] * 300, torch.float32)
    params, theirs = on_gpu(others), on_gpu(others)
    opt, torch_opt = FusedAdam(params, 0.01), torch.optim.Adam(theirs, 0.01, fused=True)
    for k in range(6):
        hand(params, others, rng)
        for a, b in zip(params, theirs, strict=True):
            b.grad = a.grad.clone()
        opt.step()
        torch_opt.step()
        if k % 2:  # each goes on with what the other has
            mine, its = copy.deepcopy(opt.state_dict()), copy.deepcopy(torch_opt.state_dict())
            opt.load_state_dict({**its, "param_groups": mine["param_groups"]})
            torch_opt.load_state_dict({**mine, "param_groups": its["param_groups"]})
    for a, b in zip(params, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert {float(state["step"]) for state in opt.state.values()} == {6.0}


def test_a_step_follows_what_its_stream_does_before(rng):
    """On streams by turns that no other waits for, with gradients whose memory is handed out again."""
    others = make(rng, LARGE, torch.float32)
    params = on_gpu(others)
    opt, other = FusedAdam(params, 0.1), FusedAdam(others, 0.1)
    streams = [torch.cuda.Stream() for _ in range(2)]
    before = torch.cuda.current_stream()
    for k in range(20):
        stream = streams[k // 2 % 2]
        stream.wait_stream(before)
        before = stream
        with torch.cuda.stream(stream):
            hand(params, others, rng)
            for param in params:
                param.grad = param.grad * 2
            opt.step()
            opt.zero_grad()  # freed, and written again, while the step is in the queue
            _ = [torch.full_like(param, torch.nan) for param in params]
        for param in others:
            param.grad = param.grad * 2
        other.step()
    torch.cuda.synchronize()
    assert_equal(params, others, opt, other)


def test_no_step_waits_for_the_device(rng):
    others = make(rng, LARGE, torch.float32)
    params = on_gpu(others)
    opt = FusedAdam(params, 0.1)
    hand(params, others, rng)
    for _ in range(3):
        opt.step()
        torch.cuda.synchronize()  # so that there is pinned memory to be handed out again
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    stream = torch.cuda.current_stream()
    torch.cuda._sleep(500_000_000)
    opt.step()
    assert not stream.query()


def test_a_scaler(rng):
    others = make(rng, LARGE, torch.float32)
    params = on_gpu(others)
    opt, other = FusedAdam(params, 0.1), FusedAdam(others, 0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=2)
    for k in range(4):
        hand(params, others, rng)
        scale = scaler.scale(torch.ones((), device="cuda")).item()
        for param in params:
            param.grad *= scale
        if k == 1:
            params[3].grad[2] = torch.inf
        scaler.step(opt)
        scaler.update()
        if k != 1:
            other.step()
    assert_equal(params, others, opt, other)


@pytest.mark.parametrize("together", [1, 10_000, 2**20])
def test_steps_in_backward(rng, monkeypatch, together):
    """Two halves of a model on two streams, so that their gradients come on both."""
    monkeypatch.setattr(backward, "TOGETHER", together)
    others = make(rng, [(64, 64)] * 6, torch.float32)
    params = on_gpu(others)
    inputs, side = torch.randn(64, 64, generator=seeded(rng)).cuda(), torch.cuda.Stream()
    opt, other_opt = FusedAdamW(params, 1e-2, step_in_backward=True), FusedAdamW(others, 1e-2)
    for _ in range(5):
        before = [param.detach().clone().requires_grad_() for param in params]
        for each in (params, before):
            hidden = inputs * each[0] + each[1] * each[2]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                out = hidden * each[3] + each[4] * each[5]
            torch.cuda.current_stream().wait_stream(side)
            out.square().sum().backward()
        opt.step()
        for other, param in zip(others, before, strict=True):
            other.grad = param.grad.cpu()
        other_opt.step()
        assert all(param.grad is None for param in params)
    assert_equal(params, others, opt, other_opt)


def test_a_capture_is_refused(rng):
    others = make(rng, [(7,)], torch.float32)
    params = on_gpu(others)
    opt = FusedAdam(params, 0.1)
    hand(params, others, rng)
    opt.step()
    before, graph = params[0].detach().clone(), torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="step must be outside of the capture"), torch.cuda.graph(graph):
        opt.step()
    assert torch.equal(params[0].detach(), before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices(rng):
    others = make(rng, LARGE, torch.float32)
    params = [
        torch.empty_like(p, device=f"cuda:{k % 2}").copy_(p).detach().requires_grad_()
        for k, p in enumerate(others)
    ]
    opt, other = FusedAdam(params, 0.1), FusedAdam(others, 0.1)
    for _ in range(3):
        hand(params, others, rng)
        opt.step()
        other.step()
    assert_equal(params, others, opt, other)
