"""The PTX and the machine code of steps of any storage: run on NumPy scalars, the bits of the CPU."""

from __future__ import annotations

import re

import numpy as np
import pytest
import sass
from cuda_builds import BACKENDS, SM_80, SM_90, SM_100
from ptx import Program, count
from storage_cases import CASES, DTYPES, case_id, encoded, options
from stored_gpu import StoredGpu, kernel_of, program, ptx_of, use
from tolerances import assert_same_bits
from unit_steps import parts

from fastadam import FusedAdam
from fastadam.adam import AdamHyperparameters
from fastadam.coefficients import Coefficients
from fastadam.kernels.device_storage import StoredTypes

N = 75
ODD = {"seed": 3, "offset": 2**32 - 20}
"""Other random bits than by default, and two keys for one buffer."""

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def assert_runs(monkeypatch, rng, backend, case, programs=program, *, capturable=False, **flags):
    """Step on the CPU and on the device, of buffers at one place of a pack and at different ones."""
    gpu = StoredGpu(backend, programs)
    use(monkeypatch, gpu)
    flags = {**options(case), **ODD, **flags, "segments": parts(N) if case["segments"] else ()}
    cpu = FusedAdam(backend="cpu", **flags)
    device = FusedAdam(backend=backend, capturable=capturable, **flags)
    params = encoded(rng.standard_normal(N).astype("f4"), case["params"])
    buffer = gpu.put(params, 1)
    out = None if case["out"] is None else np.zeros(N, DTYPES[case["out"]])
    there = None if out is None else gpu.put(out, 1)
    for k in range(3):
        values = 10.0 ** rng.uniform(-6, 3, N) * rng.standard_normal(N)
        values[5] = np.inf if k == 1 else 1
        left = encoded(values.astype("f4"), case["grads"])
        sent = gpu.put(left, 1 if k else 2)
        cpu.step(params, left, out=out, grad_scale=case["grad_scale"])
        device.step(buffer, sent, out=there, grad_scale=case["grad_scale"])
        assert_same_bits(buffer.host, params, "params")
        assert_same_bits(sent.host, left, "gradients")
        if out is not None:
            assert_same_bits(there.host, out, "out")
        for name, moment in cpu.state.moments.items():
            assert_same_bits(device.state.moments[name], moment, name)
        assert repr(device.last_step) == repr(cpu.last_step)  # NaN is NaN
    return gpu.launched


OF_BACKEND = {"cupy": CASES, "numba-cuda": CASES[::2]}
"""Of Numba's, which take long to compile, every other: every level, not every pair."""


@pytest.mark.parametrize(
    ("backend", "case"),
    [(backend, case) for backend, cases in OF_BACKEND.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) else case_id(value),
)
def test_bits_of_the_cpu(monkeypatch, rng, backend, case):
    k = OF_BACKEND[backend].index(case)
    rounding = "nearest" if k % 4 == 3 else "stochastic"
    assert_runs(monkeypatch, rng, backend, case, rounding=rounding, capturable=bool(k % 2))


@pytest.mark.parametrize("case", CASES[1::7], ids=case_id)
@each_backend
def test_telemetry(monkeypatch, rng, backend, case):
    assert "step_units_observed" in assert_runs(monkeypatch, rng, backend, case, telemetry=True)


def test_cases_of_both_backends_have_every_level():
    for name in CASES[0]:
        first, second = ({str(case[name]) for case in cases} for cases in OF_BACKEND.values())
        assert first == second


PLAIN = {
    **dict.fromkeys(CASES[0]),
    "decay": "none",
    **dict.fromkeys(("amsgrad", "maximize", "skip_nonfinite", "zero_grads", "segments"), False),
    "params": "bfloat16",
    "grads": "bfloat16",
    "state_dtype": "bfloat16",
}


@each_backend
@pytest.mark.parametrize(
    ("change", "entry"),
    [
        ({}, "step"),
        ({"max_grad_norm": 1.0}, "measure"),
        ({"segments": True, "max_grad_norm": 1.0}, "step_units"),
        ({"params": "float16", "master_params": "float32"}, "widen"),
    ],
    ids=["step", "measure", "step_units", "widen"],
)
def test_each_kernel_is_run(monkeypatch, rng, backend, change, entry):
    assert entry in assert_runs(monkeypatch, rng, backend, {**PLAIN, **change})


