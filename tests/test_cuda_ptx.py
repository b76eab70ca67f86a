"""The PTX of the CUDA kernels: nothing fused, flushed, approximate or of another float; 16-byte packs."""

from __future__ import annotations

from collections import Counter

import pytest
from cuda_builds import BACKENDS, DTYPES, OTHERS, STEPS, SUFFIX, Build, compile_cuda, plant
from ptx import count, entries
from ptx_checks import bodies, computing, due_of_clock, foreign, n_divisions, ops_of

from fastadam.kernels import cuda_source, grids

CARELESS = [
    ({"__dadd_rn(a, b)": "a + b"}, "add.f64"),
    ({"__dadd_rn(a, b)": "a + b", "__dmul_rn(a, b)": "a * b"}, "fma.rn.f64"),
    ({"__ddiv_rn(a, b)": "a * __drcp_rn(b)"}, "rcp.rn.f64"),
    ({"__dsqrt_rn(a)": "a * rsqrt(a)"}, "rsqrt.approx.f64"),
    ({'asm("cvt.f64.f32 %0, %1;" : "=d"(result) : "f"(a));': "result = a;"}, "cvt.ftz.f64.f32"),
]
"""Of ``kernels/clock.cu``: what is spelled out, what it would be otherwise, and the trace of that in PTX."""


def careless_clock(careless):
    source = cuda_source.source(Build("cupy", "decide", "float32", "adamw").types)
    for right, wrong in careless.items():
        assert right in source
        source = source.replace(right, wrong)
    return source


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


@pytest.mark.parametrize("build", OTHERS, ids=str)
def test_ptx_of_a_kernel_without_a_rule(build):
    """Nothing flushed or approximate, and as many of each operation as its source says."""
    ops = ops_of(build)
    assert computing(ops) == due_of_clock(ops, build)


@each_dtype
@each_backend
def test_what_kernels_without_a_rule_read_and_write(backend, dtype):
    suffix = SUFFIX[dtype]

    def global_accesses(entry):
        ops = ops_of(Build(backend, entry, dtype, "adamw"))
        return ops, {op.replace(".global", ""): n for op, n in ops.items() if op[2:9] == ".global"}

    ops, accesses = global_accesses("measure")
    pair = {"st.f64": 2} if backend == "numba-cuda" else {"st.f64": 1, "st.u64": 1}
    assert accesses == {f"ld.{suffix}": ops["mul.rn.f64"], **pair}

    ops, accesses = global_accesses("accumulate")
    n = ops[f"add.rn.{suffix}"]
    zeros = {f"st.u{suffix[1:]}": n // 2}  # in one of two loops
    assert accesses == {f"ld.{suffix}": 2 * n, f"st.{suffix}": n, **zeros}
    assert n % 2 == 0

    _, accesses = global_accesses("set_lr")
    assert accesses == {"st.f64": 1}


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


@pytest.mark.parametrize(("careless", "trace"), CARELESS, ids=lambda v: v if isinstance(v, str) else "")
def test_careless_clocks_are_seen(careless, trace):
    module, _ = compile_cuda(careless_clock(careless))
    seen = set()
    for entry in ("measure", "decide"):
        ops = count(entries(module)[entry])
        try:
            seen |= set(computing(ops) - due_of_clock(ops, Build("cupy", entry, "float32", "adamw")))
        except AssertionError:  # the tree has other sums
            seen |= set(computing(ops))
    assert trace in seen


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
@pytest.mark.parametrize("entry", ["step", "step_captured"])
@each_backend
def test_lost_accesses_are_seen(backend, entry, variant, lost, message):
    build = Build(backend, entry, "float32", variant)
    ops = ops_of(build)
    for fewer in (ops - Counter([lost]), Counter({**ops, lost: 0})):
        with pytest.raises(AssertionError, match=message):
            bodies(fewer, build)


@each_dtype
@each_backend
def test_a_lost_zero_is_seen(backend, dtype):
    build = Build(backend, "step_captured", dtype, "adamw-whole")
    ops = ops_of(build)
    zero = f"st.global.u{SUFFIX[dtype][1:]}"
    for fewer in (ops - Counter([zero]), Counter({**ops, zero: 0})):
        with pytest.raises(AssertionError, match="elements stored as zeros"):
            bodies(fewer, build)
