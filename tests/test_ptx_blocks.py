"""The PTX and the machine code of steps with moments in 8 bits: run on NumPy scalars, the bits of the CPU."""

from __future__ import annotations

import re

import numpy as np
import pytest
import sass
from block_cases import BLOCK_CASES, ODD, ORDERS, assert_same_state, gradients_in_order, gradients_of
from cuda_builds import BACKENDS, SM_80, SM_90, SM_100
from ptx import Program, count
from storage_cases import DTYPES, case_id, encoded, options
from stored_gpu import StoredGpu, kernel_of, program, ptx_of, use
from tolerances import assert_same_bits
from unit_steps import parts

from fastadam import FusedAdam, Segment
from fastadam.adam import AdamHyperparameters
from fastadam.coefficients import Coefficients
from fastadam.kernels.device_storage import StoredTypes

N = 300
PLAIN = {
    **dict.fromkeys(BLOCK_CASES[0]),
    "decay": "none",
    "rounding": "stochastic",
    **dict.fromkeys(("amsgrad", "maximize", "skip_nonfinite", "zero_grads"), False),
    "params": "float32",
    "grads": "float32",
    "state_dtype": "8bit",
}

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def assert_runs(
    monkeypatch,
    rng,
    backend,
    case,
    programs=program,
    *,
    size=N,
    place=0,
    capturable=False,
    segments=(),
    **flags,
):
    """Step on the CPU and on the device, of buffers so many elements behind where packs begin."""
    gpu = StoredGpu(backend, programs)
    use(monkeypatch, gpu)
    flags = {**options(case), **ODD, **flags, "segments": segments}
    cpu = FusedAdam(backend="cpu", **flags)
    device = FusedAdam(backend=backend, capturable=capturable, **flags)
    params = encoded(rng.standard_normal(size).astype("f4"), case["params"])
    gradients, scale = gradients_of(rng, size, case["grads"]), case["grad_scale"]
    assert_same_steps(gpu, cpu, device, params, gradients, case["out"], place, grad_scale=scale)
    return gpu.launched


def assert_same_steps(gpu, cpu, device, params, gradients, copy=None, place=0, **scales):
    """Step on the CPU and on the device; fail unless all that is written and reported is the same."""
    buffer = gpu.put(params, place)
    out = None if copy is None else np.zeros(params.size, DTYPES[copy])
    there = None if out is None else gpu.put(out, place)
    for left in gradients:
        sent = gpu.put(left, place)
        cpu.step(params, left, out=out, **scales)
        device.step(buffer, sent, out=there, **scales)
        assert_same_bits(buffer.host, params, "params")
        assert_same_bits(sent.host, left, "gradients")
        if out is not None:
            assert_same_bits(there.host, out, "out")
        assert_same_state(device.state_dict(), cpu.state_dict())
        assert repr(device.last_step) == repr(cpu.last_step)  # NaN is NaN


@pytest.mark.parametrize(
    ("backend", "case"),
    [*(("cupy", case) for case in BLOCK_CASES), *(("numba-cuda", case) for case in BLOCK_CASES[::3])],
    ids=lambda value: value if isinstance(value, str) else case_id(value),
)
def test_bits_of_the_cpu(monkeypatch, rng, backend, case):
    """Of Numba's, which take long to compile, every third."""
    size = 140  # a block and a part of one, with the ends of segments in both
    flags = {
        "segments": parts(size) if case["segments"] else (),
        "capturable": BLOCK_CASES.index(case) % 2 > 0,
    }
    assert_runs(monkeypatch, rng, backend, case, size=size, **flags)


@pytest.mark.parametrize(
    ("backend", "case"),
    [*(("cupy", case) for case in BLOCK_CASES[1::6]), *(("numba-cuda", case) for case in BLOCK_CASES[1::12])],
    ids=lambda value: value if isinstance(value, str) else case_id(value),
)
def test_telemetry(monkeypatch, rng, backend, case):
    """Of chunks that share blocks, and, behind them, of whole blocks that begin at any lane."""
    segments = parts(N) if case["segments"] else [Segment(2, 3, frozen=True)]
    launched = assert_runs(monkeypatch, rng, backend, case, segments=segments, telemetry=True)
    assert {"step_across", "step_units_observed"} <= set(launched)


@pytest.mark.parametrize("order", ORDERS)
@each_backend
def test_sums_are_in_the_order_of_the_tree(monkeypatch, backend, order):
    gpu = StoredGpu(backend)
    use(monkeypatch, gpu)
    segments = [Segment(0, ORDERS[order][0], frozen=True)]
    opt = FusedAdam(telemetry=True, state_dtype="8bit", backend=backend, segments=segments)
    opt.step(gpu.put(np.ones(2300, np.float32)), gpu.put(gradients_in_order(order)))
    assert opt.last_step.grad_norm == 2**27


