"""The PTX and the machine code of a step of many buffers: run on NumPy scalars, the bits of the CPU."""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
import pytest
import sass
from cuda_builds import DTYPES, SM_80, SM_90, SM_100, SUFFIX, compile_cuda
from expansions import Expansions
from ptx import Program, count, entries
from ptx_checks import foreign
from stored_gpu import StoredGpu, kernel_of, program, ptx_of
from test_cuda_codegen import arithmetic_due, is_spill
from test_tensors import CODES, KINDS, Buffers, assert_same, separate
from test_tensors import apart as apart_by

from fastadam.adam import AdamHyperparameters
from fastadam.coefficients import Coefficients
from fastadam.kernels import cuda_source, device_tensors, grids
from fastadam.kernels.cuda import STEP_TENSORS, KernelTypes
from fastadam.kernels.device_storage import StoredTypes

SIZES = [0, 1, 4, 7, 16, 33]
VARIANTS = {
    "plain": {},
    "l2": {"weight_decay": 0.1},
    "amsgrad-maximize-adamw": {
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
        "amsgrad": True,
        "maximize": True,
    },
}
MOST = "amsgrad-maximize-adamw"
NARROW = [["bfloat16"] * 4, ["bfloat16", "float32", "float16", "float32"]]
KINDS_OF_BUFFERS = [[dtype] * 4 for dtype in DTYPES] + NARROW

each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_kinds = pytest.mark.parametrize("kinds", KINDS_OF_BUFFERS, ids="-".join)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_gpu = pytest.mark.parametrize("capability", [SM_80, SM_90, SM_100], ids=str)


class OnGpu(Buffers):
    """Buffers in the memory of a GPU whose kernels NumPy runs."""

    programs = staticmethod(program)

    def take(self, group, c):
        gpu = StoredGpu("cupy", self.programs)
        pieces = device_tensors.pieces(group.units)
        tables = [pieces, group.places.view(), group.coefficients]
        for array in (*tables, *(array for of_kind in self.arrays for array in of_kind)):
            gpu.memory.add(array.reshape(-1))
        addresses = [table.ctypes.data for table in tables]
        where = device_tensors.Tables(addresses[0], len(pieces), *addresses[1:])
        device_tensors.plan(gpu, group, c, where, 0, 0)()
        assert gpu.launched == [STEP_TENSORS]


def assert_runs(rng, monkeypatch, variant, kinds, programs=program):
    monkeypatch.setattr(device_tensors, "PIECE", 16)
    monkeypatch.setattr(OnGpu, "programs", staticmethod(programs))
    flags = VARIANTS[variant]
    for align, apart in ((0, False), (1, False), (0, True)):
        buffers = OnGpu(rng, SIZES, kinds, align=align, amsgrad=flags.get("amsgrad", False))
        if apart:  # gradients begin elsewhere in a pack: no access may take one
            buffers.arrays[1] = [apart_by(grads, 1) for grads in buffers.arrays[1]]
        rows = [
            (AdamHyperparameters(**{**flags, "lr": 0.1}), 1),
            (AdamHyperparameters(**{**flags, "betas": (0.5, 0.6), "weight_decay": 0.0}), 5),
        ]
        for scale in (None, 3.0):
            expected = separate(buffers, rows, scale)
            buffers.step(rows, scale)
            assert_same(buffers.arrays, expected)


@each_kinds
@each_variant
def test_bits_of_the_cpu(rng, monkeypatch, variant, kinds):
    assert_runs(rng, monkeypatch, variant, kinds)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("sub.rn.f32", "add.rn.f32"),
        ("sqrt.rn.f32", "neg.f32"),
        ("setp.eq.f32", "setp.ne.f32"),
        ("setp.lt.s64", "setp.gt.s64"),
        ("ld.global.v4.f32", "st.global.v4.f32"),
    ],
)
def test_wrong_instructions_are_seen(rng, monkeypatch, right, wrong):
    def spoilt(*of):
        code = ptx_of(*of)
        assert f"{right} " in code
        lines = [line for line in code.splitlines() if not (right.startswith("ld.") and right in line)]
        return Program("\n".join(lines).replace(f"{right} ", f"{wrong} "))

    with pytest.raises((AssertionError, NameError, UnboundLocalError)):
        assert_runs(rng, monkeypatch, MOST, ["float32"] * 4, spoilt)


# --- The code -----------------------------------------------------------------------------------------------


