"""What all tests share: seeded randomness, one Hypothesis profile, the table of equations."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys

import numpy as np
import pytest

# Subprocesses must find the package that is being tested, not the source tree in the working directory.
os.environ["PYTHONSAFEPATH"] = "1"

with contextlib.suppress(ImportError):  # ci/gpu.sh runs where it may be missing
    from hypothesis import settings

    settings.register_profile("fastadam", deadline=None, derandomize=True, max_examples=40)
    settings.load_profile("fastadam")


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
def host_kernels(tmp_path_factory):
    """Where CUDA C++ compiled for the host is kept."""
    return tmp_path_factory.mktemp("host-kernels")


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
