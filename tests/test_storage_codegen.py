"""The machine code of steps in any storage: packed, nothing fused, no float64, no 64-bit products."""

from __future__ import annotations

import platform
import re

import numba
import numpy as np
import pytest

from fastadam.hyperparameters import Coefficients, Hyperparameters
from fastadam.kernels import compiling, stored
from fastadam.kernels.rounding import Storage
from fastadam.rounding import rounding

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in {"x86_64", "amd64"}, reason="reads x86-64 assembly"
)

F32, F16, BF16 = np.float32, np.uint16, np.int16
ALL = {"amsgrad": True, "ema_decay": 0.9, "zero_grads": True}
CASES = {
    "moments": (F32, F32, [BF16, BF16], None, None, {}),
    "all-bfloat16": (BF16, BF16, [BF16, BF16], None, None, {}),
    "float16": (F16, F16, [F32, F32], None, None, {}),
    "master": (F16, BF16, [BF16, BF16], F32, None, {}),
    "split": (BF16, BF16, [BF16, BF16], BF16, F16, {}),
    # So many arrays that compilers would rather not ask whether they overlap.
    "all": (BF16, F32, [BF16, BF16, BF16, F32], BF16, F16, ALL),
}


def instructions(params, grads, states, master, out, flags, *, parallel=False, nearest=False):
    """Of a fresh, uncached compilation: on a cache hit there is none to inspect."""
    options = {**compiling.JIT_OPTIONS, "nogil": True, "parallel": parallel}
    dispatcher = numba.njit(stored._make_loop("for inspection"), **options)
    c = Coefficients(Hyperparameters(**flags), np.dtype(F32))
    params, grads, *states = (np.empty(0, dtype) for dtype in (params, grads, *states))
    more = [None if dtype is None else np.empty(0, dtype) for dtype in (master, out)]
    storage = Storage(None if nearest else rounding(0, 1, 0), *more)
    dispatcher(params, grads, tuple(states), *c.update(1), c.clear, *storage)
    (assembly,) = dispatcher.inspect_asm().values()
    return re.findall(r"^\s+(v?[a-z][a-z0-9]+)\s", assembly, re.MULTILINE)


@pytest.mark.parametrize("parallel", [False, True], ids=["serial", "parallel"])
@pytest.mark.parametrize("nearest", [False, True], ids=["stochastic", "nearest"])
@pytest.mark.parametrize("name", CASES)
def test_loop(name, nearest, parallel):
    ops = instructions(*CASES[name], nearest=nearest, parallel=parallel)
    for op in ("sqrtps", "divps", "mulps", "subps"):
        assert {op, f"v{op}"} & set(ops), f"no packed {op}"
    assert not [op for op in ops if re.match(r"v?fn?m(add|sub)", op)], "fused multiply-add"
    assert not {op for op in ops if op.lstrip("v") in {"sqrtpd", "divpd", "mulpd", "cvtps2pd", "cvtpd2ps"}}
    assert not {op for op in ops if op.lstrip("v") == "pmullq"}, "64-bit products"
