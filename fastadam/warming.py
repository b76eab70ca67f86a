"""Compiling ahead of the first step."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastadam import backends, buffers
from fastadam.hyperparameters import Coefficients
from fastadam.optimizer import FusedAdam
from fastadam.segmented import Segmented
from fastadam.segments import Segments


def warmup(*, dtype: Any = np.float32, **hyperparameters: Any) -> None:
    """Compile the kernels ahead of the first step, or load them from the disk cache.

    Parameters
    ----------
    dtype : dtype, default float32
        float32 or float64.
    **hyperparameters
        Those of :class:`FusedAdam`, ``backend`` and ``capturable`` too: a CUDA backend compiles for the
        current device. Which kernel is compiled depends on the flags and on whether there is weight decay,
        not on the numbers.

    Raises
    ------
    TypeError, ValueError
        As :class:`FusedAdam` does.

    Examples
    --------
    >>> import fastadam
    >>> fastadam.warmup(weight_decay=0.01, decoupled_weight_decay=True)
    """
    opt = FusedAdam(**hyperparameters)
    c = Coefficients(opt._hyperparameters, buffers.flat(np.empty(0, dtype), "dtype", writable=True).dtype)
    name = opt._backend or (backends.cuda() if opt.capturable else "cpu")
    kernels = backends.load(name)
    if name == "cpu":
        kernels.warmup(c.dtype, c.types.n_states, c.update(1), c.clear)
        if c.reads_gradients_first:
            kernels.prepare_measure(c.dtype)
        if opt.segments or opt.telemetry:
            size = max((segment.stop for segment in opt.segments), default=0)
            Segmented(Segments(opt.segments), opt._hyperparameters, c, size).warmup(
                c.types.n_states, c.update(1), c.clear
            )
    else:
        kernels.warmup(c.types, captured=opt.capturable)
