"""The contenders on a GPU: everyone's Adam on one flat float32 buffer, and two references.

The rules are those of :mod:`bench.peers`, with one more: all share one buffer of parameters and one of
gradients, so that more of them fit beside each other, and their place is the same for all. The moments are
each library's own. A captured graph is one step, replayed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from bench import gpu_references
from bench.gpu_buffers import Buffers, Running
from bench.oracle import BETAS, EPS, LR
from fastadam import FusedAdam


def _traffic(buffers: Buffers) -> int:
    return 28 * len(buffers.params)


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
        step = _captured_by_cupy(step) if buffers.device.library == "cupy" else _captured_by_torch(step)

    def moments() -> tuple[Any, Any]:
        state, adopt = optimizer.state, buffers.device.adopt
        return adopt(state.exp_avg), adopt(state.exp_avg_sq)

    return Running(step, _traffic(buffers), moments)


def _numba_array(array: Any) -> Any:
    return import_module("numba.cuda").as_cuda_array(array)


def _start_torch(buffers: Buffers, *, graph: bool = False, **options: bool) -> Running:
    torch = import_module("torch")
    param = torch.nn.Parameter(_tensor(buffers.params))
    param.grad = _tensor(buffers.grads)
    optimizer = torch.optim.Adam([param], LR, BETAS, EPS, capturable=graph, **options)
    step = _captured_by_torch(optimizer.step) if graph else optimizer.step
    return Running(step, _traffic(buffers))


def _tensor(array: Any) -> Any:
    torch = import_module("torch")
    return array if isinstance(array, torch.Tensor) else torch.from_dlpack(array)


def _captured_by_cupy(step: Callable[[], object]) -> Callable[[], None]:
    """Return a call that takes a step and captures another one, and from then on replays it."""
    cupy = import_module("cupy")
    stream, graph = cupy.cuda.Stream(non_blocking=True), None

    def call() -> None:
        nonlocal graph
        if graph is not None:
            graph.launch()
            return
        cupy.cuda.runtime.deviceSynchronize()  # the stream does not wait for the default stream
        with stream:
            step()
            stream.synchronize()
            stream.begin_capture()
            try:
                step()
            finally:  # a capture that is left open breaks every contender after it
                captured = stream.end_capture()
        graph = captured

    return call


def _captured_by_torch(step: Callable[[], object]) -> Callable[[], None]:
    """Return a call that takes a step and captures another one, and from then on replays it."""
    torch = import_module("torch")
    graph = None

    def call() -> None:
        nonlocal graph
        if graph is not None:
            graph.replay()
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*without CUDA graph capture")  # PyTorch's, of this step
            step()
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        graph = captured

    return call


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
        partial(_start_fastadam, backend="numba-cuda", wrapped=_numba_array),
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
        "fastadam on torch tensors", partial(_start_fastadam, backend=None, wrapped=_tensor), ("torch",)
    )
}
"""On the device it is one of those above; the host has more to do."""
