"""What all tests share: seeded randomness, one Hypothesis profile, the table of equations."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

# Subprocesses must find the package that is being tested, not the source tree in the working directory.
os.environ["PYTHONSAFEPATH"] = "1"

# GNU OpenMP's threads spin after a parallel region: beside another worker of the tests, every region waits.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

with contextlib.suppress(ImportError):  # ci/gpu.sh runs where it may be missing
    from hypothesis import settings

    settings.register_profile("fastadam", deadline=None, derandomize=True, max_examples=40)
    settings.load_profile("fastadam")

SHARED = "FASTADAM_TESTS_SHARE"
"""Names the folder of one run, in which its workers share what they compile: cuda_builds.py, fake_cupy.py."""


def pytest_configure(config):
    if SHARED not in os.environ:  # a worker has it from the process that started it
        os.environ[SHARED] = tempfile.mkdtemp(prefix="fastadam-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(SHARED), ignore_errors=True))


def pytest_sessionstart():
    # What a test starts is no worker of pytest-xdist: there, pytest-benchmark would measure nothing.
    os.environ.pop("PYTEST_XDIST_WORKER", None)


@pytest.fixture
def rng(request) -> np.random.Generator:
    """A generator of its own for every test, the same in every run."""
    return np.random.default_rng(list(request.node.name.encode()))


@pytest.fixture
def all_threads():
    """Restore Numba's thread count after a test that changes it."""
    import numba

    before = numba.get_num_threads()
    yield numba.config.NUMBA_NUM_THREADS
    numba.set_num_threads(before)


@pytest.fixture(scope="session")
def host_kernels():
    """Where CUDA C++ compiled for the host is kept."""
    folder = Path(os.environ[SHARED]) / "host-kernels"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def cupy(host_kernels, monkeypatch):
    """A stand-in for CuPy, whose kernels run as host code, and a backend that has seen no other."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    from fake_cupy import make

    from fastadam import backends
    from fastadam.kernels import cuda_source, grids

    module = make(host_kernels)
    monkeypatch.setattr(grids, "BLOCK", 64)  # threads that wait for each other are threads of the host
    cuda_source.source.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.delitem(sys.modules, "fastadam.kernels.cuda_cupy", raising=False)
    backends.load.cache_clear()
    yield module
    cuda_source.source.cache_clear()
    backends.load.cache_clear()
    sys.modules.pop("fastadam.kernels.cuda_cupy", None)


@pytest.fixture(scope="module", params=["cupy", "numba-cuda"])
def backend(request):
    """A CUDA backend that can run here."""
    from fastadam import backends

    status = backends.status()[request.param]
    if status != "ready":
        pytest.skip(f"{request.param}: {status}")
    return request.param


@pytest.fixture(params=["cupy", "numba", "torch"])
def library(request, backend):
    """A library whose arrays a GPU test steps."""
    from gpu_libraries import LIBRARIES

    return LIBRARIES[request.param]()


@pytest.fixture(params=["cupy", "torch"])
def streaming(request, backend):
    """One of them that has a current stream."""
    from gpu_libraries import LIBRARIES

    return LIBRARIES[request.param]()
