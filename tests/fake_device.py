"""A GPU made of NumPy and two clocks: the host queues, the device works behind its back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench import gpu_compare, gpu_contest, gpu_measure
from bench.gpu_buffers import Buffers, Running
from bench.gpu_peers import Peer
from bench.oracle import BETAS, EPS, LR
from fastadam import FusedAdam

FLUSH = 20e-6
FACTS = {
    "name": "Fake GPU 1",
    "compute_capability": "0.0",
    "multiprocessors": 2,
    "memory_gib": 1,
    "l2_mib": 1,
    "driver": "1.2",
    "cuda_driver": "3.4",
    "cuda_runtime": "5.6",
}


class Event:
    def __init__(self, device: FakeDevice) -> None:
        self.device, self.time = device, 0.0

    def record(self) -> None:
        self.time = max(self.device.host, self.device.busy_until)


class FakeDevice:
    """Satisfies ``bench.gpu.Device``."""

    library = "fake"

    def __init__(self, free: int = 2**40) -> None:
        self.host = self.busy_until = 0.0
        self.free, self.flushes, self.log = free, 0, []

    def queue(self, name: str, device_seconds: float, host_seconds: float) -> None:
        """What a call does: the host is busy first, then the device."""
        self.log.append(name)
        self.host += host_seconds
        self.busy_until = max(self.busy_until, self.host) + device_seconds

    def empty(self, size):
        return np.full(size, np.nan, np.float32)

    def upload(self, array):
        return array.copy()

    def download(self, array):
        return array.copy()

    def adopt(self, array):
        return np.asarray(array)

    def bits(self, array):
        return array.view(np.int32)

    def copy(self, to, source):
        to[...] = source
        self.queue("copy", 1e-6, 0)

    def synchronize(self):
        self.host = max(self.host, self.busy_until)

    def flush(self):
        self.flushes += 1
        self.busy_until = max(self.busy_until, self.host) + FLUSH

    def event(self):
        return Event(self)

    def is_done(self, event):
        return self.host >= event.time

    def seconds(self, start, end):
        self.host = max(self.host, end.time)
        return end.time - start.time

    def free_bytes(self):
        return self.free

    def release(self):
        pass

    def facts(self) -> dict[str, Any]:
        return FACTS


def adam(
    name: str, device_seconds: float, host_seconds: float, *, lr: float = LR
) -> Callable[[Buffers], Running]:
    """A contender: the CPU backend, in fake device time."""

    def start(buffers: Buffers) -> Running:
        optimizer = FusedAdam(lr, BETAS, EPS)

        def step() -> None:
            optimizer.step(buffers.params, buffers.grads)
            buffers.device.queue(name, device_seconds, host_seconds)

        return Running(step, 28 * len(buffers.params), lambda: moments(optimizer))

    return start


def moments(optimizer: FusedAdam) -> tuple[Any, Any]:
    return optimizer.state.exp_avg, optimizer.state.exp_avg_sq


def mover(name: str, device_seconds: float, moved: int) -> Callable[[Buffers], Running]:
    """A reference that moves so many bytes per element."""
    return lambda buffers: Running(
        lambda: buffers.device.queue(name, device_seconds, 1e-6), moved * len(buffers.params)
    )


def fake_peers() -> dict[str, Peer]:
    """Contenders of the names that targets speak of."""
    return {
        "cupy": Peer("fastadam CuPy", adam("cupy", 10e-6, 5e-6), ()),
        "same_traffic": Peer("same traffic", mover("same_traffic", 9.6e-6, 28), (), is_adam=False),
        "copy": Peer("copy", mover("copy", 4.7e-6, 14), (), is_adam=False),
        "torch_fused": Peer("torch fused", adam("torch_fused", 12e-6, 50e-6), ()),
    }


def use_fake_peers(monkeypatch: Any) -> dict[str, Peer]:
    """Let the benchmarks measure the contenders above."""
    fakes = fake_peers()
    monkeypatch.setattr(gpu_contest, "PEERS", fakes)
    for module in (gpu_compare, gpu_measure):
        monkeypatch.setattr(module, "ON_TENSORS", {})
    return fakes
