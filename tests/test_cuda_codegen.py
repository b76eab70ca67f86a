"""The machine code of the CUDA kernels: nothing fused or flushed, 16-byte accesses, registers, no spills.

No GPU, no driver: NVIDIA's compilers make it for several architectures. With ``--junitxml``, the tests report
the registers of each kernel.
"""

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
    ELSEWHERE,
    ENTRIES,
    MOST,
    OTHERS,
    SM_90,
    STEPS,
    Build,
    compile_cuda,
    cubin_of,
    plant,
    source_of,
)
from expansions import Expansions
from ptx_checks import bodies, n_accesses, ops_of

from fastadam.kernels import cuda_numba, cuda_source, grids

MOST_REGISTERS = 80
"""Three blocks of 256 threads on a multiprocessor of 65,536 registers, 37 % of its threads, each with four or
more 16-byte loads in flight: 48 KiB, above what the latency of DRAM asks for (Little's law: 800 ns times
3.35 TB/s over 132 multiprocessors are 20 KiB on an H100)."""

MOST_WIDE_REGISTERS = 128
"""Of a step with an average in float64, or captured: two blocks of 256 threads on 65,536 registers, each
thread with five or six 16-byte loads in flight: 40 KiB, twice what the latency of DRAM asks for. A captured
step holds its coefficients in registers, too. NVRTC is told how many blocks should fit (kernels/grids.py);
Numba's linker is not, and takes up to 118 registers for a captured step with all parts on sm_90."""

MOST_OF_OTHERS = 64
"""Of a kernel that knows no rule: four blocks of 256 threads."""

each_step = pytest.mark.parametrize("build", STEPS, ids=str)
each_other = pytest.mark.parametrize("build", OTHERS, ids=str)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@cache
def kernel(build: Build) -> sass.Kernel:
    return build.named(sass.kernels(cubin_of(build)))


@cache
def _disassembled(backend: str, capability: tuple[int, int]) -> dict[Build, list[str]]:
    """Read all kernels of a backend for an architecture in one go."""
    place = backend, capability
    builds = [build for build in STEPS + ELSEWHERE + OTHERS if (build.backend, build.capability) == place]
    listings = sass.disassemble([kernel(build).code for build in builds], capability)
    return dict(zip(builds, listings, strict=True))


def machine_code(build: Build) -> list[str]:
    """Return the machine instructions of a kernel."""
    return _disassembled(build.backend, build.capability)[build]


# --- Instructions -------------------------------------------------------------------------------------------


def arithmetic_due(ops, suffix, expansions):
    """Return the arithmetic that the machine code of some PTX must have, no more and no less.

    Each ``add``, ``sub`` and ``mul`` is an instruction of its own, so none is part of a fused one or flushed;
    what is fused, belongs to the square roots and divisions.
    """
    letter = {"f32": "F", "f64": "D"}[suffix]
    due = Counter(expansions.arithmetic(ops[f"sqrt.rn.{suffix}"], ops[f"div.rn.{suffix}"]))
    due[f"{letter}ADD"] += sum(ops[f"{op}{suffix}"] for op in ("add.rn.", "sub.rn.", "add.", "sub."))
    due[f"{letter}MUL"] += ops[f"mul.rn.{suffix}"] + ops[f"mul.{suffix}"]
    return +due


