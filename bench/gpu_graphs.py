"""Captured CUDA graphs: a call that is recorded once, and from then on replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module


def captured(call: Callable[[], object], library: str) -> Callable[[], None]:
    """Return a call captured by the library that owns the arrays, ``"cupy"`` or another."""
    return by_cupy(call) if library == "cupy" else by_torch(call)


def by_cupy(step: Callable[[], object]) -> Callable[[], None]:
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


def by_torch(step: Callable[[], object]) -> Callable[[], None]:
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
