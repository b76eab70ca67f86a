"""What all tests share: seeded randomness, one Hypothesis profile, the table of equations."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import settings

# Subprocesses must find the package that is being tested, not the source tree in the working directory.
os.environ["PYTHONSAFEPATH"] = "1"

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
