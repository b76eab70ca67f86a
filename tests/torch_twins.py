"""The same parameters trained by ``fastadam.torch`` and by ``torch.optim``, in float64."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

RTOL, ATOL = 1e-12, 1e-15
"""A few steps in float64, of numbers near 1: a hundred roundings or so."""

SHAPES = [(3, 5), (), (0,), (7,), (2, 3, 4, 5), (1,)]


def generator(rng):
    return torch.Generator().manual_seed(int(rng.integers(2**31)))


def make(rng, shapes=SHAPES, dtype=torch.float64):
    """Parameters; one of four dimensions lies channels last, one of two is transposed."""
    found = []
    for shape in shapes:
        values = torch.randn(shape, generator=generator(rng), dtype=dtype)
        if len(shape) == 4:
            values = values.to(memory_format=torch.channels_last)
        if len(shape) == 2:
            values = values.t().contiguous().t()
        found.append(values.requires_grad_())
    return found


def copies(params):
    return [param.detach().clone().requires_grad_() for param in params]


def give(params, rng, *, without=()):
    """Give each list of parameters the same new gradients, in the memory format of their parameters."""
    for k, of_all in enumerate(zip(*params, strict=True)):
        grad = torch.randn(of_all[0].shape, generator=generator(rng), dtype=of_all[0].dtype)
        for param in of_all:
            param.grad = None if k in without else torch.empty_like(param).copy_(grad).detach()


def assert_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(
            a.detach().resolve_conj().numpy(), b.detach().resolve_conj().numpy(), rtol=RTOL, atol=ATOL
        )


def assert_same_state(ours, theirs):
    """The entries of a state dict of each: the same names, types and, but for roundings, values."""
    assert ours.keys() == theirs.keys()
    for key, theirs_of in theirs.items():
        assert list(ours[key]) == list(theirs_of)
        for name, value in theirs_of.items():
            mine = ours[key][name]
            assert (mine.dtype, mine.shape, mine.device) == (value.dtype, value.shape, value.device), name
            assert_close([mine], [value])
