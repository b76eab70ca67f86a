"""State from and for optax's ``adam`` and ``adamw``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fastadam.adam import FusedAdam
from fastadam.exchanged import (
    Layout,
    load,
    require_no_amsgrad,
    require_optimizer,
    require_size,
    unload,
)
from fastadam.flat import Flat

_KIND = "ScaleByAdamState"


def from_optax(opt: FusedAdam, opt_state: Any, *, flat: Flat | None = None) -> None:
    """Load the ``ScaleByAdamState`` of optax: the next step goes on where that stopped.

    The hyperparameters stay, for optax keeps none in its state. A call that raises has changed nothing.

    Parameters
    ----------
    opt : FusedAdam
    opt_state : pytree
        A ``ScaleByAdamState``, or the state of a chain in which there is one, at any depth.
    flat : Flat, optional
        What :func:`fastadam.flatten` made of the parameters: moments are found by their names. Without it
        the buffer is in the order of ``jax.flatten_util.ravel_pytree``, which sorts the keys of dicts.

    Raises
    ------
    TypeError
        If a value is not of its type.
    ValueError
        If there is no such state or several, or its arrays are not those of the buffer.

    Notes
    -----
    ``optax.amsgrad`` keeps the maximum of debiased moments, PyTorch and fastadam that of the others: it
    cannot be taken over. ``optax.adamax`` has a ``ScaleByAdamState``, too, and means another one.
    """
    require_optimizer(opt)
    require_no_amsgrad(opt, "optax.adam")
    adam = _only_adam(opt_state)
    mu, layout = _layout(adam.mu, flat)
    nu, _ = _layout(adam.nu, flat)
    if len(mu) != len(nu):
        raise ValueError(f"opt_state.nu must have the arrays of opt_state.mu ({len(mu)}); got {len(nu)}.")
    load(opt, int(adam.count), {"exp_avg": layout.join(mu), "exp_avg_sq": layout.join(nu)})


def to_optax(opt: FusedAdam, opt_state: Any, *, flat: Flat | None = None) -> Any:
    """Return a state like that of optax, with the moments and the step counter of an optimizer.

    Parameters
    ----------
    opt : FusedAdam
        Which has taken a step; nothing of it changes.
    opt_state : pytree
        As for :func:`from_optax`: such as ``optimizer.init(params)`` returns. It is only read.
    flat : Flat, optional
        As for :func:`from_optax`.

    Returns
    -------
    pytree
        The containers of ``opt_state`` and its dtypes. Other counts in it that are equal to that of its
        ``ScaleByAdamState``, such as the place in a schedule, follow.

    Raises
    ------
    TypeError, ValueError
        As :func:`from_optax` does, or if ``opt`` has taken no step.
    """
    import jax

    entries = unload(opt)
    require_no_amsgrad(opt, "optax.adam")
    adam = _only_adam(opt_state)
    leaves, layout = _layout(adam.mu, flat)
    require_size("opt_state", layout, entries)
    old, tree_order = int(adam.count), jax.tree_util.tree_leaves(adam.mu)

    def arrays(tree: Any, name: str) -> Any:
        found, treedef = jax.tree_util.tree_flatten(tree)
        parts = dict(zip(map(id, leaves), layout.split(entries[name]), strict=True))
        new = [
            jax.numpy.asarray(parts[id(of)].reshape(leaf.shape), leaf.dtype)
            for of, leaf in zip(tree_order, found, strict=True)
        ]
        return jax.tree_util.tree_unflatten(treedef, new)

    def renewed(state: Any) -> Any:
        if state is adam:
            return state._replace(
                count=_count(entries["step"], state.count),
                mu=arrays(state.mu, "exp_avg"),
                nu=arrays(state.nu, "exp_avg_sq"),
            )
        if "count" in getattr(state, "_fields", ()) and np.ndim(state.count) == 0 and int(state.count) == old:
            return state._replace(count=_count(entries["step"], state.count))
        return state

    return _mapped(opt_state, renewed)


def _count(step: int, like: Any) -> Any:
    import jax

    return jax.numpy.asarray(step, getattr(like, "dtype", np.int32))


def _mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Return containers with each changed, from the outside in."""
    new = change(tree)
    if new is not tree and type(new).__name__ == _KIND:
        return new
    if isinstance(new, Mapping):
        return type(new)({key: _mapped(child, change) for key, child in new.items()})  # type: ignore[call-arg]
    if isinstance(new, tuple) and hasattr(new, "_fields"):
        return type(new)(*(_mapped(child, change) for child in new))
    return type(new)(_mapped(child, change) for child in new) if isinstance(new, (tuple, list)) else new


def _only_adam(opt_state: Any) -> Any:
    found: list[Any] = []
    kinds: list[str] = []

    def look(state: Any) -> Any:
        if hasattr(state, "_fields"):
            kinds.append(type(state).__name__)
        if type(state).__name__ == _KIND:
            found.append(state)
        return state

    _mapped(opt_state, look)
    if len(found) != 1:
        got = f"{len(found)} of it" if found else ", ".join(kinds) or type(opt_state).__name__
        raise ValueError(f"opt_state must have one ScaleByAdamState; got {got}.")
    return found[0]


def _layout(tree: Any, flat: Flat | None) -> tuple[list[Any], Layout]:
    """Return arrays of a pytree in the order of the buffer, and where they lie."""
    import jax

    named = {
        ".".join(str(_key(key)) for key in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    names = list(named)
    if isinstance(flat, Flat):
        if set(names) != set(flat.names):
            raise ValueError(
                f"flat must have the names of opt_state, {sorted(names)}; got {sorted(flat.names)}."
            )
        names = list(flat.names)
    labels, leaves = [f"opt_state[{name!r}]" for name in names], [named[name] for name in names]
    return leaves, Layout(labels, [int(np.size(leaf)) for leaf in leaves], flat)


def _key(key: Any) -> object:
    """Return a key of a dict, a place in a sequence or the name of a field."""
    for name in ("key", "idx", "name"):
        if hasattr(key, name):
            return getattr(key, name)
    return key
