"""The optimizer: what a user calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import partial
from os import PathLike
from typing import Any, Self, SupportsIndex, cast

import numpy as np

from fastadam import (
    backends,
    buffers,
    clocks,
    device_buffers,
    device_steps,
    formats,
    precision,
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
from fastadam.hyperparameters import Coefficients, Hyperparameters, Schedule, divisor
from fastadam.kernels import rules
from fastadam.kernels.cuda import DeviceBuffer, KernelTypes
from fastadam.kernels.cuda_clock import Clock
from fastadam.kernels.rounding import PLAIN
from fastadam.last_step import Done, LastStep
from fastadam.loss_scale import DynamicLossScale
from fastadam.progress import Progress
from fastadam.segmented import Segmented
from fastadam.segments import Segment, Segments
from fastadam.state import State, plain, require_keys
from fastadam.tunables import Tunables


class FusedAdam(Tunables):
    r"""Adam, in one fused pass over flat buffers, in place.

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1}
            - \text{lr} \cdot \frac{m_t}{1 - \beta_1^t}
            \Big/ \Big( \sqrt{\frac{v_t}{1 - \beta_2^t}} + \text{eps} \Big)

    The moments are allocated on the first step: 8 bytes per float32 parameter, 4 more with AMSGrad and 4 with
    the average of the parameters, on their device. Segments and telemetry keep tables beside them, some 0.05
    bytes per parameter. One optimizer may not step
    in two threads at once; different optimizers may.

    Parameters
    ----------
    lr : float or callable, default 1e-3
        Learning rate, at least 0, or a function of the step number, counted from 1, such as those of
        :mod:`fastadam.schedules`.
    betas : tuple of float, default (0.9, 0.999)
        Decay rates of the first and the second moment, each in [0, 1).
    eps : float, default 1e-8
        Added to the root of the second moment, after its bias correction; at least 0.
    weight_decay : float, default 0.0
        Weight decay, at least 0.
    decoupled_weight_decay : bool, default False
        False adds ``weight_decay * param`` to the gradient (L2). True is AdamW: it subtracts
        ``lr * weight_decay * param`` from the parameter, before the update.
    amsgrad : bool, default False
        Divide by the root of the maximum of all second moments so far.
    maximize : bool, default False
        Ascend: the gradient is negated, before any weight decay.
    max_grad_norm : float, optional
        Clip the gradient to this global norm, greater than 0; the meaning is that of
        ``torch.nn.utils.clip_grad_norm_``.
    max_grad_value : float, optional
        Clip each element of the gradient to this magnitude, greater than 0.
    skip_nonfinite : bool, default False
        Take no step where an element of the gradient is inf or NaN: nothing is written and nothing counted.
    ema_decay : float, optional
        Keep an exponential moving average of the parameters, ``state.param_ema``, with this decay, in [0, 1).
        It starts with the parameters before the first step. See :meth:`swap_ema`.
    zero_grads : bool, default False
        Set the gradients to zero when a step has used them, or skipped them.
    telemetry : bool, default False
        Report of each step the norms of the gradient, of the update and of the parameters, how many elements
        of the gradient were inf or NaN and how many updates rounded to nothing (:attr:`last_step`). They are
        formed in the same pass, and change no bit of it.
    state_dtype : {"float32", "bfloat16", "8bit"} or a pair of them, default "float32"
        How the moments are stored; a pair is for ``exp_avg`` and ``exp_avg_sq``. In 8 bits, blocks of 128
        elements share a scale. With float64 parameters only the default, which is float64 then. This and what
        follows: ``docs/storage.md``.
    master_params : {None, "float32", "split"}, default None
        Keep 16-bit parameters exactly, in the state: as float32, or as what is missing of bfloat16 parameters
        to it, 2 bytes.
    rounding : {"stochastic", "nearest"}, default "stochastic"
        Of what is stored in 16 or 8 bits: moments, and parameters without a master. To the nearest, averages
        stop following: their steps are smaller than half a unit in the last place.
    seed : int, default 0
        Of stochastic rounding, in [0, 2**53). There is no generator: (seed, step, element) give the bits.
    offset : int, default 0
        Index of the buffer's first element in the whole buffer of which it is a shard, in [0, 2**53). With
        moments in 8 bits shards have the bits of the whole where it is a multiple of 128.
    segments : iterable of Segment, default ()
        Parts of the buffer with hyperparameters of their own, which do not overlap: see
        :class:`fastadam.Segment`. What they do not set, and what lies in none, follows the optimizer's own.
    backend : {None, "cpu", "cupy", "numba-cuda"}, default None
        What runs the steps. None chooses by the buffers of the first step: for arrays in GPU memory CuPy, or
        numba-cuda where CuPy is not installed.
    capturable : bool, default False
        Keep the step counter and the learning rate in GPU memory, so that a step captured in a CUDA graph
        counts on, and follows :attr:`lr`, with every replay. The bits are the same. Betas, those of segments
        too, must be at most 1 - 2**-18, and no ``lr`` a function.

    Raises
    ------
    TypeError
        If a hyperparameter is not of its type.
    ValueError
        If a hyperparameter is not finite or out of its range, segments overlap, there is no such backend, or
        a schedule is to be captured.
    ImportError
        If the package that the backend needs is not installed.

    Notes
    -----
    Names, meanings and defaults are those of ``torch.optim.Adam``; ``decoupled_weight_decay=True`` makes it
    ``torch.optim.AdamW``, whose default ``weight_decay`` is 0.01. The arithmetic is that of the parameters'
    dtype, and every operation rounds once: the same inputs give the same bits with any number of threads, any
    split of the buffer, and on GPUs. See :mod:`fastadam.kernels.rules`.

    A gradient with inf or NaN is not an error: it reaches the parameter and the moments of its element only.
    So does one whose square overflows: its element becomes NaN with the next step.

    References
    ----------
    Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, Algorithm 1.
    Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, Algorithm 2.
    Reddi, Kale & Kumar, "On the Convergence of Adam and Beyond", ICLR 2018, Algorithm 2.

    Examples
    --------
    >>> import numpy as np
    >>> from fastadam import FusedAdam
    >>> params = np.array([1.0, -2.0], dtype=np.float32)
    >>> opt = FusedAdam(lr=0.1)
    >>> for _ in range(300):
    ...     opt.step(params, 2 * params)  # the gradient of params ** 2
    >>> bool(np.all(np.abs(params) < 1e-2))
    True
    >>> opt.state.step
    300
    """

    def __init__(
        self,
        lr: Number | Schedule = 1e-3,
        betas: tuple[Number, Number] | list[float] = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        amsgrad: bool = False,
        maximize: bool = False,
        max_grad_norm: Number | None = None,
        max_grad_value: Number | None = None,
        skip_nonfinite: bool = False,
        ema_decay: Number | None = None,
        zero_grads: bool = False,
        telemetry: bool = False,
        state_dtype: StateFormat | tuple[StateFormat, StateFormat] = "float32",
        master_params: MasterFormat | None = None,
        rounding: Rounding = "stochastic",
        seed: SupportsIndex = 0,
        offset: SupportsIndex = 0,
        segments: Iterable[Segment] = (),
        backend: BackendName | None = None,
        capturable: bool = False,
    ) -> None:
        values: tuple[Any, ...] = (  # numbers of NumPy too, which become plain ones
            lr,
            betas,
            eps,
            weight_decay,
            decoupled_weight_decay,
            amsgrad,
            maximize,
            max_grad_norm,
            max_grad_value,
            skip_nonfinite,
            ema_decay,
            zero_grads,
            telemetry,
            state_dtype,
            master_params,
            rounding,
            seed,
            offset,
        )
        self._hyperparameters = Hyperparameters(*values)
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
        if state._arrays:
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

    def reset(self) -> None:
        """Forget all steps: drop the moments and the step counter, keep the hyperparameters.

        A CUDA graph that holds a step must be captured again.
        """
        self._replace_state(State(), Accumulator())

    def state_dict(self) -> dict[str, Any]:
        """Return all that a bit-exact resume needs.

        Returns
        -------
        dict
            The hyperparameters, ``"step"`` (int) and, once a step was taken, a copy of each moment, shape
            (n,), in CPU memory whatever the backend. Plain arrays and numbers:
            ``numpy.savez(file, **opt.state_dict())`` stores it, and any backend resumes from it.

            ``"segments"``, where there are any, is a float64 array with a row for each: start, stop, lr,
            weight_decay, betas[0], betas[1], eps, frozen; NaN for what it does not set. Of a callable ``lr``
            there is the value of the last step.
        """
        values = self._hyperparameters.to_dict()
        if callable(self.lr):
            values["lr"] = float(self.lr(max(self._state.step, 1)))
        if self._segments is not None and self._segments.given:
            values["segments"] = self._segments.to_array(max(self._state.step, 1))
        return {**values, **self._state.to_dict(), **self._accumulator.to_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the hyperparameters, the segments, the moments and the step counter.

        ``state_dtype`` and ``master_params`` stay those of the optimizer: moments are converted, exactly or
        to the nearest, and masters that are not in it begin with the parameters of the next step.

        A callable ``lr`` stays: the optimizer's own, and that of a segment if one of the same elements is
        loaded. Where ``state_dict`` has no segments, there are none afterwards.

        The moments go to the device of the parameters with the next step. A CUDA graph that holds a step must
        be captured again.

        Parameters
        ----------
        state_dict : mapping
            What :meth:`state_dict` returned, or ``numpy.load`` of a file made of it. It is copied.

        Raises
        ------
        TypeError
            If it is not a mapping, or a value has a wrong type or dtype.
        ValueError
            If a key is missing or unknown, a value out of its range, or a moment of another size than the
            present state's; :meth:`reset` first to load a state of another size or dtype.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping; got {type(state_dict).__name__}.")
        entries = dict(state_dict)
        names = [field.name for field in fields(Hyperparameters)]
        require_keys(entries, names[: names.index("max_grad_norm")])  # the others may be None, or newer
        values = {name: plain(entries.pop(name)) for name in names if name in entries}
        if callable(self.lr):
            values["lr"] = self.lr
        said = precision.state_dtype("state_dtype", values.get("state_dtype", "float32"))
        master = precision.master_params("master_params", values.get("master_params"))
        if master not in {None, self.master_params}:
            raise ValueError(
                f"state_dict['master_params'] must be {self.master_params!r}, the optimizer's own; got"
                f" {master!r}. Make the optimizer with it."
            )
        values["state_dtype"], values["master_params"] = self.state_dtype, self.master_params
        array = entries.pop("segments", None)
        loaded = Segments(()) if array is None else Segments.from_array(array, self.segments)
        hyperparameters = Hyperparameters(**values)
        if self._capturable:
            clocks.require_possible(hyperparameters, loaded)
        accumulator = Accumulator.from_dict(entries)
        kinds = (precision.of_states(hyperparameters.state, kind) for kind in (said, self.state_dtype))
        said_of_each, wanted = kinds
        state = State.from_dict(entries, hyperparameters.state, self._state, said=said_of_each, wanted=wanted)
        self._hyperparameters = hyperparameters
        self._use(loaded)
        self._replace_state(state, accumulator)

    def save(
        self,
        path: str | PathLike[str],
        *,
        params: object = None,
        loss_scale: DynamicLossScale | None = None,
        extra: Any = None,
        progress: Progress = None,
    ) -> None:
        """Write a checkpoint from which :meth:`load` resumes bit for bit: ``docs/checkpoints.md``.

        A safetensors file, every byte under a checksum, that takes the place of the old one at once: whoever
        opens ``path`` finds one of them, whole, whenever the process is killed. Nothing is copied on the CPU.

        Parameters
        ----------
        path : path
            The file.
        params : array_like, optional
            The parameters, in CPU memory, to be kept beside the state.
        loss_scale : DynamicLossScale, optional
            To be kept, too.
        extra : optional
            Whatever JSON can hold: epochs, the state of a random generator.
        progress : None, bool or callable, default None
            None shows a bar from 1 GiB on, in a terminal with rich; True always. Or it is called with bytes,
            those done and all.

        Raises
        ------
        TypeError, ValueError, ImportError
            If an argument is not what it must be.
        OSError
            If the file cannot be written; the old one stays.
        """
        from fastadam import saving

        saving.save(self, path, params=params, loss_scale=loss_scale, extra=extra, show=progress)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        *,
        lr: float | Schedule | None = None,
        segments: Iterable[Segment] | None = None,
        backend: str | None = None,
        capturable: bool = False,
        params: object = None,
        loss_scale: DynamicLossScale | None = None,
        shard: tuple[int, int] | None = None,
        progress: Progress = None,
    ) -> Self:
        """Return the optimizer that :meth:`save` has written; a call that raises has changed nothing.

        Parameters
        ----------
        path : path
            The file.
        lr, segments : optional
            In place of those in the file. They must be given where one was a function other than those of
            :mod:`fastadam.schedules`: no file can hold it.
        backend, capturable
            As for the class; the file does not know them.
        params : array_like, optional
            Gets the parameters that were saved, in place.
        loss_scale : DynamicLossScale, optional
            Gets the loss scale that was saved, in place.
        shard : tuple of int, optional
            Load elements ``start`` up to, without, ``stop`` of the buffer alone; with moments in 8 bits,
            multiples of 128.
        progress
            As for :meth:`save`.

        Raises
        ------
        TypeError, ValueError, ImportError
            If an argument is not what it must be; if the file is damaged, something else, of a newer version,
            or has not what is asked for.
        OSError
            If it cannot be read.
        """
        from fastadam import resuming

        opt: Self = resuming.load(
            cls,
            path,
            lr=lr,
            segments=segments,
            params=params,
            loss_scale=loss_scale,
            shard=shard,
            show=progress,
            options={"backend": backend, "capturable": capturable},
        )
        return opt

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
        if state._arrays:
            buffers.require_same_size("flat_params", params, "the state", state._layout)
        stored.require_possible(h, params.dtype)
        kinds = precision.of_states(names, h.state_dtype)
        if isinstance(params, DeviceBuffer):
            if streams.is_captured(kernels, params, cast("DeviceBuffer", grads)):
                raise ValueError(
                    "stream must not be in capture: the first step allocates the moments."
                    " Take one step before."
                )
            return kernels, State.on_device(kernels, params, names, kinds, master, state)
        if not state._arrays or (state._master is None and master is not None):
            state = State.of_params(params, names, kinds, master, state)
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
            sets_lr = values.keys() == {"lr"} and not callable(old) and not callable(lr)
            present = self._hyperparameters
            if not (sets_lr and clocks.set_lr(clock, present, hyperparameters, self._library)):
                state.leave_clock()
        elif values.keys() == {"lr"}:
            coefficients = self._with_lr(hyperparameters.lr)
        self._hyperparameters, self._coefficients = hyperparameters, coefficients
        if "telemetry" in values:
            self._use(Segments(self.segments))  # other loops

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

    def __getstate__(self) -> dict[str, Any]:
        # Modules and kernels are not copied; a deep copy has its moments in CPU memory until its first step.
        nothing = dict.fromkeys(("_coefficients", "_segmented", "_prepared", "_kernels", "_scratch"))
        last = self.last_step
        return {**self.__dict__, **nothing, "_last": None if last is None else last._done}

    def __repr__(self) -> str:
        h = self._hyperparameters
        values = {
            field.name: getattr(h, field.name)
            for k, field in enumerate(fields(h))
            if k < 7 or getattr(h, field.name) != field.default
        }
        if self._backend is not None:
            values["backend"] = self._backend
        if self._capturable:
            values["capturable"] = True
        arguments = [f"{name}={value!r}" for name, value in values.items()]
        if self.segments:
            arguments.append(f"segments=<{len(self.segments)}>")
        return f"{type(self).__name__}({', '.join(arguments)})"
