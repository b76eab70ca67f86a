"""The generated code of the CUDA kernels: nothing fused, nothing approximate, no other float, 16-byte accesses.

No GPU, no driver: NVIDIA's compilers make the PTX and the machine code (SASS) of several architectures. A third
look is to run the PTX: its bits on NumPy scalars are those of the rule, and its addresses do not overflow.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from oracles import FLAGS, flags_id, interpret
from tolerances import assert_same_bits

for _package in ("cuda.bindings.nvrtc", "cuda.bindings.nvjitlink", "cuda.pathfinder", "numba_cuda"):
    pytest.importorskip(_package, reason=f"needs {_package} to compile for GPUs", exc_type=ImportError)

import cuda_tools
from cuda_tools import CAPABILITIES, CUPY_APPENDS, ENTRIES, Memory, Ptx, kernel, types_of

from fastadam import bias_correction
from fastadam.hyperparameters import Coefficients, Hyperparameters
from fastadam.kernels import cuda_source, grids
from fastadam.kernels.cuda import Clock, Cuda, DeviceBuffer

pytestmark = pytest.mark.skipif(bool(cuda_tools.MISSING), reason=f"needs {' and '.join(cuda_tools.MISSING)}")

BACKENDS = ["cupy", "numba-cuda"]
DTYPES = ["float32", "float64"]
SUFFIX = {"float32": "f32", "float64": "f64"}
COMBINATIONS = [FLAGS[0], FLAGS[1], FLAGS[-1]]
"""All rules, directions and decays: plain Adam, with L2, and AMSGrad that maximizes with decoupled decay."""

MOST_REGISTERS = 80
"""Three blocks of 256 threads on a multiprocessor of 65,536 registers, 37 % of its threads, each with four or more
16-byte loads in flight: 48 KiB, above what the latency of DRAM asks for (Little's law: 800 ns times 3.35 TB/s over
132 multiprocessors are 20 KiB on an H100)."""

SM_90 = (9, 0)
STEPS = [
    *((c, entry, flags) for c in [SM_90] for entry in ("step", "step_captured") for flags in COMBINATIONS),
    *((c, "step", flags) for c in CAPABILITIES if c != SM_90 for flags in COMBINATIONS[1:]),
]


def name(value):
    if isinstance(value, dict):
        return flags_id(value)
    return "sm_{}{}".format(*value) if isinstance(value, tuple) else None


each_step = pytest.mark.parametrize(("capability", "entry", "flags"), STEPS, ids=name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


# --- PTX -----------------------------------------------------------------------------------------------------


def foreign(ops, suffix):
    """Floating-point instructions of PTX that a step of one dtype may not have.

    The manual of PTX: an ``add`` or ``mul`` with an explicit ``.rn`` is never fused, ``sqrt.rn`` and ``div.rn`` are
    those of IEEE 754, and without ``.ftz`` subnormals are kept. The condition of a ``setp`` is not arithmetic.
    """
    arithmetic = {f"{op}.rn.{suffix}" for op in ("add", "sub", "mul", "div", "sqrt")}
    moves = re.compile(
        rf"(neg|selp|mov|setp\.(lt|le|gt|ge|eq|ne)u?|(ld|st)\.global(\.v[24])?|ld\.param)\.{suffix}"
    )
    floats = re.compile(
        r"\.(b?f16|b?f16x2|f32|f32x2|f64|approx|full|ftz|sat)\b|^(fma|mad\.r|rcp|rsqrt|ex2|tanh)"
    )
    return {op for op in ops if floats.search(op) and op not in arithmetic and not moves.fullmatch(op)}


def packs(ops, suffix, n_states):
    """Copies of the loop over packs: each loads all buffers once and stores all but the gradients."""
    vector = {"f32": "v4.f32", "f64": "v2.f64"}[suffix]
    kinds = (vector, vector.replace("f", "b"))  # newer compilers do not tell floats from bits here
    loads, stores = (sum(ops[f"{access}.global.{kind}"] for kind in kinds) for access in ("ld", "st"))
    copies, rest = divmod(loads, n_states + 2)
    assert copies > 0, "no packs"
    assert (rest, stores) == (0, copies * (n_states + 1))
    return copies


@each_step
@each_dtype
@each_backend
def test_ptx_of_a_step(backend, dtype, capability, entry, flags):
    types, suffix = types_of(dtype, flags), SUFFIX[dtype]
    ops = kernel(backend, entry, types, capability).ops
    assert foreign(ops, suffix) == set()
    lanes = {"f32": 4, "f64": 2}[suffix]
    copies = packs(ops, suffix, types.n_states)
    bits = suffix.replace("f", "b")  # newer compilers do not tell floats from bits here
    loads, stores = (
        ops[f"{access}.global.{suffix}"] + ops[f"{access}.global.{bits}"] for access in ("ld", "st")
    )
    elements = copies * lanes + loads // (types.n_states + 2)  # of packs, and one by one
    assert ops[f"sqrt.rn.{suffix}"] > 0
    if entry == "step":  # a captured step loads its coefficients, too
        assert ops[f"sqrt.rn.{suffix}"] == ops[f"div.rn.{suffix}"] == elements
    assert stores == (ops[f"sqrt.rn.{suffix}"] - copies * lanes) * (types.n_states + 1)


@each_backend
def test_ptx_of_form_coefficients_and_set_lr(backend):
    for dtype in DTYPES:
        types = types_of(dtype, FLAGS[-1])
        ops = kernel(backend, "form_coefficients", types).ops
        product = {"cupy": "mul.f64", "numba-cuda": "mul.rn.f64"}[
            backend
        ]  # nothing is added: nothing to fuse
        rounding = {"cvt.rn.f32.f64": 3, "st.global.f32": 3} if dtype == "float32" else {"st.global.f64": 3}
        expected = {"div.rn.f64": 1, product: 1, "ld.param.f64": 1, **rounding}
        moves = {"ld.global.f64", "mov.f64"}
        assert {op: n for op, n in ops.items() if ".f" in op and op not in moves} == expected
        ops = kernel(backend, "set_lr", types).ops
        assert {op for op in ops if ".f" in op} <= {"ld.param.f64", "st.global.f64"}
        assert sum(op.startswith("st.global") for op in ops.elements()) == 1


# --- Machine code --------------------------------------------------------------------------------------------


def arithmetic(sass):
    """Count the additions, multiplications and fused multiply-adds, of float32 and float64, with variants."""
    return Counter(op for op in sass if re.match(r"[FD](ADD|MUL|FMA)", op))


def roots_and_quotients(suffix, roots, quotients):
    """CUDA C++ with so many square roots and divisions, and nothing else."""
    letter, number = {"f32": ("f", "float"), "f64": ("d", "double")}[suffix]
    body = [f'asm("sqrt.rn.{suffix} %0, %0;" : "+{letter}"(a[{k}]));' for k in range(roots)]
    body += [
        f'asm("div.rn.{suffix} %0, %0, %1;" : "+{letter}"(a[{k}]) : "{letter}"(b));'
        for k in range(8, 8 + quotients)
    ]
    signature = f"k_{suffix}_{roots}_{quotients}({number}* a, {number} b)"
    return f'extern "C" __global__ void {signature} {{ {" ".join(body)} }}'


SAMPLES = [(0, 1), (1, 1), (2, 1), (1, 2), (3, 4)]
SAMPLE_SOURCE = "\n".join(
    roots_and_quotients(suffix, *sample) for suffix in ("f32", "f64") for sample in SAMPLES
)


def expansions(backend, capability, suffix):
    """Return what square roots and divisions consist of: a function of their numbers, by samples.

    Each adds its share, and the paths for rare operands are there once.
    """
    compiled = {"cupy": cuda_tools.nvrtc_kernels, "numba-cuda": cuda_tools.linked_kernels}[backend]
    found = compiled(SAMPLE_SOURCE, capability)
    sample = {key: arithmetic(found["k_{}_{}_{}".format(suffix, *key)].sass) for key in SAMPLES}

    def of(roots, quotients):
        if (roots, quotients) in sample:
            return sample[roots, quotients]
        first, root, quotient = (sample[key] for key in ((1, 1), (2, 1), (1, 2)))
        return Counter({
            op: first[op] + (roots - 1) * (root[op] - first[op]) + (quotients - 1) * (quotient[op] - first[op])
            for op in first
        })  # fmt: skip

    assert of(3, 4) == sample[3, 4]
    del sample[3, 4]
    assert of(3, 4) == arithmetic(found[f"k_{suffix}_3_4"].sass), "shares do not add up"
    return of


def account(ops, suffix, of):
    """Arithmetic that the machine code of some PTX must have, no more and no less.

    Each ``add``, ``sub`` and ``mul`` is an instruction of its own, so none is part of a fused one or flushed; what
    is fused, belongs to the square roots and divisions.
    """
    letter = {"f32": "F", "f64": "D"}[suffix]
    due = Counter(of(ops[f"sqrt.rn.{suffix}"], ops[f"div.rn.{suffix}"]))
    due[f"{letter}ADD"] += ops[f"add.rn.{suffix}"] + ops[f"sub.rn.{suffix}"]
    due[f"{letter}MUL"] += ops[f"mul.rn.{suffix}"] + ops[f"mul.{suffix}"]
    return +due


@each_step
@each_dtype
@each_backend
def test_machine_code_of_a_step(backend, dtype, capability, entry, flags, record_property):
    types, suffix = types_of(dtype, flags), SUFFIX[dtype]
    found = kernel(backend, entry, types, capability)
    sass = Counter(found.sass)
    assert arithmetic(found.sass) == account(found.ops, suffix, expansions(backend, capability, suffix))
    if dtype == "float32":
        float64 = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)|F2F|MUFU\.\w+64")
        assert [op for op in sass if float64.match(op)] == []

    copies = packs(found.ops, suffix, types.n_states)
    assert sass["LDG.E.128"] == copies * (types.n_states + 2)
    assert sass["STG.E.128"] == copies * (types.n_states + 1)
    assert [op for op in sass if op.startswith(("LDL", "STL"))] == []
    assert (found.stack, found.local) == (0, 0)
    record_property("registers", found.registers)
    assert found.registers <= MOST_REGISTERS


@each_backend
def test_machine_code_of_form_coefficients_and_set_lr(backend):
    of = expansions(backend, SM_90, "f64")
    for entry in ("form_coefficients", "set_lr"):
        found = kernel(backend, entry, types_of("float32", FLAGS[-1]))
        # A division of float64 looks at its operands' exponents by a float32 operation.
        due = account(found.ops, "f64", of) if entry == "form_coefficients" else Counter()
        assert arithmetic(found.sass) == due
        assert (found.stack, found.local) == (0, 0)


@pytest.mark.parametrize(
    "options",
    [("-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"), ("--use_fast_math",)],
    ids=["strict", "fast"],
)
@each_dtype
def test_no_option_changes_the_machine_code(dtype, options):
    """CuPy flushes subnormals, and NVRTC fuses, unless they are told not to."""
    source = cuda_source.source(types_of(dtype, FLAGS[-1]))
    usual, other = (
        cuda_tools.nvrtc_kernels(source, SM_90, (*cuda_source.OPTIONS, *more))
        for more in (CUPY_APPENDS, options)
    )
    for entry in ENTRIES:
        assert usual[entry].machine_code == other[entry].machine_code


# --- The checks bite -----------------------------------------------------------------------------------------


def careless(statement, number="float"):
    source = f'extern "C" __global__ void k({number}* a, {number}* b, int n) {{ {statement} }}'
    return cuda_tools.nvrtc_kernels(source, SM_90, (*cuda_source.OPTIONS, *CUPY_APPENDS))["k"]


@pytest.mark.parametrize(
    ("statement", "number", "trace"),
    [
        ("*b = a[0] * a[1] + a[2];", "float", "fma.rn.ftz.f32"),
        ("*b = a[0] * a[1] + a[2];", "double", "fma.rn.f64"),
        ("*b = a[0] + a[1];", "float", "add.ftz.f32"),
        ("*b = a[0] * 0.1;", "float", "mul.f64"),
        ("*b = float(a[0]);", "double", "cvt.rn.ftz.f32.f64"),
        ("*b = __fdividef(a[0], a[1]);", "float", "div.approx.ftz.f32"),
        ("*b = __frsqrt_rn(*a);", "float", "rsqrt.approx.ftz.f32"),
        ("*b = a[0] < a[1] ? 1.f : 2.f;", "float", "setp.lt.ftz.f32"),
    ],
)
def test_the_check_of_ptx_bites(statement, number, trace):
    found = foreign(
        careless(statement, number).ops, SUFFIX[{"float": "float32", "double": "float64"}[number]]
    )
    assert trace in found


def test_the_check_of_packs_bites():
    elements = careless("for (int i = threadIdx.x; i < n; ++i) b[i] = a[i];").ops
    with pytest.raises(AssertionError, match="no packs"):
        packs(elements, "f32", 2)
    ops = kernel("cupy", "step", types_of("float32", FLAGS[0])).ops
    with pytest.raises(AssertionError):
        packs(ops - Counter(["st.global.v4.f32"]), "f32", 2)


@pytest.mark.parametrize(("number", "suffix"), [("float", "f32"), ("double", "f64")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_account_of_the_machine_code_bites(backend, number, suffix):
    of = expansions(backend, SM_90, suffix)
    plain = Counter([f"mul.rn.{suffix}", f"add.rn.{suffix}"])
    fused = arithmetic(careless("*b = a[0] * a[1] + a[2];", number).sass)
    assert fused != account(plain, suffix, lambda *_: Counter())
    flushed = arithmetic(careless("*b = a[0] + a[1];").sass)
    assert flushed == Counter(["FADD.FTZ"]) != account(Counter(["add.rn.f32"]), "f32", lambda *_: Counter())
    # One product and one sum of a step, fused.
    ops = kernel(backend, "step", types_of({"f32": "float32", "f64": "float64"}[suffix], FLAGS[0])).ops
    due = account(ops, suffix, of)
    letter = {"f32": "F", "f64": "D"}[suffix]
    fewer = account(ops - plain, suffix, of) + Counter([f"{letter}FMA"])
    assert fewer != due


def test_local_memory_is_seen():
    found = careless("float c[64]; for (int i = 0; i < n; ++i) c[i & 63] = a[i]; *b = c[n & 63];")
    assert found.stack >= 256
    assert any(op.startswith("STL") for op in found.sass)


def test_a_warning_is_an_error():
    with pytest.raises(RuntimeError, match="never referenced"):
        careless("int unused;")


# --- The PTX, run --------------------------------------------------------------------------------------------


class Emulated(Cuda):
    """A backend of which the kernels are the PTX of another, and the device is host memory."""

    def __init__(self, backend: str) -> None:
        self.name, self.memory, self._programs = backend, Memory(), {}

    def kernel(self, entry, types, device):
        if (entry, types) not in self._programs:
            self._programs[entry, types] = program(self.name, entry, types)
        return self._programs[entry, types]

    def launch(self, kernel, blocks, threads, args, device, stream):
        kernel.launch(blocks, threads, args, self.memory)

    def to_device(self, array, device, stream):
        copy = array.copy()
        self.memory.add(copy)
        return copy

    def address(self, array):
        return array.ctypes.data

    def to_host(self, array, device):
        return array

    def resident_threads(self, device):
        return 3

    def buffer(self, values, offset):
        """A copy, whose first element lies so many elements behind a 16-byte boundary."""
        memory = np.zeros(values.nbytes + 2 * grids.PACK, np.uint8)
        start = -memory.ctypes.data % grids.PACK + offset * values.itemsize
        array = memory[start : start + values.nbytes].view(values.dtype)
        array[:] = values
        return DeviceBuffer(self.memory.add(array), array.size, array.dtype, 0, 0, array)


Emulated.__abstractmethods__ = frozenset()  # the rest is never called


def program(backend, entry, types, _programs={}):  # noqa: B006
    key = backend, entry, types
    if key not in _programs:
        _programs[key] = Ptx(kernel(backend, entry, types).ptx)
    return _programs[key]


def problem(rng, dtype, size, steps):
    """Numbers of all magnitudes, subnormal and not finite ones among them."""
    finfo = np.finfo(dtype)
    special = [0.0, -0.0, 1.0, finfo.tiny / 2, finfo.smallest_subnormal, finfo.max, -np.inf, np.nan]
    arrays = 10.0 ** rng.uniform(-12, 6, (steps + 1, size)) * rng.standard_normal((steps + 1, size))
    with np.errstate(all="ignore"):
        values = np.where(rng.random(arrays.shape) < 0.3, rng.choice(special, arrays.shape), arrays).astype(
            dtype
        )
    return values[0], values[1:]


def run(backend, flags, params, gradients, lrs, offsets, *, captured):
    """Take a step with each of ``lrs``; return (params, states)."""
    h, dtype = Hyperparameters(**flags), params.dtype
    emulated = Emulated(backend)
    buffers = [
        emulated.buffer(values, offset)
        for values, offset in zip(
            [params, gradients[0], *(np.zeros_like(params) for _ in h.moments)], offsets, strict=False
        )
    ]
    param, grad, *states = buffers
    if captured:
        c = Coefficients(h, dtype)
        clock = Clock(
            emulated, 0, 0, types_of(dtype.name, flags),
            step=0, lr=h.lr, weight_decay=h.weight_decay, coefficients=(*(c.decay or ()), *c.rule(1)),
            corrections1=bias_correction.table(h.betas[0]),
            inverse_corrections2=1 / bias_correction.table(h.betas[1]),
        )  # fmt: skip
    for step, (lr, values) in enumerate(zip(lrs, gradients, strict=True), start=1):
        grad.owner[:] = values
        if captured:
            clock.set_lr(lr, 0)
            emulated.plan_captured(param, grad, states, clock)()
        else:
            c = Coefficients(h.changed(lr=lr), dtype)
            emulated.plan(param, grad, states, c.direction, c.decay, c.rule(step))()
    if captured:
        assert clock.step() == len(lrs)
    return param.owner, [state.owner for state in states]


LRS = [1e-3, 0.5, 1e-4]
PLACES = [(0, 0, 0, 0, 0), (1, 1, 1, 1, 1), (3, 3, 3, 3, 3), (0, 1, 0, 0, 0)]
"""Of the buffers, in elements from a 16-byte boundary: together, so that packs are taken, and not."""


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("flags", COMBINATIONS, ids=flags_id)
@each_dtype
@each_backend
def test_ptx_has_the_bits_of_the_rule(rng, monkeypatch, backend, dtype, flags, captured):
    monkeypatch.setattr(grids, "BLOCK", 4)
    h = Hyperparameters(**flags)
    sizes = [0, 1, 2, 3, 4, 5, 7, 8, 13, 61]
    for number, size in enumerate(sizes):
        params, gradients = problem(rng, dtype, size, len(LRS))
        expected = params, tuple(np.zeros_like(params) for _ in h.moments)
        for step, (lr, grads) in enumerate(zip(LRS, gradients, strict=True), start=1):
            expected = interpret(h.changed(lr=lr), expected[0], grads, expected[1], step)
        for offsets in PLACES if size > 8 else [PLACES[number % len(PLACES)]]:
            result = run(backend, flags, params, gradients, LRS, offsets, captured=captured)
            assert_same_bits(result[0], expected[0], f"params, {size=}, {offsets=}")
            for actual, state in zip(result[1], expected[1], strict=True):
                assert_same_bits(actual, state, f"state, {size=}, {offsets=}")


@each_dtype
@each_backend
def test_addresses_are_of_64_bits(rng, backend, dtype):
    """Threads of the largest grid, alone, at elements beyond 2**31, 2**32 and 2**40 of buffers at odd places."""
    flags = FLAGS[-1]
    types = types_of(dtype, flags)
    c = Coefficients(Hyperparameters(**flags), np.dtype(dtype))
    coefficients = (*c.decay, *c.rule(1))
    step = program(backend, "step", types)
    itemsize = np.dtype(dtype).itemsize
    lanes, blocks, threads = 16 // itemsize, 2**31 - 1, 1024
    everyone = blocks * threads
    head = 1
    for k, n_packs in [
        (2**31 + 5, 2**31 + 6),
        (2**32 + 1, 2**32 + 2),
        (everyone - 1, everyone),
        (3, everyone + 4),  # comes round once
        (0, 0),
        (2**32 + 3, 0),
    ]:
        size = head + n_packs * lanes + (2**33 if n_packs == 0 else 0)
        if n_packs:
            firsts, count = [head + j * lanes for j in (k, k + everyone) if j < n_packs], lanes
            if k < head + (size - head - n_packs * lanes):
                firsts.append(k if k < head else k + n_packs * lanes)
        else:
            firsts, count = [k], 1
        memory, places = Memory(), []
        params, gradients = problem(rng, dtype, count, 1)
        zeros = [np.zeros(count, dtype) for _ in range(types.n_states)]
        expected, expected_states = interpret(Hyperparameters(**flags), params, gradients[0], zeros, 1)
        windows = []
        for number, values in enumerate([params, gradients[0], *zeros]):
            base = (number + 1 << 50) + grids.PACK - head * itemsize
            places.append(base)
            windows.append([values.copy() for _ in firsts])
            for first, window in zip(firsts, windows[-1], strict=True):
                memory.add(window, base + first * itemsize)
        arguments = (*places, size, head, n_packs, *coefficients)
        step.thread(k // threads, k % threads, blocks, threads, arguments, memory)
        for window in windows[0]:
            assert_same_bits(window, expected)
        for moment, state in zip(windows[2:], expected_states, strict=True):
            for window in moment:
                assert_same_bits(window, state)


class TestPtx:
    """The machine that runs PTX."""

    TYPES = types_of("float32", FLAGS[0])

    def thread(self, memory, packs=1, size=4):
        c = Coefficients(Hyperparameters(), np.dtype("float32")).rule(1)
        places = [memory.add(np.ones(size, np.float32), 256 * (k + 1) + 4 * self.offset) for k in range(4)]
        program("cupy", "step", self.TYPES).thread(0, 0, 1, 1, (*places, size, 0, packs, *c), memory)

    offset = 0

    def test_traps(self):
        self.thread(Memory())
        self.thread(Memory(), packs=0)
        with pytest.raises(AssertionError, match="illegal memory access"):
            self.thread(Memory(), packs=2)
        self.offset = 1
        self.thread(Memory(), packs=0)
        with pytest.raises(AssertionError, match="misaligned"):
            self.thread(Memory())

    def test_refuses_what_it_does_not_know(self):
        with pytest.raises(NotImplementedError, match=r"fma\.rn\.ftz\.f32"):
            Ptx(careless("*b = a[0] * a[1] + a[2];").ptx)

    def test_an_overflow_is_seen(self):
        """A 32-bit product of the block's number and size wraps, and so does its address."""
        wide = careless("b[(long long)blockIdx.x * blockDim.x] = a[0];").ptx
        narrow = wide.replace("mul.wide.u32", "mul.wide.s32")
        assert narrow != wide
        memory = Memory()
        a = memory.add(np.ones(1, np.float32), 4)
        memory.add(np.ones(1, np.float32), 8 + 4 * (2**31 + 7) * 2)
        Ptx(wide.replace("ld.global.f32", "ld.global.f32")).thread(2**31 + 7, 0, 1, 2, (a, 8, 0), memory)
        with pytest.raises(AssertionError, match="illegal"):
            Ptx(narrow).thread(2**31 + 7, 0, 1, 2, (a, 8, 0), memory)
