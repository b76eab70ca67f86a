"""The contenders of the optimizer phase on a GPU: all that stands between two gradients, on one flat buffer.

The rules are those of :mod:`bench.gpu_peers`. Gradients are zero after a step, so they are written again
before each call, untimed and for all alike: a copy from one buffer (:class:`bench.gpu_buffers.Buffers`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, cast

import numpy as np

from bench import gpu_graphs, gpu_phase_references
from bench.gpu_buffers import Buffers, Running
from bench.gpu_peers import Peer, moments, numba_array, tensor
from bench.oracle import BETAS, EPS, LR
from bench.phase_oracle import CLIPPED_TO, EMA_DECAY, WEIGHT_DECAY
from fastadam import FusedAdam
from fastadam.buffers import flat
from fastadam.kernels.cuda import DeviceBuffer, Look
from fastadam.kernels.cuda_clock import Clock


def new_optimizer(grad_norm: float, backend: str | None, *, capturable: bool = False) -> FusedAdam:
    """Return what does the whole phase, for gradients of a norm."""
    return FusedAdam(
        LR,
        BETAS,
        EPS,
        WEIGHT_DECAY,
        decoupled_weight_decay=True,
        max_grad_norm=CLIPPED_TO * grad_norm,
        ema_decay=EMA_DECAY,
        zero_grads=True,
        backend=backend,
        capturable=capturable,
    )


def last_norm(optimizer: FusedAdam) -> float:
    """Return the norm that the last step found."""
    done = optimizer.last_step
    assert done is not None
    assert done.grad_norm is not None
    return done.grad_norm


def start_fastadam(
    buffers: Buffers,
    backend: str | None,
    *,
    graph: bool = False,
    wrapped: Callable[[Any], Any] = lambda array: array,
) -> Running:
    """One ``FusedAdam.step``."""
    optimizer = new_optimizer(buffers.grad_norm, backend, capturable=graph)
    step: Callable[[], object] = partial(optimizer.step, wrapped(buffers.params), wrapped(buffers.grads))
    return Running(
        gpu_graphs.captured(step, buffers.device.library) if graph else step,
        44 * len(buffers.params),
        partial(moments, optimizer, buffers),
        lambda: buffers.device.adopt(optimizer.state.param_ema),
        None if graph else lambda: last_norm(optimizer),  # the host does not see a replay
    )


def start_torch(buffers: Buffers, *, graph: bool = False) -> Running:
    """Four calls, as in a PyTorch loop: clip, step, follow with the average, clear."""
    torch = import_module("torch")
    param = torch.nn.Parameter(tensor(buffers.params))
    param.grad = tensor(buffers.grads)
    weights = param.detach()
    average = weights.clone()
    optimizer = torch.optim.AdamW([param], LR, BETAS, EPS, WEIGHT_DECAY, fused=True, capturable=graph)
    limit, found = CLIPPED_TO * buffers.grad_norm, [None]

    def step() -> None:
        found[0] = torch.nn.utils.clip_grad_norm_([param], limit)
        optimizer.step()
        average.lerp_(weights, 1 - EMA_DECAY)
        param.grad.zero_()

    return Running(
        gpu_graphs.by_torch(step) if graph else step,
        44 * len(buffers.params),
        average=lambda: buffers.device.adopt(average),
        norm=None if graph else partial(_number, found),
    )


def start_fastadam_norm(
    buffers: Buffers, backend: str, *, wrapped: Callable[[Any], Any] = lambda array: array
) -> Running:
    """Take the pass over the gradients of a step with ``max_grad_norm``, up to its decision."""
    optimizer = FusedAdam(max_grad_norm=1.0, backend=backend)
    one = (wrapped(buffers.device.upload(np.ones(1, np.float32))) for _ in range(2))
    optimizer.step(*one)  # what it decides with is there from the first step on
    clock = cast("Clock", optimizer.state._clock)
    grads = cast("DeviceBuffer", flat(wrapped(buffers.grads), "grads", writable=False, backend=backend))
    attempt = clock.attempts
    look = clock.plan(grads, Look(max_grad_norm=1.0), grads.stream or 0)
    return Running(look, 4 * len(buffers.grads), norm=lambda: clock.report(attempt).norm)


def start_torch_norm(buffers: Buffers) -> Running:
    """``torch.linalg.vector_norm``, which is what ``clip_grad_norm_`` calls."""
    torch = import_module("torch")
    grads, found = tensor(buffers.grads), [None]

    def step() -> None:
        found[0] = torch.linalg.vector_norm(grads)

    return Running(step, 4 * len(buffers.grads), norm=partial(_number, found))


def _number(found: list[Any]) -> float:
    return float(found[0])


def _needs(size: int) -> int:
    return 12 * size


def _needs_little(size: int) -> int:
    return size // 16


PHASE: dict[str, Peer] = {
    "cupy": Peer("fastadam CuPy, 1 call", partial(start_fastadam, backend="cupy"), ("cupy",), _needs),
    "two_passes": Peer("two passes", gpu_phase_references.start_two_passes, ("cupy",), _needs, is_adam=False),
    "torch": Peer("torch, 4 calls", start_torch, ("torch",), _needs),
    "cupy_graph": Peer(
        "fastadam CuPy, graph", partial(start_fastadam, backend="cupy", graph=True), ("cupy",), _needs
    ),
    "torch_graph": Peer("torch, 4 calls, graph", partial(start_torch, graph=True), ("torch",), _needs),
    "numba": Peer(
        "fastadam Numba, 1 call",
        partial(start_fastadam, backend="numba-cuda", wrapped=numba_array),
        ("numba_cuda",),
        _needs,
    ),
    "numba_graph": Peer(
        "fastadam Numba, graph",
        partial(start_fastadam, backend="numba-cuda", graph=True),
        ("numba_cuda",),
        _needs,
    ),
}
"""Clip by norm, AdamW, average, clear."""

NORM: dict[str, Peer] = {
    "cupy": Peer("fastadam CuPy", partial(start_fastadam_norm, backend="cupy"), ("cupy",), _needs_little),
    "one_read": Peer("one read", gpu_phase_references.start_read, ("cupy",), _needs_little, is_adam=False),
    "torch": Peer("torch vector_norm", start_torch_norm, ("torch",), _needs_little),
    "numba": Peer(
        "fastadam Numba",
        partial(start_fastadam_norm, backend="numba-cuda", wrapped=numba_array),
        ("numba_cuda",),
        _needs_little,
    ),
}
"""The global norm alone."""
