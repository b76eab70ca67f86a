"""Steps in many Python threads and in forked children, on every Numba threading layer.

Each case runs in a process of its own, with the layer forced: what goes wrong there aborts or kills.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from fastadam.kernels import threads

LAYERS = ["tbb", "omp", "workqueue"]

WHOLE = {"max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9}
"""Options of which a step takes two passes."""

PRELUDE = """
OPTIONS = {}
import os, sys, threading
import numba, numpy as np
import fastadam
from fastadam import FusedAdam
from fastadam.kernels import cpu, norms, threads

N = 4 * threads.MIN_PIECE + 5
START = np.linspace(-1, 1, N, dtype=np.float32)
GRADS = np.cos(np.arange(N, dtype=np.float32))

def run(steps=20):
    opt, params = FusedAdam(**OPTIONS), START.copy()
    for _ in range(steps):
        opt.step(params, GRADS)
    return params

def expected(steps=20):
    cpu.PARALLEL_FROM, before = N + 1, cpu.PARALLEL_FROM
    result = run(steps)
    cpu.PARALLEL_FROM = before
    return result

def in_threads(count):
    results = [None] * count
    def work(i):
        results[i] = run()
    workers = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for worker in workers: worker.start()
    for worker in workers: worker.join()
    return all(result is not None and (result == EXPECTED).all() for result in results)

def in_child(work):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if work() else 3)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)

EXPECTED = expected()
"""

CONCURRENT = """
assert in_threads(8)
assert threads.layer() == LAYER
"""

CONCURRENT_WITH_MAIN = """
done = []
other = threading.Thread(target=lambda: done.append(in_threads(4)))
other.start()
for _ in range(20):
    assert (run() == EXPECTED).all()
other.join()
assert done == [True]
"""

FORK_AFTER_STEP = """
assert (run() == EXPECTED).all()
assert threads.layer() == LAYER
for _ in range(3):
    assert in_child(lambda: (run() == EXPECTED).all()) == 0
assert in_child(lambda: in_threads(4)) == 0
assert in_child(lambda: in_child(lambda: (run() == EXPECTED).all()) == 0) == 0  # a child's child
assert (run() == EXPECTED).all()
"""

FORK_BEFORE_STEP = """
assert in_child(lambda: (run() == EXPECTED).all()) == 0
assert (run() == EXPECTED).all()
"""

FORK_FROM_THREAD = """
assert (run() == EXPECTED).all()
codes = []
worker = threading.Thread(target=lambda: codes.append(in_child(lambda: (run() == EXPECTED).all())))
worker.start()
worker.join()
assert codes == [0]
"""

FORK_AFTER_POOL = """
threads._numba_layer_is_safe = False
assert (run() == EXPECTED).all()
assert threads._workers > 0
assert in_child(lambda: (run() == EXPECTED).all()) == 0
"""

CASES = {
    "concurrent": CONCURRENT,
    "concurrent-with-main": CONCURRENT_WITH_MAIN,
    "fork-after-step": FORK_AFTER_STEP,
    "fork-before-step": FORK_BEFORE_STEP,
    "fork-from-thread": FORK_FROM_THREAD,
    "fork-after-pool": FORK_AFTER_POOL,
}


def run_python(source, layer, **environment):
    # pip puts TBB's library where the loader does not look.
    library_path = f"{Path(sys.prefix) / 'lib'}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", source],
        env={
            **os.environ,
            "NUMBA_THREADING_LAYER": layer,
            "NUMBA_NUM_THREADS": "4",
            "LD_LIBRARY_PATH": library_path,
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="module", params=LAYERS)
def layer(request):
    probe = "import numba; numba.get_num_threads(); print(numba.threading_layer())"
    process = run_python(probe, request.param)
    if process.returncode != 0:
        pytest.skip(f"Numba cannot load the layer {request.param} here")
    assert process.stdout.strip() == request.param
    return request.param


@pytest.mark.parametrize("options", [{}, WHOLE], ids=["plain", "whole"])
@pytest.mark.parametrize("case", CASES)
def test_layer(layer, case, options):
    if "fork" in case and not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    small_pieces = "norms.MIN_PIECE = threads.MIN_PIECE"  # so that the pool shares both passes
    prelude = PRELUDE.replace("OPTIONS = {}", f"OPTIONS = {options}").replace(
        "EXPECTED = ", f"{small_pieces}\nEXPECTED = "
    )
    process = run_python(f"{prelude}\nLAYER = {layer!r}\n{CASES[case]}\nprint('done')", layer)
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.strip() == "done"


@pytest.mark.parametrize(
    ("unsafe", "source"),
    [
        ("workqueue", CONCURRENT),
        ("omp", FORK_AFTER_STEP),
    ],
)
def test_these_cases_can_fail(unsafe, source):
    """Without our care the process dies: the cases above do reach what they are about."""
    if not sys.platform.startswith("linux"):
        pytest.skip("GNU OpenMP and fork, as on Linux")
    careless = "threads.numba_is_safe = lambda: True"
    process = run_python(f"{PRELUDE}\n{careless}\nLAYER = {unsafe!r}\n{source}\nprint('done')", unsafe)
    assert process.returncode != 0
    assert "done" not in process.stdout


def test_steps_release_the_gil():
    """Another Python thread goes on while a step runs."""
    source = """