@each_backend
def test_telemetry_of_whole_blocks(monkeypatch, rng, backend):
    """Where packs begin, and elsewhere: it takes elements one by one."""
    for place in (0, 1):
        launched = assert_runs(monkeypatch, rng, backend, PLAIN, place=place, telemetry=True)
        assert "step_across" not in launched


@pytest.mark.parametrize(
    ("entry", "right", "wrong"),
    [
        ("step_units_observed", r"and\.b(\d+)(.*), 127;", r"and.b\1\2, 255;"),
        ("step_units_observed", r"sub\.rn\.f64", "add.rn.f64"),
        ("step_across", r"st\.global\.f32", "// "),
    ],
    ids=["moment", "update", "kept"],
)
@each_backend
def test_what_telemetry_needs_is_seen(monkeypatch, rng, backend, entry, right, wrong):
    """A moment that is zero with a sign is zero; what was before a step is kept."""

    def spoilt(backend, name, types):
        if name != entry:
            return program(backend, name, types)
        code, behind = ptx_of(backend, name, types), ""
        if entry == "step_across":  # what is kept is stored before lanes wait for the first time
            code, wait, behind = code.partition("bar.warp.sync")
            behind = wait + behind
        assert re.search(right, code)
        return Program(re.sub(right, wrong, code) + behind)

    segments = [Segment(2, 3, frozen=True)]
    flags = {"segments": segments, "telemetry": True, "rounding": "nearest", "lr": 1e-4}
    with pytest.raises(AssertionError):
        assert_runs(monkeypatch, rng, backend, PLAIN, spoilt, **flags)


@pytest.mark.parametrize("size", [1, 127, 128, 129, 257])
@each_backend
def test_sizes_and_places(monkeypatch, rng, backend, size):
    """Of one block and of more, with packs and without."""
    for place in (0, 1):
        launched = assert_runs(monkeypatch, rng, backend, PLAIN, size=size, place=place)
        assert launched == ["step"] * 4


@pytest.mark.parametrize(
    "segments",
    [
        [Segment(0, 128, lr=0.1), Segment(128, 256, frozen=True)],
        [Segment(100, 300, frozen=True)],
        [
            Segment(0, 64, betas=(0.5, 0.9)),
            Segment(64, 100, betas=(0.9, 0.1)),
            Segment(110, 120, frozen=True),
        ],
    ],
    ids=["whole", "frozen", "cut"],
)
@each_backend
def test_segments(monkeypatch, rng, backend, segments):
    launched = assert_runs(monkeypatch, rng, backend, PLAIN, segments=segments)
    assert "step_units" in launched


@each_backend
def test_every_code_is_read_and_written(monkeypatch, rng, backend):
    """All codes, with mantissas of every length, in blocks with what is not finite and without."""
    gpu = StoredGpu(backend)
    use(monkeypatch, gpu)
    flags = {"state_dtype": "8bit", "betas": (0.5, 0.75), **ODD}
    size = 2048
    params, grads = rng.standard_normal((2, size)).astype("f4")
    for level in (0.0, 1.0):
        cpu, device = (FusedAdam(backend=name, **flags) for name in ("cpu", backend))
        cpu.step(params.copy(), grads)
        saved = cpu.state_dict()
        codes = np.tile(np.arange(256), 8)
        coarse, flagged = np.repeat(np.arange(8) % 4, 256), np.repeat(np.arange(8) > 3, 256)
        coarse[flagged] = 3
        saved["exp_avg"] = codes.astype(np.uint8)
        saved["exp_avg_sq"] = np.minimum(codes, np.array([248, 252, 254, 255])[coarse]).astype(np.uint8)
        scales = np.full(16, 0.75, np.float32).view(np.uint32) | (flagged[::128] * np.uint32(2**31))
        saved["exp_avg_scales"] = scales.astype(np.uint32).view(np.float32)
        saved["exp_avg_sq_scales"] = (scales | coarse[::128]).astype(np.uint32).view(np.float32)
        for opt in (cpu, device):
            opt.reset()
            opt.load_state_dict(saved)
        ours, theirs = params.copy(), gpu.put(params)
        cpu.step(ours, grads * np.float32(level))
        device.step(theirs, gpu.put(grads * np.float32(level)))
        assert_same_bits(theirs.host, ours)
        assert_same_state(device.state_dict(), cpu.state_dict())


