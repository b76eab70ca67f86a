"""Copies of a device that is not there: they run as late as they may, or at once, and are written down."""

from __future__ import annotations

import torch


def write(written, read):
    """Copy bytes; the count of versions has gone up when the copy was asked for."""
    written.detach().view(torch.uint8).numpy()[:] = read.detach().contiguous().view(torch.uint8).numpy()


class LateCopies:
    """Copies that run only when somebody waits for them, in the order of their streams and no other.

    Parameters
    ----------
    late : pair of bool
        Whether those to the host run late, and those from it.
    """

    def __init__(self, late=(True, True)):
        self.late = dict(zip(("fetch", "send"), late, strict=True))
        self.log, self.asked = [], {"fetch": [], "send": []}
        self.done = {"fetch": 0, "send": 0}
        self.most_bytes = 0
        self._known_to_device = 0  # copies from the host that what comes now is ordered behind
        self.bytes_of_empty = []

    def empty(self, size, dtype):
        self.bytes_of_empty.append(size * dtype.itemsize)
        return torch.empty(size, dtype=dtype).fill_(77)

    def begin(self):
        self.log.append("begin")
        behind = self._known_to_device
        self.asked["fetch"].append(lambda: self._run("send", behind))

    def fetch(self, pairs):
        return self._ask("fetch", pairs)

    def send(self, pairs):
        torch.autograd.graph.increment_version([to for to, _ in pairs])
        return self._ask("send", pairs)

    def _ask(self, way, pairs):
        self.log.append((way, sum(to.numel() for to, _ in pairs)))
        for to, read in pairs:
            assert (to.dtype, to.shape) == (read.dtype, read.shape)

        def copy():
            for to, read in pairs:
                write(to, read)

        self.asked[way].append(copy)
        if not self.late[way]:
            self._run(way, len(self.asked[way]))
        return way, len(self.asked[way])

    def wait(self, event):
        self.log.append(("wait", event[0]))
        self._run(*event)

    def end(self):
        self.log.append("end")
        self._known_to_device = len(self.asked["send"])

    def _run(self, way, until):
        while self.done[way] < until:
            self.done[way] += 1
            self.asked[way][self.done[way] - 1]()

    def synchronize(self):
        for way, asked in self.asked.items():
            self._run(way, len(asked))
