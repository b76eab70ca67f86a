"""Flat storage of PyTorch's parameters: backward accumulates in the buffer, and nothing is concatenated."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tolerances import assert_same_bits

import fastadam
from fastadam import FusedAdam

torch = pytest.importorskip("torch")


def model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    hidden = torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)
    return torch.nn.Sequential(*hidden).to(dtype)


def loss(net, dtype=torch.float32):
    x = torch.linspace(-1, 1, 12, dtype=dtype).reshape(4, 3)
    return (net(x) - x.sum(1, keepdim=True)).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_module_trains_in_place_as_with_gradients_put_together(dtype):
    net, other = model(dtype=dtype), model(dtype=dtype)
    flat = fastadam.flatten(net, in_place=True)
    assert flat.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    opt = FusedAdam(
        lr=0.05, weight_decay=0.1, segments=flat.segments("*.bias", weight_decay=0.0), zero_grads=True
    )
    ours = FusedAdam(lr=0.05, weight_decay=0.1, segments=opt.segments)
    params = torch.cat([p.detach().reshape(-1) for p in other.parameters()])
    before = loss(net, dtype).item()
    for _ in range(20):
        loss(net, dtype).backward()
        opt.step(flat.params, flat.grads)
        other.zero_grad()
        loss(other, dtype).backward()
        ours.step(params, torch.cat([p.grad.reshape(-1) for p in other.parameters()]))
        torch.nn.utils.vector_to_parameters(params, other.parameters())
    assert torch.equal(flat.params, params)
    assert loss(net, dtype).item() < 0.9 * before
    assert not flat.grads.any()


def test_views_share_memory_and_are_aligned():
    net = model()
    flat = fastadam.flatten(net, in_place=True, align=16)
    assert flat.params.data_ptr() % 64 == flat.grads.data_ptr() % 64 == 0
    for name, parameter in net.named_parameters():
        assert parameter.requires_grad
        assert parameter.data_ptr() == flat.by_name[name].data_ptr()
        assert parameter.data_ptr() % 64 == 0
        assert parameter.grad.data_ptr() == flat.grad_views[name].data_ptr()
    assert not flat.params.requires_grad


def test_gradients_that_were_there_are_kept():
    net = model()
    loss(net).backward()
    grads = torch.cat([p.grad.reshape(-1) for p in net.parameters()])
    flat = fastadam.flatten(net, in_place=True)
    assert torch.equal(flat.grads, grads)
    loss(net).backward()
    torch.testing.assert_close(flat.grads, 2 * grads, rtol=1e-6, atol=0)


def test_frozen_parameters_are_not_stepped_and_tied_ones_once():
    net = model()
    net[0].weight.requires_grad_(False)
    net.tied = net[2]
    flat = fastadam.flatten(net, in_place=True)
    assert flat.names == ("0.bias", "2.weight", "2.bias")
    assert flat.views["tied.weight"] is flat.views["2.weight"]
    with pytest.raises(ValueError, match="arrays must hold an array; got none"):
        fastadam.flatten(torch.nn.Tanh())


def test_without_in_place_tensors_are_left_alone():
    net = model()
    flat = fastadam.flatten(dict(net.named_parameters()))
    flat.params.zero_()
    assert all(p.any() and p.grad is None for p in net.parameters())
    assert all(not view.requires_grad for view in flat.by_name.values())


def lose_gradients(net):
    net.zero_grad(set_to_none=True)


def lose_and_find_others(net):
    net.zero_grad(set_to_none=True)
    loss(net).backward()


def move(net):
    net.load_state_dict({name: p.clone() for name, p in net.state_dict().items()}, assign=False)
    for p in net.parameters():
        p.data = p.data.clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lose_gradients,
            "arrays['0.weight'].grad must be a view of flat.grads; got None. Clear gradients with"
            " flat.grads.zero_() or FusedAdam(zero_grads=True), or call attach().",
        ),
        (
            lose_and_find_others,
            "arrays['0.weight'].grad must be a view of flat.grads; got other memory."
            " Call attach() to copy it in.",
        ),
        (
            move,
            "arrays['0.weight'] must be a view of flat.params; got other memory."
            " Call attach() to copy it in.",
        ),
    ],
)
def test_lost_views_are_errors_and_attach_repairs_them(change, message):
    net = model()
    flat = fastadam.flatten(net, in_place=True)
    loss(net).backward()
    change(net)
    with torch.no_grad():
        wanted = [p.clone() for p in net.parameters()]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        _ = flat.grads
    flat.attach()
    for name, value, grad in zip(flat.names, wanted, grads, strict=True):
        assert torch.equal(flat.by_name[name], value)
        assert torch.equal(flat.grad_views[name], grad)
    before = flat.grads.clone()
    loss(net).backward()
    assert not torch.equal(flat.grads, before)


def test_attach_after_memory_was_given_to_gradients():
    """Module.to with a memory format replaces the memory of parameters and of the gradients it finds."""
    net = torch.nn.Conv2d(2, 3, 2)
    flat = fastadam.flatten(net, in_place=True)
    net(torch.ones(1, 2, 3, 3)).sum().backward()
    grads = flat.grads.clone()
    net.to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"must be a view of flat\.params"):
        _ = flat.grads
    flat.attach()
    assert torch.equal(flat.grads, grads)
    flat.grads.zero_()
    assert not net.weight.grad.any()


def test_attach_refuses_what_does_not_fit_and_changes_nothing():
    net = model()
    flat = fastadam.flatten(net, in_place=True)
    net[2].double()
    pointers = [p.data_ptr() for p in net.parameters()]
    message = "arrays['2.weight'] must be float32, as in the buffer; got float64. Flatten again."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        flat.attach()
    assert pointers == [p.data_ptr() for p in net.parameters()]


@pytest.mark.parametrize(
    ("kind", "tensors", "options", "message"),
    [
        (
            ValueError,
            lambda: [torch.ones(2, requires_grad=True) * 2],
            {"in_place": True},
            "arrays['0'] must be a leaf of the graph for in_place; got a result of other tensors.",
        ),
        (
            TypeError,
            lambda: [torch.ones(2), torch.ones(2, device="meta")],
            {},
            "arrays['1'] must be in CPU memory or on an NVIDIA GPU; got device meta.",
        ),
        (
            TypeError,
            lambda: [torch.eye(2).to_sparse()],
            {},
            "arrays['0'] must be in CPU memory or on an NVIDIA GPU; got a tensor of layout torch.sparse_coo.",
        ),
        (
            TypeError,
            lambda: [torch.ones(2, dtype=torch.complex64)],
            {},
            "arrays['0'] must be float32, float64, float16 or bfloat16; got complex64.",
        ),
        (
            TypeError,
            lambda: [torch.ones(2), np.ones(2, np.float32)],
            {},
            "arrays['1'] must be of the library of arrays['0'] (PyTorch); got NumPy.",
        ),
    ],
)
def test_errors(kind, tensors, options, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        fastadam.flatten(tensors(), **options)


@pytest.mark.gpu
def test_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    net, host = model().cuda(), model()
    flat = fastadam.flatten(net, in_place=True)
    expected = fastadam.flatten(host, in_place=True)
    assert flat.params.is_cuda
    assert flat.params.data_ptr() % 64 == 0
    opt, ours = FusedAdam(lr=0.05), FusedAdam(lr=0.05)
    loss(host).backward()
    with torch.no_grad():
        flat.grads.copy_(expected.grads)
    opt.step(flat.params, flat.grads)
    ours.step(expected.params, expected.grads)
    assert_same_bits(flat.params.cpu().numpy(), expected.params.numpy())
