"""``fastadam.torch.FusedAdam`` for parameters on CUDA devices, as far as it can be told without one."""

from __future__ import annotations

import copy
import re

import pytest
from fake_torch_cuda import OnFirst, OnSecond, there, use
from oracles import PAIRS_OF_FLAGS, flags_id
from torch_twins import SHAPES, copies, give, make
from torch_twins import generator as seeded

torch = pytest.importorskip("torch")

from fastadam import backends  # noqa: E402
from fastadam.torch import FusedAdam, FusedAdamW, backward, queues  # noqa: E402
from fastadam.torch.device_bundles import DeviceBundle  # noqa: E402

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]


@pytest.fixture
def devices(cupy, monkeypatch):
    """The queues of two devices."""
    found = use(monkeypatch)
    found.log = cupy.log
    return found


def pair(rng, shapes=SHAPES, dtype=torch.float32, kind=OnFirst):
    """Parameters in CPU memory, and the same on devices."""
    theirs = make(rng, shapes, dtype)
    return there(theirs, kind), theirs


def hand(ours, theirs, rng, *, without=()):
    give((theirs,), rng, without=without)
    for param, other in zip(ours, theirs, strict=True):
        grad = other.grad
        if grad is not None:
            grad = torch.empty_like(grad).copy_(grad)
            grad = grad if type(param) is torch.Tensor else grad.as_subclass(type(param))
        param.grad = grad


def plain(tensor):
    return tensor.detach().as_subclass(torch.Tensor)


def assert_same(ours, theirs, opt=None, other=None):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(plain(a), plain(b))
        if opt is not None:
            assert opt.state[a].keys() == other.state[b].keys()
            for name, value in other.state[b].items():
                assert torch.equal(plain(opt.state[a][name]), value), name
                assert opt.state[a][name].device == (torch.device("cpu") if name == "step" else a.device)


def train(ours, theirs, opt, other, rng, steps=3, **options):
    for _ in range(steps):
        hand(ours, theirs, rng, **options)
        opt.step()
        other.step()
    assert_same(ours, theirs, opt, other)


# --- The bits of the CPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", PAIRS_OF_FLAGS, ids=flags_id)
def test_every_equation(devices, rng, flags):
    ours, theirs = pair(rng)
    train(ours, theirs, FusedAdam(ours, 0.1, **flags), FusedAdam(theirs, 0.1, **flags), rng)
    assert [entry[:3] for entry in devices.log] == [("step_tensors", 0, 0)] * 3


def groups_of(params):
    return [
        {"params": params[:2], "lr": 0.1, "weight_decay": 0.1},
        {"params": params[2:4], "betas": (0.5, 0.6)},
        {"params": params[4], "amsgrad": True, "eps": 1e-3},
        {"params": params[5], "maximize": True, "lr": torch.tensor(0.02)},
    ]


def test_groups_schedules_and_missing_gradients(devices, rng):
    """One launch for each equation; groups of one equation, and of other step numbers, share it."""
    ours, theirs = pair(rng)
    opt, other = (FusedAdamW(groups_of(params), lr=0.05) for params in (ours, theirs))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (opt, other)]
    for without in ((), (0, 2, 4), (), (1, 5), ()):
        before = len(devices.log)
        train(ours, theirs, opt, other, rng, 1, without=without)
        assert len(devices.log) - before == 3 - (4 in without or 5 in without)
        for scheduler in schedulers:
            scheduler.step()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(devices, rng, dtype):
    ours, theirs = pair(rng, [*SHAPES, (5000,)], dtype)
    train(ours, theirs, FusedAdam(ours, 0.1), FusedAdam(theirs, 0.1), rng)


def test_several_devices_and_the_host_in_one_optimizer(devices, rng):
    """Devices are asked first: they work while the host steps what is in its memory."""
    ours, theirs = pair(rng, kind=(None, OnFirst, OnSecond))
    opt, other = FusedAdam(ours, 0.1), FusedAdam(theirs, 0.1)
    train(ours, theirs, opt, other, rng)
    assert [entry[:2] for entry in devices.log] == [("step_tensors", 0), ("step_tensors", 1)] * 3
    (plan,) = opt._plans.values()
    kinds = [type(part.bundle) for part in plan._parts]
    assert [kind is DeviceBundle for kind in kinds] == [True, True, False]


def test_gradients_of_other_orders_and_lazy_views(devices, rng):
    ours, theirs = pair(rng, [(4, 5), (), (3,)], torch.complex64)
    opt, other = FusedAdam(ours, 0.1), FusedAdam(theirs, 0.1)
    for _ in range(3):
        hand(ours, theirs, rng)
        for param in (*ours, *theirs):
            param.grad = param.grad.contiguous().conj()
        opt.step()
        other.step()
    assert_same(ours, theirs, opt, other)


# --- What is sent -------------------------------------------------------------------------------------------


def test_only_what_changed_is_sent(devices, rng):
    ours, theirs = pair(rng, [(100,)] * 7 + [(9000,)])
    queue, opt = devices.first, FusedAdam(ours, 0.1)
    hand(ours, theirs, rng)
    pieces, places, rows = 24 * 10, 8 * 6 * 8, 4 * 8
    opt.step()
    assert queue.sent == [(0, pieces), (0, places), (0, rows)]
    queue.sent.clear()
    opt.step()
    assert queue.sent == [(0, rows)], "bias corrections"
    queue.sent.clear()
    for param in ours:
        param.grad = param.grad.clone()
    opt.step()
    assert queue.sent == [(0, places), (0, rows)]
    queue.sent.clear()
    queue.current = 77
    opt.step()
    assert queue.sent == [(77, pieces), (77, places), (77, rows)], "no stream waits for another"
    assert devices.log[-1][:3] == ("step_tensors", 0, 77)


