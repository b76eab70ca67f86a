"""The optimizer: what a user calls. :mod:`fastadam.adam` and :mod:`fastadam.family` give it a rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self, SupportsIndex, TypedDict, cast

import numpy as np

from fastadam import (
    backends,
    buffers,
    clocks,
    device_buffers,
    device_steps,
    formats,
    sparse_rows,
    stored,
    streams,
)
from fastadam.accumulation import Accumulator
from fastadam.arrays import (
    BackendName,
    CudaStream,
    FlatArray,
    MasterFormat,
    Number,
    Rounding,
    Scalar,
    StateFormat,
)
from fastadam.checks import require_flag
from fastadam.coefficients import Coefficients, divisor
from fastadam.hyperparameters import Hyperparameters, Schedule
from fastadam.kernels import rules
from fastadam.kernels.cuda import DeviceBuffer, KernelTypes
from fastadam.kernels.cuda_clock import Clock
from fastadam.kernels.rounding import PLAIN
from fastadam.last_step import Done, LastStep
from fastadam.persistent import Persistent
from fastadam.rows import require_fields
from fastadam.segmented import Segmented
from fastadam.segments import Segment, Segments
from fastadam.state import State
from fastadam.tunables import Tunables


class Options(TypedDict, total=False):
    """What all optimizers take besides arguments of their own, as :class:`fastadam.FusedAdam` has it."""

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


_OF_HYPERPARAMETERS = Options.__annotations__.keys() - {"segments", "backend", "capturable"}


class FusedOptimizer(Tunables, Persistent):
    """Steps of one update rule, in one fused pass over flat buffers, in place: what all optimizers share.

    One optimizer may not step in two threads at once; different optimizers may.

    Parameters
    ----------
    hyperparameters : Hyperparameters
        Those of the rule, and what all rules have.
    segments, backend, capturable
        As :class:`fastadam.FusedAdam` has them.
    """

    HYPERPARAMETERS: ClassVar[type[Hyperparameters]]
    """Those of the rule."""

    def __init__(
        self,
        hyperparameters: Hyperparameters,
        *,
        segments: Iterable[Segment] = (),
        backend: BackendName | None = None,
        capturable: bool = False,
    ) -> None:
        self._hyperparameters = hyperparameters
        self._backend = backends.require_name(backend)
        self._capturable = require_flag("capturable", capturable)
        self._coefficients: Coefficients | None = None
        self._prepared: object = None  # the types for which the kernels were compiled
        self._segments: Segments | None = None
        self._segmented: Segmented | None = None  # their coefficients, for buffers of one size
        self._state = State()
        self.segments = segments
        self._kernels: Any = None  # the backend, from the first step on
        # What is known of the last step: its coefficients, if it was a plain one, or its number on a clock.
        self._last: Done | Coefficients | LastStep | tuple[Clock, int] | None = None
        self._scratch: buffers.Array | None = None  # for the pass over the gradients
        self._accumulator = Accumulator()
        self._library = ""  # whose current stream the last capturable step took

    def _begin_with(self, own: Mapping[str, Any], options: Options) -> None:
        """Begin with the optimizer's own arguments, and with what all optimizers take.

        Raises
        ------
        TypeError
            If there is another option.
        """
        for name in options.keys() - Options.__annotations__.keys():
            raise TypeError(f"got an unexpected keyword argument {name!r}")
        shared: dict[str, Any] = {k: value for k, value in options.items() if k in _OF_HYPERPARAMETERS}
        rest: Any = {name: value for name, value in options.items() if name not in shared}
        FusedOptimizer.__init__(self, self.HYPERPARAMETERS(**own, **shared), **rest)

    @classmethod
    def _of(cls, hyperparameters: Hyperparameters, **options: Any) -> Self:
        """Return an optimizer with these, whatever its own arguments are."""
        opt = cls.__new__(cls)
        FusedOptimizer.__init__(opt, hyperparameters, **options)
        return opt

    def step(
        self,
        flat_params: FlatArray,
        flat_grads: FlatArray | None = None,
        *,
        grad_scale: Scalar | None = None,
        out: FlatArray | None = None,
        stream: CudaStream | None = None,
    ) -> None:
        """Advance the parameters by one step, in place.

        Reads ``flat_params``, ``flat_grads`` and the moments, writes ``flat_params`` and the moments: 28
        bytes per float32 element. ``max_grad_norm`` and ``skip_nonfinite`` take a pass over ``flat_grads``
        before: 4 bytes. ``ema_decay`` reads and writes 8 more, ``zero_grads`` writes 4; ``docs/storage.md``
        has the bytes of other storage. A call that raises
        has changed nothing; only what a signal handler raises, such as ``KeyboardInterrupt``, may follow a
        step that was taken whole and counted.

        On a GPU the step is queued, and the call returns: it waits for nothing, and copies nothing once what
        it needs is there. That is made with the first step, and again when segments, telemetry or the set of
        features change; a schedule is asked ahead where steps are counted on the device (docs/phase.md).

        Parameters
        ----------
        flat_params : array_like
            The parameters, n elements, read and written: a C-contiguous, writable array of any shape, of
            float32, float64, float16 or bfloat16. In CPU memory, NumPy's or anything that shares its memory
            (DLPack, ``__array_interface__``, buffer protocol), such as a detached torch tensor. In GPU
            memory, aligned to its elements, CuPy's, Numba's or anything with ``__cuda_array_interface__`` or
            DLPack.
        flat_grads : array_like
            The gradients, n elements on the same device, of the same dtype, or any other than float64 beside
            one other than float64; read only, and they may be read-only.
            Written, too, with ``zero_grads``. None, the default, is the mean of what :meth:`accumulate` has
            added up, which is cleared.
        grad_scale : float, optional
            What the loss was multiplied with, greater than 0: the gradients are divided by it.
        out : array_like, optional
            Gets a copy of the new parameters, in the same pass: n elements of float32, float16 or bfloat16 on
            the same device; written only, to the nearest. A step that is skipped leaves it as it is.
        stream : optional
            The CUDA stream on which to queue the step: an object of any library, or the handle. Without it,
            the current stream of the library that made ``flat_params``, in the right order with those of
            ``flat_grads`` and ``out``.

        Raises
        ------
        TypeError
            If a buffer is not an array, cannot be shared or written to in place, has another dtype than those
            above, or lies elsewhere than the parameters, the moments or the backend; or if ``stream`` is no
            stream.
        ValueError
            If a buffer is not contiguous, what is to be written is read-only, sizes differ, or buffers
            overlap; if gradients come after :meth:`accumulate`, or none and nothing was accumulated; if a
            segment ends behind them; if the parameters cannot be stored as the hyperparameters say; if
            ``grad_scale`` is out of its range; or if the stream is being captured and the step could not be
            replayed.
        ImportError
            If a CUDA array comes and no CUDA backend is installed.
        """
        params = buffers.flat(flat_params, "flat_params", writable=True, backend=self._backend)
        summed = self._accumulator.calls
        if flat_grads is None or summed:
            grads = self._summed(params, flat_grads)
        else:
            clears = self._hyperparameters.zero_grads
            grads = buffers.flat(flat_grads, "flat_grads", writable=clears, backend=self._backend)
        alike = buffers.require_same_layout("flat_grads", grads, "flat_params", params)
        buffers.require_disjoint("flat_grads", grads, "flat_params", params)
        on_device = isinstance(params, DeviceBuffer)
        if on_device:
            params, grads = streams.bind(params, grads, stream, keep=bool(summed))  # type: ignore[arg-type]
        elif stream is not None:
            raise TypeError("stream must be None for buffers in CPU memory; got a stream.")

        state, kernels = self._state, self._kernels
        if kernels is None:  # the first step, or the first after load_state_dict
            kernels, state = self._begin(params, grads)
        moments, block = state._arrays, state._block
        buffers.require_same_layout("flat_params", params, "the state", state._layout)
        buffers.require_disjoint("flat_params", params, "the state", block)
        buffers.require_disjoint("flat_grads", grads, "the state", block)

        c = self._coefficients
        if c is None or c.dtype != params.dtype:
            math = formats.math_of(params.dtype)
            if c is None or c.dtype != math:
                c = self._coefficients = Coefficients(self._hyperparameters, math)
            alike = alike and params.dtype == math
        loops = kernels
        if not on_device and (out is not None or not alike or self._segments is not None):
            loops = self._other_loops(c, params, grads, state, out, alike)
        if on_device:
            take, report = device_steps.plan(
                kernels,
                state,
                cast("DeviceBuffer", params),
                cast("DeviceBuffer", grads),
                self._hyperparameters,
                c,
                out=out,
                stream=stream,
                grad_scale=grad_scale,
                summed=summed,
                segments=self._segments,
                capturable=self._capturable,
            )
            take()  # queued in a moment, or refused by CUDA: counted after
            self._state, self._kernels, self._last = state, kernels, c
            self._accumulator.calls = 0
            state._step += 1  # a clock counts by itself
            if state._clock is not None:
                self._last = (state._clock, state._clock.attempts - 1)
                self._library = "" if stream is not None else device_buffers.library(flat_params)
            if report is not None:
                report()
            return

        last: Done | Coefficients | LastStep
        update: Any
        types: Any
        if grad_scale is None and c.is_plain and loops is kernels and not summed:
            # Coefficients.update, without a call: 0.2 us.
            last, clear, types = c, None, c.types
            update = (None, c.direction, c.decay, c.rule(state._step + 1), None)
        else:
            last, update, clear, types = self._look_at(loops, grads, c, state, grad_scale, summed)
            if loops is not kernels and loops.kinds:
                types = (types, *loops.kinds)
            if update is None:  # skipped
                if clear is not None:
                    for start, stop in ((0, grads.size),) if loops is kernels or summed else loops.runs:
                        cast("buffers.Array", grads)[start:stop] = 0
                self._last, self._accumulator.calls = last, 0
                return
        if types is not self._prepared:
            if types != self._prepared:
                loops.prepare(params, grads, moments, update, clear)
            self._prepared = types
        take = loops.plan(params, grads, moments, update, clear)
        # It runs to its end whatever a signal handler raises meanwhile (Ctrl-C), so it is counted before.
        self._state, self._kernels, self._last = state, kernels, last
        state._step += 1
        if not summed:
            take()
            return
        self._accumulator.calls = 0
        try:
            take()
        finally:
            if loops is not kernels and not loops.is_whole:
                cast("buffers.Array", grads)[:] = 0  # what frozen segments have added up, too

    def step_rows(
        self,
        flat_params: FlatArray,
        rows: Sequence[int] | FlatArray,
        grad_rows: FlatArray,
        *,
        grad_scale: Scalar | None = None,
    ) -> None:
        """Advance some rows of a table by one step, in place, and leave all others as they are: lazy steps.

        Gradients of the same row are added first, in the order in which they are given; then each row is
        stepped once. No other row is read or written: its moments do not decay, and no weight decay takes
        from it. All rows share the number of the step, and so the bias corrections. The norm is that of the
        sums, and ``grad_scale`` divides them. Takes the time of the rows, whatever the size of the table. A
        call that raises has changed nothing.

        In CPU memory alone, and without ``ema_decay``, ``zero_grads``, ``telemetry`` and other storage.

        Parameters
        ----------
        flat_params : array_like
            The parameters, r rows of d elements, read and written: an array as for :meth:`step`, float32 or
            float64, of shape (r, d), or flat.
        rows : array_like of int, shape (k,)
            Which rows, each in [0, r), in any order, some more than once.
        grad_rows : array_like, shape (k, d)
            A gradient for each of them; read only. Of the dtype of ``flat_params``, or 16 bits beside
            float32.
        grad_scale
            As for :meth:`step`.

        Raises
        ------
        TypeError, ValueError
            If an argument is not what it must be, or the optimizer has what no step of rows does.

        Examples
        --------
        >>> import numpy as np
        >>> from fastadam import FusedAdam
        >>> table, opt = np.zeros((5, 2)), FusedAdam(lr=0.1)
        >>> opt.step_rows(table, [3, 1, 3], np.ones((3, 2)))
        >>> table.round(3).tolist()
        [[0.0, 0.0], [-0.1, -0.1], [0.0, 0.0], [-0.1, -0.1], [0.0, 0.0]]
        """
        summed, h = self._accumulator.calls, self._hyperparameters
        sparse_rows.require_possible(h, capturable=self._capturable, accumulated=summed)
        given = sparse_rows.arguments(flat_params, rows, grad_rows, self._backend)
        params, grads = given.params, given.grads
        state, kernels = self._state, self._kernels
        if kernels is None:
            kernels, state = self._begin(params, params)
        buffers.require_same_layout("flat_params", params, "the state", state._layout)
        buffers.require_disjoint("flat_params", params, "the state", state._block)
        buffers.require_disjoint("grad_rows", grads, "the state", state._block)
        c = self._coefficients
        if c is None or c.dtype != params.dtype:
            c = self._coefficients = Coefficients(h, params.dtype)
        segmented = self._other_loops(c, params, params, state, None, True) if self.segments else None
        loops = sparse_rows.SparseRows(given, rows, segmented)
        last, update, _, types = self._look_at(loops, grads, c, state, grad_scale, 0)
        if update is None:  # skipped
            self._last = last
            return
        prepare, take = loops.plan(params, grads, state._arrays, update)
        if (types, *loops.kinds) != self._prepared:
            prepare()
            self._prepared = (types, *loops.kinds)
        # As in step: counted before.
        self._state, self._kernels, self._last = state, kernels, last
        state._step += 1
        take()

    def accumulate(self, flat_grads: FlatArray, *, stream: CudaStream | None = None) -> None:
        """Add gradients to a sum, of which the next :meth:`step` takes the mean.

        Reads ``flat_grads`` and the sum, writes the sum: 12 bytes per float32 element, and 4 more with
        ``zero_grads``. The sum is allocated by the first call, 4 bytes per element, and kept. A call that
        raises has changed nothing.

        Parameters
        ----------
        flat_grads, stream
            As for :meth:`step`.

        Raises
        ------
        TypeError, ValueError, ImportError
            As :meth:`step` does for ``flat_grads``.

        Examples
        --------
        >>> import numpy as np
        >>> from fastadam import FusedAdam
        >>> params = np.zeros(2)
        >>> opt = FusedAdam()
        >>> for micro_batch in ([1.0, 2.0], [3.0, 4.0]):
        ...     opt.accumulate(np.array(micro_batch))
        >>> opt.step(params)  # with the gradient [2, 3]
        """
        clears = self._hyperparameters.zero_grads
        grads = buffers.flat(flat_grads, "flat_grads", writable=clears, backend=self._backend)
        if isinstance(grads, DeviceBuffer):
            grads, _ = streams.bind(grads, grads, stream)
        elif stream is not None:
            raise TypeError("stream must be None for buffers in CPU memory; got a stream.")
        state, total = self._state, self._accumulator.total
        if state._layout.size:  # known from the first step on, where nothing is kept, too
            # A state of a checkpoint or a copy goes where the parameters are with the next step.
            fits = buffers.require_same_size if self._kernels is None else buffers.require_same_layout
            fits("flat_grads", grads, "the state", state._layout)
            buffers.require_disjoint("flat_grads", grads, "the state", state._block)
        if total is not None:
            fits = (
                buffers.require_same_size if not self._accumulator.is_placed else buffers.require_same_layout
            )
            fits("flat_grads", grads, "the accumulated gradients", total)
            buffers.require_disjoint("flat_grads", grads, "the accumulated gradients", total)
        kernels = self._kernels or backends.load(self._choose(grads, "flat_grads"))
        self._accumulator.add(kernels, grads, clear=clears)

    @property
    def last_step(self) -> LastStep | None:
        """What the last call of :meth:`step` did; None before the first, and after a load or a reset."""
        last = self._last
        if last is None or isinstance(last, LastStep):
            return last
        if isinstance(last, tuple) and not isinstance(last, Done):
            return LastStep(partial(clocks.done, *last))
        done = Done(self._state._step, last.lr) if isinstance(last, Coefficients) else last
        return LastStep(lambda: done)

    @property
    def state(self) -> State:
        """The moments and the step counter."""
        return self._state

    @property
    def backend(self) -> str | None:
        """The name of the backend that takes the steps; None before the first step if none was asked for."""
        return self._backend if self._kernels is None else self._kernels.name

    @property
    def capturable(self) -> bool:
        """Whether the step counter and the learning rate are kept in GPU memory."""
        return self._capturable

    def swap_ema(self, flat_params: FlatArray, *, stream: CudaStream | None = None) -> None:
        """Exchange the parameters and their average, in place: for an evaluation, and back after it.

        Parameters
        ----------
        flat_params, stream
            As for :meth:`step`.

        Raises
        ------
        TypeError, ValueError
            As :meth:`step` does for ``flat_params``, or if there is no average: without ``ema_decay``, or
            before the first step.
        """
        params = buffers.flat(flat_params, "flat_params", writable=True, backend=self._backend)
        if params.dtype not in formats.FLOATS:
            raise TypeError(
                "flat_params must be float32 or float64 for swap_ema; got"
                f" {formats.name_of(params.dtype)}. Convert state.param_ema into another buffer."
            )
        if self._state.param_ema is None:
            raise ValueError(
                "swap_ema must come after a step with ema_decay; got no average of the parameters."
            )
        if isinstance(params, DeviceBuffer):
            params, _ = streams.bind(params, params, stream)
        elif stream is not None:
            raise TypeError("stream must be None for buffers in CPU memory; got a stream.")
        state, kernels = self._state, self._kernels
        if kernels is None:  # the first call after load_state_dict
            kernels, state = self._begin(params, params)
        buffers.require_same_layout("flat_params", params, "the state", state._arrays[-1])
        buffers.require_disjoint("flat_params", params, "the state", state._block)
        self._state, self._kernels = state, kernels
        state.swap_last(params)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Parts of the buffer with hyperparameters of their own; set them, by any iterable, between steps.

        On a GPU that waits for the device. With ``capturable=True`` they stay, once a step was taken.
        """
        return () if self._segments is None else self._segments.given

    @segments.setter
    def segments(self, value: Iterable[Segment]) -> None:
        new, clock = Segments(value), self._state._clock
        require_fields(new, self._hyperparameters)
        if self._capturable:
            clocks.require_possible(self._hyperparameters, new)
            if clock is not None:
                raise ValueError(
                    f"segments must stay as they are once a capturable step was taken; got {len(new.given)}."
                    " Only lr may change, until reset."
                )
        if clock is not None:
            self._state.leave_clock()
        self._use(new)

    def _use(self, segments: Segments) -> None:
        h = self._hyperparameters
        self._segments = segments if segments.given or h.telemetry or not h.stores_plainly else None
        self._segmented = self._prepared = None

    def _summed(self, params: buffers.Buffer, flat_grads: object) -> buffers.Buffer:
        """Return the accumulated gradients, where the parameters are."""
        if not self._accumulator.calls:
            raise ValueError("flat_grads must be given where nothing was accumulated; got None.")
        if flat_grads is not None:
            raise ValueError(
                f"flat_grads must be None after accumulate; got {type(flat_grads).__name__}."
                " Accumulate it, too."
            )
        kernels = self._kernels or backends.load(self._choose(params, "flat_params"))
        total = cast("buffers.Buffer", self._accumulator.total)
        buffers.require_same_size("flat_params", params, "the accumulated gradients", total)
        grads: buffers.Buffer = self._accumulator.at(kernels, params)
        return grads

    def _choose(self, buffer: buffers.Buffer, label: str) -> str:
        """Return the name of the backend for a buffer."""
        on_device = isinstance(buffer, DeviceBuffer)
        name = self._backend or (backends.cuda() if on_device else "cpu")
        for wanted, reason in (
            (name != "cpu", f"for backend={name!r}"),
            (on_device or self._capturable, "with capturable=True"),
        ):
            if wanted != on_device:
                memory = "GPU memory" if wanted else "CPU memory"
                raise TypeError(f"{label} must be in {memory} {reason}; got {buffers.place(buffer)}.")
        return name

    def _begin(self, params: buffers.Buffer, grads: buffers.Buffer) -> tuple[Any, State]:
        """Choose the backend for the parameters, and have the state where they are."""
        state = self._state
        if state._kernels is not None:  # shared with a copy of this optimizer that has stepped
            return state._kernels, state
        kernels = backends.load(self._choose(params, "flat_params"))
        h = self._hyperparameters
        names, master = h.state, stored.master_of(h)
        if state._layout.size:
            buffers.require_same_size("flat_params", params, "the state", state._layout)
        stored.require_possible(h, params.dtype)
        kinds = h.formats()
        if isinstance(params, DeviceBuffer):
            if streams.is_captured(kernels, params, cast("DeviceBuffer", grads)):
                raise ValueError(
                    "stream must not be in capture: the first step allocates the moments."
                    " Take one step before."
                )
            return kernels, State.on_device(kernels, params, names, kinds, master, state, h.start())
        if not state._names or (state._master is None and master is not None):
            state = State.of_params(params, names, kinds, master, state, h.start())
        return kernels, state

    def _look_at(
        self,
        kernels: Any,
        grads: buffers.Buffer,
        c: Coefficients,
        state: State,
        grad_scale: object,
        summed: int,
    ) -> tuple[Done | LastStep, rules.Update | None, rules.Clear | None, KernelTypes]:
        """Take the pass over all gradients, where one is needed, and return what a step is made of.

        That is what it will have done, its coefficients (None for a step that is skipped), whether gradients
        are cleared, and what to compile for.
        """
        scale = divisor(grad_scale, summed, c.dtype)
        clear = rules.Clear() if summed else c.clear
        types = c.types if scale is None else c.scaled_types
        if summed:
            types = types._replace(clear=rules.Clear)
        step = state._step + 1
        last: Done | LastStep
        if not c.reads_gradients_first:
            update = c.update(step, scale)
            last = Done(step, c.lr)
            if self._hyperparameters.telemetry:
                last = kernels.watch(last, scale)
            return last, update, clear, types

        if self._scratch is None or self._scratch.size < kernels.scratch_size(grads.size):
            self._scratch = np.empty(kernels.scratch_size(grads.size))
        squares, nonfinite = kernels.measure(grads, self._scratch)
        norm = rules.grad_norm(squares, 1.0 if scale is None else scale)
        factor = c.clip_factor(norm)
        if c.skips and nonfinite:
            return Done(step - 1, c.lr_of(step), norm, factor, True, nonfinite), None, clear, types
        update = c.update(step, scale, factor)
        last = Done(step, c.lr, norm, factor, False, nonfinite)
        if self._hyperparameters.telemetry:
            last = kernels.watch(last, scale)
        return last, update, clear, types

    def _other_loops(
        self,
        c: Coefficients,
        params: buffers.Buffer,
        grads: buffers.Buffer,
        state: State,
        out: object,
        alike: bool,
    ) -> Any:
        """Return what takes the place of the backend for the next step."""
        h = self._hyperparameters
        storage, step = PLAIN, state._step + 1
        kinds: tuple[object, ...] = ()
        if out is not None or not alike or not h.stores_plainly:
            storage, kinds = stored.storage_of(h, cast("buffers.Array", params), grads, out, state, step)
        found = self._segmented
        if found is None or found.c is not c or found.size != params.size:
            found = self._segmented = Segmented(self._segments or Segments(()), h, c, params.size)
        found.step, found.storage, found.kinds = step, storage, kinds
        return found

    def _change(self, **values: Any) -> None:
        hyperparameters, state = self._hyperparameters.changed(**values), self._state
        coefficients, clock = None, state._clock
        is_lr = len(values) == 1 and "lr" in values
        if not is_lr and (state._names or state._step):
            self._require_same_states(hyperparameters, values)
        if self._capturable:
            clocks.require_possible(hyperparameters, self._segments)
        if clock is not None:
            if self._capturable:
                for name in values.keys() - {"lr"}:
                    raise ValueError(
                        f"{name} must stay {getattr(self, name)} once a capturable step was taken; got"
                        f" {values[name]}. Only lr may change, until reset."
                    )
            coefficients = Coefficients(hyperparameters, clock.types.dtype)
            old, lr = self.lr, hyperparameters.lr
            sets_lr = is_lr and not callable(old) and not callable(lr)
            present = self._hyperparameters
            if not (sets_lr and clocks.set_lr(clock, present, hyperparameters, self._library)):
                state.leave_clock()
        elif is_lr:
            coefficients = self._with_lr(hyperparameters.lr)
        self._hyperparameters, self._coefficients = hyperparameters, coefficients
        if "telemetry" in values:
            self._use(Segments(self.segments))  # other loops

    def _require_same_states(self, hyperparameters: Hyperparameters, values: Mapping[str, Any]) -> None:
        """Raise ValueError if a change asks for another state than there is."""
        old, new = self._hyperparameters.state, hyperparameters.state
        if old != new:
            (name,) = values
            raise ValueError(
                f"{name} must keep what the state has, {list(old)}; got {values[name]}, which needs"
                f" {list(new)}. Reset the optimizer first."
            )

    def _with_lr(self, lr: float | Schedule) -> Coefficients | None:
        """Return the present coefficients with another learning rate, where that is possible."""
        c = self._coefficients
        if c is None or callable(lr) or callable(self.lr) or self.segments:
            return None
        if self._last is c:
            self._last = Done(self._state._step, c.lr)
        try:
            c.set_lr(lr)
        except ValueError:  # too large or small for the dtype: the next step says so
            return None
        return c

    def _replace_state(self, state: State, accumulator: Accumulator) -> None:
        self._state, self._accumulator = state, accumulator
        self._coefficients = self._prepared = self._kernels = self._last = None
