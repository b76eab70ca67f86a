"""The contenders of the optimizer phase: all that stands between two gradients, on one flat buffer.

The rules are those of :mod:`bench.peers`. Gradients are zero after a step, so all contenders get them back in
the same way before each call, untimed: a copy from a buffer of their own, which leaves the same bytes in the
caches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from math import sqrt

import numpy as np

from bench import phase_roofline
from bench.oracle import BETAS, EPS, LR, Array, Contender
from bench.peers import Peer
from bench.phase_oracle import EMA_DECAY, WEIGHT_DECAY, max_norm
from bench.placement import placed_copy
from fastadam import FusedAdam
from fastadam.kernels import norms


def refilled(
    step: Callable[[], object], params: Array, grads: Array, read_average: Callable[[], Array]
) -> Contender:
    """Return a contender whose step clears ``grads``, with what writes them back before each call."""
    source = placed_copy(grads)
    return Contender(
        step,
        lambda: params,
        partial(np.copyto, source),
        before=partial(np.copyto, grads, source),
        read_average=read_average,
        read_grads=lambda: grads,
    )


def start_fastadam(params: Array, grads: Array, out: Array | None = None) -> Contender:
    """One ``FusedAdam.step``, which may write a copy of the parameters."""
    optimizer = FusedAdam(
        LR,
        BETAS,
        EPS,
        WEIGHT_DECAY,
        decoupled_weight_decay=True,
        max_grad_norm=max_norm(grads),
        ema_decay=EMA_DECAY,
        zero_grads=True,
    )
    step = partial(optimizer.step, params, grads, out=out)
    return refilled(step, params, grads, lambda: optimizer.state.param_ema)


def start_torch(params: Array, grads: Array) -> Contender:
    """Four calls, as in a PyTorch loop: clip, step, follow with the average, clear."""
    torch = import_module("torch")
    limit = max_norm(grads)
    param = torch.nn.Parameter(torch.from_numpy(params))
    param.grad = torch.from_numpy(grads)
    weights = param.detach()
    average = weights.clone()
    optimizer = torch.optim.AdamW([param], LR, BETAS, EPS, WEIGHT_DECAY, fused=True)

    def step() -> object:
        norm = torch.nn.utils.clip_grad_norm_([param], limit)
        optimizer.step()
        average.lerp_(weights, 1 - EMA_DECAY)
        param.grad.zero_()
        return norm

    return refilled(step, params, grads, average.numpy)


def start_roofline(params: Array, grads: Array) -> Contender:
    """Two passes, of :mod:`bench.phase_roofline`; they have checked themselves."""
    checked = 2**18  # elements: enough for the parallel loops
    sums = phase_roofline.new_sums(grads.size, grads.dtype)
    phase_roofline.check_read(phase_roofline.read, grads, sums)
    phase_roofline.check_move(phase_roofline.move, params[:checked], grads[:checked])
    states = [placed_copy(np.zeros_like(params)) for _ in range(3)]
    step = partial(phase_roofline.two_passes, params, grads, *states, sums=sums)
    return refilled(step, params, grads, lambda: states[-1])


def start_fastadam_norm(params: Array, grads: Array) -> Contender:
    """``norms.measure``: the pass over the gradients that a step with ``max_grad_norm`` takes."""
    scratch = np.empty(norms.scratch_size(grads.size))
    return Contender(
        lambda: sqrt(norms.measure(grads, scratch)[0]), lambda: params, partial(np.copyto, grads)
    )


def start_torch_norm(params: Array, grads: Array) -> Contender:
    """``torch.linalg.vector_norm``, which is what ``clip_grad_norm_`` calls."""
    torch = import_module("torch")
    tensor = torch.from_numpy(grads)
    return Contender(partial(torch.linalg.vector_norm, tensor), lambda: params, partial(np.copyto, grads))


PHASE: dict[str, Peer] = {
    "fastadam": Peer("fastadam, 1 call", start_fastadam),
    "roofline": Peer("two passes", start_roofline, is_adam=False),
    "torch": Peer("torch, 4 calls", start_torch, ("torch",)),
}
"""Clip by norm, AdamW, average, clear."""

NORM: dict[str, Peer] = {
    "fastadam": Peer("fastadam", start_fastadam_norm),
    "roofline": Peer("one read", phase_roofline.start_read, is_adam=False),
    "torch": Peer("torch vector_norm", start_torch_norm, ("torch",)),
}
"""The global norm alone."""
