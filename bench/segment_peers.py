"""The contenders of segments and of telemetry: what they add to a step that does without.

The rules are those of :mod:`bench.peers`. All segments have the values of the plain step, so that all compute
the same: what a segment costs does not depend on its values.
"""

from __future__ import annotations

import itertools
from functools import partial
from importlib import import_module

import numpy as np

from bench.oracle import BETAS, EPS, LR, Array, Contender
from bench.peers import PEERS, Peer
from fastadam import FusedAdam, Segment

COUNT = 10_000
LEAST_ELEMENTS = 8
"""For each segment, on average: smaller buffers have fewer segments."""


def bounds(size: int, seed: int = 0) -> Array:
    """Return where segments begin and end: log-uniform sizes, the largest some 10,000 times the smallest."""
    count = max(1, min(COUNT, size // LEAST_ELEMENTS))
    shares = np.cumsum(np.exp(np.random.default_rng(seed).uniform(0, np.log(1e4), count)))
    # Rounded, with room for one element each: none is empty.
    inner = np.floor(shares / shares[-1] * (size - count)).astype(np.int64) + np.arange(1, count + 1)
    return np.append(0, inner)


def start_fastadam(params: Array, grads: Array) -> Contender:
    """``FusedAdam.step`` with segments that cover the buffer."""
    edges = bounds(params.size).tolist()
    segments = [
        Segment(start, stop, lr=LR) if k % 2 else Segment(start, stop, betas=BETAS, eps=EPS)
        for k, (start, stop) in enumerate(itertools.pairwise(edges))
    ]
    optimizer = FusedAdam(LR, BETAS, EPS, segments=segments)
    return Contender(partial(optimizer.step, params, grads), lambda: params, partial(np.copyto, grads))


def start_torch(params: Array, grads: Array) -> Contender:
    """``torch.optim.Adam(fused=True).step`` on one tensor for each segment, in two groups."""
    torch = import_module("torch")
    edges = bounds(params.size).tolist()
    groups: tuple[list[object], list[object]] = ([], [])
    for k, (start, stop) in enumerate(itertools.pairwise(edges)):
        tensor = torch.nn.Parameter(torch.from_numpy(params[start:stop]))
        tensor.grad = torch.from_numpy(grads[start:stop])
        groups[k % 2].append(tensor)
    optimizer = torch.optim.Adam([{"params": group} for group in groups if group], LR, BETAS, EPS, fused=True)
    return Contender(optimizer.step, lambda: params, partial(np.copyto, grads))


def start_telemetry(params: Array, grads: Array) -> Contender:
    """``FusedAdam.step`` with ``telemetry=True``; to read :attr:`FusedAdam.last_step` is not part of it."""
    optimizer = FusedAdam(LR, BETAS, EPS, telemetry=True)
    return Contender(partial(optimizer.step, params, grads), lambda: params, partial(np.copyto, grads))


PLAIN = Peer("fastadam, plain", PEERS["fastadam"].start)

SEGMENTS: dict[str, Peer] = {
    "fastadam": Peer("fastadam, 10,000 segments", start_fastadam),
    "plain": PLAIN,
    "torch": Peer("torch fused, 10,000 tensors", start_torch, ("torch",)),
}
"""10,000 segments, or one for 8 elements in small buffers."""

TELEMETRY: dict[str, Peer] = {"fastadam": Peer("fastadam, telemetry", start_telemetry), "plain": PLAIN}
"""Norms and counts of each step."""