import time
opt, params, grads = FusedAdam(), np.ones(1 << 26, np.float32), np.ones(1 << 26, np.float32)
numba.set_num_threads(1)
opt.step(params, grads)
ticks, stop = [], threading.Event()
def tick():
    while not stop.is_set():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
ticker = threading.Thread(target=tick)
ticker.start()
time.sleep(0.05)
start = time.perf_counter()
for _ in range(5):
    opt.step(params, grads)
end = time.perf_counter()
stop.set()
ticker.join()
inside = sum(start < t < end for t in ticks)
# Held, the GIL would let the other thread run only between two steps.
assert inside >= 10, (inside, end - start)
"""
    process = run_python(PRELUDE + source, "workqueue")
    assert process.returncode == 0, process.stderr[-3000:]


def test_pieces_cover_the_buffer_once():
    for size in (
        1,
        100,
        threads.MIN_PIECE,
        2 * threads.MIN_PIECE - 1,
        2 * threads.MIN_PIECE,
        10**6 + 7,
        10**9,
    ):
        for count, least in itertools.product((1, 2, 3, 7, 64), (threads.MIN_PIECE, 512)):
            pieces = threads.pieces(size, count, min_piece=least)
            assert len(pieces) <= count
            assert pieces[0][0] == 0
            assert pieces[-1][1] == size
            assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
            assert all(start % threads.ALIGNMENT == 0 and start < stop for start, stop in pieces)
            assert len(pieces) == 1 or min(b - a for a, b in pieces[:-1]) >= least


def test_pool_makes_every_call_once_and_passes_errors_on():
    calls = [0] * 50

    def call(i):
        calls[i] += 1
        if i == 30:
            raise ValueError("in a worker")

    with pytest.raises(ValueError, match="in a worker"):
        threads.run_in_pool([partial(call, i) for i in range(50)])
    assert calls == [1] * 50


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_pool_where_no_more_threads_can_be_started(allowed):
    """A limit of the system on threads: every piece is still stepped once."""
    source = f"""
import time
threads._numba_layer_is_safe = False
real, started = threads.start_new_thread, []
def start(*arguments):
    if len(started) == {allowed}:
        raise RuntimeError("can't start new thread")
    started.append(arguments)
    real(*arguments)
threads.start_new_thread = start
for _ in range(3):
    assert (run() == EXPECTED).all()
assert threads._workers == {allowed}
"""
    process = run_python(PRELUDE + source, "workqueue")
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timer on this system")
@pytest.mark.parametrize("safe", [True, False], ids=["numba", "pool"])
def test_interrupts_leave_whole_steps(safe):
    """A signal handler that raises at any moment of a step: it is taken whole, and counted, or not at all."""
    source = f"""
import signal, time
threads._numba_layer_is_safe = None if {safe} else False
def handler(*_):
    raise TimeoutError
signal.signal(signal.SIGALRM, handler)
opt, params = FusedAdam(lr=0.1), START.copy()
opt.step(params, GRADS)
interrupted = partly = miscounted = 0
for k in range(400):
    before, count, taken = params.copy(), opt.state.step, True
    try:
        signal.setitimer(signal.ITIMER_REAL, 2e-5 + (k % 100) * 1e-5)
        opt.step(params, GRADS)
        while True:
            pass
    except TimeoutError:
        interrupted += 1
    now = params.copy()
    time.sleep(0.002)
    assert (now == params).all(), "still written to after step had raised"
    changed = (params != before).mean()
    partly += 0.001 < changed < 0.999
    miscounted += (changed > 0) != (opt.state.step > count)
assert interrupted == 400
assert partly == 0, partly
assert miscounted <= 8, miscounted  # counted just before it is taken: a window of a microsecond
"""
    process = run_python(
        PRELUDE + source, "omp" if safe and sys.platform.startswith("linux") else "workqueue"
    )
    assert process.returncode == 0, process.stderr[-3000:]


def test_fork_after_others_used_numba(layer):
    """The parent entered parallel regions of its own, and imported fastadam, but never stepped."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    source = """
import os, numba, numpy as np, fastadam
@numba.njit(parallel=True)
def others(x):
    for i in numba.prange(x.size):
        x[i] += 1
others(np.zeros(100_000))
pid = os.fork()
if pid == 0:
    params = np.ones(1_000_000, np.float32)
    fastadam.FusedAdam().step(params, params.copy())
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
    process = run_python(source, layer)
    assert process.returncode == 0, process.stderr[-3000:]


def test_pool_at_interpreter_shutdown():
    """An executor takes no work any more then: a last step still completes."""
    source = """
import atexit
threads._numba_layer_is_safe = False
run(1)
def last():
    assert (run(2) == expected(2)).all()
    print("stepped")
atexit.register(last)
"""
    process = run_python(PRELUDE + source, "workqueue")
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.strip() == "stepped"
    assert not process.stderr
