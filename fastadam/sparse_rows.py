"""Steps of some rows of a table: what is checked, and what takes the place of a backend in such a step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastadam import buffers, formats
from fastadam.arrays import FlatArray
from fastadam.buffers import Array
from fastadam.hyperparameters import Hyperparameters
from fastadam.kernels import rules
from fastadam.kernels.cuda import DeviceBuffer
from fastadam.segmented import Segmented

if TYPE_CHECKING:
    from fastadam.kernels.touched import Touched

_MUST_BE = {
    "ema_decay": (None, "an average of all rows takes a step of all"),
    "zero_grads": (False, "gradients of rows are read only"),
    "telemetry": (False, "norms of all parameters take a step of all"),
    "state_dtype": ("float32", "rows are stepped in float32 and float64"),
    "master_params": (None, "rows are stepped in float32 and float64"),
}
"""Hyperparameter -> the value that it must have, and why."""


def require_possible(h: Hyperparameters, *, capturable: bool, accumulated: int) -> None:
    """Raise ValueError if an optimizer cannot step rows."""
    for name, (wanted, reason) in _MUST_BE.items():
        value = getattr(h, name)
        if value != wanted:
            raise ValueError(f"{name} must be {wanted!r} for step_rows: {reason}; got {value!r}.")
    if capturable:
        raise ValueError("capturable must be False for step_rows; got True.")
    if accumulated:
        raise ValueError(
            f"step_rows must not come between accumulate and step; got {accumulated} accumulated gradients."
        )


class Given(NamedTuple):
    """The arguments of a step of rows."""

    params: Array
    grads: Array
    rows: Any  # ndarray of int64: a copy
    width: int


def arguments(flat_params: FlatArray, rows: object, grad_rows: FlatArray, backend: str | None) -> Given:
    """Return the arguments of a step of rows, as arrays, or raise."""
    params = _in_cpu_memory(flat_params, "flat_params", backend, writable=True)
    grads = _in_cpu_memory(grad_rows, "grad_rows", backend, writable=False)
    if params.dtype not in formats.FLOATS:
        found = formats.name_of(params.dtype)
        raise TypeError(f"flat_params must be float32 or float64 for step_rows; got {found}.")
    if formats.math_of(grads.dtype) != params.dtype:
        wanted, found = formats.name_of(params.dtype), formats.name_of(grads.dtype)
        raise TypeError(f"grad_rows must have the dtype of flat_params ({wanted}); got {found}.")
    buffers.require_disjoint("grad_rows", grads, "flat_params", params)

    indices = _indices(rows)
    shape, shape_of_params = _shape(grad_rows, grads), _shape(flat_params, params)
    if len(shape) != 2 or shape[0] != indices.size or shape[1] == 0:
        raise ValueError(
            f"grad_rows must have shape (k, d) with a row for each of rows ({indices.size}); got {shape}."
        )
    width = shape[1]
    if params.size % width or (len(shape_of_params) == 2 and shape_of_params[1] != width):
        raise ValueError(
            f"flat_params must have rows of the width of grad_rows ({width}); got shape {shape_of_params}."
        )
    return Given(params, grads, indices, width)


def _in_cpu_memory(buffer: FlatArray, name: str, backend: str | None, *, writable: bool) -> Array:
    array = buffers.flat(buffer, name, writable=writable, backend=backend)
    if isinstance(array, DeviceBuffer):
        raise TypeError(f"{name} must be in CPU memory for step_rows; got {buffers.place(array)}.")
    return array


def _shape(buffer: Any, array: Array) -> tuple[int, ...]:
    """Return the shape of what was given; what does not tell any is flat."""
    shape = getattr(buffer, "shape", None)
    return array.shape if shape is None else tuple(map(int, shape))


def _indices(rows: Any) -> Any:
    """Return a copy of the indices; what is no index raises."""
    if getattr(rows, "__cuda_array_interface__", None) is not None:
        raise TypeError(
            f"rows must be in CPU memory; got {type(rows).__name__} in GPU memory. Pass a CPU copy."
        )
    try:
        array = np.asarray(rows)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise TypeError(
            f"rows must be an array of integers; {type(rows).__name__} refuses: {reason}"
        ) from error
    if array.dtype.kind not in "iu":
        raise TypeError(f"rows must be integers; got {array.dtype}.")
    if array.ndim != 1:
        raise ValueError(f"rows must have shape (k,); got {array.shape}. Pass rows.reshape(-1).")
    return np.array(array, np.int64)


class SparseRows:
    """The step of some rows: takes the place of a backend in it.

    Parameters
    ----------
    given : Given
    rows : object
        As the caller gave them, for errors.
    segmented : Segmented, optional
        Of the parameters, where there are segments.

    Raises
    ------
    ValueError
        If a row is not in the table.
    """

    def __init__(self, given: Given, rows: Any, segmented: Segmented | None) -> None:
        from fastadam.kernels import norms, row_sums, sparse_rows, touched  # imports Numba

        self._loops, self._sums, self._norms = sparse_rows, row_sums, norms
        self._width = given.width
        self._dtype, self._segmented = given.params.dtype, segmented
        n_rows = given.params.size // given.width
        wrong, found = touched.touched(given.rows, n_rows)
        if wrong >= 0:
            raise ValueError(f"rows[{wrong}] must be in [0, {n_rows}); got {int(np.asarray(rows)[wrong])}.")
        self._touched: Touched = found
        self.kinds = (
            "rows",
            sparse_rows.runs_parallel(found, given.width),
            given.grads.dtype,
            given.grads.flags.writeable,
        )

    def scratch_size(self, _: int) -> int:
        """Return the elements of ``scratch`` that :meth:`measure` needs."""
        return self._norms.scratch_size(self._touched.rows.size * self._width)

    def measure(self, grads: Array, scratch: Array) -> tuple[float, int]:
        """Return the sum of squares of the sums that count, and how many are infinite or NaN."""
        units = None if self._segmented is None else self._segmented.stretches
        return self._sums.measure(grads, self._touched, self._width, units, self._dtype, scratch)

    def plan(
        self, params: Array, grads: Array, states: Any, c: rules.Update
    ) -> tuple[Any, Callable[[], None]]:
        """Return what compiles the loop, and what takes the step."""
        table = None
        if self._segmented is not None:
            coefficients, c = self._segmented.formed(c)
            table = self._loops.Table(self._segmented.stretches, coefficients)
        of_step = (params, grads, states, self._touched, self._width, table, c)
        return partial(self._loops.prepare, *of_step), self._loops.plan(*of_step)
