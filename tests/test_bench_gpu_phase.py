"""The contenders of the phase on a GPU: what is wrong is refused, what is right passes, the roofline too."""

from __future__ import annotations

import ctypes
import math
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

# Behind the installed package, which `bench` measures: the root of the tree holds a folder of its name.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import fake_cupy
from fake_device import FakeDevice
from fake_phase import NORM, WHOLE, on_cpu, start_wrong

from bench import (
    gpu,
    gpu_measure,
    gpu_phase,
    gpu_phase_peers,
    gpu_phase_references,
    phase_oracle,
)
from bench.gpu_buffers import PERIOD, Buffers, Running
from bench.gpu_peers import Peer
from bench.gpu_timer import EventTimer
from bench.oracle import WrongUpdateError

pytestmark = pytest.mark.filterwarnings("default")  # other libraries' would stop a comparison with them

SIZES = [1, 1000, PERIOD + 5]
OURS, THEIRS = Peer("fastadam CPU", lambda _: None, ()), Peer("theirs", lambda _: None, ())


def new_buffers(size=1000, device=None):
    return Buffers.new(device or FakeDevice(), size, refilled=True)


def check(start, size=1000, peer=OURS):
    buffers = new_buffers(size)
    gpu_phase.check_phase(peer, start(buffers), buffers)


# --- Checks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_right_contenders_pass(size):
    check(on_cpu, size)
    pytest.importorskip("torch")
    check(gpu_phase_peers.start_torch, size, THEIRS)


@pytest.mark.parametrize(
    "changes",
    [{"max_grad_norm": 1.0}, {"weight_decay": 0.02}, {"lr": 1.1e-3}, {"maximize": True}, {"ema_decay": 0.9}],
    ids=str,
)
def test_wrong_contenders_are_refused(changes):
    with pytest.raises(WrongUpdateError, match=r"^theirs must clip, step, average and clear; got an "):
        check(partial(start_wrong, promised=False, **changes), peer=THEIRS)


@pytest.mark.parametrize(
    "changes",
    [{"lr": 1.0001e-3}, {"weight_decay": 0.010001}, {"ema_decay": 0.9899999}, {"betas": (0.9, 0.99900001)}],
    ids=str,
)
def test_of_ours_all_bits_are_checked(changes):
    check(partial(start_wrong, promised=False, **changes), peer=THEIRS)  # within the tolerance
    with pytest.raises(WrongUpdateError, match=r"^fastadam CPU must have the bits of the CPU; it has not\.$"):
        check(partial(start_wrong, **changes))


def test_a_wrong_norm_is_found():
    def start(buffers, error):
        right = on_cpu(buffers)
        return right._replace(norm=lambda: right.norm() * (1 + error))

    for error, message in ((1e-15, "must find the CPU's norm, "), (1e-9, "must find a norm of ")):
        with pytest.raises(WrongUpdateError, match=f"^fastadam CPU {message}"):
            check(partial(start, error=error))


@pytest.mark.parametrize("place", [0, 999, PERIOD + 4])
def test_a_gradient_that_is_left_is_found_everywhere(place):
    def start(buffers):
        right = on_cpu(buffers)

        def step():
            right.step()
            buffers.grads[place] = 1e-9

        return right._replace(step=step)

    with pytest.raises(WrongUpdateError, match=r"^fastadam CPU must set all gradients to zero; "):
        check(start, PERIOD + 5)


@pytest.mark.parametrize("size", SIZES)
def test_the_norm_is_that_of_all_gradients(size):
    whole = np.resize(new_buffers(size).host_grads, size)
    expected = phase_oracle.global_norm(whole)
    assert new_buffers(size).grad_norm == pytest.approx(expected, rel=1e-14)
    assert gpu_phase._cpu_norm(size) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(("peer", "error"), [(THEIRS, 0.02), (THEIRS, math.nan), (OURS, 1e-15), (OURS, 1e-9)])
def test_wrong_norms_are_refused(peer, error):
    buffers = Buffers.new(FakeDevice(), 1000)
    right = Running(lambda: None, 4000, norm=lambda: gpu_phase._cpu_norm(1000))
    gpu_phase.check_norm(peer, right, buffers)
    wrong = right._replace(norm=lambda: gpu_phase._cpu_norm(1000) * (1 + error))
    with pytest.raises(WrongUpdateError, match=rf"^{peer.label} must find "):
        gpu_phase.check_norm(peer, wrong, buffers)


def test_torch_norm_passes():
    pytest.importorskip("torch")
    buffers = Buffers.new(FakeDevice(), 1000)
    gpu_phase.check_norm(THEIRS, gpu_phase_peers.start_torch_norm(buffers), buffers)


# --- With CuPy's stand-in -----------------------------------------------------------------------------------


class OnFakeCupy(FakeDevice):
    """Its arrays are NumPy's, in memory that the stand-in for CuPy knows."""

    def __init__(self, cupy):
        super().__init__()
        self.cupy = cupy

    def empty(self, size):
        return self.upload(np.full(size, np.nan, np.float32))

    def upload(self, array):
        return self.cupy.asarray(array).host

    def adopt(self, array):
        return array.host

    def wrapped(self, host):
        return self.cupy.ndarray(host, 0)


