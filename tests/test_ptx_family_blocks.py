"""The PTX of steps of the family with states in 8 bits: the bits of the CPU on NumPy scalars, and lean."""

from __future__ import annotations

import re

import numpy as np
import pytest
from block_cases import ODD, assert_same_state, gradients_of
from cuda_builds import BACKENDS, SM_80, SM_90, SM_100
from cuda_family import FAMILY, OWN
from ptx import Program, count
from storage_cases import encoded
from stored_gpu import StoredGpu, kernel_of, program, ptx_of, use
from test_ptx_blocks import HARMLESS, SEEN, assert_same_steps

from fastadam import Segment, device_stored, formats
from fastadam.coefficients import Coefficients

N = 300
"""Two blocks and a part of one. In the second all stays finite, in the others only at first."""

CUTS = [
    Segment(0, 3, lr=0.05),
    Segment(3, 60, weight_decay=0.3),
    Segment(120, 135, frozen=True),
    Segment(200, 210, frozen=True),
    Segment(210, 299, lr=0.0),
]
"""Parts of every block, frozen ones inside of two."""

WHOLE = {
    "params": "bfloat16",
    "master_params": "split",
    "out": "float32",
    "ema_decay": 0.9,
    "maximize": True,
    "max_grad_value": 1e9,
    "zero_grads": True,
}

CASES = {
    "adagrad": {"segments": CUTS, "capturable": True},
    "adadelta": {"segments": CUTS, "telemetry": True},
    "momentum": {"segments": CUTS, "rounding": "nearest"},
    "lion": {"telemetry": True},
    "rmsprop-momentum": {"state_dtype": ("8bit", "bfloat16"), "params": "bfloat16"},
    "triple": {**WHOLE, "segments": CUTS},
    "rmsprop-centered-momentum": {"telemetry": True},
    "yogi": {"state_dtype": ("bfloat16", "8bit"), "telemetry": True},
    "adamax": {"segments": CUTS, "telemetry": True, "rounding": "nearest"},
    "nesterov": {"capturable": True},
    "rmsprop": {"segments": CUTS},
    "sgd": {},
    "nadam": {"segments": CUTS},
}
"""Of each rule a case: states with a sign and without, at every place."""

MEMBERS = FAMILY | OWN

FEW = list(CASES)[:6]
"""Those of Numba, which takes seconds to compile each: codes of both kinds at two places, three states."""

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def assert_runs(monkeypatch, rng, backend, rule, programs=program, *, size=N, steps=4, **options):
    """Step on the CPU and on the device; return the optimizer on the CPU, and the kernels that stepped."""
    options = {"state_dtype": "8bit", **ODD, **options}
    capturable, kind = options.pop("capturable", False), options.pop("params", "float32")
    copy = options.pop("out", None)
    built = []

    def programs_of(backend, entry, types):
        if entry.startswith("step"):
            built.append((entry, types))
        return programs(backend, entry, types)

    use(monkeypatch, gpu := StoredGpu(backend, programs_of))
    cpu = MEMBERS[rule](backend="cpu", **options)
    device = MEMBERS[rule](backend=backend, capturable=capturable, **options)
    params = encoded(rng.standard_normal(size).astype("f4"), kind)
    gradients = gradients_of(rng, size, kind, steps)
    gradients.append(gradients[0].copy())  # what was not finite stays so by its state alone
    assert_same_steps(gpu, cpu, device, params, gradients, copy)
    return cpu, dict(built)


@pytest.mark.parametrize(
    ("backend", "rule"),
    [("cupy", rule) for rule in CASES] + [("numba-cuda", rule) for rule in FEW],
)
def test_bits_of_the_cpu(monkeypatch, rng, backend, rule):
    """The code, too: nothing is fused or flushed, and all is in registers, two blocks to a multiprocessor."""
    opt, built = assert_runs(monkeypatch, rng, backend, rule, **CASES[rule])
    scales = [value for name, value in opt.state_dict().items() if name.endswith("_scales")]
    assert all(set(np.signbit(of_blocks)) == {True, False} for of_blocks in scales)
    assert len(scales) > 0 or rule == "sgd"
    for entry, types in built.items():
        allowed = HARMLESS + (SEEN if entry in {"step_units_observed", "step_across"} else "")
        ops = count(ptx_of(backend, entry, types))
        assert {op for op in ops if not re.fullmatch(allowed, op, re.VERBOSE)} == set()
        kernel = kernel_of(backend, entry, types, SM_90)
        assert kernel.registers <= 128
        assert (kernel.stack, kernel.local) == (0, 0)