def test_what_could_not_be_sent_is_sent_again(devices, rng, monkeypatch):
    ours, theirs = pair(rng)
    opt, other = FusedAdam(ours, 0.1), FusedAdam(theirs, 0.1)
    train(ours, theirs, opt, other, rng, 1)
    hand(ours, theirs, rng)
    with monkeypatch.context() as patch:
        patch.setattr(devices.first, "send", lambda _: (_ for _ in ()).throw(MemoryError("full")))
        with pytest.raises(MemoryError, match="full"):
            opt.step()
    assert {float(opt.state[p]["step"]) for p in ours} == {1.0}
    opt.step()
    other.step()
    assert_same(ours, theirs, opt, other)


def test_nothing_to_step(devices):
    param = torch.zeros(0).as_subclass(OnFirst).requires_grad_()
    param.grad = torch.zeros_like(param).detach()
    opt = FusedAdam([param])
    opt.step()
    assert opt.state[param]["step"] == 1
    assert devices.log == devices.first.sent == []


# --- A scaler, state, steps in backward ---------------------------------------------------------------------


def test_a_scaler(devices, rng):
    """What it leaves on the device is read once; a step that it refuses is none."""
    ours, theirs = pair(rng)
    opt, other = FusedAdam(ours, 0.1), FusedAdam(theirs, 0.1)
    for found in (0.0, 1.0, 0.0):
        hand(ours, theirs, rng)
        opt.grad_scale, other.grad_scale = torch.tensor(8.0).as_subclass(OnFirst), 8.0
        opt.found_inf = torch.tensor([found]).as_subclass(OnFirst)
        opt.step()
        if not found:
            other.step()
    assert {float(opt.state[p]["step"]) for p in ours} == {2.0}
    assert_same(ours, theirs, opt, other)


def test_state_goes_on(devices, rng):
    ours, theirs = pair(rng)
    opt, other = FusedAdam(ours, 0.1, amsgrad=True), FusedAdam(theirs, 0.1, amsgrad=True)
    train(ours, theirs, opt, other, rng)
    again = there(ours)
    resumed = FusedAdam(again)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(again, theirs, resumed, other, rng)
    both = copy.deepcopy((again, resumed))
    train(both[0], theirs, both[1], other, rng, 2)


@pytest.mark.parametrize("together", [1, 100, 2**20])
def test_steps_in_backward(devices, rng, monkeypatch, together):
    monkeypatch.setattr(backward, "TOGETHER", together)
    ours, theirs = pair(rng, [(3, 5), (7,), (20, 30), (1,)], kind=(OnFirst, OnSecond, None))
    opt, other = FusedAdam(ours, 0.1, step_in_backward=True), FusedAdam(theirs, 0.1)
    for _ in range(3):
        factors = [torch.randn(p.shape, generator=seeded(rng)) for p in theirs]
        for params, each in ((ours, opt), (theirs, other)):
            loss = sum((plain_of(p) * f).square().sum() for p, f in zip(params, factors, strict=True))
            each.zero_grad()
            loss.backward()
            each.step()
        assert all(param.grad is None for param in ours)
    assert_same(ours, theirs, opt, other)


def plain_of(param):
    """The values of a parameter with its graph, to be added to those on other devices."""
    return param.as_subclass(torch.Tensor)


def test_streams_of_backward_are_joined(devices, rng, monkeypatch):
    """Gradients that came on other streams than that of the last one, whose step reads all of them."""
    ours, _ = pair(rng, [(4,)] * 3)
    opt = FusedAdam(ours, 0.1, step_in_backward=True)
    queue = devices.first
    for stream, param in zip((5, 6, 5), ours, strict=True):
        queue.current = stream
        param.grad = torch.ones_like(param).detach()
        opt._in_backward._take(param)
    queue.current = 0
    opt.step()
    assert queue.joined == [(0, [5, 6, 5])]
    monkeypatch.setattr(backward, "TOGETHER", 8)
    queue.current = 9
    for param in ours[:2]:
        param.grad = torch.ones_like(param).detach()
        opt._in_backward._take(param)
    assert queue.joined[1:] == [(9, [9, 9])]
    assert [param.grad is None for param in ours] == [True, True, True]


# --- Refused ------------------------------------------------------------------------------------------------


def test_a_capture_is_refused(devices, rng, cupy):
    ours, theirs = pair(rng)
    opt, other = FusedAdam(ours, 0.1), FusedAdam(theirs, 0.1)
    train(ours, theirs, opt, other, rng, 1)
    message = (
        "step must be outside of the capture of a CUDA graph; got one on cuda:0. Its coefficients come from"
        " the host: take fastadam.FusedAdam(capturable=True) on a flat buffer."
    )
    stream = cupy.cuda.Stream(78)
    stream.begin_capture()
    devices.first.current = 78
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        opt.step()
    stream.end_capture()
    assert_same(ours, theirs, opt, other)


def test_cupy_is_missing(rng, monkeypatch):
    monkeypatch.setattr(backends, "is_installed", lambda name: name != "cupy")
    ours, theirs = pair(rng)
    hand(ours, theirs, rng)
    opt, before = FusedAdam(ours), copies(ours)
    queues.queue_for.cache_clear()
    message = (
        'parameters on cuda:0 need CuPy. pip install "fastadam[cuda13]" (or "fastadam[cuda12]"), or take'
        " fastadam.torch.OffloadedAdam."
    )
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        opt.step()
    assert not opt.state
    assert_same(ours, before)
