"""What goes into a checkpoint."""

from __future__ import annotations

import json
import os
from functools import partial
from typing import Any

import numpy as np

from fastadam import atomic, buffers, documents, eight_bit, loading, progress
from fastadam.checkpoint import DTYPES, KIND, VERSION
from fastadam.containers import Tensor, write
from fastadam.loss_scale import DynamicLossScale
from fastadam.progress import Progress
from fastadam.state import MASTERS


def save(
    opt: Any,
    path: str | os.PathLike[str],
    *,
    params: object = None,
    loss_scale: DynamicLossScale | None = None,
    extra: Any = None,
    show: Progress = None,
) -> None:
    """Do what :meth:`fastadam.FusedAdam.save` says."""
    progress.require(show)
    tensors = _tensors_of(opt)
    size = opt._state._layout.size or None  # known where nothing is kept, too
    if params is not None:
        flat = buffers.flat(params, "params", writable=False)
        buffers.require_in_cpu_memory("params", flat)
        if size is not None and flat.size != size:
            raise ValueError(f"params must have the size of the state ({size}); got {flat.size}.")
        tensors["params"] = Tensor(DTYPES[flat.dtype], (flat.size,), lambda: flat)  # type: ignore[arg-type,return-value]
    if loss_scale is not None and not isinstance(loss_scale, DynamicLossScale):
        raise TypeError(f"loss_scale must be a DynamicLossScale; got {type(loss_scale).__name__}.")
    step = opt._state.step
    hyperparameters = opt._hyperparameters.to_dict()
    called: dict[str, Any] = {}
    if callable(opt.lr):
        hyperparameters["lr"] = float(opt.lr(max(step, 1)))
        called["lr"] = documents.of_schedule(opt.lr)
    called["segments"] = [
        [k, documents.of_schedule(segment.lr)]
        for k, segment in enumerate(opt.segments)
        if callable(segment.lr)
    ]
    document = {
        "step": step,
        "size": size,
        "rule": opt._hyperparameters.KIND,
        "hyperparameters": hyperparameters,
        "schedules": called,
        "grads_summed": opt._accumulator.calls,
        "loss_scale": None if loss_scale is None else loss_scale.state_dict(),
    }
    texts = {"format": KIND, "version": str(VERSION), "optimizer": json.dumps(document)}
    texts["extra"] = documents.of_extra(extra)
    total = sum(tensor.nbytes for tensor in tensors.values())
    with progress.counting(show, total, "saving") as advance, atomic.replacing(path) as file:
        write(file, tensors, texts, advance)


def _tensors_of(opt: Any) -> dict[str, Tensor]:
    """Return what an optimizer remembers, as it lies in CPU memory; from a GPU it comes one by one."""
    state, tensors = opt._state, {}

    def host(view: Any) -> Any:
        return view if state._kernels is None else state._copy(view)

    n = state._layout.size
    for name, view in zip(state._names, state._views, strict=True):
        kind = "I16" if name == MASTERS["split"] else DTYPES[view.dtype]
        tensors[name] = Tensor(kind, (n,), partial(host, view))
    for name, scales in zip(state._names, state._scales, strict=False):
        if scales.size:
            given = partial(state._copy_of_scales, scales)
            tensors[name + loading.SCALES] = Tensor("F32", (eight_bit.blocks_of(n),), given)
    summed = opt._accumulator
    if summed.calls:
        total: Any = summed.total

        def grad_sum() -> Any:
            return total if isinstance(total, np.ndarray) else summed.to_dict()["grad_sum"]

        tensors["grad_sum"] = Tensor(DTYPES[total.dtype], (total.size,), grad_sum)
    if opt.segments and opt._segments is not None:
        table = opt._segments.to_array(max(state.step, 1))
        tensors["segments"] = Tensor("F64", table.shape, lambda: table)
    return tensors
