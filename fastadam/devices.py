"""Where the demo and the benchmark run: an array library, and a clock that agrees with it.

A GPU works behind the caller's back: a call returns when its work is queued, so the caller's clock times only
the queueing. Events are marks in the queue itself, and the GPU notes the time when it comes to one. The time
between two is that of the work between, and of waiting where the caller is slower than the GPU. Nothing has
to be synchronised until the times are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from time import perf_counter
from typing import Any

import numpy as np

from fastadam import backends


@dataclass(frozen=True)
class Device:
    """An array library and its clock.

    Parameters
    ----------
    label : str
        For people: "CPU", or the model of the GPU and how it is timed.
    xp : module
        NumPy, or CuPy, which has the same functions.
    mark : callable
        Returns a mark of the present place in the order of the work.
    seconds : callable
        Takes two marks, returns the time between them; waits for the later one.
    """

    label: str
    xp: Any
    mark: Callable[[], Any]
    seconds: Callable[[Any, Any], float]


CPU = Device("CPU", np, perf_counter, lambda start, end: float(end - start))


def cuda() -> Device:
    """Return the current GPU: CuPy, and events on its current stream.

    Raises
    ------
    ImportError
        If CuPy is missing, or finds no GPU.
    """
    status = backends.status()["cupy"]
    if status != "ready":
        raise ImportError(f"device cuda needs CuPy and an NVIDIA GPU; CuPy here: {status}")
    cupy: Any = import_module("cupy")  # by name: it has no types
    model = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()

    def seconds(start: Any, end: Any) -> float:
        end.synchronize()  # which start, queued before, has passed by then
        return float(cupy.cuda.get_elapsed_time(start, end)) * 1e-3

    label = f"{model}, timed by its events"
    return Device(label, cupy, lambda: cupy.cuda.get_current_stream().record(), seconds)
