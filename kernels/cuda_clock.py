"""The clock of steps that count and decide in device memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from . import grids
from .columns import Columns
from .cuda import Cuda, DeviceBuffer, KernelTypes, Look, same_stream
from .cuda_units import DeviceUnits, Launch
from .tree import CHUNK, LANES

_FORMED = ("lr_times_weight_decay", "grad_scale", "clip_factor")
"""The coefficients besides the rule's that are formed on the device, in the order in which kernels take their
places."""

REPORTS = 256
"""Steps whose reports are kept."""


class Report(NamedTuple):
    """What a step on a clock did, as the kernels write it: all numbers in float64."""

    norm: float
    clip_factor: float
    skipped: float
    nonfinite: float
    step: float
    lr: float
    grad_scale: float
    update_norm: float  # this and what follows: where the step is observed, and not skipped
    param_norm: float
    vanished: float


class Clock:
    """The step counter, the learning rates and the coefficients of a step, in device memory.

    A step is :meth:`plan`, which may be repeated, the kernel ``step_captured`` or that of units, which takes
    the step and counts it, and :meth:`conclude`. So a step that CUDA refuses is not counted.

    Parameters
    ----------
    backend : Cuda
    device, stream : int
        Where, and in which order, it is made.
    types : KernelTypes
    step : int
        Steps taken.
    lrs : array_like of float, shape (k,) or (sources, k)
        Learning rates of the next steps, with units of each source; the last is also that of all later ones.
    weight_decay : float
    coefficients : sequence of scalar
        Of any step; those that change from step to step are formed on the device.
    columns : Columns
        What those of the rule are formed from, which change from step to step; one row.
    units : DeviceUnits, optional
        What is stepped, where it is not all the buffer with one set of coefficients, or is observed.
    made_for : object
        Its owner's note.
    """

    def __init__(
        self,
        backend: Cuda,
        device: int,
        stream: int,
        types: KernelTypes,
        *,
        step: int,
        lrs: Any,
        weight_decay: float,
        coefficients: Sequence[Any],
        columns: Columns,
        units: DeviceUnits | None = None,
        made_for: object = None,
    ) -> None:
        spare = np.zeros(1, types.dtype)  # where a kernel puts what this rule does not have
        names = [
            field for part in types.parts[:3] for field in getattr(part, "_fields", ())
        ]  # before the rule's
        table, numbers = columns.moved(len(names))
        parts = [
            np.array([step, 0, 0, 0], np.int64),  # the counter, whether the step is skipped, and its keys
            table.reshape(-1),
            numbers,
            np.zeros(REPORTS * len(Report._fields)),
            np.concatenate([np.array(coefficients, types.dtype), spare]),
        ]
        image = np.concatenate([part.view(np.uint8) for part in parts])
        self.backend, self.device, self.stream, self.types = backend, device, stream, types
        self.units, self.made_for = units, made_for
        self._memory = backend.to_device(image, device, stream)
        address = backend.address(self._memory)
        sizes = [part.nbytes for part in parts]
        at_step, at_table, at_numbers, self._reports, at_coefficients = (
            address + sum(sizes[:k]) for k in range(len(sizes))
        )
        at_skip = at_step + 8
        self.keys = at_skip + 8  # of stochastic rounding: random bits, and the index of element 0
        self.arguments = (at_coefficients, at_step, at_skip)  # of the kernel of a step
        self._reports_from = sum(sizes[:3])

        spare_at = len(types.coefficients)
        places = (names.index(name) if name in names else spare_at for name in _FORMED)
        tables = (at_table, table.shape[1], at_numbers)
        self._before_lrs = (at_step,)
        self._after_lrs = (weight_decay, *tables, at_coefficients, *places, at_skip)
        self._kernels: dict[tuple[str, Any], Any] = {}
        self._kernel("form_coefficients")
        self._scratch: Any = None
        self._scratch_bytes = 0
        self.attempts = 0  # steps queued
        self.is_captured = False  # a CUDA graph has its addresses
        self.stored: set[Any] = set()  # the storage of steps for which kernels are loaded
        self.looked = [False] * REPORTS  # of each report: whether gradients were read before
        self.set_lrs(lrs, step, stream)

    def _kernel(self, entry: str, grads: np.dtype[Any] | None = None) -> Any:
        key = (entry, grads)
        if key not in self._kernels:
            types = self.types.without_rule(self.types.dtype, grads)
            self._kernels[key] = self.backend.kernel(entry, types, self.device)
        return self._kernels[key]

    def plan(
        self, grads: DeviceBuffer, look: Look, stream: int, seed: tuple[int, int] | None = None
    ) -> Callable[[], None]:
        """Return the call that queues: look at the gradients, if need be, and form the next coefficients.

        With ``seed``, a mixed seed and the index of element 0, the keys of stochastic rounding, too.
        """
        scale: tuple[Any, ...] = (look.grad_scale, 0, 0, 0)
        if look.scale_there is not None:
            place = look.scale_there.pointer
            scale = (look.grad_scale, place, place, look.scale_there.dtype.itemsize)
        form = (*scale, *self._before_lrs, *self._lr_arguments, *self._after_lrs, self._slot)
        if not look.reads_gradients_first:
            launches = [(self._kernel("form_coefficients"), 1, LANES, form)]
        else:
            launches, sums, left = self._measure(grads, stream)
            clips, limit = look.max_grad_norm is not None, look.max_grad_norm or 0.0
            decide = (sums, left, int(clips), limit, int(look.skips), *form)
            launches.append((self._kernel("decide"), 1, grids.BLOCK, decide))
        if seed is not None:
            launches.append((self._kernel("form_keys"), 1, 1, (self.keys, *self._before_lrs, *seed)))
        if self.units is not None:
            launches.append(self.units.form(*self._before_lrs, self._lr_arguments))
            if look.clears_all:
                launches += self.units.clear_gaps(grads.pointer, grads.dtype)
        return partial(self._queue, launches, look, stream)

    def conclude(self) -> list[Launch]:
        """Return what is to be queued behind the step that is planned."""
        return [] if self.units is None else self.units.conclude(self.arguments[-1], self._slot)

    @property
    def _slot(self) -> int:
        """Where the report of the next step goes."""
        return self._reports + self.attempts % REPORTS * 8 * len(Report._fields)

    def _measure(self, grads: DeviceBuffer, stream: int) -> tuple[list[Launch], int, int]:
        """Return the pass over the gradients, where its sums lie, and how many they are."""
        if self.units is not None:
            return self.units.measure(grads.pointer, grads.dtype)
        chunks = -(-grads.size // CHUNK)
        sums = self._have_scratch(chunks, stream)
        blocks = grids.tree_blocks(chunks, self.backend.resident_threads(self.device))
        arguments = (grads.pointer, grads.size, sums)
        return [(self._kernel("measure", grads.dtype), blocks, grids.BLOCK, arguments)], sums, chunks

    def _queue(self, launches: list[Launch], look: Look, stream: int) -> None:
        self.stream = stream
        there = look.scale_there
        if there is not None and there.stream is not None and not same_stream(stream, there.stream):
            self.backend.order(there.stream, stream, self.backend.event(self.device), self.device)
        for kernel, blocks, threads, arguments in launches:
            self.backend.launch(kernel, blocks, threads, arguments, self.device, stream)
        self.looked[self.attempts % REPORTS] = look.reads_gradients_first
        self.attempts += 1

    def _have_scratch(self, chunks: int, stream: int) -> int:
        """Return where the sums of chunks go, level after level."""
        needed, left = 0, chunks
        while left > 1:
            needed += left
            left = -(-left // CHUNK)
        needed = 16 * (needed + 1)
        if self._scratch_bytes < needed:
            self._scratch = self.backend.zeros(needed, self.device, stream)
            self._scratch_bytes = needed
        return self.backend.address(self._scratch)

    def set_lrs(self, lrs: Any, step: int, stream: int) -> None:
        """Give the learning rates of the steps after ``step``; waits for their copy."""
        table = np.array(lrs, np.float64)
        # The one before is kept: steps that are queued read it.
        self._kept, self._lrs = (
            getattr(self, "_lrs", None),
            self.backend.to_device(table.reshape(-1).view(np.uint8), self.device, stream),
        )
        self._lr_arguments = (self.backend.address(self._lrs), step, table.shape[-1])
        self.lrs_until = self.attempts + table.shape[-1]

    def set_lr(self, lr: float, stream: int) -> None:
        """Queue: change the learning rate of what is queued later, here or on the last step's stream.

        Of several sources, that of the first; each has one learning rate.
        """

        def queue() -> None:
            place = self._lr_arguments[0]
            self.backend.launch(self._kernel("set_lr"), 1, 1, (place, lr), self.device, stream)

        self.backend.queue_between(stream, self.stream, self.device, queue)

    def step(self) -> int:
        """Return how many steps were taken, when the device has done all its work."""
        return int(self.backend.to_host(self._memory[:8], self.device).view(np.int64)[0])

    def report(self, attempt: int) -> Report:
        """Return the report of a step, counted from 0 with those skipped; waits for the device."""
        size = 8 * len(Report._fields)
        start = self._reports_from + attempt % REPORTS * size
        host = self.backend.to_host(self._memory[start : start + size], self.device)
        return Report(*host.view(np.float64).tolist())
