"""Tensors that say they lie on a CUDA device, and queues of such devices: all is in the memory of the host.

Kernels run as host code behind the stand-in for CuPy. What it cannot show: that PyTorch's streams, its pinned
memory and its allocator do what they say.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from fastadam import backends


class Faked(torch.Tensor):
    """A tensor of the host that says otherwise; so does what PyTorch makes of it."""

    @property
    def grad(self):
        found = torch.Tensor.grad.__get__(self)
        return found if found is None else found.as_subclass(type(self))

    @grad.setter
    def grad(self, value):
        torch.Tensor.grad.__set__(self, value)

    def __deepcopy__(self, memo):
        copy = self.detach().clone().as_subclass(type(self)).requires_grad_(self.requires_grad)
        return memo.setdefault(id(self), copy)

    def to(self, *args, device=None, **kwargs):
        assert device in (None, self.device)
        return super().to(*args, **kwargs)


class OnFirst(Faked):
    """One on the first device."""

    device = torch.device("cuda", 0)


class OnSecond(Faked):
    """One on the second."""

    device = torch.device("cuda", 1)


def there(tensors, kind=OnFirst):
    """Return copies that say they are on a device; of several kinds by turns."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    found = []
    for k, tensor in enumerate(tensors):
        which = kinds[k % len(kinds)]
        values = torch.empty_like(tensor.detach()).copy_(tensor.detach())
        found.append((values if which is None else values.as_subclass(which)).requires_grad_())
    return found


class FakeQueue:
    """Satisfies ``fastadam.torch.queues.Queue``."""

    def __init__(self) -> None:
        self.backend = backends.load("cupy")
        self.current, self.sent, self.joined = 0, [], []

    def stream(self):
        return self.current

    def send(self, table):
        self.sent.append((self.current, table.nbytes))
        memory = torch.empty(table.nbytes + 16, dtype=torch.uint8)
        memory = memory[-memory.data_ptr() % 16 :][: table.nbytes]  # as devices hand it out
        return memory.copy_(torch.from_numpy(table))

    def mark(self):
        return self.current

    def join(self, marked):
        self.joined.append((self.current, [stream for stream, _ in marked]))


def use(monkeypatch) -> SimpleNamespace:
    """Let optimizers step on fake devices; return the queues of both."""
    from fastadam.torch import queues

    found: dict[torch.device, FakeQueue] = {}

    def queue_for(device):
        return found.setdefault(device, FakeQueue())

    monkeypatch.setattr(queues, "queue_for", queue_for)
    return SimpleNamespace(first=queue_for(OnFirst.device), second=queue_for(OnSecond.device))
