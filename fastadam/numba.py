"""The fused step inside your own ``@njit`` function: a whole training loop compiled as one.

:func:`compiled` lends an optimizer's state to compiled code, and :func:`step` is what such code calls, with
the bits of :meth:`fastadam.FusedAdam.step`. ``docs/numba.md`` is the guide; what a kernel of
``numba.cuda`` calls stands in :mod:`fastadam.numba_cuda`. Importing this module loads Numba.

The loops are those of the optimizer (:mod:`fastadam.kernels.cpu`, :mod:`fastadam.kernels.norms`), and so are
the formulas of the coefficients; what is more here is to form them with no Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from numba.extending import overload

from fastadam import buffers, formats
from fastadam.coefficients import Coefficients
from fastadam.compiled_state import CompiledAdam, compiled_adam, require_defaults, require_types
from fastadam.compiled_steps import make_step
from fastadam.kernels.compiling import JIT_OPTIONS, jit
from fastadam.kernels.cuda import DeviceBuffer
from fastadam.last_step import Done

if TYPE_CHECKING:
    from fastadam.adam import FusedAdam
    from fastadam.state import State

__all__ = ["CompiledAdam", "compiled", "step", "step_parallel"]

_OPTIONS = {**JIT_OPTIONS, "fastmath": False, "forceinline": False}
"""Numba hands the caller's ``fastmath`` down to what it calls, unless that says otherwise: here it does, and
hands this down to all loops and rules. Those are the optimizer's own, too, and are cached on disk."""


class _Lent:
    """In place of a state that compiled code has: whatever is asked of it raises."""

    def __getattr__(self, name: str) -> NoReturn:
        _refuse()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        _refuse()


def _refuse() -> NoReturn:
    raise ValueError(
        "The optimizer must not be used while compiled code has its state; got a use of it inside"
        " `with fastadam.numba.compiled(...)`. Use it after the block."
    )


@contextmanager
def compiled(opt: FusedAdam, flat_params: object) -> Iterator[CompiledAdam]:
    """Lend the state of an optimizer to compiled code, for the time of a ``with`` block.

    Nothing is copied: compiled code writes to the optimizer's own moments. When the block ends, whatever ends
    it, the optimizer is as if it had taken the steps itself: :attr:`~fastadam.FusedAdam.state` has their
    count, :attr:`~fastadam.FusedAdam.last_step` tells of the last, and ``opt.lr`` is the learning rate of
    that. Inside the block it cannot be used.

    Parameters
    ----------
    opt : FusedAdam
        Any but with segments, telemetry, a learning rate that is a function, moments or masters in another
        storage than that of the arithmetic, and GPUs.
    flat_params : array_like
        The parameters that will be stepped: float32 or float64, in CPU memory. The moments are made for them
        where there are none; ``ema_decay`` begins with what they are now.

    Yields
    ------
    CompiledAdam
        What compiled functions take, as one argument. After the block it must not be used any more.

    Raises
    ------
    TypeError, ValueError
        If the optimizer has one of the above, the parameters do not fit its state, or gradients are
        accumulated and not yet used.

    Examples
    --------
    >>> import numpy as np
    >>> from numba import njit
    >>> from fastadam import FusedAdam
    >>> from fastadam.numba import compiled, step
    >>> @njit
    ... def train(params, adam, steps):
    ...     for _ in range(steps):
    ...         step(params, 2 * params, adam)  # the gradient of params ** 2
    >>> params, opt = np.array([1.0, -2.0]), FusedAdam(lr=0.1)
    >>> with compiled(opt, params) as adam:
    ...     train(params, adam, 300)
    >>> bool(np.all(np.abs(params) < 1e-2)), opt.state.step
    (True, 300)
    """
    params = buffers.flat(flat_params, "flat_params", writable=True, backend=opt._backend)
    _require_possible(opt, params)
    kernels, state = opt._kernels, opt._state
    if kernels is None:
        kernels, state = opt._begin(params, params)
    buffers.require_same_layout("flat_params", params, "the state", state._layout)
    buffers.require_disjoint("flat_params", params, "the state", state._block)
    before, first = opt._state, state._step
    adam = compiled_adam(Coefficients(opt._hyperparameters, params.dtype), opt._hyperparameters, state)
    lent: Any = _Lent()
    opt._state = lent
    try:
        yield adam
    finally:
        if opt._state is lent:  # reset() leaves none to give back
            opt._state = before
            _give_back(opt, kernels, state, first, adam)
        adam.last.calls[0] = -1  # compiled code that kept it is refused


