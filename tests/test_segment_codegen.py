"""The generated machine code of the loop over segments: that of the plain loop."""

from __future__ import annotations

import platform
import re

import numba
import numpy as np
import pytest

from fastadam.adam import AdamHyperparameters
from fastadam.coefficients import Coefficients
from fastadam.kernels import compiling, cpu, segments

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in {"x86_64", "amd64"}, reason="reads x86-64 assembly"
)

SUFFIX = {"float32": "ps", "float64": "pd"}


def instructions(make_loop, *arguments, parallel):
    """Of a fresh, uncached compilation: on a cache hit there is none to inspect."""
    options = {**compiling.JIT_OPTIONS, "nogil": True, "parallel": parallel}
    dispatcher = numba.njit(make_loop("for inspection"), **options)
    dispatcher(*arguments)
    (assembly,) = dispatcher.inspect_asm().values()
    return [op.removeprefix("v") for op in re.findall(r"^\s+(v?[a-z][a-z0-9]+)\s", assembly, re.MULTILINE)]


@pytest.mark.parametrize("parallel", [False, True], ids=["serial", "parallel"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_loop(dtype, decay, parallel):
    h = AdamHyperparameters(weight_decay=decay, decoupled_weight_decay=True)
    c = Coefficients(h, np.dtype(dtype)).update(1)
    empty = np.empty(0, dtype)
    buffers = (empty, empty, (empty, empty))
    table = (np.empty((0, 3), np.int64), np.zeros(1, np.int64), np.empty((0, 8), dtype))
    ops = instructions(segments._make_loop, *buffers, *table, *c, None, parallel=parallel)
    plain = instructions(cpu._make_plain, *buffers, c.direction, c.decay, c.rule, parallel=False)
    for name in ("sqrt", "div", "mul", "sub"):
        # As many copies as of the plain loop, once without decay: no condition is left inside of a loop.
        packed = name + SUFFIX[dtype]
        assert ops.count(packed) >= plain.count(packed) > 0
    assert not [op for op in ops if re.match(r"fn?m(add|sub)", op)], "fused multiply-add"
    assert not [op for op in ops if re.match(r"r(sqrt|cp)", op)], "approximate reciprocal"
    if dtype == "float32":
        assert not [op for op in ops if re.fullmatch(r"cvt.*pd.*|cvt.*ss2sd|(sqrt|div|mul)[sp]d", op)]