def test_ours_passes_with_its_kernels(cupy):
    device = OnFakeCupy(cupy)
    start = partial(gpu_phase_peers.start_fastadam, backend="cupy", wrapped=device.wrapped)
    buffers = new_buffers(9001, device)
    gpu_phase.check_phase(OURS, start(buffers), buffers)


def test_our_norm_is_the_pass_of_a_step(cupy):
    device = OnFakeCupy(cupy)
    buffers = Buffers.new(device, 9001)
    running = gpu_phase_peers.start_fastadam_norm(buffers, "cupy", wrapped=device.wrapped)
    gpu_phase.check_norm(OURS, running, buffers)
    gpu_phase.check_norm(OURS, running, buffers)
    queued = len(cupy.log)
    running.step()
    assert [entry[0] for entry in cupy.log[queued:]] == ["measure", "decide"]


# --- Roofline -----------------------------------------------------------------------------------------------

FLOAT4 = """
#define __device__
struct float4 { float x, y, z, w; };
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
"""


class HostKernel:
    """A kernel in place of CuPy's, compiled for the host."""

    def __init__(self, folder, code, name):
        self.library = fake_cupy.compile_for_the_host(FLOAT4 + code, folder)
        self.kernel = self.library[name]

    def __call__(self, grid, block, arguments):
        values = [ctypes.c_longlong(a.ctypes.data if a.ndim else a) for a in arguments]

        def run(number, thread):
            self.library.place(number, thread, *block, *grid)
            self.kernel(*values)

        for number in range(*grid):
            self.library.gather(*block)
            list(fake_cupy.POOL.map(partial(run, number), range(*block)))


@pytest.fixture
def host_kernel(host_kernels, monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    made = SimpleNamespace(RawKernel=partial(HostKernel, host_kernels))
    monkeypatch.setitem(sys.modules, "cupy", made)

    def launches(_, size):
        return [((-(-size // 256),), (64,)), ((2,), (32,))]  # few threads: of the host, and they wait

    monkeypatch.setattr("bench.gpu_references.launches", launches)


@pytest.mark.parametrize("size", [1, 3, 64, 1003])
def test_two_passes_read_and_move_everything(host_kernel, size):
    buffers = new_buffers(size)
    running = gpu_phase_references.start_two_passes(buffers)
    assert running.moved == 44 * size
    buffers.restore()
    running.step()
    assert np.array_equal(buffers.params, buffers.host_params + buffers.host_grads)
    assert not buffers.grads.any()
    assert gpu_phase_references.start_read(Buffers.new(FakeDevice(), size)).moved == 4 * size


@pytest.mark.parametrize(
    ("kernel", "right", "wrong", "message"),
    [
        ("READ", "for (long long i = n / 4 * 4 + first; i < n; i += threads) total += g[i];", "", "must sum"),
        ("READ", "i < n / 4", "i < n / 8", "the reading kernel must sum all gradients"),
        ("READ", "total +=", "total -=", "the reading kernel must sum all gradients"),
        ("MOVE", "g4[i] = make_float4(0, 0, 0, 0);", "", "the moving kernel must add the gradient to four"),
        ("MOVE", "a[i] += g[i];", "", "the moving kernel must add the gradient to four"),
        ("MOVE", "v4[i] = sum(c, grad)", "v4[i] = sum(c, d)", "the moving kernel must add the gradient to"),
    ],
)
def test_the_roofline_checks_itself(host_kernel, monkeypatch, kernel, right, wrong, message):
    code = getattr(gpu_phase_references, kernel)
    assert right in code
    monkeypatch.setattr(gpu_phase_references, kernel, code.replace(right, wrong))
    with pytest.raises(WrongUpdateError, match=message):
        gpu_phase_references.start_two_passes(new_buffers(1003))


@pytest.mark.parametrize("kernel", ["READ", "MOVE"])
def test_the_roofline_compiles_for_a_gpu_with_wide_accesses(kernel):
    from cuda_builds import compile_cuda  # skips where there is no compiler

    ptx, _ = compile_cuda(getattr(gpu_phase_references, kernel), options=())
    assert "ld.global.nc.v4.f32" in ptx if kernel == "READ" else "st.global.v4.f32" in ptx


# --- On a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("contest", [WHOLE, NORM], ids=lambda contest: contest.work)
@pytest.mark.parametrize("size", [2**10, PERIOD + 4])
def test_every_contender_is_right_on_a_gpu(size, contest):
    if (reason := gpu.missing()) is not None:
        pytest.skip(reason)
    measured = gpu_measure.measure(EventTimer(gpu.open_device()), size, contest=contest, rounds=1)
    assert measured.failed == {}
    assert measured.moved.keys() | measured.left_out.keys() == contest.peers.keys()
    assert all(0 < measured.times.median(name) < 0.1 for name in measured.moved)
