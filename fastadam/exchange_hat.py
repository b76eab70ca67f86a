r"""State from and for the Adams of Keras and thinc, whose epsilon is "epsilon hat".

They divide by :math:`\sqrt{v_t} + \hat\epsilon` and correct the bias in the learning rate, as the paper does
just before its section 2.1; fastadam and PyTorch correct it in both moments, as Algorithm 1 does:

.. math::

    \text{lr} \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \cdot \frac{m_t}{\sqrt{v_t} + \hat\epsilon}
    = \text{lr} \frac{m_t}{1 - \beta_1^t}
      \Big/ \Big( \sqrt{\frac{v_t}{1 - \beta_2^t}} + \frac{\hat\epsilon}{\sqrt{1 - \beta_2^t}} \Big)

So one is the other at one step, and no constant is the other at all steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import sqrt
from typing import Any

import numpy as np

from fastadam.adam import FusedAdam
from fastadam.checks import at_least_zero, count
from fastadam.exchanged import (
    Layout,
    host,
    load,
    require_no_amsgrad,
    require_one_step,
    require_optimizer,
    require_size,
    unload,
)
from fastadam.flat import Flat
from fastadam.hyperparameters import CHECKS

_KERAS = {"exp_avg": "momentum", "exp_avg_sq": "velocity", "max_exp_avg_sq": "velocity_hat"}


def eps_of_hat(epsilon: float, beta2: float, step: int) -> float:
    """Return the ``eps`` that is Keras's or thinc's epsilon at a step: ``epsilon / sqrt(1 - beta2 ** step)``.

    Examples
    --------
    >>> [round(eps_of_hat(1e-7, 0.999, step), 10) for step in (1, 1000, 100_000)]
    [3.1623e-06, 1.258e-07, 1e-07]
    """
    return at_least_zero("epsilon", epsilon) / _root(beta2, step)


def hat_of_eps(eps: float, beta2: float, step: int) -> float:
    """Return the epsilon of Keras or thinc that is ``eps`` at a step: ``eps * sqrt(1 - beta2 ** step)``.

    Examples
    --------
    >>> round(hat_of_eps(1e-8, 0.999, 1), 14)
    3.1623e-10
    """
    return at_least_zero("eps", eps) * _root(beta2, step)


def _root(beta2: float, step: int) -> float:
    beta: float = CHECKS["betas"]("betas", (0.0, beta2))[1]
    return sqrt(1 - beta ** count("step", step))


def from_keras(
    opt: FusedAdam, variables: Iterable[Any], *, epsilon: float = 1e-7, flat: Flat | None = None
) -> None:
    """Load the variables of ``keras.optimizers.Adam`` or ``AdamW``: the next step goes on where that stopped.

    The learning rate is taken over if it is among them, and ``eps`` is what ``epsilon`` is at the next step;
    after that they part. Exact at every step is to set it before each:
    ``opt.eps = eps_of_hat(1e-7, opt.betas[1], opt.state.step + 1)``. All else stays: Keras keeps it
    elsewhere. A call that raises has changed nothing.

    Parameters
    ----------
    opt : FusedAdam
    variables : iterable
        ``optimizer.variables`` of Keras 3, or pairs of their paths and arrays, whose paths end in iteration,
        learning_rate, momentum, velocity and velocity_hat; moments in the order of the buffer.
    epsilon : float, default 1e-7
        Keras's.
    flat : Flat, optional
        What :func:`fastadam.flatten` made of the parameters; only needed where it pads them.

    Raises
    ------
    TypeError
        If a value is not of its type.
    ValueError
        If variables are missing or unknown, or do not fit.
    """
    require_optimizer(opt)
    found = _by_kind(variables)
    if len(found["iteration"]) != 1:
        raise ValueError(f"variables must have one iteration; got {len(found['iteration'])}.")
    step = int(_value(found["iteration"][0][1]))
    names = [name for name, kind in _KERAS.items() if found[kind]]
    layout = _layout_of_keras(found, flat)
    moments = {name: layout.join([array for _, array in found[_KERAS[name]]]) for name in names}
    changed: dict[str, Any] = {"amsgrad": "max_exp_avg_sq" in names}
    if found["learning_rate"]:
        changed["lr"] = float(_value(found["learning_rate"][0][1]))
    changed["eps"] = eps_of_hat(epsilon, opt.betas[1], step + 1)
    load(opt, step, moments, **changed)


def to_keras(opt: FusedAdam, variables: Iterable[Any], *, flat: Flat | None = None) -> dict[str, Any]:
    """Return what ``load_own_variables`` of Keras's Adam takes: a dict of arrays by the places of variables.

    Parameters
    ----------
    opt : FusedAdam
        Which has taken a step; nothing of it changes.
    variables, flat
        As for :func:`from_keras`; they are only read.

    Returns
    -------
    dict
        ``{"0": array, ...}``, one for each variable. A learning rate is that of ``opt``. Set Keras's epsilon
        with :func:`hat_of_eps`.

    Raises
    ------
    TypeError, ValueError
        As :func:`from_keras` does, or if ``opt`` has taken no step.
    """
    entries, variables = unload(opt), list(variables)
    found = _by_kind(variables)
    if opt.amsgrad != bool(found["velocity_hat"]):
        kind = "with" if opt.amsgrad else "without"
        raise ValueError(f"variables must be those of an Adam {kind} amsgrad, as opt is; got others.")
    layout = _layout_of_keras(found, flat)
    require_size("variables", layout, entries)
    store: dict[int, Any] = {}
    for name, kind in _KERAS.items():
        if found[kind]:
            for (place, like), array in zip(found[kind], layout.split(entries[name]), strict=True):
                store[place] = array.reshape(np.shape(like))
    store.update(dict.fromkeys((place for place, _ in found["iteration"]), np.asarray(entries["step"])))
    rate = np.asarray(entries["lr"], np.float32)
    store.update(dict.fromkeys((place for place, _ in found["learning_rate"]), rate))
    return {str(place): store[place] for place in sorted(store)}


def _by_kind(variables: Iterable[Any]) -> dict[str, list[tuple[int, Any]]]:
    """Return places and variables by what they are."""
    kinds = ("velocity_hat", "momentum", "velocity", "iteration", "learning_rate")
    found: dict[str, list[tuple[int, Any]]] = {kind: [] for kind in kinds}
    for place, variable in enumerate(variables):
        is_pair = isinstance(variable, tuple)
        path = str(variable[0] if is_pair else getattr(variable, "path", type(variable).__name__))
        kind = next((kind for kind in kinds if path.rpartition("/")[2].endswith(kind)), None)
        if kind is None:
            raise ValueError(
                f"variables[{place}] must have a path that ends in one of {kinds}; got {path!r}."
            )
        found[kind].append((place, variable[1] if is_pair else variable))
    for kind in ("velocity", *(["velocity_hat"] if found["velocity_hat"] else [])):
        if len(found[kind]) != len(found["momentum"]) or not found[kind]:
            raise ValueError(
                f"variables must have a {kind} for each momentum ({len(found['momentum'])}); got"
                f" {len(found[kind])}."
            )
    return found


def _value(variable: Any) -> Any:
    return variable.numpy() if hasattr(variable, "numpy") else variable


def _layout_of_keras(found: Mapping[str, list[tuple[int, Any]]], flat: Flat | None) -> Layout:
    labels = [f"variables[{place}]" for place, _ in found["momentum"]]
    return Layout(labels, [int(np.prod(variable.shape)) for _, variable in found["momentum"]], flat)


def from_thinc(
    opt: FusedAdam, optimizer: Any, *, keys: Iterable[Any] | None = None, flat: Flat | None = None
) -> None:
    """Load the state of thinc's ``Adam``: the next step goes on where that stopped.

    Its learning rate, betas, L2 and what its epsilon is at the next step are taken over, as they are now;
    schedules, averages and ``grad_clip``, which clips each array, are not. See :func:`from_keras` on ``eps``.
    thinc decays after its update, AdamW before it. A call that raises has changed nothing.

    Parameters
    ----------
    opt : FusedAdam
    optimizer : thinc.api.Optimizer
        It is only read.
    keys : iterable, optional
        Those of thinc, in the order of the buffer; without it they have the order of its ``mom1``.
    flat : Flat, optional
        What :func:`fastadam.flatten` made of the weights; only needed where it pads them.

    Raises
    ------
    TypeError
        If a value is not of its type.
    ValueError
        If a key has no state, or weights have taken different numbers of steps.
    """
    require_optimizer(opt)
    require_no_amsgrad(opt, "thinc")
    for name in ("mom1", "mom2", "nr_update"):
        if not isinstance(getattr(optimizer, name, None), Mapping):
            raise TypeError(f"optimizer must be a thinc Optimizer; got {type(optimizer).__name__}.")
    chosen = list(optimizer.mom1 if keys is None else keys)
    if not chosen:
        raise ValueError("optimizer must have taken a step; got no moments.")
    for key in chosen:
        if key not in optimizer.mom1 or key not in optimizer.mom2:
            raise ValueError(f"keys must be those of optimizer.mom1; got {key!r}.")
    step = require_one_step({f"optimizer.nr_update[{key!r}]": optimizer.nr_update[key] for key in chosen})
    labels = [f"optimizer.mom1[{key!r}]" for key in chosen]
    firsts = [host(optimizer.mom1[key], label) for key, label in zip(chosen, labels, strict=True)]
    layout = Layout(labels, [first.size for first in firsts], flat)
    moments = {"exp_avg": layout.join(firsts)}
    moments["exp_avg_sq"] = layout.join([optimizer.mom2[key] for key in chosen])
    now = {"key": chosen[0], "last_score": optimizer.last_score}
    lr, beta1, beta2, epsilon, decay = (
        float(getattr(optimizer, name)(optimizer.step, **now))
        for name in ("learn_rate", "b1", "b2", "eps", "L2")
    )
    load(
        opt,
        step,
        moments,
        lr=lr,
        betas=(beta1, beta2),
        eps=eps_of_hat(epsilon, beta2, step + 1),
        weight_decay=decay,
        decoupled_weight_decay=bool(optimizer.L2_is_weight_decay),
    )


def to_thinc(
    opt: FusedAdam, weights: Mapping[Any, Any], *, flat: Flat | None = None
) -> dict[str, dict[Any, Any]]:
    """Return ``mom1``, ``mom2`` and ``nr_update`` of thinc's ``Optimizer``.

    Put them in with ``for name, of_keys in found.items(): getattr(optimizer, name).update(of_keys)``.

    Parameters
    ----------
    opt : FusedAdam
        Which has taken a step; nothing of it changes.
    weights : mapping
        thinc's key of each weight -> the weight, in the order of the buffer.
    flat : Flat, optional
        As for :func:`from_thinc`.

    Raises
    ------
    TypeError, ValueError
        If a value is not of its type, or the weights are not those of the buffer.
    """
    entries = unload(opt)
    require_no_amsgrad(opt, "thinc")
    keys = list(weights)
    labels = [f"weights[{key!r}]" for key in keys]
    layout = Layout(labels, [int(np.prod(weights[key].shape)) for key in keys], flat)
    require_size("weights", layout, entries)
    found: dict[str, dict[Any, Any]] = {}
    for name, moment in (("mom1", "exp_avg"), ("mom2", "exp_avg_sq")):
        parts = layout.split(entries[moment].astype(np.float32, copy=False))
        found[name] = dict(zip(keys, parts, strict=True))
    found["nr_update"] = dict.fromkeys(keys, entries["step"])
    return found
