"""Parameters that live elsewhere, and their masters, which ``FusedAdam`` steps with the same gradients."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

SHAPES = [(40, 30), (), (0,), (7,), (2, 3, 4, 5), (1001,)]
LATE = [(True, True), (True, False), (False, True), (False, False)]


def make(dtype=torch.float32, shapes=SHAPES):
    torch.manual_seed(0)
    params = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    if len(shapes) > 4:
        params[0] = params[0].detach().t().contiguous().t().requires_grad_()
        params[4] = params[4].detach().to(memory_format=torch.channels_last).requires_grad_()
    return params


def masters_of(params):
    return [param.detach().to(master_dtype(param)).clone().requires_grad_() for param in params]


def master_dtype(param):
    return torch.float32 if param.dtype.itemsize == 2 else param.dtype


def give(params, masters, *, without=(), scale=1.0):
    for k, (param, master) in enumerate(zip(params, masters, strict=True)):
        grad = torch.randn(param.shape, dtype=param.dtype) * scale  # contiguous, as not all parameters are
        param.grad, master.grad = (None, None) if k in without else (grad, grad.to(master.dtype))


def assert_equal(params, masters):
    for param, master in zip(params, masters, strict=True):
        assert torch.equal(param, master.to(param.dtype))


def train(params, masters, ours, theirs, fake=None, steps=4, without=()):
    for k in range(steps):
        give(params, masters, without=without if k % 2 else ())
        ours.step()
        theirs.step()
    if fake is not None:
        fake.synchronize()
    assert_equal(params, masters)
