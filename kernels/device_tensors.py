"""Steps on a GPU of many buffers that lie anywhere, in one launch: what :mod:`.tensors` is on the CPU.

The tables are those of the CPU, copied to the device by whoever has memory there; units are cut into pieces,
of which a block takes one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from . import grids, rules
from .cuda import STEP_TENSORS, Cuda, KernelTypes
from .device_storage import StoredTypes
from .tensors import Tensors
from .units import Integers, Units

PIECE = 4096
"""Elements: four packs of float32 for each thread of a block, so that a table of pieces is small beside them,
and a tensor of some thousands is shared by few blocks."""


class Tables(NamedTuple):
    """Where the tables of a step lie on its device."""

    pieces: int
    n_pieces: int
    places: int
    rows: int


def pieces(units: Units) -> Integers:
    """Return units cut every ``PIECE`` elements, ``(start, stop, buffer)`` each, C-contiguous."""
    starts, stops, buffers = units.whole.T
    counts = -(-(stops - starts) // PIECE)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    begins = np.repeat(starts, counts) + PIECE * (np.arange(len(first)) - first)
    ends = np.minimum(begins + PIECE, np.repeat(stops, counts))
    return np.ascontiguousarray(np.stack([begins, ends, np.repeat(buffers, counts)], axis=1), np.int64)


def types_of(tensors: Tensors, c: rules.Update) -> KernelTypes:
    """Return what a kernel is compiled for."""
    math = tensors.coefficients.dtype
    types = KernelTypes.of(math, len(tensors.states), c, None)
    params, grads, states = tensors.params.dtype, tensors.grads.dtype, tuple(s.dtype for s in tensors.states)
    if {params, grads, *states} == {math}:
        return types
    return types._replace(stored=StoredTypes(params, grads, states))


def plan(
    backend: Cuda, tensors: Tensors, c: rules.Update, tables: Tables, device: int, stream: int
) -> Callable[[], None]:
    """Return the call that queues one step of all buffers, in place, on a stream.

    All that could fail is done here, but the launch. Nothing waits.

    Parameters
    ----------
    backend : Cuda
        That has ``STEP_TENSORS``.
    tensors : Tensors
        As on the CPU, but in the memory of the device, each aligned to its elements; no copies of parameters.
    c : Update
        What is the same for all, as on the CPU.
    tables : Tables
        Of :func:`pieces`, and of the places and coefficients of ``tensors``; they stay until the device has
        taken the step.
    """
    if not tables.n_pieces:
        return lambda: None
    kernel = backend.kernel(STEP_TENSORS, types_of(tensors, c), device)
    blocks = min(tables.n_pieces, max(1, grids.WAVES * backend.resident_threads(device) // grids.BLOCK))
    arguments = (*tables, *(c.conditioning or ()))
    return partial(backend.launch, kernel, blocks, grids.BLOCK, arguments, device, stream)
