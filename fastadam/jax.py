"""Adam as a pure function of JAX's flat arrays: new ones are returned, and nothing is written to.

See ``docs/jax.md`` for what the copies cost, and when to keep NumPy buffers instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import numpy as np

from fastadam import buffers, stored
from fastadam.adam import AdamHyperparameters, FusedAdam
from fastadam.arrays import Scalar
from fastadam.checks import count
from fastadam.hyperparameters import Hyperparameters, Schedule
from fastadam.libraries import NUMPY
from fastadam.segments import Segment, Segments
from fastadam.state import State

Array: TypeAlias = Any
"""An array of JAX or NumPy."""

_LARGEST_COUNT = 2**31 - 1
"""Steps that an int32 counts: JAX has no int64 by default."""


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class AdamState:
    """What Adam remembers between steps: an immutable pytree.

    Its leaves are ``step`` and the arrays; the hyperparameters are part of its structure.

    Parameters
    ----------
    step : array of int32, shape ()
        Steps taken.
    arrays : dict of str to array
        The moments, and what else there is, named and stored as in ``FusedAdam.state_dict()``: ``exp_avg``
        and ``exp_avg_sq``, with PyTorch's meanings.
    hyperparameters : Hyperparameters
    segments : tuple of Segment
    """

    step: Array
    arrays: Mapping[str, Array]
    hyperparameters: Hyperparameters
    segments: tuple[Segment, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """Return what ``FusedAdam.load_state_dict`` takes, in NumPy arrays."""
        optimizer = FusedAdam(**vars(self.hyperparameters), segments=self.segments)
        own = {name: value for name, value in optimizer.state_dict().items() if name != "step"}
        return {**own, "step": int(self.step), **{k: np.array(v) for k, v in self.arrays.items()}}

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        """Return the leaves and what is static; for JAX."""
        names = tuple(self.arrays)
        key = jax.tree_util.GetAttrKey
        leaves = [(key("step"), self.step), *((key(name), self.arrays[name]) for name in names)]
        return leaves, (names, self.hyperparameters, self.segments)

    @classmethod
    def tree_unflatten(cls, static: Any, leaves: Iterable[Any]) -> AdamState:
        """Undo :meth:`tree_flatten_with_keys`; for JAX."""
        names, hyperparameters, segments = static
        steps, *arrays = leaves
        return cls(steps, dict(zip(names, arrays, strict=True)), hyperparameters, segments)


def init(flat_params: Array, *, segments: Iterable[Segment] = (), **hyperparameters: Any) -> AdamState:
    """Return the state before the first step.

    Parameters
    ----------
    flat_params : array, shape (n,)
        Of JAX or NumPy, such as ``jax.flatten_util.ravel_pytree`` returns; it is only read.
    segments : iterable of Segment
    **hyperparameters
        Those of :class:`fastadam.FusedAdam`, but for ``zero_grads`` and ``telemetry``.

    Raises
    ------
    TypeError
        If a value is not of its type, or the parameters cannot be those of a step.
    ValueError
        If a value is out of its range.

    Examples
    --------
    >>> import jax
    >>> import fastadam.jax
    >>> from jax.flatten_util import ravel_pytree
    >>> flat_params, unravel = ravel_pytree({"w": jax.numpy.ones(2), "b": jax.numpy.zeros(1)})
    >>> loss = lambda flat: (unravel(flat)["w"] ** 2).sum() + unravel(flat)["b"][0]
    >>> state = fastadam.jax.init(flat_params, lr=0.25)
    >>> flat_params, state = fastadam.jax.step(flat_params, jax.grad(loss)(flat_params), state)
    >>> unravel(flat_params)["w"].tolist(), int(state.step)
    ([0.75, 0.75], 1)
    """
    h = AdamHyperparameters(**hyperparameters)
    for name in ("zero_grads", "telemetry"):
        if getattr(h, name):
            why = "gradients are not written to" if name == "zero_grads" else "there is no last_step"
            raise ValueError(f"{name} must be False in fastadam.jax, where {why}; got True.")
    given = Segments(segments)
    params = buffers.flat(_host(flat_params, "flat_params"), "flat_params", writable=False)
    _require_possible_in_jax(params.dtype)
    stored.require_possible(h, params.dtype)
    given.units(params.size)
    kinds = h.formats()
    entries = State.of_params(params, h.state, kinds, stored.master_of(h), State()).to_dict()  # type: ignore[arg-type]
    steps = np.asarray(entries.pop("step"), np.int32)
    steps, arrays = _to_jax((steps, entries))
    return AdamState(steps, arrays, h, given.given)


def step(
    flat_params: Array,
    flat_grads: Array,
    state: AdamState,
    *,
    lr: float | Schedule | None = None,
    grad_scale: Scalar | None = None,
) -> tuple[Array, AdamState]:
    """Return the parameters and the state after a step; those given stay as they are.

    The bits are those of :meth:`fastadam.FusedAdam.step`. Call it outside of ``jax.jit``, with what a
    compiled function of the parameters returns.

    Parameters
    ----------
    flat_params, flat_grads : array, shape (n,)
        Of JAX or NumPy, in CPU memory.
    state : AdamState
        What :func:`init` or the last step returned.
    lr : float, optional
        Learning rate of this step, in place of that in the state's hyperparameters.
    grad_scale : float, optional
        What the loss was multiplied with, greater than 0.

    Returns
    -------
    flat_params : jax.Array, shape (n,)
    state : AdamState

    Raises
    ------
    TypeError, ValueError
        As :meth:`fastadam.FusedAdam.step` does, or if arrays are tracers or not in CPU memory.
    """
    if not isinstance(state, AdamState):
        raise TypeError(f"state must be what fastadam.jax.init returns; got {type(state).__name__}.")
    given = _host(flat_params, "flat_params")
    _require_possible_in_jax(given.dtype)
    grads = _host(flat_grads, "flat_grads")
    taken = count("state.step", int(_host(state.step, "state.step")), least=0)
    if taken >= _LARGEST_COUNT:
        raise ValueError(f"state.step must be less than {_LARGEST_COUNT}; got {taken}.")
    kept = {name: _host(array, f"state.arrays[{name!r}]") for name, array in state.arrays.items()}

    # It lives for this call and writes to copies: what it leaves behind is nobody else's, and becomes JAX's.
    params = NUMPY.aligned_zeros(given.size, given).reshape(given.shape)
    params[...] = given
    optimizer = FusedAdam(**vars(state.hyperparameters), segments=state.segments)
    if lr is not None:
        optimizer.lr = lr
    h = optimizer._hyperparameters
    said = h.formats()
    optimizer._state = State.from_dict({"step": taken, **kept}, h.state, State(), said=said, wanted=said)
    optimizer.step(params, grads, grad_scale=grad_scale)
    entries = optimizer.state.to_dict(copy=False)
    steps = np.asarray(entries.pop("step"), np.int32)
    params, steps, arrays = _to_jax((params, steps, entries))
    return params, replace(state, step=steps, arrays=arrays)


def _to_jax(arrays: Any) -> Any:
    """Return arrays that nobody else has as JAX's, in CPU memory, aligned ones without a copy."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return jax.device_put(arrays)  # jax.numpy.asarray would copy


def _host(array: Any, label: str) -> Any:
    """Return an array as NumPy's, without a copy, from CPU memory only."""
    if isinstance(array, jax.core.Tracer):
        # jax.pure_callback would do, but waits for ever where JAX has one thread (docs/jax.md).
        raise TypeError(
            f"{label} must be an array outside of jax.jit; got a tracer. Compile the function that returns"
            " the gradients, and step with its result."
        )
    if isinstance(array, np.ndarray):
        return array
    if not isinstance(array, jax.Array):
        raise TypeError(f"{label} must be an array of JAX or NumPy; got {type(array).__name__}.")
    for device in array.devices():
        if device.platform != "cpu":
            raise TypeError(
                f"{label} must be in CPU memory; got {device}. Use FusedAdam with arrays of CuPy there."
            )
    return np.asarray(array)


def _require_possible_in_jax(dtype: Any) -> None:
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise TypeError(
            "flat_params must be of at most 32 bits while jax_enable_x64 is off; got float64."
            " Use FusedAdam, or jax.config.update('jax_enable_x64', True)."
        )
