"""All GPU contenders at one size, checked and then timed in turns, and what their calls cost the host.

Each round has one block of every contender, in a new order: an untimed call, then the median of three timed
ones. Ratios are formed within a round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bench import gpu_contest, harness
from bench.gpu import Device
from bench.gpu_buffers import Buffers, Running
from bench.gpu_contest import Contest
from bench.gpu_peers import ON_TENSORS
from bench.gpu_timer import EventTimer
from bench.harness import Quartiles
from bench.units import format_bytes

SIZES = tuple(2**exponent for exponent in (10, 14, 17, 20, 23, 26, 28, 30))
ROUNDS = 30
WARM_UPS = 10
BLOCKS = harness.Blocks(0, 0, min_warm_calls=1, min_timed_calls=3)

HOST_SIZE = 2**10
HOST_CALLS = 200
"""Calls in a row without waiting: fewer launches than the driver queues before it makes the host wait."""

_SPARE = 2**30
"""Bytes that stay free, for contexts, code and comparisons."""

_PART = 5
"""Rounds between two looks at the deadline."""


@dataclass(frozen=True)
class Measured:
    """The times of one size.

    Parameters
    ----------
    size : int
        Elements.
    times : Measurement
        Seconds on the device, one median for each round.
    moved : dict
        Contender -> bytes that a call reads and writes.
    late : dict
        Contender -> the share of its calls in which the device may have waited for the host.
    left_out, failed : dict
        Contender -> why it was not started, or how it failed.
    contest : Contest
        Of whom.
    """

    size: int
    times: harness.Measurement
    moved: dict[str, int]
    late: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    contest: Contest = field(default_factory=gpu_contest.of_step)

    def speed(self, name: str, *, over: str) -> Quartiles | None:
        """Return the bandwidth of one contender over that of another, or None where that was not timed."""
        if over not in self.moved:
            return None
        bytes_ratio = self.moved[name] / self.moved[over]
        return Quartiles(*(bytes_ratio * x for x in self.times.ratio(over, over=name)))

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each contender, plain values."""
        return [self._row(name) for name in self.moved]

    def _row(self, name: str) -> dict[str, Any]:
        seconds, moved = Quartiles.of(self.times.seconds[name]), self.moved[name]
        speeds = {over: self.speed(name, over=over) for over in self.contest.references}
        return {
            "work": self.contest.work,
            "size": self.size,
            "peer": name,
            "label": self.contest.peers[name].label,
            "rounds": len(self.times.seconds[name]),
            "seconds": seconds._asdict(),
            "bytes": moved,
            "gb_per_second": moved / seconds.median * 1e-9,
            "speed_over": {over: q._asdict() for over, q in speeds.items() if q is not None},
            "late_share": self.late.get(name, 0.0),
        }


def plan(contest: Contest, names: Iterable[str], size: int, free: int) -> tuple[list[str], dict[str, str]]:
    """Return the contenders that fit beside each other, in their order, and why the others are left out."""
    room = free - _SPARE - Buffers.needs(size, refilled=contest.clears)
    chosen, left_out = [], {}
    for name in names:
        needs, absent = contest.peers[name].needs(size), contest.peers[name].missing()
        if absent is not None:
            left_out[name] = absent
        elif needs > room:
            left_out[name] = f"does not fit: needs {format_bytes(needs)} of {format_bytes(max(room, 0))}"
        else:
            room -= needs
            chosen.append(name)
    return chosen, left_out


def _start(contest: Contest, name: str, buffers: Buffers) -> Running | str:
    """Return a checked and warm contender, or how it failed: the others are measured all the same."""
    peer = contest.peers[name]
    try:
        buffers.restore()  # an average begins with what it finds
        running = peer.start(buffers)
        if peer.is_adam:
            contest.check(peer, running, buffers)
        for _ in range(WARM_UPS):
            if buffers.before is not None:
                buffers.before()
            running.step()
        buffers.device.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    finally:
        buffers.device.release()
    return running


def _start_all(
    contest: Contest, names: Iterable[str], buffers: Buffers
) -> tuple[dict[str, Running], dict[str, str]]:
    started = {name: _start(contest, name, buffers) for name in names}
    buffers.restore()
    running = {name: it for name, it in started.items() if isinstance(it, Running)}
    return running, {name: it for name, it in started.items() if isinstance(it, str)}


def measure(
    timer: EventTimer,
    size: int,
    names: Sequence[str] | None = None,
    *,
    contest: Contest | None = None,
    rounds: int = ROUNDS,
    deadline: float = math.inf,
) -> Measured:
    """Start, check and time contenders.

    Parameters
    ----------
    timer : EventTimer
        Of the device.
    size : int
        Elements.
    names : sequence of str
        Contenders, by default all; those that are not installed or do not fit are left out.
    contest : Contest, optional
        Of whom; by default that of steps.
    rounds : int
        Blocks of each.
    deadline : float
        Of ``time.monotonic``; from then on no further rounds, once there are some.
    """
    device, contest = timer.device, contest or gpu_contest.of_step()
    device.release()
    chosen, left_out = plan(contest, contest.peers if names is None else names, size, device.free_bytes())
    if not chosen:
        return Measured(size, harness.Measurement({}), {}, {}, left_out, contest=contest)
    buffers = Buffers.new(device, size, refilled=contest.clears)
    running, failed = _start_all(contest, chosen, buffers)
    tasks = {name: harness.Task(it.step, buffers.before) for name, it in running.items()}
    parts: list[harness.Measurement] = []
    timer.late.clear()
    taken = 0
    while taken < rounds and not (parts and time.monotonic() > deadline):
        part = min(_PART, rounds - taken)
        parts.append(harness.interleave(tasks, rounds=part, blocks=BLOCKS, seed=taken, timer=timer))
        taken += part
    moved = {name: it.moved for name, it in running.items()}
    calls = taken * (BLOCKS.min_warm_calls + BLOCKS.min_timed_calls)
    late = {name: timer.late[it.step] / calls for name, it in running.items()}
    timer.late.clear()  # its keys keep the contenders and their memory
    return Measured(size, harness.Measurement.pooled(parts), moved, late, left_out, failed, contest)


def _repeat(step: Callable[[], object]) -> None:
    for _ in range(HOST_CALLS):
        step()


def host_cost(device: Device, *, rounds: int = 15) -> tuple[harness.Measurement, dict[str, str]]:
    """Return the time that a call of a step costs the host, in turns, and who failed.

    Calls follow each other without waiting for the device, which has next to nothing to do.
    """
    contest = gpu_contest.of_step()
    peers = {
        name: peer
        for name, peer in {**contest.peers, **ON_TENSORS}.items()
        if peer.is_adam and peer.missing() is None
    }
    running, failed = _start_all(contest._replace(peers=peers), peers, Buffers.new(device, HOST_SIZE))
    tasks = {
        name: harness.Task(partial(_repeat, it.step), before=device.synchronize)
        for name, it in running.items()
    }
    blocks = harness.Blocks(0, 0, min_warm_calls=1, min_timed_calls=1)
    batches = harness.interleave(tasks, rounds=rounds, blocks=blocks)
    seconds = {name: [s / HOST_CALLS for s in of_name] for name, of_name in batches.seconds.items()}
    device.synchronize()
    return harness.Measurement(seconds), failed
