"""The contenders: everyone's Adam on one flat buffer, behind one protocol.

The rules of the comparison: each contender has buffers of its own; parameters and gradients lie where
:mod:`bench.placement` puts them, the state where its library does; the state exists before timing;
what is timed is the whole public call; hyperparameters are everyone's defaults, and all take the steps of
Algorithm 1 (:mod:`bench.oracle`). No contender is configured beyond its defaults.

Libraries are imported when their contender starts, so that a comparison needs only what it compares.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench import roofline
from bench.oracle import BETAS, EPS, LR, Array, Contender
from fastadam import FusedAdam


def _writer(grads: Array) -> Callable[[Array], None]:
    def write(new: Array) -> None:
        grads[...] = new

    return write


def start_fastadam(params: Array, grads: Array) -> Contender:
    """``FusedAdam.step``."""
    optimizer = FusedAdam(LR, BETAS, EPS)
    return Contender(partial(optimizer.step, params, grads), lambda: params, _writer(grads))


def start_torch(params: Array, grads: Array) -> Contender:
    """``torch.optim.Adam(fused=True).step`` on one parameter."""
    torch = import_module("torch")
    param = torch.nn.Parameter(torch.from_numpy(params))
    param.grad = torch.from_numpy(grads)
    optimizer = torch.optim.Adam([param], LR, BETAS, EPS, fused=True)
    return Contender(optimizer.step, lambda: params, _writer(grads))


def start_deepspeed(params: Array, grads: Array) -> Contender:
    """``DeepSpeedCPUAdam.step`` on one parameter; builds its C++ on first use, which takes a minute."""
    # Its loader calls ninja, which pip installs beside Python, and would look for accelerators.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch = import_module("torch")
    param = torch.nn.Parameter(torch.from_numpy(params))
    param.grad = torch.from_numpy(grads)
    cpu_adam = import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
    optimizer = cpu_adam([param], lr=LR, betas=BETAS, eps=EPS, adamw_mode=False)
    return Contender(optimizer.step, lambda: params, _writer(grads))


def start_optax(params: Array, grads: Array) -> Contender:
    """``optax.adam`` and ``apply_updates`` under one ``jax.jit``, parameters and state donated."""
    jax, optax = import_module("jax"), import_module("optax")
    jax.config.update("jax_enable_x64", params.dtype == np.float64)
    transform = optax.adam(LR, *BETAS, EPS)

    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = transform.update(grads, state)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(update, donate_argnums=(0, 1))
    now = jax.numpy.array(params, copy=True)
    state = transform.init(now)
    gradient = jax.numpy.array(grads, copy=True)

    def step() -> None:
        nonlocal now, state
        now, state = compiled(now, state, gradient)
        now.block_until_ready()

    def write_grads(new: Array) -> None:
        nonlocal gradient
        gradient = jax.numpy.array(new, copy=True)

    return Contender(step, lambda: np.asarray(now), write_grads)


def start_thinc(params: Array, grads: Array) -> Contender:
    """``NumpyOps.adam``, the Cython loop of thinc's optimizer."""
    from thinc.api import NumpyOps

    ops = NumpyOps()
    exp_avg, exp_avg_sq = np.zeros_like(params), np.zeros_like(params)
    source = grads.copy()
    taken = 0

    def step() -> None:
        nonlocal taken
        taken += 1
        # The caller does the bias correction. Thinc's own adds eps before it; scaled, it is Algorithm 1's.
        correction = (1 - BETAS[1] ** taken) ** 0.5
        step_size = LR * correction / (1 - BETAS[0] ** taken)
        ops.adam(params, grads, exp_avg, exp_avg_sq, *BETAS, EPS * correction, step_size)

    # It uses the gradient as scratch space and leaves zeros: give it back, untimed, before each step.
    return Contender(step, lambda: params, _writer(source), before=lambda: np.copyto(grads, source))


def start_numpy(params: Array, grads: Array) -> Contender:
    """Plain NumPy as users write it: in place where that is natural, with temporaries where not."""
    exp_avg, exp_avg_sq = np.zeros_like(params), np.zeros_like(params)
    beta1, beta2 = BETAS
    taken = 0

    def step() -> None:
        nonlocal taken, exp_avg, exp_avg_sq, params
        taken += 1
        exp_avg *= beta1
        exp_avg += (1 - beta1) * grads
        exp_avg_sq *= beta2
        exp_avg_sq += (1 - beta2) * grads**2
        denom = np.sqrt(exp_avg_sq / (1 - beta2**taken))
        denom += EPS
        params -= LR / (1 - beta1**taken) * exp_avg / denom

    return Contender(step, lambda: params, _writer(grads))


@dataclass(frozen=True)
class Peer:
    """A contender that can be started.

    Parameters
    ----------
    name : str
        What tables call it.
    start : callable
        ``(params, grads)``, both to be owned by it -> a new contender.
    packages : tuple of str
        The distributions it needs, which are also the names of their modules.
    dtypes : tuple of str
        What it supports.
    is_adam : bool
        False for what only moves memory, and checks itself.
    """

    name: str
    start: Callable[[Array, Array], Contender]
    packages: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32", "float64")
    is_adam: bool = True

    def missing(self, dtype: str) -> str | None:
        """Return why it cannot run here, or None."""
        if dtype not in self.dtypes:
            return f"no {dtype}"
        absent = [package for package in self.packages if find_spec(package) is None]
        return f"not installed: {', '.join(absent)}" if absent else None


FASTADAM = Peer("fastadam", start_fastadam)
ROOFLINE = Peer("same traffic", roofline.start, is_adam=False)
TORCH = Peer("torch fused", start_torch, ("torch",))
DEEPSPEED = Peer("DeepSpeed", start_deepspeed, ("deepspeed", "torch", "ninja"), ("float32",))
OPTAX = Peer("optax jit", start_optax, ("optax", "jax", "jaxlib"))
THINC = Peer("thinc", start_thinc, ("thinc",), ("float32",))
NUMPY = Peer("NumPy", start_numpy)

PEERS: dict[str, Peer] = {
    "fastadam": FASTADAM,
    "roofline": ROOFLINE,
    "torch": TORCH,
    "deepspeed": DEEPSPEED,
    "optax": OPTAX,
    "thinc": THINC,
    "numpy": NUMPY,
}
"""Key on the command line -> peer."""
