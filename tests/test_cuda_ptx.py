"""The PTX of the CUDA kernels: nothing fused, flushed, approximate or of another float; 16-byte packs."""

from __future__ import annotations

from collections import Counter

import pytest
from cuda_builds import BACKENDS, DTYPES, STEPS, SUFFIX, Build, compile_cuda, plant
from ptx import count, entries
from ptx_checks import bodies, foreign, n_divisions, ops_of

from fastadam.kernels import grids

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize("build", STEPS, ids=str)
def test_ptx_of_a_step(build):
    ops = ops_of(build)
    assert foreign(ops, build.suffix) == set()
    packs, alone = bodies(ops, build)
    elements = packs * grids.PACK // build.types.dtype.itemsize + alone
    assert ops[f"sqrt.rn.{build.suffix}"] == elements
    assert ops[f"div.rn.{build.suffix}"] == n_divisions(build) * elements


@each_dtype
@each_backend
def test_ptx_of_form_coefficients(backend, dtype):
    ops = ops_of(Build(backend, "form_coefficients", dtype, "adamw"))
    product = "mul.f64" if backend == "cupy" else "mul.rn.f64"  # nothing is added: nothing to fuse
    rounding = {"cvt.rn.f32.f64": 3, "st.global.f32": 3} if dtype == "float32" else {"st.global.f64": 3}
    moves = {"ld.global.f64", "mov.f64"}
    found = {op: n for op, n in ops.items() if ".f" in op and op not in moves}
    assert found == {"div.rn.f64": 1, product: 1, "ld.param.f64": 1, **rounding}


@each_dtype
@each_backend
def test_ptx_of_set_lr(backend, dtype):
    ops = ops_of(Build(backend, "set_lr", dtype, "adamw"))
    assert {op: n for op, n in ops.items() if ".f" in op} == {"ld.param.f64": 1, "st.global.f64": 1}


@pytest.mark.parametrize(
    ("statement", "dtype", "trace"),
    [
        ("*b = a[0] * a[1] + a[2];", "float32", "fma.rn.ftz.f32"),
        ("*b = a[0] * a[1] + a[2];", "float64", "fma.rn.f64"),
        ("*b = a[0] + a[1];", "float32", "add.ftz.f32"),
        ("*b = a[0] * 0.1;", "float32", "mul.f64"),
        ("*b = float(a[0]);", "float64", "cvt.rn.ftz.f32.f64"),
        ("*b = __fdividef(a[0], a[1]);", "float32", "div.approx.ftz.f32"),
        ("*b = __frsqrt_rn(*a);", "float32", "rsqrt.approx.ftz.f32"),
        ("*b = a[0] < a[1] ? 1.f : 2.f;", "float32", "setp.lt.ftz.f32"),
    ],
)
def test_foreign_instructions_are_seen(statement, dtype, trace):
    module, _ = compile_cuda(plant(statement, "float" if dtype == "float32" else "double"))
    assert trace in foreign(count(entries(module)["planted"]), SUFFIX[dtype])


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("ld.global.v4.f32", "packs loaded"),
        ("st.global.v4.f32", "packs stored"),
        ("ld.global.f32", "elements loaded"),
        ("st.global.f32", "elements stored"),
    ],
)
@pytest.mark.parametrize("variant", ["plain", "adamw-whole"])
@each_backend
def test_lost_accesses_are_seen(backend, variant, lost, message):
    build = Build(backend, "step", "float32", variant)
    ops = ops_of(build)
    for fewer in (ops - Counter([lost]), Counter({**ops, lost: 0})):
        with pytest.raises(AssertionError, match=message):
            bodies(fewer, build)
