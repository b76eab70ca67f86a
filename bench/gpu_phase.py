"""``python -m bench.gpu_phase``: clip, step, average and clear on a GPU, beside PyTorch and the roofline.

Two comparisons: the whole phase, and the pass over the gradients that it begins with.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from math import sqrt

import numpy as np

from bench import gpu, gpu_program, phase_oracle
from bench.gpu_buffers import PERIOD, Buffers, Running
from bench.gpu_contest import Contest, Target, require_bits
from bench.gpu_peers import Peer
from bench.gpu_phase_peers import NORM, PHASE, last_norm, new_optimizer
from bench.gpu_program import Program
from bench.oracle import GRAD_FACTORS, Array, WrongUpdateError, inputs
from fastadam.kernels import norms

SIZES = (2**10, 2**20, 2**26, 2**28)

TARGETS = (Target("torch", 2**26, 1.5), Target("two_passes", 2**26, 0.92))


def _whole(size: int) -> tuple[Array, Array]:
    """Return what the buffers on the device hold."""
    params, grads = inputs(min(size, PERIOD), np.float32)
    return np.resize(params, size), np.resize(grads, size)


@cache
def _cpu_bits(size: int, grad_norm: float) -> tuple[float, tuple[Array, ...]]:
    """Return the norm, and the first period of all arrays, after the steps of the check by the CPU backend.

    It steps on all elements: the norm of all is what is clipped.
    """
    params, grads = _whole(size)
    optimizer = new_optimizer(grad_norm, "cpu")
    for factor in GRAD_FACTORS:
        optimizer.step(params, grads * np.float32(factor))
    arrays = (params, *optimizer.state.moments.values())
    return last_norm(optimizer), tuple(array[:PERIOD].copy() for array in arrays)


@cache
def _cpu_norm(size: int) -> float:
    """Return the norm of all gradients, by the CPU backend."""
    _, grads = _whole(size)
    return sqrt(norms.measure(grads, np.empty(norms.scratch_size(size)))[0])


def check_phase(peer: Peer, running: Running, buffers: Buffers) -> None:
    """Take three steps: all of fastadam's bits must be the CPU's, a peer's result within tolerances.

    Raises
    ------
    WrongUpdateError
        If not; or if a gradient is left, anywhere.
    """
    buffers.restore()
    host = buffers.host_params, buffers.host_grads
    phase_oracle.check_phase(peer.label, running.contender(buffers), *host, buffers.grad_norm)
    if not gpu.same_bits(buffers.device, buffers.grads, np.zeros(1, np.float32)):
        raise WrongUpdateError(f"{peer.label} must set all gradients to zero; it does not.")
    if running.moments is None:
        return
    norm, expected = _cpu_bits(len(buffers.grads), buffers.grad_norm)
    require_bits(peer, buffers, (buffers.params, *running.moments()), expected)
    if running.norm is not None:
        _require_same_norm(peer, running.norm(), norm)


def check_norm(peer: Peer, running: Running, buffers: Buffers) -> None:
    """Compare a norm: all bits of fastadam's must be the CPU's, a peer's within a tolerance.

    Raises
    ------
    WrongUpdateError
        If not.
    """
    assert running.norm is not None
    buffers.restore()
    running.step()
    norm = phase_oracle.require_norm(peer.label, running.norm(), buffers.grad_norm)
    if peer.is_ours:
        _require_same_norm(peer, norm, _cpu_norm(len(buffers.grads)))


def _require_same_norm(peer: Peer, norm: float, expected: float) -> None:
    if norm != expected:
        raise WrongUpdateError(f"{peer.label} must find the CPU's norm, {expected!r}; got {norm!r}.")


def program() -> Program:
    """Return what is measured."""
    whole = Contest("whole phase", PHASE, check_phase, ("two_passes", "torch"), TARGETS, clears=True)
    norm = Contest("norm alone", NORM, check_norm, ("one_read", "torch"))
    return Program("gpu_phase", (whole, norm), SIZES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return 1 if a contender failed, 2 without a GPU."""
    return gpu_program.main(program(), "gpu_phase", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
