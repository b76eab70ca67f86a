"""Steps in GPU memory: with coefficients from the host, or on a clock where something is decided there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastadam import buffers, clocks, device_stored, streams
from fastadam.coefficients import Coefficients, divisor
from fastadam.hyperparameters import Hyperparameters
from fastadam.kernels import rules
from fastadam.kernels.cuda import Cuda, DeviceBuffer, Look
from fastadam.segments import Segments
from fastadam.state import State


def plan(
    kernels: Cuda,
    state: State,
    params: DeviceBuffer,
    grads: DeviceBuffer,
    h: Hyperparameters,
    c: Coefficients,
    *,
    out: object,
    stream: object,
    grad_scale: object,
    summed: int,
    segments: Segments | None,
    capturable: bool,
) -> tuple[Callable[[], None], Callable[[], None] | None]:
    """Return the call that queues a step of checked buffers, and that which reports of it, if need be.

    Parameters
    ----------
    kernels : Cuda
    state : State
        Gets a clock where it needs one.
    params, grads : DeviceBuffer
        Of the size, arithmetic and device of the state, each with its stream.
    h : Hyperparameters
    c : Coefficients
        Of ``h`` in the dtype of the arithmetic.
    out : array_like or None
        Gets a copy of the parameters.
    stream : object
        The stream that is asked for, if one is.
    grad_scale : float, array in GPU memory of one element, or None
        What the gradients are divided by.
    summed : int
        The gradients of which ``grads`` is the sum, or 0 if they are no sum, which is not cleared then.
    segments : Segments or None
    capturable : bool
        Whether the step may be captured, and is counted in GPU memory for that.

    Raises
    ------
    TypeError, ValueError
        If ``grad_scale`` is none, a segment ends behind the buffer, a coefficient overflows or becomes zero,
        the stream is being captured and the step could not be replayed, or a CUDA graph holds another kind.
    """
    storage = device_stored.storage_of(kernels, h, params, grads, out, state, stream)
    if segments is not None and not (segments.given or h.telemetry):
        segments = None  # it is only that the storage is not plain
    captured = streams.is_captured(kernels, params, grads)
    if captured:
        device_stored.require_capturable(storage, params)
    there = scale_in_gpu_memory(grad_scale, params)
    scale = divisor(None if there is not None else grad_scale, summed, c.dtype)
    clear = rules.Clear() if summed else c.clear
    moments: Any = state._arrays
    decides = c.reads_gradients_first or there is not None or segments is not None or h.telemetry
    if captured and not capturable:
        raise ValueError(
            "stream must not be in capture: a replay would know nothing of steps and changes since."
            " Use FusedAdam(capturable=True)."
        )
    if not (capturable or decides or state._clock is not None):
        update = c.update(state._step + 1, grad_scale=scale)
        if storage is not None:
            storage = device_stored.with_keys(storage, h, state._step + 1)
        return kernels.plan(params, grads, moments, update, clear, storage), None

    scaled = scale is not None or there is not None
    types = (c.scaled_types if scaled else c.types)._replace(clear=type(clear))
    stored = None if storage is None else storage.types
    if captured and not (
        clocks.fits(state._clock, types, h, segments) and clocks.stores(state._clock, stored)
    ):
        raise ValueError(
            "stream must not be in capture: this step is compiled otherwise than the one before."
            " Take one step like it before."
        )
    clock = clocks.fitting(state._clock, kernels, params, h, c, types, state._step, segments)
    state._clock, clock.is_captured = clock, clock.is_captured or captured
    look = Look(1.0 if scale is None else scale, there, h.max_grad_norm, h.skip_nonfinite, bool(summed))
    report = kernels.plan_report(params, clock) if h.telemetry else None
    step = kernels.plan_on_clock(params, grads, moments, clock, look, storage)
    clock.stored.add(stored)
    return step, report


def scale_in_gpu_memory(grad_scale: object, params: DeviceBuffer) -> DeviceBuffer | None:
    """Return where a ``grad_scale`` lies, if it is an array in GPU memory.

    Raises
    ------
    TypeError, ValueError
        If it has more than one element, is not of float32 or float64, or lies on another device.
    """
    if not hasattr(grad_scale, "__cuda_array_interface__"):
        return None
    scale = buffers.flat(grad_scale, "grad_scale", writable=False, codes=False)
    if scale.size != 1:
        raise ValueError(f"grad_scale must have one element; got {scale.size}.")
    if not isinstance(scale, DeviceBuffer) or scale.device != params.device:
        raise TypeError(
            f"grad_scale must be on the device of flat_params ({buffers.place(params)});"
            f" got {buffers.place(scale)}. Pass a copy."
        )
    return scale