def _require_possible(opt: FusedAdam, params: buffers.Buffer) -> None:
    """Raise TypeError or ValueError for an optimizer or parameters that compiled code cannot step."""
    if isinstance(params, DeviceBuffer):
        raise TypeError(
            f"flat_params must be in CPU memory for compiled code; got {buffers.place(params)}."
            " See fastadam.numba_cuda."
        )
    if params.dtype not in formats.FLOATS:
        raise TypeError(
            f"flat_params must be float32 or float64 for compiled code; got {formats.name_of(params.dtype)}."
        )
    plain_only = ("state_dtype", "master_params", "telemetry")
    require_defaults(opt._hyperparameters, opt.segments, plain_only, "compiled code")
    if callable(opt.lr):
        raise TypeError(
            "lr must be a number for compiled code; got a function. Make an array of its values, and set"
            " adam.lr[0] before each step."
        )
    if opt._accumulator.calls:
        raise ValueError(
            "Accumulated gradients must be used before compiled code steps; got"
            f" {opt._accumulator.calls} of them. Call opt.step(flat_params)."
        )


def _give_back(opt: FusedAdam, kernels: Any, state: State, first: int, adam: CompiledAdam) -> None:
    """Have an optimizer count what compiled code did with its state."""
    last = adam.last
    if not last.calls[0]:
        return
    state._step = int(adam.step[0])
    if state._step > first:
        opt._state, opt._kernels = state, kernels
    if float(last.lr[0]) != opt.lr:
        opt.lr = float(last.lr[0])
    done = Done(state._step, float(last.lr[0]))
    if adam.reads_gradients_first is not None:
        norm, factor, nonfinite = float(last.grad_norm[0]), float(last.clip_factor[0]), int(last.nonfinite[0])
        done = Done(*done[:2], norm, factor, adam.skips is not None and nonfinite > 0, nonfinite)
    opt._last = done


def step(flat_params: Any, flat_grads: Any, adam: CompiledAdam, grad_scale: float | None = None) -> bool:
    """Advance the parameters by one step, in place; in compiled code, by the thread that calls it.

    Memory traffic, rounding and the meaning of every option are those of :meth:`fastadam.FusedAdam.step`.

    Parameters
    ----------
    flat_params : ndarray, shape (n,)
        float32 or float64, C-contiguous; read and written.
    flat_grads : ndarray, shape (n,)
        Of the same dtype, elsewhere in memory; read, and written with ``zero_grads``.
    adam : CompiledAdam
        What :func:`compiled` gave for parameters of this size and dtype. One may not step in two threads at
        once.
    grad_scale : float, optional
        What the loss was multiplied with, greater than 0.

    Returns
    -------
    bool
        Whether the step was taken: False where ``skip_nonfinite`` skipped it.

    Raises
    ------
    TypingError
        When it is compiled: if an argument is not of its type.
    ValueError
        If sizes differ, gradients overlap the parameters, ``adam.lr`` or ``grad_scale`` is out of its range,
        or the block of ``adam`` has ended. Nothing was changed then.
    """
    return bool(_serial(flat_params, flat_grads, adam, grad_scale))


def step_parallel(
    flat_params: Any, flat_grads: Any, adam: CompiledAdam, grad_scale: float | None = None
) -> bool:
    """Advance the parameters as :func:`step` does, the same bits, in all threads of Numba.

    Not for a ``prange`` loop, whose threads are busy. Small buffers are left to the calling thread.
    """
    return bool(_parallel(flat_params, flat_grads, adam, grad_scale))


_of_one_thread, _of_all_threads = make_step(None), make_step(True)


@overload(step, jit_options=_OPTIONS, strict=False)
def _step(flat_params: Any, flat_grads: Any, adam: Any, grad_scale: Any = None) -> Any:
    require_types(flat_params, flat_grads, adam, grad_scale)
    return _of_one_thread


@overload(step_parallel, jit_options=_OPTIONS, strict=False)
def _step_parallel(flat_params: Any, flat_grads: Any, adam: Any, grad_scale: Any = None) -> Any:
    require_types(flat_params, flat_grads, adam, grad_scale)
    return _of_all_threads


def _make_serial(cache_key: str) -> Any:
    def step_compiled(flat_params: Any, flat_grads: Any, adam: CompiledAdam, grad_scale: Any) -> bool:
        cache_key  # noqa: B018
        return step(flat_params, flat_grads, adam, grad_scale)

    return step_compiled


def _make_parallel(cache_key: str) -> Any:
    def step_compiled_parallel(flat_params: Any, flat_grads: Any, adam: Any, grad_scale: Any) -> bool:
        cache_key  # noqa: B018
        return step_parallel(flat_params, flat_grads, adam, grad_scale)

    return step_compiled_parallel


# For Python, where a compiled function is tried out without being compiled.
_serial, _parallel = jit(_make_serial), jit(_make_parallel)
