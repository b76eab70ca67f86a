"""The clock of the GPU benchmarks: two device events around a call, behind a queue that the host fills.

Before each call a buffer of twice the L2 cache is written, so that a call finds its data in device memory.
These writes also hold the device back until the host has queued the whole call: between events on an idle
device stands the time that Python takes to launch, not the time of the kernels. Whether the host was ahead is
checked with each call: if the device reached the first event before all was queued, the time does not count
and the call is repeated behind more writes.

The writes leave the cache full of lines that are still to be written to memory, at most its size: each call
pays for them, those of small buffers the most, and all contenders alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from bench.gpu import Device
from bench.harness import Before

MOST_WRITES = 64
"""Some milliseconds; a call that takes the host longer waits for the device itself."""


class EventTimer:
    """Times calls on the device; a :data:`bench.harness.Timer`.

    Parameters
    ----------
    device : Device
        Whose events are used.

    Attributes
    ----------
    late : Counter
        Call -> how many of its counted times include waiting for the host.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.late: Counter[Callable[[], object]] = Counter()
        self._start, self._end = device.event(), device.event()
        self._writes = 1  # for all contenders the same, and never less

    def __call__(self, call: Callable[[], object], before: Before = None) -> float:
        """Make a call, on the device alone; return its duration in nanoseconds.

        What comes before a call is queued before the writes, again for each repetition.
        """
        while True:
            if before is not None:
                before()
            for _ in range(self._writes):
                self.device.flush()
            self._start.record()
            call()
            is_late = self.device.is_done(self._start)
            self._end.record()
            seconds = self.device.seconds(self._start, self._end)
            if not is_late or self._writes >= MOST_WRITES:
                self.late[call] += is_late
                return seconds * 1e9
            self._writes *= 2
