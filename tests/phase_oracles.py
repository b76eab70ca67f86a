"""The whole optimizer phase, spelled out: what FusedAdam does in two passes, as a sequence of plain steps.

- :class:`literal_phase`: the documented order in float64 or better, around the paper's Algorithm 1. It shares
  no code with fastadam.
- :class:`torch_phase`: the calls that a PyTorch program makes for the same.
"""

from __future__ import annotations

import numpy as np
from oracles import algorithm_1


class literal_phase:  # noqa: N801
    """Unscale, look for inf and NaN, clip by norm, clip by value, Adam, average; zero the gradients.

    ``lr`` may be a function of the step number. What :func:`algorithm_1` takes besides goes there.
    """

    def __init__(
        self,
        theta,
        lr=1e-3,
        max_grad_norm=None,
        max_grad_value=None,
        skip_nonfinite=False,
        ema_decay=None,
        zero_grads=False,
        telemetry=False,  # noqa: ARG002 - it changes nothing
        dtype=np.float64,
        **adam,
    ):
        self.number = np.dtype(dtype).type
        self.adam = algorithm_1(theta, dtype=dtype, **adam)
        self.lr, self.max_norm, self.max_value = lr, max_grad_norm, max_grad_value
        self.skips, self.decay, self.zeroes = skip_nonfinite, ema_decay, zero_grads
        self.average = self.adam.theta.copy()
        self.norm, self.factor, self.skipped = None, 1.0, False
        self.largest = np.zeros_like(self.adam.theta)  # of what went into a gradient

    @property
    def theta(self):
        return self.adam.theta

    @property
    def t(self):
        return self.adam.t

    def step(self, gradient, grad_scale=None):
        """Take a step, or none; set ``gradient`` to zero if asked to."""
        number = self.number
        g = np.array(gradient, self.theta.dtype)
        self.skipped = self.skips and not np.isfinite(g).all()
        if self.zeroes:
            gradient[:] = 0
        if grad_scale is not None:
            g = g / number(grad_scale)
        self.norm, self.factor = np.sqrt(np.sum(g * g)), number(1)
        if self.skipped:
            return
        if self.max_norm is not None:
            self.factor = number(self.max_norm) / (self.norm + number(1e-6))
            if self.factor > 1:
                self.factor = number(1)
            g = g * self.factor
        if self.max_value is not None:
            g = np.where(g > self.max_value, number(self.max_value), g)
            g = np.where(g < -self.max_value, -number(self.max_value), g)
        decayed = self.adam.weight_decay * np.abs(self.theta)
        self.largest = np.maximum(self.largest, np.abs(g) + decayed)
        self.adam.alpha = number(self.lr(self.t + 1) if callable(self.lr) else self.lr)
        self.adam.step(g)
        if self.decay is not None:
            decay = number(self.decay)
            self.average = decay * self.average + (1 - decay) * self.theta


class torch_phase:  # noqa: N801
    """The same as calls of PyTorch, in the parameters' dtype; ``inverse`` multiplies as GradScaler does.

    ``skip_nonfinite`` is GradScaler's: the optimizer is not called.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        max_grad_norm=None,
        max_grad_value=None,
        skip_nonfinite=False,
        ema_decay=None,
        zero_grads=False,
        telemetry=False,  # noqa: ARG002 - it changes nothing
        inverse=False,
        decoupled_weight_decay=False,
        weight_decay=0.0,
        **adam,
    ):
        import torch

        self.torch = torch
        self.parameter = torch.from_numpy(params.copy()).requires_grad_()
        kind = torch.optim.AdamW if decoupled_weight_decay else torch.optim.Adam
        self.optimizer = kind([self.parameter], weight_decay=weight_decay, foreach=False, **adam)
        self.lr, self.max_norm, self.max_value = lr, max_grad_norm, max_grad_value
        self.skips, self.decay, self.zeroes, self.inverse = skip_nonfinite, ema_decay, zero_grads, inverse
        self.shadow = self.parameter.detach().clone()
        self.steps, self.norm = 0, None

    @property
    def theta(self):
        return self.parameter.detach().numpy()

    @property
    def average(self):
        return self.shadow.numpy()

    @property
    def state(self):
        """The moments by name."""
        return {name: value.numpy() for name, value in self.optimizer.state[self.parameter].items()}

    def step(self, gradient, grad_scale=None):
        torch, parameter = self.torch, self.parameter
        parameter.grad = torch.from_numpy(gradient.copy())
        skipped = self.skips and not bool(torch.isfinite(parameter.grad).all())
        if not skipped:
            self._condition_and_step(grad_scale)
        if self.zeroes:
            torch.from_numpy(gradient).zero_()

    def _condition_and_step(self, grad_scale):
        torch, parameter = self.torch, self.parameter
        if grad_scale is not None:
            parameter.grad.mul_(1 / grad_scale) if self.inverse else parameter.grad.div_(grad_scale)
        if self.max_norm is not None:
            self.norm = torch.nn.utils.clip_grad_norm_([parameter], self.max_norm).item()
        if self.max_value is not None:
            torch.nn.utils.clip_grad_value_([parameter], self.max_value)
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.steps) if callable(self.lr) else self.lr
        self.optimizer.step()
        if self.decay is not None:
            self.shadow.lerp_(parameter.detach(), 1 - self.decay)
