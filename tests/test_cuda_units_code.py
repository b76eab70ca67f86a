"""Code of steps over units: nothing fused or flushed, every element once, registers, no spills."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import cuda_builds
import pytest
import sass
from cuda_builds import (
    BACKENDS,
    DTYPES,
    MOST,
    SM_80,
    SM_90,
    SM_100,
    UNITS,
    Build,
    compile_cuda,
    cubin_of,
    source_of,
)
from expansions import Expansions
from ptx import count, entries
from ptx_checks import (
    assert_accesses_of_units,
    elements_of_units,
    foreign,
    ops_of,
)
from test_cuda_codegen import arithmetic_due, is_spill, of_float64

from fastadam.kernels import cuda_numba, cuda_source

MOST_REGISTERS = {"step_units": 128, "step_units_observed": 128}
"""Two blocks of 256 threads on 65,536 registers, as for a captured step with all parts."""

MOST_WIDE = 168
"""Of an observed step in float64, bound to one block: with fewer, Numba's linker spills. NVRTC takes up to
132, by its version."""

on_sm_90 = [build for build in UNITS if build.capability == SM_90]


@cache
def kernel(build: Build) -> sass.Kernel:
    return build.named(sass.kernels(cubin_of(build)))


@cache
def _disassembled(backend, capability):
    builds = [build for build in UNITS if (build.backend, build.capability) == (backend, capability)]
    listings = sass.disassemble([kernel(build).code for build in builds], capability)
    return dict(zip(builds, listings, strict=True))


def machine_code(build):
    return _disassembled(build.backend, build.capability)[build]


# --- PTX ----------------------------------------------------------------------------------------------------


def of_what_is_seen(ops, build):
    """Return the instructions that an observed step may have besides those of its dtype."""
    if build.entry == "step_units":
        return set()
    harmless = re.compile(
        r"""cvt\.f64\.f32 | (add|sub|mul)\.rn\.f64 | sub\.f64 | setp\.neu\.f64 | selp\.f64
        | mov\.f64 | (ld|st)\.shared(\.v2)?\.[fu]64 | (ld|st)\.shared\.b64 | st\.global(\.v2)?\.[fb]64
        | bar(rier)?\.sync(\.aligned)?""",
        re.VERBOSE,
    )
    return {op for op in ops if harmless.fullmatch(op)}


def assert_plain(ops, build):
    assert foreign(ops, build.suffix) <= of_what_is_seen(ops, build)
    n = elements_of_units(ops, build)
    if build.entry == "step_units_observed" and build.dtype == "float32":
        assert ops["cvt.f64.f32"] == 3 * n


@pytest.mark.parametrize("build", UNITS, ids=str)
def test_ptx(build):
    assert_plain(ops_of(build), build)


@pytest.mark.parametrize("build", on_sm_90, ids=str)
def test_every_element_is_loaded_and_stored_once(build):
    assert_accesses_of_units(ops_of(build), build)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("ld.global.f32", "elements loaded"),
        ("st.global.f32", "elements stored"),
        ("st.global.u32", "zeros stored"),
    ],
)
@pytest.mark.parametrize("entry", ["step_units", "step_units_observed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lost_accesses_are_seen(backend, entry, lost, message):
    build = Build(backend, entry, "float32", MOST)
    with pytest.raises(AssertionError, match=message):
        assert_accesses_of_units(ops_of(build) - Counter([lost]), build)


CARELESS = [
    ({"__dadd_rn(a, b)": "a + b", "__dmul_rn(a, b)": "a * b"}, "fma.rn.f64"),
    ({'asm("cvt.f64.f32 %0, %1;" : "=d"(result) : "f"(a));': "result = a;"}, "cvt.ftz.f64.f32"),
    ({"grad[k], new_param,": "grad[k], Real{new_param.value * 1.5f},"}, "mul.ftz.f32"),
]
"""Of the source of an observed step: what is spelled out, what it would be otherwise, and its trace."""


@pytest.mark.parametrize(("careless", "trace"), CARELESS, ids=lambda v: v if isinstance(v, str) else "")
def test_careless_sources_are_seen(careless, trace):
    build = Build("cupy", "step_units_observed", "float32", "plain")
    source = source_of(build)
    for right, wrong in careless.items():
        assert right in source
        source = source.replace(right, wrong)
    ops = count(entries(compile_cuda(source)[0])[build.entry])
    assert trace in ops
    with pytest.raises(AssertionError):
        assert_plain(ops, build)


# --- Machine code -------------------------------------------------------------------------------------------


def assert_code(names, ops, build):
    """Nothing is fused, flushed or approximate but in roots and divisions, and what is seen is float64."""
    due = arithmetic_due(ops, build.suffix, Expansions(build.backend, build.capability, build.suffix))
    observed = build.entry == "step_units_observed"
    if build.dtype == "float32" and observed:
        due += Counter({"DADD": sum(ops[f"{op}.f64"] for op in ("add.rn", "sub.rn", "sub"))})
        due += Counter({"DMUL": ops["mul.rn.f64"]})
    found = Counter(sass.arithmetic(names))
    # A negative that is no operand of what can negate its operands is an addition to -0.
    add = "FADD" if build.dtype == "float32" else "DADD"
    negatives = (build.hyperparameters.max_grad_value is not None) + build.hyperparameters.maximize
    assert 0 <= found[add] - due[add] <= negatives * ops[f"sqrt.rn.{build.suffix}"]
    found[add] = due[add]
    assert found == due
    if build.dtype == "float32":
        wide = {name for name in of_float64(names) if not name.startswith("DSETP.NEU")}
        assert wide == ({"DADD", "DMUL", "F2F.F64.F32"} if observed else set())
        assert Counter(names)["F2F.F64.F32"] == ops["cvt.f64.f32"]


@pytest.mark.parametrize("build", UNITS, ids=str)
def test_machine_code(build):
    assert_code(machine_code(build), ops_of(build), build)


@pytest.mark.parametrize(("option", "trace"), [(("-fma=1", "-fma=0"), "DFMA"), (("-ftz=1", "-ftz=0"), "FTZ")])
def test_careless_linking_is_seen(monkeypatch, option, trace):
    build = Build("numba-cuda", "step_units_observed", "float32", "plain")
    careless, careful = option
    options = tuple(careless if each == careful else each for each in cuda_numba._LINK_OPTIONS)
    monkeypatch.setattr(cuda_numba, "_LINK_OPTIONS", options)
    cubin = cuda_builds._numba.__wrapped__(build.entry, build.types, SM_90)
    (names,) = sass.disassemble([build.named(sass.kernels(cubin)).code], SM_90)
    assert any(trace in name for name in names)
    with pytest.raises(AssertionError):
        assert_code(names, ops_of(build), build)


@pytest.mark.parametrize("build", UNITS, ids=str)
def test_registers_and_memory(build, record_property):
    found = kernel(build)
    record_property("registers", found.registers)
    wide = (build.entry, build.dtype) == ("step_units_observed", "float64")
    assert 0 < found.registers <= (MOST_WIDE if wide else MOST_REGISTERS[build.entry])
    assert (found.stack, found.local) == (0, 0)
    assert [name for name in machine_code(build) if is_spill(name)] == []


@pytest.mark.parametrize("capability", [SM_80, SM_90, SM_100], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_too_tight_a_bound_spills(capability, dtype):
    """So the bound of kernels/grids.py is what keeps an observed step with all parts from it."""
    build = Build("cupy", "step_units_observed", dtype, MOST, capability)
    source = source_of(build)
    tight = re.sub(r"(__launch_bounds__\(256, )\d(\)\nstep_units_observed)", r"\g<1>4\2", source)
    assert tight != source
    assert sass.kernels(compile_cuda(tight, capability)[1])[build.entry].stack > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_but_units_is_compiled_for_units(dtype):
    """And nothing of them for a step without."""
    types = Build("cupy", "step", dtype, MOST).types
    for kinds in (types, types.of_clock):
        usual, units = (
            set(entries(compile_cuda(cuda_source.source(kinds, units=u))[0])) for u in (False, True)
        )
        assert not usual & units
