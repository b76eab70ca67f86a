"""What the CUDA backends share: the layout of a launch, eager and captured steps.

:class:`Cuda` plans steps; :mod:`fastadam.kernels.cuda_cupy` and :mod:`fastadam.kernels.cuda_numba`, with one
library each, compile the kernels, launch them and own memory. Work is queued on a stream; nothing here waits
for the device but what says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from . import grids, rules
from .device_storage import DeviceStorage, StoredTypes
from .groups import BLOCK

Array: TypeAlias = Any
"""An array of the library in device memory."""

Kernel: TypeAlias = Any
"""A compiled kernel of the library, loaded on one device."""

Event: TypeAlias = Any
"""An event of the library."""

_SWAPPED = 2**26
"""Bytes that are exchanged at a time."""

LEGACY_STREAM = (0, 1)
"""The two handles of the default stream that every other stream waits for."""


class DeviceBuffer(NamedTuple):
    """A flat, contiguous buffer in the memory of one GPU."""

    pointer: int
    size: int
    dtype: np.dtype[Any]
    device: int  # ordinal, as CUDA counts
    stream: int | None  # handle of the stream on which its owner queues work, if known
    owner: object  # keeps the memory alive


class KernelTypes(NamedTuple):
    """What a kernel is compiled for: dtypes, and the types of the parts of :class:`rules.Update`."""

    dtype: np.dtype[Any]  # of the arithmetic
    n_states: int
    conditioning: type
    direction: type
    decay: type
    rule: type
    average: type
    clear: type
    stored: StoredTypes | None = None  # where not all buffers are of that dtype

    @classmethod
    def of(
        cls, dtype: np.dtype[Any], n_states: int, c: rules.Update, clear: rules.Clear | None
    ) -> KernelTypes:
        """Return the types of the arguments of a step."""
        conditioning, direction, decay, rule, average = map(type, c)
        return cls(dtype, n_states, conditioning, direction, decay, rule, average, type(clear))

    @classmethod
    def without_rule(cls, dtype: np.dtype[Any], grads: np.dtype[Any] | None = None) -> KernelTypes:
        """Return the types for kernels that know no rule: one for all rules of a dtype.

        ``grads`` is how the buffer is stored that they read, gradients mostly, if not in ``dtype``.
        """
        stored = None if grads is None or grads == dtype else StoredTypes(dtype, grads)
        no = type(None)
        return cls(dtype, 0, no, no, no, no, no, no, stored)

    @property
    def of_clock(self) -> KernelTypes:
        """The types for the kernels of its clock."""
        return self.without_rule(self.dtype)

    @property
    def grads(self) -> np.dtype[Any]:
        """How the gradients are stored."""
        return self.dtype if self.stored is None else self.stored.grads

    @property
    def parts(self) -> tuple[type, ...]:
        """The types of the parts of an update, in their order."""
        return self[2:7]

    @property
    def n_moments(self) -> int:
        """The states that are the rule's: all but an average."""
        return self.n_states - (self.average is not type(None))

    @property
    def coefficients(self) -> tuple[str, ...]:
        """The names of the coefficients, in the order in which a kernel takes them."""
        return tuple(field for part in self.parts for field in getattr(part, "_fields", ()))


CLOCK_ENTRIES = ("form_coefficients", "form_keys", "set_lr", "measure", "decide", "accumulate", "widen")
"""The kernels that know no rule."""

GRAD_ENTRIES = ("measure", "accumulate", "widen", "measure_units", "clear_units")
"""Those of these and of ``UNIT_ENTRIES`` that are compiled for how gradients are stored."""

UNIT_STEPS = ("step_units", "step_units_observed")
"""The steps over units."""

STEP_ACROSS = "step_across"
"""What steps blocks of moments of which two chunks have elements, before ``step_units_observed`` runs."""

STEP_TENSORS = "step_tensors"
"""The step of many buffers that lie anywhere."""

UNIT_ENTRIES = ("measure_units", "sum_groups", "form_rows", "conclude", "clear_units")
"""What surrounds them, and knows no rule."""


class Look(NamedTuple):
    """What a step on a clock must know before it writes."""

    grad_scale: float = 1.0  # what the gradients are divided by
    scale_there: DeviceBuffer | None = None  # where another factor of that lies
    max_grad_norm: float | None = None
    skips: bool = False  # takes no step where a gradient is inf or NaN
    clears_all: bool = False  # sets gradients to zero that no unit covers, too

    @property
    def reads_gradients_first(self) -> bool:
        """Whether it takes a pass over the gradients."""
        return self.skips or self.max_grad_norm is not None


