"""Contenders of the optimizer phase, right and wrong, on the GPU of :mod:`fake_device`."""

from __future__ import annotations

from functools import partial

from fake_device import mover

from bench import gpu_phase, gpu_phase_peers, phase_oracle
from bench.gpu_peers import Peer
from bench.oracle import LR
from fastadam import FusedAdam

WHOLE, NORM = gpu_phase.program().contests
on_cpu = partial(gpu_phase_peers.start_fastadam, backend="cpu")


def start_wrong(buffers, promised=True, **changes):
    """The contender fastadam with other hyperparameters; its bits are promised or not."""
    right = on_cpu(buffers)
    options = {
        "lr": LR,
        "weight_decay": phase_oracle.WEIGHT_DECAY,
        "decoupled_weight_decay": True,
        "max_grad_norm": phase_oracle.CLIPPED_TO * buffers.grad_norm,
        "ema_decay": phase_oracle.EMA_DECAY,
        "zero_grads": True,
    }
    optimizer = FusedAdam(**{**options, **changes})

    def moments():
        return tuple(optimizer.state.moments.values())

    return right._replace(
        step=lambda: optimizer.step(buffers.params, buffers.grads),
        moments=moments if promised else None,
        average=lambda: optimizer.state.param_ema,
        norm=lambda: optimizer.last_step.grad_norm,
    )


def timed(name, device_seconds, host_seconds=1e-6):
    """A contender: the CPU backend, in fake device time. No call of it may find gradients that are zero."""

    def start(buffers):
        running = on_cpu(buffers)

        def step():
            assert buffers.grads.all()
            running.step()
            buffers.device.queue(name, device_seconds, host_seconds)

        return running._replace(step=step)

    return start


def fake_program(**changes):
    peers = {
        "cupy": Peer("fastadam CuPy, 1 call", timed("cupy", 10e-6), ()),
        "two_passes": Peer("two passes", mover("two_passes", 9.5e-6, 44), (), is_adam=False),
        "torch": Peer("torch, 4 calls", timed("torch", 18e-6, 60e-6), ()),
        **changes,
    }
    reads = {
        "cupy": Peer("fastadam CuPy", mover("cupy", 2e-6, 4), (), is_adam=False),
        "torch": Peer("torch vector_norm", mover("torch", 3e-6, 4), (), is_adam=False),
    }
    contests = (WHOLE._replace(peers=peers), NORM._replace(peers=reads))
    return gpu_phase.program()._replace(contests=contests)
