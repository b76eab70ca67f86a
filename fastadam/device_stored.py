"""A step in GPU memory of buffers that are not all of one dtype: what is checked, and what it is told."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from fastadam import buffers, formats, stored, streams
from fastadam.hyperparameters import Hyperparameters
from fastadam.kernels.cuda import Cuda, DeviceBuffer, same_stream
from fastadam.kernels.device_storage import DeviceStorage, StoredTypes
from fastadam.rounding import mixed, random_bits
from fastadam.state import State, kept

_SIGN = 2**63


def storage_of(
    kernels: Cuda,
    h: Hyperparameters,
    params: DeviceBuffer,
    grads: DeviceBuffer,
    out: object,
    state: State,
    stream: object,
) -> DeviceStorage | None:
    """Return how a step of checked buffers stores them; None where all are of the dtype of the arithmetic.

    Raises
    ------
    TypeError, ValueError
        If the parameters cannot be kept as the hyperparameters say, or ``out`` is no buffer for a copy of
        them.
    """
    if out is None and h.stores_plainly and params.dtype == grads.dtype and params.dtype in formats.FLOATS:
        return None
    copy = None if out is None else _copy_of_params(kernels, out, params, grads, state, stream)
    types = _types_of(h, params.dtype, grads.dtype, None if copy is None else copy.dtype)
    seed = (_signed(mixed(h.seed)), h.offset) if types.rounds else None
    scales = tuple(state._scales[k] for k in types.in_blocks)
    return DeviceStorage(types, state._master, copy, seed, scales=scales)


def types_of(h: Hyperparameters, dtype: np.dtype[Any]) -> StoredTypes | None:
    """Return how steps of parameters and gradients of a dtype, or its codes, are stored; None for plainly."""
    return None if h.stores_plainly and dtype in formats.FLOATS else _types_of(h, dtype, dtype, None)


def _types_of(
    h: Hyperparameters, params: np.dtype[Any], grads: np.dtype[Any], out: np.dtype[Any] | None
) -> StoredTypes:
    stored.require_possible(h, params)
    rounds = stored.rounds_at_random(h, params)
    return _types(h.state, h.formats(), stored.master_of(h), params, grads, out, rounds)


@lru_cache(maxsize=64)
def _types(
    names: tuple[str, ...],
    kinds: tuple[str, ...],
    master: str | None,
    params: np.dtype[Any],
    grads: np.dtype[Any],
    out: np.dtype[Any] | None,
    rounds: bool,
) -> StoredTypes:
    _, dtypes = kept(names, kinds, master, formats.math_of(params))
    states, (of_master,) = dtypes[: len(kinds)], dtypes[len(kinds) :] or (None,)
    return StoredTypes(params, grads, states, of_master, out, rounds)


def with_keys(storage: DeviceStorage, h: Hyperparameters, step: int) -> DeviceStorage:
    """Return the storage of step number ``step``, with the keys that the host forms."""
    if not storage.types.rounds:
        return storage
    return storage._replace(keys=(_signed(random_bits(h.seed, step)), h.offset))


def require_capturable(storage: DeviceStorage | None, params: DeviceBuffer) -> None:
    """Raise ValueError if a CUDA graph would have to wait for the stream of ``out``."""
    if storage is None or storage.out is None or storage.out.stream is None:
        return
    if not same_stream(storage.out.stream, params.stream or 0):
        raise ValueError(
            "out must be on the stream of flat_params in a capture; got two streams."
            " Make one stream current in both libraries, or pass stream=."
        )


def _copy_of_params(
    kernels: Cuda, out: object, params: DeviceBuffer, grads: DeviceBuffer, state: State, stream: object
) -> DeviceBuffer:
    buffer = buffers.flat(out, "out", writable=True, backend=kernels.name)
    buffers.require_same_place("out", buffer, "flat_params", params)
    stored.require_copy(buffer, params, grads, state)
    assert isinstance(buffer, DeviceBuffer)
    return buffer if stream is None else buffer._replace(stream=streams.handle(stream))


def _signed(bits: int) -> int:
    """Return what 64 bits say in two's complement, as kernels take integers."""
    return (bits + _SIGN & 2 * _SIGN - 1) - _SIGN