class Cuda(ABC):
    """One way to run steps on NVIDIA GPUs."""

    name: str
    """What users call it."""

    # --- Steps ----------------------------------------------------------------------------------------------

    def plan(
        self,
        params: DeviceBuffer,
        grads: DeviceBuffer,
        states: Sequence[DeviceBuffer],
        c: rules.Update,
        clear: rules.Clear | None = None,
        storage: DeviceStorage | None = None,
    ) -> Callable[[], None]:
        """Return the call that queues one step of ``params`` and ``states``, in place, on ``params.stream``.

        With ``clear`` it sets ``grads`` to zero. The buffers are of one size and device, of one dtype or as
        ``storage`` says, aligned to their elements, and do not overlap: the caller checks. Memory traffic as
        on the CPU; nothing is allocated.
        """
        dtype = params.dtype if storage is None else grids.MATH
        types = KernelTypes.of(dtype, len(states), c, clear)
        if storage is not None:
            types = types._replace(stored=storage.types)
        kernel = self.kernel("step", types, params.device)
        coefficients = tuple(value for part in c if part for value in part)
        keys = () if storage is None else storage.keys or ()
        return partial(self._queue, kernel, params, grads, states, keys, coefficients, storage, None)

    def plan_on_clock(
        self,
        params: DeviceBuffer,
        grads: DeviceBuffer,
        states: Sequence[DeviceBuffer],
        clock: Any,
        look: Look,
        storage: DeviceStorage | None = None,
    ) -> Callable[[], None]:
        """Return what :meth:`plan` does, with coefficients that a clock forms on the device.

        ``clock`` is a :class:`fastadam.kernels.cuda_clock.Clock`. A CUDA graph may capture what is queued.
        """
        seed = None if storage is None else storage.seed
        prepare = clock.plan(grads, look, params.stream or 0, seed)
        keys = () if seed is None else (clock.keys,)
        stored = None if storage is None else storage.types
        if clock.units is None:
            kernel = self.kernel("step_captured", clock.types._replace(stored=stored), params.device)
            arguments = (kernel, params, grads, states, keys, clock.arguments, storage, prepare)
            return partial(self._queue, *arguments)
        pointers = (params.pointer, grads.pointer, *(state.pointer for state in states))
        if storage is not None:
            pointers += (*storage.pointers, *keys)
        layout = _packs(params, grads, states, storage)
        launches = clock.units.steps(pointers, clock.arguments, stored, layout)
        return partial(self._queue_launches, launches, params, grads, prepare, storage)

    def plan_report(self, params: DeviceBuffer, clock: Any) -> Callable[[], None]:
        """Return the call that queues, behind the step that is planned, the report of what it saw."""
        return partial(self._queue_launches, clock.conclude(), params, params, None)

    def warmup(self, types: KernelTypes, step: str) -> None:
        """Compile, or load from the disk cache, a step and what is around it, for the current device."""
        self.kernel(step, types, self.current_device())
        if step == "step_units_observed" and types.stored is not None and types.stored.in_blocks:
            self.kernel(STEP_ACROSS, types, self.current_device())
        for entry in (() if step == "step" else CLOCK_ENTRIES) + (UNIT_ENTRIES if step in UNIT_STEPS else ()):
            grads = types.grads if entry in GRAD_ENTRIES else None
            self.kernel(entry, types.without_rule(types.dtype, grads), self.current_device())

    def _queue(
        self,
        kernel: Kernel,
        params: DeviceBuffer,
        grads: DeviceBuffer,
        states: Sequence[DeviceBuffer],
        keys: tuple[int, ...],
        coefficients: tuple[Any, ...],
        storage: DeviceStorage | None,
        prepare: Callable[[], None] | None,
    ) -> None:
        size, resident = params.size, self.resident_threads(params.device)
        pointers = (params.pointer, grads.pointer, *(state.pointer for state in states))
        head, packs = _packs(params, grads, states, storage)
        itemsize = params.dtype.itemsize if storage is None else grids.MATH.itemsize
        blocks = grids.blocks(size, packs, itemsize, resident)
        if storage is not None:
            pointers += storage.pointers
            if storage.types.in_blocks:  # of which a warp takes one at a time
                blocks = grids.tree_blocks(-(-size // BLOCK), resident)
        arguments = (*pointers, *keys, size, head, packs, *coefficients)
        self._queue_launches([(kernel, blocks, grids.BLOCK, arguments)], params, grads, prepare, storage)

    def _queue_launches(
        self,
        launches: list[tuple[Kernel, int, int, tuple[Any, ...]]],
        params: DeviceBuffer,
        grads: DeviceBuffer,
        prepare: Callable[[], None] | None,
        storage: DeviceStorage | None = None,
    ) -> None:
        device, stream = params.device, params.stream or 0

        def queue() -> None:
            if prepare is not None:
                prepare()
            for kernel, blocks, threads, arguments in launches:
                self.launch(kernel, blocks, threads, arguments, device, stream)

        work: Callable[[], None] = queue
        if storage is not None and storage.out is not None:
            other = stream if storage.out.stream is None else storage.out.stream
            work = partial(self.queue_between, stream, other, device, queue)
        self.queue_between(stream, stream if grads.stream is None else grads.stream, device, work)

    def accumulate(self, total: DeviceBuffer, grads: DeviceBuffer, *, clear: bool) -> None:
        """Queue on the stream of ``grads``: add them to ``total``, and set them to zero with ``clear``.

        In order with what the stream of ``total`` holds.
        """
        types = KernelTypes.without_rule(total.dtype, grads.dtype)
        kernel = self.kernel("accumulate", types, total.device)
        blocks = grids.blocks(total.size, 0, total.dtype.itemsize, self.resident_threads(total.device))
        arguments = (total.pointer, grads.pointer, total.size, int(clear))
        stream, device = grads.stream or 0, total.device
        launch = partial(self.launch, kernel, blocks, grids.BLOCK, arguments, device, stream)
        self.queue_between(stream, total.stream or 0, device, launch)

    def widen(self, to: DeviceBuffer, source: DeviceBuffer) -> None:
        """Queue on the stream of ``source``: write its numbers, of any storage, to a buffer of another."""
        kernel = self.kernel("widen", KernelTypes.without_rule(to.dtype, source.dtype), to.device)
        blocks = grids.blocks(to.size, 0, to.dtype.itemsize, self.resident_threads(to.device))
        arguments = (to.pointer, source.pointer, to.size)
        self.launch(kernel, blocks, grids.BLOCK, arguments, to.device, source.stream or 0)

    def swap(self, one: DeviceBuffer, other: DeviceBuffer) -> None:
        """Queue the exchange of the contents of two buffers on the stream of the first, block by block."""
        device, stream, nbytes = one.device, one.stream or 0, one.size * one.dtype.itemsize
        held = self.zeros(min(nbytes, _SWAPPED), device, stream)
        place = self.address(held)
        for start in range(0, nbytes, _SWAPPED):
            length = min(_SWAPPED, nbytes - start)
            self.copy(place, one.pointer + start, length, device, stream)
            self.copy(one.pointer + start, other.pointer + start, length, device, stream)
            self.copy(other.pointer + start, place, length, device, stream)

    def queue_between(self, stream: int, other: int, device: int, queue: Callable[[], None]) -> None:
        """Queue work on a stream, after what another one holds, and before what that one gets later."""
        if same_stream(stream, other):
            queue()
            return
        before, after = self.event(device), self.event(device)  # what may fail, fails before the work
        self.order(other, stream, before, device)
        queue()
        self.order(stream, other, after, device)

    # --- What each library does in its way ------------------------------------------------------------------

    @abstractmethod
    def kernel(self, entry: str, types: KernelTypes, device: int) -> Kernel:
        """Return a kernel, compiled, or loaded from the disk cache, and loaded on a device; once for each.

        ``entry`` is one of those that :mod:`fastadam.kernels.cuda_source` names.
        """

    @abstractmethod
    def launch(
        self, kernel: Kernel, blocks: int, threads: int, args: tuple[Any, ...], device: int, stream: int
    ) -> None:
        """Queue a kernel on a stream of a device.

        An int (a pointer, too) is passed in 64 bits, a float as float64, a NumPy scalar as it is.
        """

    @abstractmethod
    def event(self, device: int) -> Event:
        """Return a new event of a device."""

    @abstractmethod
    def order(self, first: int, then: int, event: Event, device: int) -> None:
        """Let stream ``then`` wait for what stream ``first`` has queued so far; the host does not wait."""

    @abstractmethod
    def is_capturing(self, stream: int, device: int) -> bool:
        """Return whether work queued on a stream is recorded for a CUDA graph."""

    @abstractmethod
    def zeros(self, nbytes: int, device: int, stream: int) -> Array:
        """Allocate bytes on a device, zero in stream order."""

    @abstractmethod
    def to_device(self, array: np.ndarray[Any, Any], device: int, stream: int) -> Array:
        """Copy a flat array of bytes to a device, in stream order."""

    @abstractmethod
    def to_host(self, array: Array, device: int) -> np.ndarray[Any, Any]:
        """Copy an array from a device, when the device has done all its work."""

    @abstractmethod
    def copy(self, to: int, source: int, nbytes: int, device: int, stream: int) -> None:
        """Queue a copy from one address to another of a device."""

    @abstractmethod
    def address(self, array: Array) -> int:
        """Return the pointer to an array's first element."""

    @abstractmethod
    def device_of(self, pointer: int) -> int:
        """Return the ordinal of the device on which memory lies."""

    @abstractmethod
    def device_count(self) -> int:
        """Return how many devices there are; raises what the library raises without a driver."""

    @abstractmethod
    def current_device(self) -> int:
        """Return the ordinal of the calling thread's device."""

    @abstractmethod
    def resident_threads(self, device: int) -> int:
        """Return how many threads a device holds at once."""


def _packs(
    params: DeviceBuffer, grads: DeviceBuffer, states: Sequence[DeviceBuffer], storage: DeviceStorage | None
) -> tuple[int, int]:
    """Return the elements before the first pack of buffers, and the packs."""
    buffers = (params, grads, *states) if storage is None else (params, grads, *states, *storage.beside)
    places = tuple(buffer.pointer for buffer in buffers)
    if storage is None:
        return grids.packs(places, params.dtype.itemsize, params.size)
    widths = [buffer.dtype.itemsize for buffer in buffers]
    return grids.packs(grids.as_of(grids.MATH.itemsize, places, widths), grids.MATH.itemsize, params.size)


def same_stream(stream: int, other: int) -> bool:
    """Return whether two handles name one stream."""
    return stream == other or (stream in LEGACY_STREAM and other in LEGACY_STREAM)