@each_backend
def test_mantissas_of_all_lengths(monkeypatch, rng, backend):
    """Blocks whose second moments span from 0 to 40 octaves."""
    gpu = StoredGpu(backend)
    use(monkeypatch, gpu)
    size = 41 * 128
    octaves = np.repeat(np.arange(41), 128) * rng.uniform(0, 0.5, size)
    params, grads = rng.standard_normal(size).astype("f4"), (2.0**-octaves).astype("f4")
    cpu, device = (FusedAdam(state_dtype="8bit", backend=name, **ODD) for name in ("cpu", backend))
    buffer = gpu.put(params)
    for _ in range(2):
        cpu.step(params, grads)
        device.step(buffer, gpu.put(grads))
        assert_same_state(device.state_dict(), cpu.state_dict())
    scales = cpu.state_dict()["exp_avg_sq_scales"].view(np.uint32)
    assert set(scales & 3) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("1016", "16"), ("8388608", "2130706432"), ("1065353224", "1065353225"), ("1048575", "524287")],
    ids=["coarseness", "least", "up", "bits"],
)
@each_backend
def test_wrong_constants_are_seen(monkeypatch, rng, backend, right, wrong):
    def spoilt(backend, name, types):
        if name != "step_captured":
            return program(backend, name, types)
        code = ptx_of(backend, name, types)
        found = [form for form in (right, f"0f{int(right):08X}") if re.search(rf"\b{form}\b", code)]
        assert found
        new = wrong if found[0] == right else f"0f{int(wrong):08X}"
        return Program(re.sub(rf"\b{found[0]}\b", new, code))

    with pytest.raises(AssertionError):
        assert_runs(monkeypatch, rng, backend, {**PLAIN, "amsgrad": True}, spoilt, capturable=True, size=2000)


# --- Code ---------------------------------------------------------------------------------------------------

F32, F16, BF16, FIRST, SECOND = (np.dtype(name) for name in ("f4", "u2", "i2", "i1", "u1"))
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
    "plain": (StoredTypes(F32, F32, (FIRST, SECOND), None, None, rounds=True), {}),
    "pair": (StoredTypes(BF16, BF16, (BF16, SECOND), BF16, None, rounds=True), {"weight_decay": 0.1}),
    "whole": (StoredTypes(BF16, BF16, (FIRST, SECOND, SECOND, F32), BF16, F32, rounds=True), WHOLE),
}
STEPS = ["step", "step_captured", "step_units"]

each_storage = pytest.mark.parametrize("storage", STORED)


@each_backend
@pytest.mark.parametrize("entry", STEPS)
def test_lanes_wait_before_scales_are_set(backend, entry):
    """One of them sets what all of them read, and an exchange orders no accesses to memory.

    Of bfloat16 and codes of 8 bits, only scales are stored with 32 bits.
    """
    waited, stores = False, 0
    for op in re.findall(
        r"\b(?:shfl|redux)\.sync|\bbar\.warp\.sync|\bst\.global\.[ubf]32\b",
        ptx_of(backend, entry, types_of("pair")),
    ):
        if op.startswith("st"):
            assert waited
            stores += 1
        else:
            waited = op.startswith("bar")
    assert stores >= 2  # in whole blocks, and in others


def types_of(storage):
    stored, flags = STORED[storage]
    return Coefficients(AdamHyperparameters(**flags), F32).scaled_types._replace(stored=stored)


HARMLESS = r"""(add|sub|mul|div|sqrt|rcp)\.rn\.f32
    | (neg|min|max|selp|mov|setp\.(lt|le|gt|ge|eq|ne|num|nan)u?)\.f32 | ld\.param\.f32
    | (ld|st)\.global(\.v[24])?\.(f32|[usb](8|16|32|64))
    | (redux\.sync\.max|shfl\.sync\.bfly)\.[ub]32 | bar\.warp\.sync
    | [a-z]+(\.[a-z]+)*(\.[usb](8|16|32|64))+  # of integers
    | (and|or|xor|not|mov)\.pred | bra(\.uni)? | ret | \$\w+"""
SEEN = r""" | (add|sub|mul)\.rn\.f64 | (sub|mov|selp)\.f64 | cvt\.f64\.f32 | setp\.neu\.f64
    | (ld|st)\.(global|shared)\.(f64|[usb]64) | bar\.sync"""
"""Of what is seen; the difference of a number and itself cannot be fused."""


@each_backend
@pytest.mark.parametrize("entry", STEPS)
@each_storage
def test_nothing_is_fused_flushed_or_of_float64(backend, entry, storage):
    ops = count(ptx_of(backend, entry, types_of(storage)))
    assert {op for op in ops if not re.fullmatch(HARMLESS, op, re.VERBOSE)} == set()


@each_backend
@pytest.mark.parametrize("entry", ["step_units_observed", "step_across"])
@pytest.mark.parametrize("storage", ["pair", "whole"])
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
        found = sum(n for op, n in ops.items() if re.match(rf"{access}\.global\.v", op))
        # Four bytes of them may be one word, as four codes are, or four zeros.
        words = ops[f"{access}.global.u32"] + ops[f"{access}.global.u64"]
        assert found <= len(buffers) <= found + words


MOST = ["whole"]
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
@pytest.mark.parametrize("storage", ["plain", "whole"])
def test_registers_suffice_for_telemetry(backend, storage, capability):
    """Of Numba's code with all else, 20 numbers lie in memory (sm_90)."""
    for entry in ("step_across", "step_units_observed"):
        kernel = kernel_of(backend, entry, types_of(storage), capability)
        is_whole = (backend, storage, entry) == ("numba-cuda", "whole", "step_units_observed")
        assert kernel.registers <= 128
        assert kernel.stack <= (80 if is_whole else 0)
        assert kernel.local == 0
