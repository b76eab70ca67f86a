"""Kill a process that saves in a loop, again and again; the file is whole every time.

Run as a program, with a folder: it forks, which a process with threads must not.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from fastadam import FusedAdam

ROUNDS, N = 30, 200_000


def state_of(number):
    """Return an optimizer of which every number tells which it is."""
    opt = FusedAdam(number)
    moments = {name: np.full(N, number, np.float32) for name in ("exp_avg", "exp_avg_sq")}
    opt.load_state_dict({**opt.state_dict(), "step": number, **moments})
    return opt, np.full(N, number, np.float32)


def save(path, number, states):
    opt, params = states[number]
    opt.save(path, params=params, extra=number)


def check(path):
    """Return which of them is in the file, whole, or fail."""
    params = np.zeros(N, np.float32)
    opt = FusedAdam.load(path, params=params)
    number = opt.state.step
    assert opt.lr == number
    for array in (params, opt.state.exp_avg, opt.state.exp_avg_sq):
        assert np.array_equal(array, np.full(N, number, np.float32))
    return number


def main():
    folder = Path(sys.argv[1])
    path, delays = folder / "run", random.Random(1)
    states = {number: state_of(number) for number in (1, 2)}
    save(path, 1, states)
    stale, found = 0, set()
    for _ in range(ROUNDS):
        child = os.fork()
        if child == 0:
            while True:
                for number in (2, 1):
                    save(path, number, states)
        time.sleep(delays.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found.add(check(path))
        left = [entry.name for entry in folder.iterdir() if entry.name != "run"]
        assert len(left) <= 1, left  # each save removes what the one before has left
        stale += len(left)
    save(path, 1, states)
    print(json.dumps([ROUNDS, stale, len(found)]))  # noqa: T201


main()
