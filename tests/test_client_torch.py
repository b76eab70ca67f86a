"""A character language model in PyTorch: one flat buffer, of which its parameters are views."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from clients import Nudges, assert_finds_a_defect, assert_trains_as_its_own

from fastadam import FusedAdam

torch = pytest.importorskip("torch")

STEPS, BATCH, CONTEXT, HIDDEN = 40, 8, 24, 24
OPTIONS = {"lr": 5e-3, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def one_thread():
    """The model is too small for more: they would wait for each other, 30 times per character."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class CharacterModel(torch.nn.Module):
    def __init__(self, n_characters):
        super().__init__()
        self.embedding = torch.nn.Embedding(n_characters, HIDDEN)
        self.recurrent = torch.nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.out = torch.nn.Linear(HIDDEN, n_characters)

    def forward(self, codes):
        return self.out(self.recurrent(self.embedding(codes))[0])


def make_flat(model):
    """Move the parameters into one buffer, and their gradients into another."""
    parameters = list(model.parameters())
    flat_params = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    flat_grads = torch.zeros_like(flat_params)
    start = 0
    for parameter in parameters:
        part = slice(start, start + parameter.numel())
        parameter.data = flat_params[part].view(parameter.shape)
        parameter.grad = flat_grads[part].view(parameter.shape)
        start += parameter.numel()
    return flat_params, flat_grads


@cache
def text():
    """The docstring that users read, as codes."""
    alphabet, codes = np.unique(list(FusedAdam.__doc__), return_inverse=True)
    return torch.from_numpy(codes), len(alphabet)


def train(kind, seed):
    codes, n_characters = text()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CharacterModel(n_characters)
    flat_params, flat_grads = make_flat(model)
    if kind == "fused":
        opt = FusedAdam(**OPTIONS, decoupled_weight_decay=True, zero_grads=True)
    else:
        opt = torch.optim.AdamW(model.parameters(), **OPTIONS)
    nudge, losses = Nudges(seed), []
    for _ in range(STEPS):
        starts = torch.randint(len(codes) - CONTEXT, (BATCH,), generator=generator)
        batch = codes[starts[:, None] + torch.arange(CONTEXT + 1)]
        logits = model(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        losses.append(loss.item())
        if kind == "fused":
            opt.step(flat_params, flat_grads)
            continue
        before = flat_params.numpy().copy()
        opt.step()
        opt.zero_grad(set_to_none=False)
        if kind == "nudged":
            nudge(flat_params.numpy(), before)
    if kind == "fused":
        assert opt.state.step == STEPS
    return np.array(losses)


def test_curve_is_that_of_torch():
    assert_trains_as_its_own(train)


def test_a_defect_is_found(monkeypatch):
    assert_finds_a_defect(train, monkeypatch)
