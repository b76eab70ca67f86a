"""An optimizer out of a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fastadam import buffers, documents, eight_bit, loading, progress
from fastadam.accumulation import Accumulator
from fastadam.checkpoint import DTYPES, Checkpoint, clipped
from fastadam.kernels.groups import BLOCK
from fastadam.loss_scale import DynamicLossScale
from fastadam.progress import Progress
from fastadam.segments import Segment, Segments
from fastadam.state import State


def load(
    cls: Any,
    path: str | os.PathLike[str],
    *,
    lr: Any = None,
    segments: Any = None,
    params: object = None,
    loss_scale: DynamicLossScale | None = None,
    shard: tuple[int, int] | None = None,
    show: Progress = None,
    options: Mapping[str, Any],
) -> Any:
    """Do what :meth:`fastadam.FusedAdam.load` says."""
    progress.require(show)
    with Checkpoint(path) as file:
        start, stop = file._range(*((0, None) if shard is None else shard))
        h = file._hyperparameters
        if not isinstance(h, cls.HYPERPARAMETERS):
            raise file._file.error(
                f"be of a {cls.__name__}", f"{h.KIND!r}", "Load it with the class that has saved it."
            )
        cls.require_implied(h)
        values = {"lr": _lr(file) if lr is None else lr, "offset": h.offset + start}
        given = _segments(file, start, stop) if segments is None else segments
        opt = cls._of(h.changed(**values), segments=given, **options)
        target = None if params is None else _params(file, params, stop - start)
        scale = None if loss_scale is None else _loss_scale(file, loss_scale)
        accumulator, found = Accumulator(), None
        unread = {"segments"} if target is not None else {"segments", "params"}
        names = [name for name in file._file.tensors if name not in unread]
        with file._reading(names, start, stop, show) as advance:
            state = _state(file, start, stop, advance)
            if "grad_sum" in names:
                accumulator.calls = file._document["grads_summed"]
                accumulator.total = file._array("grad_sum", start, stop, advance)
            if target is not None:
                found = file._array("params", start, stop, advance)
    # Nothing raises any more.
    if target is not None and found is not None:
        target.view(np.uint8)[:] = found.view(np.uint8)
    if loss_scale is not None and scale is not None:
        loss_scale.load_state_dict(scale.state_dict())
    opt._replace_state(state, accumulator)
    return opt


def _params(file: Checkpoint, params: object, size: int) -> buffers.Array:
    """Return where parameters go, or raise if they do not fit."""
    file._require_params()
    target = buffers.flat(params, "params", writable=True)
    buffers.require_in_cpu_memory("params", target)
    dtype = file._file.tensors["params"][0]
    if target.size != size:
        raise ValueError(f"params must have {size} elements; got {target.size}.")
    if DTYPES[target.dtype] != dtype:
        raise TypeError(f"params must be of the dtype that was saved, {dtype}; got {DTYPES[target.dtype]}.")
    return target  # type: ignore[return-value]


def _loss_scale(file: Checkpoint, loss_scale: object) -> DynamicLossScale:
    """Return what a loss scale is to become."""
    if not isinstance(loss_scale, DynamicLossScale):
        raise TypeError(f"loss_scale must be a DynamicLossScale; got {type(loss_scale).__name__}.")
    scale = file.loss_scale()
    if scale is None:
        raise file._file.error("have a loss scale", "without", "Save it: opt.save(path, loss_scale=...).")
    return scale


def _schedule(written: Any, asked: str) -> Any:
    if "callable" in written:
        raise ValueError(
            f"{asked} must be given for this checkpoint; got None. It was {written['callable']}, which no"
            " file can hold."
        )
    return documents.to_schedule(written)


def _lr(file: Checkpoint) -> Any:
    return _schedule(file._called["lr"], "lr") if "lr" in file._called else file._hyperparameters.lr


def _segments(file: Checkpoint, start: int, stop: int) -> list[Segment]:
    if "segments" not in file._file.tensors:
        return []
    array = file._array("segments", 0, 0, lambda _: None)
    array, kept = clipped(array, start, None if file.size is None else stop)
    called = dict(file._called["segments"])
    return [
        replace(segment, lr=_schedule(called[k], "segments")) if k in called else segment
        for k, segment in zip(kept, Segments.from_array(array, ()).given, strict=True)
    ]


def _state(file: Checkpoint, start: int, stop: int, advance: Callable[[int], None]) -> State:
    """Return the state of a shard, read to where it is to lie: no second copy."""
    names, dtypes = file._stored()
    if not names:
        return State(size=stop - start, dtype=file._math, step=file.step)
    state = State(names, stop - start, file._math, file.step, dtypes)
    for name, view in zip(names, state._views, strict=True):
        file._fill(view, name, start, advance)
    for name, codes, scales in zip(names, state._views, state._scales, strict=False):
        if scales.size:
            file._fill(scales, name + loading.SCALES, start // BLOCK, advance)
            if not eight_bit.is_possible(codes, scales):
                raise file._file.error(
                    "be a fastadam checkpoint", f"with scales of {name} that no step gives"
                )
    return state
