"""A comparison on a GPU: who takes part, what each must compute, what fastadam promises.

And the first of them: one step of Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from bench import gpu, oracle
from bench.gpu_buffers import Buffers, Running
from bench.gpu_peers import PEERS, Peer
from fastadam import FusedAdam

HELD = "cupy"
"""The contender that is held to the targets: the backend that CUDA arrays get by default."""


class Target(NamedTuple):
    """The bandwidth of :data:`HELD` is at least this much of another's, from a size on."""

    over: str
    from_size: int
    at_least: float


class Contest(NamedTuple):
    """Contenders that do the same work, or move the same bytes."""

    work: str
    peers: Mapping[str, Peer]
    """Name -> contender. Where memory is short, the later ones are left out."""
    check: Callable[[Peer, Running, Buffers], None]
    """Raises WrongUpdateError; for contenders that do not check themselves."""
    references: tuple[str, ...]
    """With whose bandwidth that of all is compared."""
    targets: tuple[Target, ...] = ()
    clears: bool = False
    """Whether calls clear the gradients, so that they are written again before each."""


def of_step() -> Contest:
    """Return the comparison of whole steps without anything else."""
    targets = (
        Target("same_traffic", 2**26, 0.95),
        Target("copy", 2**26, 0.92),
        Target("torch_fused", 2**20, 1.0),
    )
    return Contest("step", PEERS, check_step, ("copy", "same_traffic", "torch_fused"), targets)


@cache
def _cpu_bits(size: int) -> tuple[oracle.Array, ...]:
    """Return parameters and moments after the steps of the check, by the CPU backend."""
    params, grads = oracle.inputs(size, np.float32)
    optimizer = FusedAdam(oracle.LR, oracle.BETAS, oracle.EPS)
    for factor in oracle.GRAD_FACTORS:
        optimizer.step(params, grads * np.float32(factor))
    return params, optimizer.state.exp_avg, optimizer.state.exp_avg_sq


def check_step(peer: Peer, running: Running, buffers: Buffers) -> None:
    """Take three steps: all of fastadam's bits must be the CPU's, a peer's update within a tolerance.

    Raises
    ------
    WrongUpdateError
        If not.
    """
    buffers.restore()
    oracle.check_update(peer.label, running.contender(buffers), buffers.host_params, buffers.host_grads)
    if running.moments is not None:
        found = (buffers.params, *running.moments())
        require_bits(peer, buffers, found, _cpu_bits(buffers.host_params.size))


def require_bits(
    peer: Peer, buffers: Buffers, found: Sequence[object], expected: Sequence[oracle.Array]
) -> None:
    """Raise WrongUpdateError unless arrays of the device repeat, to the last bit, those of the CPU."""
    for array, period in zip(found, expected, strict=True):
        if not gpu.same_bits(buffers.device, array, period):
            raise oracle.WrongUpdateError(f"{peer.label} must have the bits of the CPU; it has not.")
