"""What the tests hold fastadam against. Nothing here uses a compiled kernel.

- :func:`algorithm_1`: the paper, literally, in float64 or better. It shares no code with fastadam.
- :func:`interpret`: the rules of fastadam evaluated on NumPy scalars, one element after the other. The bits
  of every backend must be these.
"""

from __future__ import annotations

from unittest import mock

import numpy as np

from fastadam.coefficients import Coefficients
from fastadam.hyperparameters import Hyperparameters
from fastadam.kernels import relatives, rules

WIDER = {np.dtype(np.float32): np.float64, np.dtype(np.float64): np.longdouble}
"""The dtype in which to judge the errors of another; x86's long double has 11 more bits than float64."""

FLAGS = [
    {"amsgrad": amsgrad, "maximize": maximize, **decay}
    for amsgrad in (False, True)
    for maximize in (False, True)
    for decay in (
        {},
        {"weight_decay": 0.05},
        {"weight_decay": 0.05, "decoupled_weight_decay": True},
    )
]
"""Every combination of the flags of Adam."""

PAIRS_OF_FLAGS = [FLAGS[k] for k in (0, 2, 4, 7, 9, 11)]
"""As few as have every pair of two flags, where each one is compiled."""

_ALL = {"max_grad_value": 0.5, "ema_decay": 0.9, "zero_grads": True}
PHASES = [
    *({"amsgrad": False, "maximize": False, name: value} for name, value in _ALL.items()),
    {**FLAGS[2], **_ALL},
    {**FLAGS[-2], **_ALL, "ema_decay": 0.3},
]
"""What else one pass does with an element: each alone, and all together, with two rules."""


def flags_id(flags: dict) -> str:
    decay = "adamw" if flags.get("decoupled_weight_decay") else "l2" if "weight_decay" in flags else ""
    names = ["amsgrad" * flags["amsgrad"], "maximize" * flags["maximize"], decay]
    more = [name for name in _ALL if name in flags]
    names += ["whole"] if more == list(_ALL) else more
    return "-".join(filter(None, names)) or "plain"


class algorithm_1:  # noqa: N801
    """Kingma & Ba, Algorithm 1, in float64 or a wider ``dtype``, with the variants written out.

    AdamW: Loshchilov & Hutter, Algorithm 2. AMSGrad as in PyTorch: the maximum is over undebiased moments.
    """

    def __init__(
        self,
        theta,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        decoupled_weight_decay=False,
        amsgrad=False,
        maximize=False,
        dtype=np.float64,
    ):
        number = np.dtype(dtype).type
        lr, eps, weight_decay = number(lr), number(eps), number(weight_decay)
        betas = number(betas[0]), number(betas[1])
        self.theta = np.array(theta, dtype)
        self.m = np.zeros_like(self.theta)
        self.v = np.zeros_like(self.theta)
        self.v_max = np.zeros_like(self.theta)
        self.t = 0
        self.alpha, self.betas, self.eps = lr, betas, eps
        self.weight_decay, self.decoupled = weight_decay, decoupled_weight_decay
        self.amsgrad, self.maximize = amsgrad, maximize

    def step(self, gradient):
        g = np.array(gradient, self.theta.dtype)
        beta1, beta2 = self.betas
        self.t = self.t + 1
        if self.maximize:
            g = -g
        if self.decoupled:
            self.theta = self.theta * (1 - self.alpha * self.weight_decay)
        else:
            g = g + self.weight_decay * self.theta
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        self.v_max = np.maximum(self.v_max, self.v)
        m_hat = self.m / (1 - beta1**self.t)
        v_hat = (self.v_max if self.amsgrad else self.v) / (1 - beta2**self.t)
        self.theta = self.theta - self.alpha * m_hat / (np.sqrt(v_hat) + self.eps)


def interpret(
    hyperparameters: Hyperparameters,
    params,
    grads,
    states,
    step: int,
    update=rules.update,
    coefficients=Coefficients,
    **scales,
):
    """Return the new parameters and states of one step, computed with NumPy scalars of ``params.dtype``.

    ``scales`` are ``grad_scale`` and ``clip_factor``.
    """
    c = coefficients(hyperparameters, params.dtype)
    new_params = np.empty_like(params)
    new_states = tuple(np.empty_like(state) for state in states)
    # math.sqrt of an np.float32 is a float64; np.sqrt rounds to float32, correctly.
    with (
        mock.patch.object(rules, "sqrt", np.sqrt),
        mock.patch.object(relatives, "sqrt", np.sqrt),
        np.errstate(all="ignore"),
    ):
        parts = c.update(step, **scales)
        for i in range(params.size):
            state = tuple(array[i] for array in states)
            new, state = update(params[i], grads[i], state, parts)
            assert new.dtype == params.dtype, "the rule promoted"
            new_params[i] = new
            for array, value in zip(new_states, state, strict=True):
                array[i] = value
    return new_params, new_states


def initial_states(hyperparameters: Hyperparameters, params):
    """Return the states before the first step: what moments begin with, and parameters as their average."""
    start = hyperparameters.start()
    return tuple(
        params.copy() if name == "param_ema" else np.full_like(params, start.get(name, 0))
        for name in hyperparameters.state
    )


def interpret_steps(hyperparameters: Hyperparameters, params, gradients, **scales):
    """Return parameters and states after a step with each of ``gradients``, from the initial states."""
    states = initial_states(hyperparameters, params)
    for number, grads in enumerate(gradients, start=1):
        params, states = interpret(hyperparameters, params, grads, states, number, **scales)
    return params, states