def of_float64(names):
    return {name for name in names if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|F2F|MUFU\.\w+64", name)}


@each_step
def test_machine_code_of_a_step(build):
    ops, names = ops_of(build), machine_code(build)
    expansions = Expansions(build.backend, build.capability, build.suffix)
    packs, alone = bodies(ops, build)
    found, due = Counter(sass.arithmetic(names)), arithmetic_due(ops, build.suffix, expansions)
    # To clip to -max_value, or to ascend, a negative is made: of -0 plus that, if it is no operand of what
    # can negate its operands.
    add = "FADD" if build.dtype == "float32" else "DADD"
    elements = packs * grids.PACK // build.types.dtype.itemsize + alone
    negatives = (build.hyperparameters.max_grad_value is not None) + build.hyperparameters.maximize
    assert found[add] - due[add] in {n * elements for n in range(negatives + 1)}
    found[add] = due[add]
    assert found == due
    if build.dtype == "float32":
        assert of_float64(names) == set()
    n_loads, n_stores = n_accesses(build)
    assert names.count("LDG.E.128") == packs * n_loads
    assert names.count("STG.E.128") == packs * n_stores


@each_other
def test_machine_code_of_a_kernel_without_a_rule(build):
    assert_plain(machine_code(build), ops_of(build), build)


OF_A_TERM = {
    "measure_units": {"DMUL": 1, "DADD": 3, "F2F.F64.F32": 1},
    "sum_groups": {"DADD": 2},
}
"""What a loop of Numba's does with a term, of which its assembler makes more copies than the PTX has."""


def assert_plain(names, ops, build):
    """Nothing is fused, flushed or approximate, and floats are converted as the PTX says."""
    suffix = build.suffix if build.entry == "accumulate" else "f64"
    expansions = Expansions(build.backend, build.capability, suffix)
    due = arithmetic_due(ops, suffix, expansions)
    # NVRTC rounds the clip factor of a step that does not look, which is 1, itself; Numba has in its PTX.
    folded = (build.backend, build.entry, build.dtype) == ("cupy", "form_coefficients", "float32")
    conversions = {"F2F.F64.F32": ops["cvt.f64.f32"], "F2F.F32.F64": ops["cvt.rn.f32.f64"] - folded}
    found = sass.arithmetic(names)
    if build.backend == "numba-cuda" and build.entry in OF_A_TERM:
        term = OF_A_TERM[build.entry]
        copies = (found["DADD"] - due["DADD"]) // term["DADD"]
        assert copies >= 0
        due += Counter({name: n * copies for name, n in term.items() if name.startswith("D")})
        conversions["F2F.F64.F32"] += copies * (build.dtype == "float32" and "F2F.F64.F32" in term)
    assert found == due
    assert Counter(name for name in names if name.startswith("F2F")) == +Counter(conversions)


@pytest.mark.parametrize(
    ("entry", "option", "trace"),
    [
        ("measure", ("-fma=1", "-fma=0"), "DFMA"),
        ("measure", ("-ftz=1", "-ftz=0"), "FTZ"),
        ("decide", ("-ftz=1", "-ftz=0"), "FTZ"),
    ],
)
def test_careless_linking_is_seen(monkeypatch, entry, option, trace):
    """Numba's kernels are as the linker is told."""
    build = Build("numba-cuda", entry, "float32", "adamw")
    careless, careful = option
    options = tuple(careless if each == careful else each for each in cuda_numba._LINK_OPTIONS)
    assert options != cuda_numba._LINK_OPTIONS
    monkeypatch.setattr(cuda_numba, "_LINK_OPTIONS", options)
    cubin = cuda_builds._numba.__wrapped__(entry, build.types, SM_90)
    (names,) = sass.disassemble([build.named(sass.kernels(cubin)).code], SM_90)
    assert any(trace in name for name in names)
    with pytest.raises(AssertionError):
        assert_plain(names, ops_of(build), build)


@pytest.mark.parametrize(
    ("careless", "trace"),
    [
        ({"__dadd_rn(a, b)": "a + b", "__dmul_rn(a, b)": "a * b"}, "DFMA"),
        ({'asm("cvt.f64.f32 %0, %1;" : "=d"(result) : "f"(a));': "result = a;"}, "FMUL.FTZ"),
    ],
    ids=["fused", "flushed"],
)
def test_careless_clocks_are_seen(careless, trace):
    """Where they are compiled as CuPy does."""
    build = Build("cupy", "measure", "float32", "adamw")
    source = cuda_source.source(build.types)
    for right, wrong in careless.items():
        assert right in source
        source = source.replace(right, wrong)
    _, cubin = compile_cuda(source)
    (names,) = sass.disassemble([sass.kernels(cubin)["measure"].code], SM_90)
    assert trace in names
    with pytest.raises(AssertionError):
        assert_plain(names, ops_of(build), build)


@pytest.mark.parametrize(
    "options",
    [("-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"), ("--use_fast_math",)],
    ids=["strict", "fast"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_option_changes_the_machine_code(dtype, options):
    """CuPy flushes subnormals, and NVRTC fuses, unless they are told not to."""
    for entry in ENTRIES:
        build = Build("cupy", entry, dtype, MOST)
        _, other = compile_cuda(source_of(build), SM_90, (*cuda_source.OPTIONS, *options))
        assert sass.kernels(cubin_of(build))[entry].code == sass.kernels(other)[entry].code


def test_options_change_careless_code():
    source = plant("*b = a[0] * a[1] + a[2];")
    usual, other = (
        sass.kernels(compile_cuda(source, SM_90, options)[1])
        for options in (("-ftz=true",), ("-fmad=false",))
    )
    assert usual["planted"].code != other["planted"].code


SPILLING = "float c[64]; for (int i = 0; i < n; ++i) c[i & 63] = a[i]; *b = c[n & 63];"


@cache
def planted() -> dict[str, list[str]]:
    """Return the machine instructions of kernels that the checks must refuse, by name."""
    sources = [
        plant("*b = a[0] * a[1] + a[2];", "float", "fused_f32"),
        plant("*b = a[0] * a[1] + a[2];", "double", "fused_f64"),
        plant("*b = a[0] + a[1];", "float", "flushed"),
        plant("*b = a[0] * 0.1;", "float", "wide"),
        plant(SPILLING, "float", "spilling"),
    ]
    _, cubin = compile_cuda("".join(sources))
    kernels = sass.kernels(cubin)
    listings = sass.disassemble([kernel.code for kernel in kernels.values()], SM_90)
    return dict(zip(kernels, listings, strict=True))


@pytest.mark.parametrize(
    ("name", "suffix", "plain", "found"),
    [
        ("fused_f32", "f32", ["mul.rn.f32", "add.rn.f32"], "FFMA.FTZ"),
        ("fused_f64", "f64", ["mul.rn.f64", "add.rn.f64"], "DFMA"),
        ("flushed", "f32", ["add.rn.f32"], "FADD.FTZ"),
    ],
)
@each_backend
def test_other_arithmetic_is_seen(backend, name, suffix, plain, found):
    arithmetic = sass.arithmetic(planted()[name])
    assert arithmetic == {found: 1}
    due = arithmetic_due(Counter(plain), suffix, Expansions(backend, SM_90, suffix))
    assert arithmetic != due
    assert due.total() == len(plain)


def test_float64_is_seen():
    assert of_float64(planted()["wide"]) >= {"F2F.F64.F32", "DMUL", "F2F.F32.F64"}
    assert of_float64(planted()["flushed"]) == set()


# --- Registers and memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("build", STEPS + ELSEWHERE, ids=str)
def test_registers_and_memory_of_a_step(build, record_property):
    found = kernel(build)
    record_property("registers", found.registers)
    more = build.dtype == "float64" or build.entry == "step_captured"
    wide = more and build.hyperparameters.ema_decay is not None
    assert 0 < found.registers <= (MOST_WIDE_REGISTERS if wide else MOST_REGISTERS)
    assert (found.stack, found.local) == (0, 0)
    assert [name for name in machine_code(build) if is_spill(name)] == []


def is_spill(name):
    """Whether an instruction loads from, or stores to, a thread's memory of its own."""
    return name.startswith(("LDL", "STL"))


@each_other
def test_registers_and_memory_of_a_kernel_without_a_rule(build, record_property):
    found = kernel(build)
    record_property("registers", found.registers)
    assert 0 < found.registers <= MOST_OF_OTHERS
    assert (found.stack, found.local) == (0, 0)
    assert [name for name in machine_code(build) if is_spill(name)] == []


def test_memory_of_a_thread_is_seen():
    _, cubin = compile_cuda(plant(SPILLING))
    assert sass.kernels(cubin)["planted"].stack >= 256
    assert {name[:3] for name in filter(is_spill, planted()["spilling"])} == {"LDL", "STL"}


def test_registers_are_seen():
    """Ninety sums, kept in registers from one iteration to the next."""
    sums = "float s[90] = {}; for (int i = 0; i < n; ++i) for (int k = 0; k < 90; ++k) s[k] += a[k * n + i];"
    _, cubin = compile_cuda(plant(f"{sums} for (int k = 0; k < 90; ++k) b[k] = s[k];"))
    assert sass.kernels(cubin)["planted"].registers > MOST_REGISTERS


def test_a_warning_is_an_error():
    with pytest.raises(RuntimeError, match="never referenced"):
        compile_cuda(plant("int unused;"))