@pytest.mark.parametrize(
    ("entry", "right", "wrong"),
    [
        ("step_captured", "-1028477379", "-1028477377"),  # of the hash
        ("step_captured", "65535", "255"),
        ("form_keys", "-4658895280553007687", "-4658895280553007685"),
    ],
)
@each_backend
def test_wrong_constants_are_seen(monkeypatch, rng, backend, entry, right, wrong):
    def spoilt(backend, name, types):
        if name != entry:
            return program(backend, name, types)
        code = ptx_of(backend, name, types)
        assert right in code
        return Program(code.replace(right, wrong))

    with pytest.raises(AssertionError):
        assert_runs(monkeypatch, rng, backend, PLAIN, spoilt, capturable=True)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("sub.rn.f64", "add.rn.f64"), ("mul.rn.f64", "add.rn.f64"), ("setp.eq.f32", "setp.ne.f32")],
)
@each_backend
def test_wrong_instructions_of_telemetry_are_seen(monkeypatch, rng, backend, right, wrong):
    def spoilt(backend, name, types):
        if name != OBSERVED:
            return program(backend, name, types)
        code = ptx_of(backend, name, types)
        assert right in code
        return Program(code.replace(f"{right} ", f"{wrong} "))

    with pytest.raises(AssertionError):
        assert_runs(monkeypatch, rng, backend, PLAIN, spoilt, telemetry=True)


@each_backend
@pytest.mark.parametrize("entry", ["measure", "measure_units", "accumulate", "widen", "clear_units"])
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_codes_are_not_read_as_numbers(backend, entry, kind):
    """Two bytes for each element."""
    grads = np.dtype({"float16": "u2", "bfloat16": "i2"}[kind])
    types = Coefficients(AdamHyperparameters(), np.dtype("f4")).types.without_rule(np.dtype("f4"), grads)
    ops = count(ptx_of(backend, entry, types))
    access = "st" if entry == "clear_units" else "ld"
    assert sum(n for op, n in ops.items() if re.fullmatch(rf"{access}\.global\.[usb]16", op)) > 0
    assert not [op for op in ops if op.startswith("ld.global") and "f32" in op and entry != "accumulate"]


# --- Code ---------------------------------------------------------------------------------------------------

F32, F16, BF16 = (np.dtype(name) for name in ("f4", "u2", "i2"))
WHOLE = {
    "weight_decay": 0.1,
    "amsgrad": True,
    "maximize": True,
    "ema_decay": 0.9,
    "max_grad_norm": 1.0,
    "max_grad_value": 1.0,
    "zero_grads": True,
}
STORED = {
    "moments": (StoredTypes(F32, F32, (BF16, BF16), None, None, rounds=True), {}),
    "bfloat16": (StoredTypes(BF16, BF16, (BF16, BF16), None, None, rounds=True), {}),
    "float16": (StoredTypes(F16, F16, (F32, F32), F32, None), {}),
    "split": (StoredTypes(BF16, BF16, (BF16, BF16), BF16, F32, rounds=True), {"weight_decay": 0.1}),
    "whole": (StoredTypes(BF16, BF16, (BF16, BF16, BF16, F32), BF16, F32, rounds=True), WHOLE),
    "whole-float16": (StoredTypes(F16, F16, (BF16, BF16, BF16, F32), None, F16, rounds=True), WHOLE),
}
STEPS = ["step", "step_captured", "step_units"]
OBSERVED = "step_units_observed"

each_storage = pytest.mark.parametrize("storage", STORED)
each_step = pytest.mark.parametrize("entry", STEPS)


def types_of(storage):
    stored, flags = STORED[storage]
    return Coefficients(AdamHyperparameters(**flags), F32).scaled_types._replace(stored=stored)


