"""The optimizer: what a user calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from fastadam import backends, buffers
from fastadam.hyperparameters import Coefficients, Hyperparameters
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
    (12 with AMSGrad). One optimizer may not step in two threads at once; different optimizers may.

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

    Raises
    ------
    TypeError
        If a hyperparameter is not of its type.
    ValueError
        If a hyperparameter is not finite or out of its range.

    Notes
    -----
    Names, meanings and defaults are those of ``torch.optim.Adam``; ``decoupled_weight_decay=True`` makes it
    ``torch.optim.AdamW``, whose default ``weight_decay`` is 0.01. The arithmetic is that of the parameters'
    dtype, and every operation rounds once: the same inputs give the same bits with any number of threads and
    any split of the buffer. See :mod:`fastadam.kernels.rules`.

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
    ) -> None:
        self._hyperparameters = Hyperparameters(
            lr, betas, eps, weight_decay, decoupled_weight_decay, amsgrad, maximize
        )
        self._coefficients: Coefficients | None = None
        self._prepared: object = None  # the types for which the kernels were compiled
        self._state = State()

    def step(self, flat_params: object, flat_grads: object) -> None:
        """Advance the parameters by one step, in place.

        Reads ``flat_params``, ``flat_grads`` and the moments, writes ``flat_params`` and the moments: 28
        bytes per float32 element. A call that raises has changed nothing; only what a signal handler raises,
        such as ``KeyboardInterrupt``, may follow a step that was taken whole and counted.

        Parameters
        ----------
        flat_params : array_like
            The parameters, n elements, read and written: a C-contiguous, writable array of any shape, float32
            or float64, in CPU memory; NumPy's or anything that shares its memory (DLPack,
            ``__array_interface__``, buffer protocol), such as a detached torch tensor.
        flat_grads : array_like
            The gradients, n elements of the same dtype, read only. May be read-only.

        Raises
        ------
        TypeError
            If a buffer is not an array in CPU memory, cannot be shared or written to in place, or has another
            dtype than float32, float64, the parameters or the moments.
        ValueError
            If a buffer is not contiguous, the parameters are read-only, sizes differ, or buffers overlap.
        """
        params = buffers.flat(flat_params, "flat_params", writable=True)
        grads = buffers.flat(flat_grads, "flat_grads", writable=False)
        buffers.require_same_layout("flat_grads", grads, "flat_params", params)
        buffers.require_disjoint("flat_grads", grads, "flat_params", params)

        state = self._state
        moments, block = state._arrays, state._block
        if moments:
            buffers.require_same_layout("flat_params", params, "the state", moments[0])
            buffers.require_disjoint("flat_params", params, "the state", block)
            buffers.require_disjoint("flat_grads", grads, "the state", block)
        else:  # the first step
            state = State(self._hyperparameters.moments, params.size, params.dtype)
            moments = state._arrays

        kernels, c = backends.cpu(), self._coefficients
        if c is None or c.dtype != params.dtype:
            c = Coefficients(self._hyperparameters, params.dtype)
            if self._prepared != c.types:
                kernels.prepare(params, grads, moments, c.direction, c.decay, c.rule(1))
                self._prepared = c.types
            self._coefficients = c
        rule = c.rule(state.step + 1)

        take = kernels.plan(params, grads, moments, c.direction, c.decay, rule)

        # Nothing fails from here on. What a signal handler raises (Ctrl-C) comes when the step is taken to
        # its end, so it is counted before.
        state.advance()
        self._state = state
        take()

    @property
    def state(self) -> State:
        """The moments and the step counter."""
        return self._state

    def reset(self) -> None:
        """Forget all steps: drop the moments and the step counter, keep the hyperparameters."""
        self._state, self._coefficients, self._prepared = State(), None, None

    def state_dict(self) -> dict[str, Any]:
        """Return all that a bit-exact resume needs.

        Returns
        -------
        dict
            The hyperparameters, ``"step"`` (int) and, once a step was taken, a copy of each moment, shape
            (n,). Plain arrays and numbers: ``numpy.savez(file, **opt.state_dict())`` stores it.
        """
        return {**asdict(self._hyperparameters), **self._state.to_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the hyperparameters, the moments and the step counter.

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
        state = State.from_dict(entries, hyperparameters.moments, self._state)
        self._hyperparameters, self._state = hyperparameters, state
        self._coefficients = self._prepared = None

    @property
    def lr(self) -> float:
        """Learning rate; set it between steps."""
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

    def _change(self, **values: Any) -> None:
        self._hyperparameters = self._hyperparameters.changed(**values)
        self._coefficients = None

    def __repr__(self) -> str:
        values = asdict(self._hyperparameters)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"


def warmup(*, dtype: Any = np.float32, **hyperparameters: Any) -> None:
    """Compile the kernels ahead of the first step, or load them from the disk cache.

    Parameters
    ----------
    dtype : dtype, default float32
        float32 or float64.
    **hyperparameters
        Those of :class:`FusedAdam`. Which kernel is compiled depends on the flags and on whether there is
        weight decay, not on the numbers.

    Raises
    ------
    TypeError, ValueError
        As :class:`FusedAdam` does.

    Examples
    --------
    >>> import fastadam
    >>> fastadam.warmup(weight_decay=0.01, decoupled_weight_decay=True)
    """
    h = FusedAdam(**hyperparameters)._hyperparameters
    math_dtype = buffers.flat(np.empty(0, dtype), "dtype", writable=True).dtype
    c = Coefficients(h, math_dtype)
    backends.cpu().warmup(math_dtype, len(h.moments), c.direction, c.decay, c.rule(1))
