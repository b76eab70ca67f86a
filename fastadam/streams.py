"""The CUDA stream of a step: which one, in what order with others, and whether it is being captured."""

from __future__ import annotations

import numbers
import sys
from typing import Any

from fastadam.kernels.cuda import Cuda, DeviceBuffer, same_stream
from fastadam.kernels.cuda_clock import Clock


def current(library: str, device: int) -> int | None:
    """Return the handle of a library's current stream on a device, or None where it has no such thing."""
    module = sys.modules.get(library)
    if module is None:
        return None
    if library == "torch":
        return int(module.cuda.current_stream(device).cuda_stream)
    if library == "cupy":
        return int(module.cuda.get_current_stream(device).ptr)
    return None


def handle(stream: Any) -> int:
    """Return the handle of a stream: an integer, or any library's stream object.

    Raises
    ------
    TypeError
        If it is neither.
    """
    if isinstance(stream, numbers.Integral) and not isinstance(stream, bool):
        return int(stream)
    if hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        return int((protocol() if callable(protocol) else protocol)[1])
    for attribute in ("cuda_stream", "ptr"):  # PyTorch's, CuPy's
        number = getattr(stream, attribute, None)
        if isinstance(number, int):
            return number
    if type(stream).__module__.startswith("cuda.bindings."):  # the driver's and the runtime's own types
        return int(stream)
    raise TypeError(f"stream must be a CUDA stream or its handle; got {type(stream).__name__}.")


def bind(
    params: DeviceBuffer, grads: DeviceBuffer, stream: object, *, keep: bool = False
) -> tuple[DeviceBuffer, DeviceBuffer]:
    """Return the buffers of a step, each with a stream: the one that is asked for, or else its owner's.

    With ``keep`` the gradients keep theirs, whatever is asked for: a sum, that was formed on it.

    Raises
    ------
    TypeError
        If what is asked for is no stream.
    """
    if stream is not None:
        asked = handle(stream)
        return params._replace(stream=asked), grads if keep else grads._replace(stream=asked)
    if params.stream is None:  # its owner works on none: follow the gradients
        params = params._replace(stream=grads.stream or 0)
    if grads.stream is None:
        grads = grads._replace(stream=params.stream)
    return params, grads


def is_captured(kernels: Cuda, params: DeviceBuffer, grads: DeviceBuffer) -> bool:
    """Return whether a step of these buffers would be recorded for a CUDA graph.

    Raises
    ------
    ValueError
        If it would be, and the gradients are on another stream: outside of the graph, or in another one.
    """
    ours, theirs = params.stream or 0, grads.stream or 0
    if same_stream(ours, theirs):
        return kernels.is_capturing(ours, params.device)
    if kernels.is_capturing(ours, params.device) or kernels.is_capturing(theirs, params.device):
        raise ValueError(
            "flat_grads must be on the stream of flat_params in a capture; got two streams."
            " Make one stream current in both libraries, or pass stream=."
        )
    return False


def for_lr(clock: Clock, library: str) -> int:
    """Return the stream on which a new learning rate is queued.

    Parameters
    ----------
    clock : Clock
    library : str
        Whose current stream the last step took; empty if it was told one.

    Raises
    ------
    ValueError
        If that stream or the last step's is being captured.
    """
    now = current(library, clock.device)
    stream = clock.stream if now is None else now
    for one in {stream, clock.stream}:
        if clock.backend.is_capturing(one, clock.device):
            raise ValueError("lr must be set outside of a capture: every replay would set it again.")
    return stream
