"""The contenders of ``bench.storage``: our step by storage, 8-bit Adams of others, the phase with a copy.

The rules are those of :mod:`bench.peers`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from bench import phase_peers, storage_oracle, storage_traffic, storages
from bench.oracle import BETAS, EPS, LR, Array, Contender
from bench.peers import Peer
from bench.placement import placed_copy
from bench.storage_oracle import Precision
from bench.storages import STORAGES, Storage


@dataclass(frozen=True)
class Stored(Peer):
    """A contender whose numbers are stored in some way."""

    storage: Storage = STORAGES["float32"]

    def missing(self, dtype: str) -> str | None:
        """Return why it cannot run here, or None."""
        absent = super().missing(dtype)
        return absent if absent or not self.is_adam else self.storage.refused()


@dataclass(frozen=True)
class Compiled(Peer):
    """A contender that ``torch.compile`` builds."""

    def missing(self, dtype: str) -> str | None:
        """Return why it cannot run here, or None."""
        compilers = filter(None, (os.environ.get("CXX"), "g++", "clang++", "cl"))
        absent = super().missing(dtype)
        return absent or (None if any(map(shutil.which, compilers)) else "no C++ compiler")


def _fastadam(name: str, storage: Storage) -> Stored:
    kinds = (storage.params, storage.grads, *storage.state)
    packages = ("ml_dtypes",) if "bfloat16" in kinds else ()
    start = partial(storages.start, storage=storage)
    return Stored(name, start, packages, ("float32",), storage=storage)


def _traffic(storage: Storage) -> Stored:
    name = f"same traffic, {storage.bytes_moved:.3g} bytes"
    start = partial(storage_traffic.start, storage=storage)
    return Stored(name, start, (), ("float32",), is_adam=False, storage=storage)


def _with_traffic(peers: dict[str, Stored]) -> dict[str, Peer]:
    """Add the roofline of each number of bytes, by that number."""
    rooflines = {f"traffic {peer.storage.bytes_moved:g}": _traffic(peer.storage) for peer in peers.values()}
    return {**peers, **rooflines}


_FLOAT32, _BF16, _8BIT = (STORAGES[name] for name in ("float32", "bfloat16", "8bit"))

STATES = _with_traffic(
    {
        "float32": _fastadam("float32", _FLOAT32),
        "bfloat16": _fastadam("bfloat16", _BF16),
        "bfloat16 nearest": _fastadam("bfloat16, nearest", _BF16._replace(rounding="nearest")),
        "8bit": _fastadam("8bit", _8BIT),
        "8bit nearest": _fastadam("8bit, nearest", _8BIT._replace(rounding="nearest")),
        "pair": _fastadam("(bfloat16, 8bit)", STORAGES["bfloat16, 8bit"]),
    }
)
"""Parameters and gradients in float32, moments in less."""

PARAMS = _with_traffic(
    {
        "float32": _fastadam("float32", _FLOAT32),
        **{
            name: _fastadam(name, STORAGES[name])
            for name in ("8bit, split master", "bfloat16, split master", "bfloat16, no master")
        },
    }
)
"""Parameters and gradients in bfloat16, beside all in float32."""


def start_bitsandbytes(params: Array, grads: Array) -> Contender:
    """``bitsandbytes.optim.Adam8bit.step`` on one parameter."""
    torch = import_module("torch")
    param = torch.nn.Parameter(torch.from_numpy(params))
    param.grad = torch.from_numpy(grads)
    optimizer = import_module("bitsandbytes").optim.Adam8bit([param], LR, BETAS, EPS)
    return Contender(optimizer.step, lambda: params, partial(np.copyto, grads))


def start_torchao(params: Array, grads: Array) -> Contender:
    """``torchao.optim.AdamW8bit.step`` on one parameter, without decay; it compiles itself for each size."""
    torch = import_module("torch")
    param = torch.nn.Parameter(torch.from_numpy(params))
    param.grad = torch.from_numpy(grads)
    adam = import_module("torchao.optim").AdamW8bit
    optimizer = adam([param], LR, BETAS, EPS, weight_decay=0.0)
    return Contender(optimizer.step, lambda: params, partial(np.copyto, grads))


EIGHT_BIT: dict[str, Peer] = {
    "fastadam": _fastadam("fastadam, 8bit", _8BIT),
    "float32": _fastadam("fastadam, float32", _FLOAT32),
    "torchao": Compiled("torchao AdamW8bit", start_torchao, ("torchao", "torch"), ("float32",)),
    "bitsandbytes": Peer(
        "bitsandbytes Adam8bit", start_bitsandbytes, ("bitsandbytes", "torch"), ("float32",)
    ),
}
"""Of 4 Ki elements and more; below, the others keep float32."""

EIGHT_BIT_PRECISIONS = {
    # The table of both has 64 numbers of a sign in the upper decade, and 128 for what has no sign. Of the
    # gradients of the check the smallest is half the largest of its block, so it is a half and a quarter.
    "bitsandbytes": Precision(0.9 / 64 / 0.5, 0.9 / 128 / 0.25),
    # The scale is at least 1e-12, so these second moments lie in a lower decade, with 32 numbers.
    "torchao": Precision(0.9 / 64 / 0.5, 0.9 / 32 / 0.1),
}


def start_fastadam_copy(params: Array, grads: Array) -> Contender:
    """One ``FusedAdam.step`` with ``out``."""
    copy = placed_copy(np.zeros(params.size, storages.numpy_dtype("bfloat16")))
    return phase_peers.start_fastadam(params, grads, copy)._replace(read_copy=lambda: copy)


def start_torch_copy(params: Array, grads: Array) -> Contender:
    """Five calls: the four of :func:`bench.phase_peers.start_torch`, and ``copy_``."""
    torch = import_module("torch")
    phase = phase_peers.start_torch(params, grads)
    codes = placed_copy(np.zeros(params.size, np.int16))
    copy, weights = torch.from_numpy(codes).view(torch.bfloat16), torch.from_numpy(params)

    def step() -> Any:
        norm = phase.step()
        copy.copy_(weights)
        return norm

    return phase._replace(step=step, read_copy=lambda: codes)


COPY: dict[str, Peer] = {
    "fastadam": Peer("fastadam, 1 call", start_fastadam_copy, ("ml_dtypes",), ("float32",)),
    "torch": Peer("torch, 5 calls", start_torch_copy, ("torch",), ("float32",)),
}
"""Clip by norm, AdamW, average, clear, copy to bfloat16."""


def checks(peers: Mapping[str, Peer]) -> Callable[[str, Contender, Array, Array], None]:
    """Return what checks the contenders of a contest: each within what it can hold."""
    precisions = {
        name: Precision.of(peer.storage) if isinstance(peer, Stored) else EIGHT_BIT_PRECISIONS[name]
        for name, peer in peers.items()
        if peer.is_adam
    }

    def check(name: str, contender: Contender, params: Array, grads: Array) -> None:
        storage_oracle.check_update(precisions[name], name, contender, params, grads)

    return check
