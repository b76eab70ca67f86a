"""Where the demo and the benchmark run: clocks, what is said without a GPU, the wall of the fake."""

from __future__ import annotations

import sys
from time import sleep

import numpy as np
import pytest
import walled_numpy

from fastadam import backends, devices


@pytest.fixture
def fake(monkeypatch):
    return walled_numpy.install(monkeypatch)


def test_the_clock_of_the_cpu():
    start = devices.CPU.mark()
    sleep(0.01)
    assert 0.01 <= devices.CPU.seconds(start, devices.CPU.mark()) < 1


def test_the_clock_of_a_gpu_waits_for_the_later_event(fake):
    device = devices.cuda()
    start = device.mark()
    sleep(0.01)
    end = device.mark()
    with pytest.raises(RuntimeError, match="cudaErrorNotReady"):
        fake.cuda.get_elapsed_time(start, end)
    assert 0.01 <= device.seconds(start, end) < 1


def test_the_device_of_a_gpu(fake):
    device = devices.cuda()
    assert device.xp is fake
    assert device.label == "Fake GPU, timed by its events"


@pytest.mark.parametrize(
    "status", ['not installed: pip install "fastadam[cuda13]"', "no CUDA driver", "no CUDA device"]
)
def test_without_a_gpu(monkeypatch, status):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(backends, "status", lambda: {"cupy": status})
    with pytest.raises(ImportError) as caught:
        devices.cuda()
    assert str(caught.value) == f"device cuda needs CuPy and an NVIDIA GPU; CuPy here: {status}"


# --- Backends that cannot run -------------------------------------------------------------------------------


def failing(error, cause=None):
    def load(name):
        raise error from cause

    return load


NO_DRIVER = (
    "Error at driver init: \n\nCUDA driver library cannot be found.\nEnsure that a compatible NVIDIA driver"
    " is installed and available on your system path.\n:"
)


@pytest.mark.parametrize(
    ("error", "cause", "status"),
    [
        (
            ImportError(NO_DRIVER),
            None,
            "ImportError: Error at driver init: CUDA driver library cannot be found. Ensure that a compatible"
            " NVIDIA driver is installed and available on your system path.",
        ),
        (
            RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient"),
            None,
            "RuntimeError: cudaErrorInsufficientDriver: CUDA driver version is insufficient",
        ),
        (
            ImportError("\n======\nFailed to import CuPy.\n\nIf you installed CuPy via wheels ..."),
            OSError("libnvrtc.so.13: no such file"),
            "OSError: libnvrtc.so.13: no such file",
        ),
        (RuntimeError(""), None, "RuntimeError"),
        (RuntimeError("\nword" * 100), None, "RuntimeError:" + " word" * 56 + " ..."),
    ],
    ids=["no driver", "CuPy, no driver", "CuPy, import", "nothing said", "a page"],
)
def test_why_a_backend_cannot_run(monkeypatch, error, cause, status):
    monkeypatch.setattr(backends, "is_installed", lambda _: True)
    monkeypatch.setattr(backends, "load", failing(error, cause))
    assert backends.status() == dict.fromkeys(backends.NAMES, status)


@pytest.mark.parametrize("name", ["cupy", "numba-cuda"])
def test_status_here(name):
    status = backends.status()[name]
    assert "\n" not in status
    assert status == status.strip(" :")
    if name == "numba-cuda" and "Error at driver init" in status:
        assert len(status) > len("CudaSupportError: Error at driver init: ")


# --- The fake -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "crossing",
    [
        "np.asarray(x)",
        "np.exp(x)",
        "np.mean(x)",
        "np.zeros(3).__setitem__(..., x)",
        "xp.exp(host)",
        "xp.stack([x, host])",
        "x + host",
        "host * x",
        "x.__iadd__(host)",
        "x[np.arange(2)]",
        "x.__setitem__(..., host)",
        "x.sum(out=np.ones(()))",
        "bool(x[0] > 0)",
    ],
)
def test_nothing_crosses_the_wall_by_itself(fake, crossing):
    names = {"np": np, "xp": fake, "host": np.ones(3), "x": fake.asarray(np.ones(3))}
    with pytest.raises(TypeError):
        eval(crossing, names)


def test_the_fake_computes(fake):
    x = fake.asarray(np.arange(6.0)).reshape(2, 3)
    x[1] -= 1
    x /= 2
    assert isinstance(x.T @ fake.exp(0 * x), walled_numpy.DeviceArray)
    assert (float(x.sum()), int(x.argmax()), float(fake.mean(x > 0.5))) == (6.0, 5, 4 / 6)
    assert fake.reads == 3
