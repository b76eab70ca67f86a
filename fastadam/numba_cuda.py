"""The update of one element inside your own ``numba.cuda`` kernel: the bits of the CPU, fused with your code.

``docs/numba.md`` is the guide. Importing this module loads Numba-CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numba import cuda

from fastadam import formats
from fastadam.checks import count
from fastadam.coefficients import Coefficients, divisor
from fastadam.compiled_state import require_defaults
from fastadam.kernels import rules
from fastadam.kernels.cuda_exact import exact, plain, require_types
from fastadam.kernels.cuda_loop import make_update

if TYPE_CHECKING:
    from fastadam.adam import FusedAdam

__all__ = ["DeviceAdam", "device_adam"]


class DeviceAdam(NamedTuple):
    """What a kernel calls, and what it must be given."""

    update: Any
    """The device function ``update(param, grad, state, c)`` -> ``(param, state)``, of numbers of the dtype;
    ``state`` is the tuple of ``opt.state.moments`` of an element: ``(exp_avg, exp_avg_sq)``, with ``amsgrad``
    also ``max_exp_avg_sq``, with ``ema_decay`` also ``param_ema``."""
    coefficients: Callable[..., tuple[Any, ...]]
    """``coefficients(step, *, lr=None, grad_scale=None, grad_norm=None)`` -> ``c``: a tuple of numbers, an
    argument of a launch. ``step`` is counted from 1; ``lr`` takes the place of the optimizer's; ``grad_norm``
    is the norm of the unscaled gradient, which ``max_grad_norm`` clips by."""


def device_adam(opt: FusedAdam, dtype: Any = np.float32, *, scaled: bool = False) -> DeviceAdam:
    """Return the update of one element for kernels of ``numba.cuda``.

    It has the bits of :meth:`fastadam.FusedAdam.step`, with whatever ``fastmath`` or ``fma`` the kernel is
    compiled. The hyperparameters are those that the optimizer has now; its state is neither read nor written.

    Parameters
    ----------
    opt : FusedAdam
        Any but with segments, telemetry, ``skip_nonfinite``, ``zero_grads`` or another storage than that of
        the arithmetic, which are more than an update of an element.
    dtype : dtype
        Of all numbers: float32 or float64.
    scaled : bool
        Whether gradients are divided by a ``grad_scale``.

    Returns
    -------
    DeviceAdam

    Raises
    ------
    TypeError, ValueError
        If the optimizer has one of the above, or the dtype is another.
    """
    dtype = np.dtype(dtype)
    h = opt._hyperparameters
    if dtype not in formats.FLOATS:
        raise TypeError(f"dtype must be float32 or float64; got {formats.name_of(dtype)}.")
    plain_only = ("state_dtype", "master_params", "telemetry", "skip_nonfinite", "zero_grads")
    require_defaults(h, opt.segments, plain_only, "a device function")
    c = Coefficients(h, dtype)
    kinds = c.scaled_types if scaled else c.types
    update_of = make_update(kinds)
    states, numbers = (0,) * kinds.n_states, (0,) * len(kinds.coefficients)

    @cuda.jit(device=True)
    def update(param: Any, grad: Any, state: Any, c: Any) -> Any:
        require_types(param, grad, state, c, states, numbers)
        param, state = rules.update(exact(param), exact(grad), exact(state), update_of(exact(c)))
        return plain(param), plain(state)

    def coefficients(
        step: int, *, lr: float | None = None, grad_scale: float | None = None, grad_norm: float | None = None
    ) -> tuple[Any, ...]:
        count("step", step, least=1)
        if scaled != (grad_scale is not None):
            rule = "given" if scaled else "None, unless scaled=True"
            raise ValueError(f"grad_scale must be {rule}; got {grad_scale}.")
        if (h.max_grad_norm is None) != (grad_norm is None):
            rule = "None, unless there is a max_grad_norm" if grad_norm is not None else "given to be clipped"
            raise ValueError(f"grad_norm must be {rule}; got {grad_norm}.")
        of_step = c if lr is None else Coefficients(h.changed(lr=lr), dtype)
        factor = 1.0 if grad_norm is None else c.clip_factor(grad_norm)
        parts = of_step.update(step, divisor(grad_scale, 0, dtype), factor)
        return tuple(value for part in parts if part is not None for value in part)

    return DeviceAdam(update, coefficients)
