"""What fastadam promises on a GPU, and whether a result keeps it. Every promise is judged by the median."""

from __future__ import annotations

from typing import Any, NamedTuple

from bench import harness
from bench.gpu_measure import Measured
from bench.gpu_peers import PEERS
from bench.units import format_size

HELD = "cupy"
"""The contender that is held to the targets: the backend that CUDA arrays get by default."""


class Target(NamedTuple):
    """The bandwidth of :data:`HELD` is at least this much of another's, from a size on."""

    over: str
    from_size: int
    at_least: float


TARGETS = (
    Target("same_traffic", 2**26, 0.95),
    Target("copy", 2**26, 0.92),
    Target("torch_fused", 2**20, 1.0),
)
HOST_AT_LEAST = 1.0
"""Of the host's time for a call of torch fused over that for ours."""


def _row(promise: str, at_least: float, measured: harness.Quartiles) -> dict[str, Any]:
    return {
        "promise": promise,
        "at_least": at_least,
        "measured": measured._asdict(),
        "met": measured.median >= at_least,
    }


def of_device(measured: Measured) -> list[dict[str, Any]]:
    """Judge the times of one size; what was not measured is not judged."""
    if HELD not in measured.moved:
        return []
    speeds = [
        (target, measured.speed(HELD, over=target.over))
        for target in TARGETS
        if measured.size >= target.from_size
    ]
    size = format_size(measured.size)
    return [
        _row(f"speed over {PEERS[target.over].label}, {size}", target.at_least, speed)
        for target, speed in speeds
        if speed is not None
    ]


def of_host(times: harness.Measurement) -> list[dict[str, Any]]:
    """Judge what a call costs the host."""
    if not {HELD, "torch_fused"} <= times.seconds.keys():
        return []
    ratio = times.ratio("torch_fused", over=HELD)
    return [_row("host time of torch fused over ours", HOST_AT_LEAST, ratio)]


def of_bits(every: list[Measured]) -> list[dict[str, Any]]:
    """Judge the bits: a contender of ours is timed only if all its bits are the CPU's."""
    ours = [name for name, peer in PEERS.items() if peer.label.startswith("fastadam")]
    rows = []
    for name in ours:
        right = sum(name in measured.moved for measured in every)
        tried = right + sum(name in measured.failed for measured in every)
        if tried:
            promise = f"bits of the CPU at all sizes, {PEERS[name].label}"
            rows.append({"promise": promise, "at_least": tried, "measured": right, "met": right == tried})
    return rows
