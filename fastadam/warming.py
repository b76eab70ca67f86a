"""Compiling ahead of the first step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, SupportsIndex, TypedDict, Unpack, cast, overload

import numpy as np

from fastadam import backends, buffers, device_stored, formats, stored
from fastadam.adam import FusedAdam
from fastadam.arrays import BackendName, MasterFormat, Number, Rounding, StateFormat
from fastadam.checks import require_flag
from fastadam.coefficients import Coefficients
from fastadam.hyperparameters import Schedule
from fastadam.optimizer import FusedOptimizer
from fastadam.rows import Rows
from fastadam.segmented import Segmented
from fastadam.segments import Segment, Segments


class Options(TypedDict, total=False):
    """The arguments of :class:`FusedAdam`, for type checkers."""

    lr: Number | Schedule
    betas: tuple[Number, Number] | list[float]
    eps: Number
    weight_decay: Number
    decoupled_weight_decay: bool
    amsgrad: bool
    maximize: bool
    max_grad_norm: Number | None
    max_grad_value: Number | None
    skip_nonfinite: bool
    ema_decay: Number | None
    zero_grads: bool
    telemetry: bool
    state_dtype: StateFormat | tuple[StateFormat, StateFormat]
    master_params: MasterFormat | None
    rounding: Rounding
    seed: SupportsIndex
    offset: SupportsIndex
    segments: Iterable[Segment]
    backend: BackendName | None
    capturable: bool


@overload
def warmup(
    *,
    dtype: np.dtype[Any] | type[Any] | str = np.float32,
    scaled: bool = False,
    **hyperparameters: Unpack[Options],
) -> None: ...


@overload
def warmup(
    *,
    optimizer: type[FusedOptimizer],
    dtype: np.dtype[Any] | type[Any] | str = np.float32,
    scaled: bool = False,
    **hyperparameters: Any,
) -> None: ...


def warmup(
    *,
    optimizer: Any = FusedAdam,
    dtype: np.dtype[Any] | type[Any] | str = np.float32,
    scaled: bool = False,
    **hyperparameters: Any,
) -> None:
    """Compile the kernels ahead of the first step, or load them from the disk cache.

    Parameters
    ----------
    optimizer : type, default FusedAdam
        The class of the optimizer.
    dtype : dtype, default float32
        Of the parameters and the gradients: float32, float64, float16 or bfloat16.
    scaled : bool, default False
        Compile for steps with a ``grad_scale``.
    **hyperparameters
        Those of the class, ``backend`` and ``capturable`` too: a CUDA backend compiles for the current
        device. Which kernel is compiled depends on the flags and on whether there is weight decay, not on the
        numbers.

    Raises
    ------
    TypeError
        If ``optimizer`` is none of this package's classes.
    TypeError, ValueError
        As the class does.

    Examples
    --------
    >>> import fastadam
    >>> fastadam.warmup(weight_decay=0.01, decoupled_weight_decay=True)
    >>> fastadam.warmup(optimizer=fastadam.FusedSGD, momentum=0.9)
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, FusedOptimizer)):
        raise TypeError(f"optimizer must be a class such as FusedAdam; got {optimizer!r}.")
    require_flag("scaled", scaled)
    opt = optimizer(**hyperparameters)
    h = opt._hyperparameters
    params = cast("buffers.Array", buffers.flat(np.empty(0, dtype), "dtype", writable=True))
    c = Coefficients(h, formats.math_of(params.dtype))
    name = opt._backend or (backends.cuda() if opt.capturable else "cpu")
    kernels = backends.load(name)
    types = c.scaled_types if scaled else c.types
    update = c.update(1, grad_scale=1.0 if scaled else None)
    if name != "cpu":
        stored.require_possible(h, params.dtype)
        types = types._replace(stored=device_stored.types_of(h, params.dtype))
        if opt.segments or opt.telemetry:
            decay = Rows(Segments(opt.segments), h, c).decay
            entry = "step_units_observed" if opt.telemetry else "step_units"
            kernels.warmup(types._replace(decay=type(decay)), entry)
        else:
            kernels.warmup(types, "step_captured" if opt.capturable or c.reads_gradients_first else "step")
    elif not h.stores_plainly or c.dtype != params.dtype:
        stored.require_possible(h, params.dtype)
        stored.warmup(h, params, c, update, opt.segments)
        if c.reads_gradients_first:
            kernels.prepare_measure(params.dtype)
    else:
        kernels.warmup(c.dtype, types.n_states, update, c.clear)
        if c.reads_gradients_first:
            kernels.prepare_measure(c.dtype)
        if opt.segments or opt.telemetry:
            size = max((segment.stop for segment in opt.segments), default=0)
            Segmented(Segments(opt.segments), h, c, size).warmup(types.n_states, update, c.clear)
