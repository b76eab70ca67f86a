"""The optimizer: what a user calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any, cast

from fastadam import backends, buffers, clocks, device_buffers, streams
from fastadam.checks import require_flag
from fastadam.hyperparameters import Coefficients, Hyperparameters
from fastadam.kernels.cuda import Cuda, DeviceBuffer
from fastadam.state import State, plain, require_keys


class FusedAdam:
    r"""Adam, in one fused pass over flat buffers, in place.

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1}
            - \text{lr} \cdot \frac{m_t}{1 - \beta_1^t}
            \Big/ \Big( \sqrt{\frac{v_t}{1 - \beta_2^t}} + \text{eps} \Big)

    The moments are allocated on the first step, and are all that it allocates: 8 bytes per float32 parameter
    (12 with AMSGrad), on the device of the parameters. One optimizer may not step in two threads at once;
    different optimizers may.

    Parameters
    ----------
    lr : float, default 1e-3
        Learning rate, at least 0.
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
    backend : {None, "cpu", "cupy", "numba-cuda"}, default None
        What runs the steps. None chooses by the buffers of the first step: for arrays in GPU memory CuPy, or
        numba-cuda where CuPy is not installed.
    capturable : bool, default False
        Keep the step counter and the learning rate in GPU memory, so that a step captured in a CUDA graph
        counts on, and follows :attr:`lr`, with every replay. The bits are the same. Both betas must be at
        most 1 - 2**-18.

    Raises
    ------
    TypeError
        If a hyperparameter is not of its type.
    ValueError
        If a hyperparameter is not finite or out of its range, or there is no such backend.
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
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        amsgrad: bool = False,
        maximize: bool = False,
        backend: str | None = None,
        capturable: bool = False,
    ) -> None:
        self._hyperparameters = Hyperparameters(
            lr, betas, eps, weight_decay, decoupled_weight_decay, amsgrad, maximize
        )
        self._backend = backends.require_name(backend)
        self._capturable = require_flag("capturable", capturable)
        if self._capturable:
            clocks.require_betas(self._hyperparameters)
        self._coefficients: Coefficients | None = None
        self._prepared: object = None  # the types for which the kernels were compiled
        self._state = State()
        self._kernels: Any = None  # the backend, from the first step on
        self._library = ""  # whose current stream the last capturable step took

    def step(self, flat_params: object, flat_grads: object, *, stream: object = None) -> None:
        """Advance the parameters by one step, in place.

        Reads ``flat_params``, ``flat_grads`` and the moments, writes ``flat_params`` and the moments: 28
        bytes per float32 element. A call that raises has changed nothing; only what a signal handler raises,
        such as ``KeyboardInterrupt``, may follow a step that was taken whole and counted.

        On a GPU the step is queued, and the call returns: it waits for nothing, and copies nothing once the
        moments are there.

        Parameters
        ----------
        flat_params : array_like
            The parameters, n elements, read and written: a C-contiguous, writable array of any shape, float32
            or float64. In CPU memory, NumPy's or anything that shares its memory (DLPack,
            ``__array_interface__``, buffer protocol), such as a detached torch tensor. In GPU memory, aligned
            to its elements, CuPy's, Numba's or anything with ``__cuda_array_interface__`` or DLPack.
        flat_grads : array_like
            The gradients, n elements of the same dtype on the same device, read only. May be read-only.
        stream : optional
            The CUDA stream on which to queue the step: an object of any library, or the handle. Without it,
            the current stream of the library that made ``flat_params``, in the right order with that of
            ``flat_grads``.

        Raises
        ------
        TypeError
            If a buffer is not an array, cannot be shared or written to in place, has another dtype than
            float32, float64, the parameters or the moments, or lies elsewhere than the parameters, the
            moments or the backend; or if ``stream`` is no stream.
        ValueError
            If a buffer is not contiguous, the parameters are read-only, sizes differ, or buffers overlap; or
            if the stream is being captured and the step could not be replayed.
        ImportError
            If a CUDA array comes and no CUDA backend is installed.
        """
        params, grads = self._flat(flat_params, flat_grads, stream)
        state, kernels = self._state, self._kernels
        if kernels is None:  # the first step, or the first after load_state_dict
            kernels, state = self._begin(params, grads)
        moments, block = state._arrays, state._block
        buffers.require_same_layout("flat_params", params, "the state", moments[0])
        buffers.require_disjoint("flat_params", params, "the state", block)
        buffers.require_disjoint("flat_grads", grads, "the state", block)

        c = self._coefficients
        if c is None or c.dtype != params.dtype:
            c = self._coefficients = Coefficients(self._hyperparameters, params.dtype)
        on_device = isinstance(params, DeviceBuffer)
        if on_device:
            take = self._plan_on_device(kernels, state, params, grads, c)
        else:
            if self._prepared != c.types:
                kernels.prepare(params, grads, moments, c.direction, c.decay, c.rule(1))
                self._prepared = c.types
            take = kernels.plan(params, grads, moments, c.direction, c.decay, c.rule(state._step + 1))

        # A step on the CPU runs to its end whatever a signal handler raises meanwhile (Ctrl-C), so it is
        # counted before. One on a GPU is queued in a moment, or refused by CUDA, so it is counted after.
        if on_device:
            take()
        self._state, self._kernels = state, kernels
        state.advance()
        if not on_device:
            take()
        if self._capturable:
            self._library = "" if stream is not None else device_buffers.library(flat_params)

    @property
    def state(self) -> State:
        """The moments and the step counter."""
        return self._state

    def reset(self) -> None:
        """Forget all steps: drop the moments and the step counter, keep the hyperparameters.

        A CUDA graph that holds a step must be captured again.
        """
        self._replace_state(State())

    def state_dict(self) -> dict[str, Any]:
        """Return all that a bit-exact resume needs.

        Returns
        -------
        dict
            The hyperparameters, ``"step"`` (int) and, once a step was taken, a copy of each moment, shape
            (n,), in CPU memory whatever the backend. Plain arrays and numbers:
            ``numpy.savez(file, **opt.state_dict())`` stores it, and any backend resumes from it.
        """
        return {**asdict(self._hyperparameters), **self._state.to_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the hyperparameters, the moments and the step counter.

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
        require_keys(entries, names)
        hyperparameters = Hyperparameters(**{name: plain(entries.pop(name)) for name in names})
        if self._capturable:
            clocks.require_betas(hyperparameters)
        state = State.from_dict(entries, hyperparameters.moments, self._state)
        self._hyperparameters = hyperparameters
        self._replace_state(state)

    @property
    def backend(self) -> str | None:
        """The name of the backend that takes the steps; None before the first step if none was asked for."""
        return self._backend if self._kernels is None else self._kernels.name

    @property
    def capturable(self) -> bool:
        """Whether the step counter and the learning rate are kept in GPU memory."""
        return self._capturable

    @property
    def lr(self) -> float:
        """Learning rate; set it between steps.

        With ``capturable=True`` setting it is queued on the current stream, or that given to the last step.
        """
        return self._hyperparameters.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._change(lr=value)

    @property
    def betas(self) -> tuple[float, float]:
        """Decay rates of the moments; set them between steps."""
        return self._hyperparameters.betas

    @betas.setter
    def betas(self, value: tuple[float, float]) -> None:
        self._change(betas=value)

    @property
    def eps(self) -> float:
        """Added to the root of the second moment; set it between steps."""
        return self._hyperparameters.eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._change(eps=value)

    @property
    def weight_decay(self) -> float:
        """Weight decay; set it between steps."""
        return self._hyperparameters.weight_decay

    @weight_decay.setter
    def weight_decay(self, value: float) -> None:
        self._change(weight_decay=value)

    @property
    def decoupled_weight_decay(self) -> bool:
        """Whether weight decay is AdamW's."""
        return self._hyperparameters.decoupled_weight_decay

    @property
    def amsgrad(self) -> bool:
        """Whether the maximum of the second moments is kept and used."""
        return self._hyperparameters.amsgrad

    @property
    def maximize(self) -> bool:
        """Whether steps ascend."""
        return self._hyperparameters.maximize

    def _flat(
        self, flat_params: object, flat_grads: object, stream: object
    ) -> tuple[buffers.Buffer, buffers.Buffer]:
        """View the arguments of a step as buffers that fit each other."""
        params = buffers.flat(flat_params, "flat_params", writable=True, backend=self._backend)
        grads = buffers.flat(flat_grads, "flat_grads", writable=False, backend=self._backend)
        buffers.require_same_layout("flat_grads", grads, "flat_params", params)
        buffers.require_disjoint("flat_grads", grads, "flat_params", params)
        if isinstance(params, DeviceBuffer) and isinstance(grads, DeviceBuffer):
            return streams.bind(params, grads, stream)
        if stream is not None:
            raise TypeError("stream must be None for buffers in CPU memory; got a stream.")
        return params, grads

    def _begin(self, params: buffers.Buffer, grads: buffers.Buffer) -> tuple[Any, State]:
        """Choose the backend for the parameters, and have the state where they are."""
        state, on_device = self._state, isinstance(params, DeviceBuffer)
        if state._kernels is not None:  # shared with a copy of this optimizer that has stepped
            return state._kernels, state
        name = self._backend or (backends.cuda() if on_device else "cpu")
        for wanted, reason in (
            (name != "cpu", f"for backend={name!r}"),
            (on_device or self._capturable, "with capturable=True"),
        ):
            if wanted != on_device:
                memory = "GPU memory" if wanted else "CPU memory"
                raise TypeError(f"flat_params must be in {memory} {reason}; got {buffers.place(params)}.")
        kernels, names = backends.load(name), self._hyperparameters.moments
        if state._arrays:
            buffers.require_same_size("flat_params", params, "the state", state._arrays[0])
        if isinstance(params, DeviceBuffer):
            if streams.is_captured(kernels, params, cast("DeviceBuffer", grads)):
                raise ValueError(
                    "stream must not be in capture: the first step allocates the moments."
                    " Take one step before."
                )
            return kernels, State.on_device(kernels, params, names, state)
        return kernels, state if state._arrays else State(names, params.size, params.dtype, state.step)

    def _plan_on_device(
        self, kernels: Cuda, state: State, params: Any, grads: Any, c: Coefficients
    ) -> Callable[[], None]:
        """Return the call that queues a step, counted by the state's clock where there is one."""
        captured = streams.is_captured(kernels, params, grads)
        moments: Any = state._arrays
        if self._capturable:
            if state._clock is None:
                state._clock = clocks.make(kernels, params, self._hyperparameters, c, state._step)
            return kernels.plan_captured(params, grads, moments, state._clock)
        if captured:
            raise ValueError(
                "stream must not be in capture: every replay would repeat this step number."
                " Use FusedAdam(capturable=True)."
            )
        return kernels.plan(params, grads, moments, c.direction, c.decay, c.rule(state._step + 1))

    def _change(self, **values: Any) -> None:
        hyperparameters, clock = self._hyperparameters.changed(**values), self._state._clock
        coefficients = None
        if clock is not None:
            for name in values.keys() - {"lr"}:
                raise ValueError(
                    f"{name} must stay {getattr(self, name)} once a capturable step was taken; got"
                    f" {values[name]}. Only lr may change, until reset."
                )
            coefficients = Coefficients(hyperparameters, clock.types.dtype)
            clock.set_lr(hyperparameters.lr, streams.for_lr(clock, self._library))
        elif self._capturable:
            clocks.require_betas(hyperparameters)
        self._hyperparameters, self._coefficients = hyperparameters, coefficients

    def _replace_state(self, state: State) -> None:
        self._state = state
        self._coefficients = self._prepared = self._kernels = None

    def __getstate__(self) -> dict[str, Any]:
        # Modules and kernels are not copied; a deep copy has its moments in CPU memory until its first step.
        return {**self.__dict__, "_coefficients": None, "_prepared": None, "_kernels": None}

    def __repr__(self) -> str:
        values = asdict(self._hyperparameters)
        if self._backend is not None:
            values["backend"] = self._backend
        if self._capturable:
            values["capturable"] = True
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"
