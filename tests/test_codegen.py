"""The generated machine code: packed arithmetic, no float64 in the float32 loop, nothing fused."""

from __future__ import annotations

import platform
import re

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
from oracles import FLAGS, PHASES, flags_id

from fastadam.adam import AdamHyperparameters
from fastadam.coefficients import Coefficients
from fastadam.kernels import compiling, cpu

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in {"x86_64", "amd64"}, reason="reads x86-64 assembly"
)

SUFFIX = {"float32": "ps", "float64": "pd"}


def compiled(dtype, flags, *, parallel):
    """Assembly of a fresh, uncached compilation: on a cache hit there is none to inspect."""
    options = {**compiling.JIT_OPTIONS, "nogil": True, "parallel": parallel}
    h = AdamHyperparameters(**flags)
    c = Coefficients(h, np.dtype(dtype))
    loop, _, arguments = cpu._loops(c.update(1), c.clear)
    make = cpu._make_plain if loop is cpu.serial else cpu._make_whole
    dispatcher = numba.njit(make("for inspection"), **options)
    empty = np.empty(0, dtype)
    dispatcher(empty, empty, (empty,) * len(h.state), *arguments)
    (assembly,) = dispatcher.inspect_asm().values()
    return assembly


def instructions(assembly):
    return re.findall(r"^\s+(v?[a-z][a-z0-9]+)\s", assembly, re.MULTILINE)


@pytest.mark.parametrize("parallel", [False, True], ids=["serial", "parallel"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("flags", [FLAGS[0], FLAGS[-1], *PHASES], ids=flags_id)
def test_loop(flags, dtype, parallel):
    assembly = compiled(dtype, flags, parallel=parallel)
    ops = instructions(assembly)
    packed = SUFFIX[dtype]
    for name in ("sqrt", "div", "mul", "sub"):
        assert any(op in {f"v{name}{packed}", f"{name}{packed}"} for op in ops), f"no packed {name}"
    assert not [op for op in ops if re.match(r"v?fn?m(add|sub)", op)], "fused multiply-add"
    assert not [op for op in ops if re.match(r"v?r(sqrt|cp)", op)], "approximate reciprocal"
    if dtype == "float32":
        # Coefficients come in as float64 of Python and are rounded before the loop: scalars only.
        converted = {op for op in ops if op.lstrip("v").startswith("cvt") and "d" in op.lstrip("v")[3:]}
        assert not {op for op in converted if "pd" in op or "ss2sd" in op}, "float64 in the float32 loop"
        assert not [
            op for op in ops if op.lstrip("v") in {"sqrtsd", "divsd", "mulsd", "sqrtpd", "divpd", "mulpd"}
        ]
    widest = max((width for width in "xyz" if f"%{width}mm" in assembly), key="xyz".index)
    features = llvm.get_host_cpu_features()
    if features.get("avx2"):
        assert widest in "yz", "128-bit vectors on a machine with 256"


def test_the_checks_bite():
    """A float64 literal and fastmath leave the traces that the test above looks for."""

    def careless(x, out):
        for i in range(x.size):
            out[i] = x[i] * 0.1 + out[i]

    x = np.ones(3, np.float32)
    dispatcher = numba.njit(careless, fastmath=True)
    dispatcher(x, x.copy())
    (assembly,) = dispatcher.inspect_asm().values()
    ops = instructions(assembly)
    assert any(op in {"vcvtps2pd", "cvtps2pd", "vcvtss2sd", "cvtss2sd"} for op in ops)
    if llvm.get_host_cpu_features().get("fma"):
        assert any(re.match(r"v?fn?m(add|sub)", op) for op in ops)


def test_no_recompilation_on_the_second_step():
    """Other numbers, same code: only flags, dtypes and the presence of a decay select a kernel."""
    from fastadam import FusedAdam

    def signatures():
        return len(cpu.serial.signatures) + len(cpu.parallel.signatures)

    for size in (10, cpu.PARALLEL_FROM):
        opt, params = FusedAdam(weight_decay=0.1), np.ones(size, np.float32)
        opt.step(params, np.ones(size, np.float32))
        before = signatures()
        for lr in (0.5, 1, np.float32(0.1)):
            opt.lr, opt.betas, opt.eps, opt.weight_decay = lr, (0.5, 0.6), 0.1, lr
            opt.step(params, np.ones(size, np.float32))
            opt.step(np.ones((2, size // 2), np.float32), np.ones(size, np.float32))
        assert signatures() == before
