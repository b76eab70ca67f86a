"""Whether a result keeps what fastadam promises on a GPU. Every promise is judged by the median."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import harness
from bench.gpu_contest import HELD
from bench.gpu_measure import Measured
from bench.units import format_size

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
    contest = measured.contest
    speeds = [
        (target, measured.speed(HELD, over=target.over))
        for target in contest.targets
        if measured.size >= target.from_size
    ]
    size = format_size(measured.size)
    return [
        _row(f"speed over {contest.peers[target.over].label}, {size}", target.at_least, speed)
        for target, speed in speeds
        if speed is not None
    ]


def of_host(times: harness.Measurement) -> list[dict[str, Any]]:
    """Judge what a call costs the host."""
    if not {HELD, "torch_fused"} <= times.seconds.keys():
        return []
    ratio = times.ratio("torch_fused", over=HELD)
    return [_row("host time of torch fused over ours", HOST_AT_LEAST, ratio)]


def of_bits(every: Sequence[Measured]) -> list[dict[str, Any]]:
    """Judge the bits of one contest: a contender of ours is timed only if all its bits are the CPU's."""
    ours = {name: peer.label for at in every for name, peer in at.contest.peers.items() if peer.is_ours}
    rows = []
    for name, label in ours.items():
        right = sum(name in measured.moved for measured in every)
        tried = right + sum(name in measured.failed for measured in every)
        if tried:
            promise = f"bits of the CPU at all sizes, {label}"
            rows.append({"promise": promise, "at_least": tried, "measured": right, "met": right == tried})
    return rows