@each_backend
def test_what_is_kept_of_a_block(monkeypatch, rng, backend):
    """Its least numbers say how long mantissas are; codes change with the scale."""
    use(monkeypatch, gpu := StoredGpu(backend))
    decayed, kept = Segment(0, 128, weight_decay=0.1), Segment(200, 210, frozen=True)
    options = {**ODD, "state_dtype": "8bit", "segments": [decayed]}
    cpu = FAMILY["adagrad"](backend="cpu", **options)
    device = FAMILY["adagrad"](backend=backend, **options)
    params, grads = rng.uniform(10, 20, (2, N)).astype("f4")
    grads[200:210] /= 30
    buffer, coarse = gpu.put(params), []
    for _ in range(3):
        cpu.step(params, grads)
        device.step(buffer, gpu.put(grads))
        assert_same_state(device.state_dict(), cpu.state_dict())
        coarse.append(cpu.state_dict()["sum_scales"].view(np.uint32)[1] & 3)
        cpu.segments = device.segments = [decayed, kept]
    assert coarse == [2, 2, 2]


@each_backend
def test_all_of_a_code_without_a_sign_says_whether_it_is_zero(monkeypatch, rng, backend):
    """Updates vanish of what moves, be the code of its first state 128."""
    segments = [Segment(0, 128, weight_decay=0.1)]  # of the kernels of the case above
    options = {**CASES["adadelta"], "segments": segments, "lr": 1e-20}
    opt, _ = assert_runs(monkeypatch, rng, backend, "adadelta", size=2 * N, steps=1, **options)
    assert 128 in opt.state_dict()["square_avg"]
    assert opt.last_step.vanished == 2 * N


@pytest.mark.parametrize("capability", [SM_80, SM_100], ids=str)
def test_registers_suffice_elsewhere(capability):
    """Of the rule with the most states, and with all else that there is."""
    flags = {"state_dtype": "8bit", "master_params": "split", "ema_decay": 0.9, "weight_decay": 0.1}
    flags |= {"max_grad_norm": 1.0, "max_grad_value": 1.0, "zero_grads": True}
    h = MEMBERS["triple"](**flags)._hyperparameters
    c = Coefficients(h, np.dtype(np.float32))
    types = c.scaled_types._replace(stored=device_stored.types_of(h, formats.BFLOAT16))
    for entry in ("step", "step_captured", "step_units", "step_units_observed", "step_across"):
        kernel = kernel_of("cupy", entry, types, capability)
        assert kernel.registers <= 128
        assert (kernel.stack, kernel.local) == (0, 0)


PER_PEAK = np.float32((1 + 2.0**-20) / (1.875 - 2.0**-15)).view(np.uint32)
PER_SQUARE = np.float32((1 + 2.0**-20) / 1.875).view(np.uint32)


@pytest.mark.parametrize(
    ("backend", "rule", "right", "wrong"),
    [
        *((backend, "lion", f"0f{PER_PEAK:08X}", "0f3F000000") for backend in BACKENDS),
        *((backend, "adagrad", f"0f{PER_SQUARE:08X}", "0f3F000000") for backend in BACKENDS),
        ("numba-cuda", "adagrad", "min.u32", "max.u32"),
        ("numba-cuda", "adagrad", "max.u32", "min.u32"),
    ],
    ids=["peak-cupy", "peak-numba", "square-cupy", "square-numba", "least", "largest"],
)
def test_wrong_code_is_seen(monkeypatch, rng, backend, rule, right, wrong):
    def spoilt(backend, entry, types):
        if not entry.startswith("step"):
            return program(backend, entry, types)
        code = ptx_of(backend, entry, types)
        assert right in code
        return Program(code.replace(right, wrong))

    with pytest.raises(AssertionError, match=r"params|Arrays are not equal"):
        assert_runs(monkeypatch, rng, backend, rule, spoilt, **CASES[rule])