def types_of(variant, kinds, *, scaled=False):
    """Return what the kernel of a variant is compiled for."""
    h = AdamHyperparameters(**VARIANTS[variant])
    math = np.dtype(np.float64 if kinds[0] == "float64" else np.float32)
    c = Coefficients(h, math).update(1, 2.0 if scaled else None)
    types = KernelTypes.of(math, 2 + h.amsgrad, c, None)
    if set(kinds) == {math.name}:
        return types
    params, grads, *states = (np.dtype(CODES.get(kind, KINDS[kind])) for kind in kinds)
    return types._replace(stored=StoredTypes(params, grads, tuple([*states, states[-1]][: types.n_states])))


@cache
def compiled(types, capability):
    """Return the PTX's instructions, the kernel and its machine code."""
    kernel = kernel_of("cupy", STEP_TENSORS, types, capability)
    (names,) = sass.disassemble([kernel.code], capability)
    return kernel, names


def ops_of(types, capability=SM_90):
    """Count the instructions of the kernel's PTX."""
    return count(
        entries(compile_cuda(cuda_source.source_of(STEP_TENSORS, types), capability)[0])[STEP_TENSORS]
    )


def elsewhere(ops):
    """Return accesses to memory of which the compiler does not know that it is the device's."""
    return [
        op for op in ops if op.startswith(("ld.", "st.")) and not op[3:].startswith(("global.", "param."))
    ]


@each_gpu
@each_dtype
@each_variant
def test_nothing_is_fused_or_flushed(variant, dtype, capability):
    types, suffix = types_of(variant, [dtype] * 4, scaled=True), SUFFIX[dtype]
    _, names = compiled(types, capability)
    ops = ops_of(types, capability)
    assert foreign(ops, suffix) == set()
    due = arithmetic_due(ops, suffix, Expansions("cupy", capability, suffix))
    found, add = Counter(sass.arithmetic(names)), "FADD" if dtype == "float32" else "DADD"
    # A negative that is no operand of what can negate its operands is an addition to -0: clipping and ascent.
    assert 0 <= found[add] - due[add] <= 2 * ops[f"sqrt.rn.{suffix}"]
    found[add] = due[add]
    assert found == due


@pytest.mark.parametrize(
    ("right", "wrong"), [("BINARY(*,", "STRAY(*,"), ("BINARY(-,", "STRAY(-,")], ids=["product", "difference"]
)
def test_careless_sources_are_seen(right, wrong):
    """An operator that is not spelled out is flushed, or fused."""
    source = cuda_source.source_of(STEP_TENSORS, types_of("l2", ["float32"] * 4))
    assert right in source
    function = "DEVICE Real operator symbol(Real a, Real b) { return {a.value symbol b.value}; }"
    stray = f"#define STRAY(symbol, _) {function}\n"
    source = source.replace(right, wrong).replace("UNARY(operator-", f"{stray}UNARY(operator-", 1)
    assert foreign(count(entries(compile_cuda(source)[0])[STEP_TENSORS]), "f32") != set()


@each_dtype
@each_variant
def test_what_is_in_packs_is_one_access(variant, dtype):
    """A pack of each buffer, an element of each, a row; parameters and states are written."""
    types, suffix = types_of(variant, [dtype] * 4), SUFFIX[dtype]
    ops, buffers = ops_of(types), 2 + types.n_states
    pack = f"v{grids.PACK // np.dtype(dtype).itemsize}.{suffix}"
    assert (ops[f"ld.global.{pack}"], ops[f"st.global.{pack}"]) == (buffers, buffers - 1)
    row = 7 + (types.decay is not type(None))
    loops, rest = divmod(ops[f"ld.global.{suffix}"] - row, buffers)  # one for rows without a decay, perhaps
    assert (loops in {1, 2}, rest) == (True, 0)
    assert ops[f"st.global.{suffix}"] == loops * (buffers - 1)
    assert elsewhere(ops) == []


@each_gpu
@each_kinds
@each_variant
def test_registers_and_memory(variant, kinds, capability, record_property):
    """Two blocks of 256 threads on 65,536 registers, as the kernel is bound to, and nothing spilled."""
    kernel, names = compiled(types_of(variant, kinds, scaled=True), capability)
    record_property("registers", kernel.registers)
    assert 0 < kernel.registers <= 128
    assert (kernel.stack, kernel.local) == (0, 0)
    assert [name for name in names if is_spill(name)] == []


def test_memory_that_could_be_any_is_seen():
    """Were what a table has not said to be global, every access would have to find out what it is."""
    source = cuda_source.source_of(STEP_TENSORS, types_of("plain", ["float32"] * 4))
    said = "static_cast<Element*>(__cvta_global_to_generic(static_cast<unsigned long long>(address))) + i"
    assert said in source
    source = source.replace(said, "reinterpret_cast<Element*>(address) + i")
    assert elsewhere(count(compile_cuda(source)[0])) != []