HARMLESS = r"""(add|sub|mul|div|sqrt)\.rn\.f32
    | (neg|selp|mov|setp\.(lt|le|gt|ge|eq|ne|num|nan)u?)\.f32 | ld\.param\.f32
    | cvt\.(f32\.f16|rn\.f16\.f32|rzi\.u32\.f32)
    | (ld|st)\.global(\.v[24])?\.(f32|[usb](16|32|64))
    | [a-z]+(\.[a-z]+)*(\.[usb](16|32|64))+  # of integers
    | (and|or|xor|not|mov)\.pred | bra(\.uni)? | ret | \$\w+"""
SEEN = r""" | (add|sub|mul)\.rn\.f64 | (sub|mov|selp)\.f64 | cvt\.f64\.f32 | setp\.neu\.f64
    | (ld|st)\.(global|shared)\.(f64|[usb]64) | bar\.sync"""
"""Of what is seen; the difference of a number and itself cannot be fused."""


@each_backend
@each_step
@each_storage
def test_nothing_is_fused_flushed_or_of_float64(backend, entry, storage):
    ops = count(ptx_of(backend, entry, types_of(storage)))
    assert {op for op in ops if not re.fullmatch(HARMLESS, op, re.VERBOSE)} == set()


@each_backend
@pytest.mark.parametrize("entry", [OBSERVED])
@pytest.mark.parametrize("storage", ["split", "whole"])
def test_nothing_is_fused_or_flushed_in_telemetry(backend, entry, storage):
    ops = count(ptx_of(backend, entry, types_of(storage)))
    assert {op for op in ops if not re.fullmatch(HARMLESS + SEEN, op, re.VERBOSE)} == set()


@each_backend
@pytest.mark.parametrize("entry", STEPS[:2])
@each_storage
def test_packs_are_of_four_elements(backend, entry, storage):
    """One access of each buffer that a step reads, and one of each that it writes."""
    (stored, _), types = STORED[storage], types_of(storage)
    ops = count(ptx_of(backend, entry, types))
    kept = [*stored.states, *([] if stored.master is None else [stored.master])]
    read = [*([] if stored.master == F32 else [stored.params]), stored.grads, *kept]
    written = [stored.params, *kept, *([] if stored.out is None else [stored.out])]
    written += [] if types.clear is type(None) else [stored.grads]
    for access, buffers in (("ld", read), ("st", written)):
        wide = [dtype for dtype in buffers if dtype == F32]
        narrow = (f"{access}.global.{kind}" for kind in ("v4.u16", "v4.b16", "v2.u32"))  # zeros as the last
        assert ops[f"{access}.global.v4.f32"] == len(wide)
        assert sum(ops[op] for op in narrow) == len(buffers) - len(wide)


MOST = ["whole", "whole-float16"]
"""Storages whose steps take the most registers."""

PLACES = [
    *((SM_90, backend, storage) for backend in BACKENDS for storage in STORED),
    *((place, "cupy", storage) for place in (SM_80, SM_100) for storage in STORED),
    *((place, "numba-cuda", storage) for place in (SM_80, SM_100) for storage in MOST),
]
"""Numba takes the longest to compile: off sm_90 only what takes the most registers."""


@pytest.mark.parametrize(("capability", "backend", "storage"), PLACES, ids=str)
def test_registers_suffice(backend, storage, capability):
    """Two blocks of 256 threads on a multiprocessor, and nothing in memory that should be in registers."""
    types, codes = types_of(storage), []
    for entry in STEPS:
        kernel = kernel_of(backend, entry, types, capability)
        assert kernel.registers <= 128
        assert (kernel.stack, kernel.local) == (0, 0)
        codes.append(kernel.code)
    names = {name for listing in sass.disassemble(codes, capability) for name in listing}
    assert not {name for name in names if name.startswith(("LDL", "STL"))}


@pytest.mark.parametrize("capability", [SM_80, SM_90, SM_100], ids=str)
@each_backend
@pytest.mark.parametrize("storage", ["split", "whole"])
def test_registers_suffice_for_telemetry(backend, storage, capability):
    """Of Numba's code with all else, two numbers lie in memory (sm_90)."""
    kernel = kernel_of(backend, OBSERVED, types_of(storage), capability)
    assert kernel.registers <= 128
    assert kernel.stack <= (8 if (backend, storage) == ("numba-cuda", "whole") else 0)
    assert kernel.local == 0
