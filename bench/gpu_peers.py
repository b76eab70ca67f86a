"""The contenders on a GPU: everyone's Adam on one flat float32 buffer, and two references.

The rules are those of :mod:`bench.peers`, with one more: all share one buffer of parameters and one of
gradients, so that more of them fit beside each other, and their place is the same for all. The moments are
each library's own. A captured graph is one step, replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from bench import gpu_graphs, gpu_references
from bench.gpu_buffers import Buffers, Running
from bench.oracle import BETAS, EPS, LR
from fastadam import FusedAdam


def _start_fastadam(
    buffers: Buffers,
    backend: str | None,
    *,
    graph: bool = False,
    wrapped: Callable[[Any], Any] = lambda array: array,
) -> Running:
    optimizer = FusedAdam(LR, BETAS, EPS, backend=backend, capturable=graph)
    step: Callable[[], object] = partial(optimizer.step, wrapped(buffers.params), wrapped(buffers.grads))
    if graph:
        step = gpu_graphs.captured(step, buffers.device.library)
    return Running(step, 28 * len(buffers.params), partial(moments, optimizer, buffers))


def moments(optimizer: FusedAdam, buffers: Buffers) -> tuple[Any, ...]:
    """Return the moments of an optimizer, and its average, as arrays of the device's library."""
    return tuple(map(buffers.device.adopt, optimizer.state.moments.values()))


def numba_array(array: Any) -> Any:
    """Return a view of Numba's."""
    return import_module("numba.cuda").as_cuda_array(array)


def _start_torch(buffers: Buffers, *, graph: bool = False, **options: bool) -> Running:
    torch = import_module("torch")
    param = torch.nn.Parameter(tensor(buffers.params))
    param.grad = tensor(buffers.grads)
    optimizer = torch.optim.Adam([param], LR, BETAS, EPS, capturable=graph, **options)
    step = gpu_graphs.by_torch(optimizer.step) if graph else optimizer.step
    return Running(step, 28 * len(buffers.params))


def tensor(array: Any) -> Any:
    """Return a view of PyTorch's."""
    torch = import_module("torch")
    return array if isinstance(array, torch.Tensor) else torch.from_dlpack(array)


@dataclass(frozen=True)
class Peer:
    """A contender that can be started.

    Parameters
    ----------
    label : str
        What tables call it.
    start : callable
        ``(buffers)`` -> a new contender.
    modules : tuple of str
        What it imports.
    needs : callable
        Elements -> bytes that it allocates, temporaries included.
    is_adam : bool
        False for what only moves memory, and checks itself.
    """

    label: str
    start: Callable[[Buffers], Running]
    modules: tuple[str, ...]
    needs: Callable[[int], int] = lambda size: 8 * size
    is_adam: bool = True

    @property
    def is_ours(self) -> bool:
        """Whether all its bits are promised."""
        return self.label.startswith("fastadam")

    def missing(self) -> str | None:
        """Return why it cannot run here, or None."""
        absent = [module for module in self.modules if find_spec(module) is None]
        return f"not installed: {', '.join(absent)}" if absent else None


PEERS: dict[str, Peer] = {
    "cupy": Peer("fastadam CuPy", partial(_start_fastadam, backend="cupy"), ("cupy",)),
    "same_traffic": Peer("same traffic", gpu_references.start_same_traffic, ("cupy",), is_adam=False),
    "copy": Peer("copy", gpu_references.start_copy, (), gpu_references.copy_needs, is_adam=False),
    "torch_fused": Peer("torch fused", partial(_start_torch, fused=True), ("torch",)),
    "cupy_graph": Peer(
        "fastadam CuPy, graph", partial(_start_fastadam, backend="cupy", graph=True), ("cupy",)
    ),
    "torch_fused_graph": Peer(
        "torch fused, graph", partial(_start_torch, fused=True, graph=True), ("torch",)
    ),
    "numba": Peer(
        "fastadam Numba",
        partial(_start_fastadam, backend="numba-cuda", wrapped=numba_array),
        ("numba_cuda",),
    ),
    "numba_graph": Peer(
        "fastadam Numba, graph",
        partial(_start_fastadam, backend="numba-cuda", graph=True),
        ("numba_cuda",),
    ),
    "cupy_elementwise": Peer("CuPy ElementwiseKernel", gpu_references.start_elementwise, ("cupy",)),
    "torch_foreach": Peer(
        "torch foreach", partial(_start_torch, foreach=True), ("torch",), lambda size: 20 * size
    ),
}
"""Name -> contender. Where memory is short, the later ones are left out."""

ON_TENSORS = {
    "tensors": Peer(
        "fastadam on torch tensors", partial(_start_fastadam, backend=None, wrapped=tensor), ("torch",)
    )
}
"""On the device it is one of those above; the host has more to do."""
