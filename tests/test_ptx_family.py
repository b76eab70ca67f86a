"""The PTX of every rule of the family: the bits of the CPU on NumPy scalars, nothing fused or approximate."""

from __future__ import annotations

import re

import numpy as np
import pytest
from cuda_builds import BACKENDS, SM_80, SM_90, SM_100, SUFFIX
from cuda_family import FAMILY, IN_8_BITS, Pair, case_id, problem, some_cases, step_in_8_bits
from ptx import Program, count
from ptx_checks import foreign
from stored_gpu import StoredGpu, kernel_of, program, ptx_of, use
from test_ptx_blocks import HARMLESS, SEEN

from fastadam.coefficients import Coefficients
from fastadam.device_stored import types_of as storage_of
from fastadam.formats import BFLOAT16

SIZE = 45

each_backend = pytest.mark.parametrize("backend", BACKENDS)


CASES_OF = {backend: some_cases(k) for k, backend in enumerate(BACKENDS)}
"""The stand-in for CuPy has all of them."""


def assert_runs(monkeypatch, rng, backend, case, programs=program):
    gpu = StoredGpu(backend, programs)
    use(monkeypatch, gpu)
    params, gradients = problem(rng, case, SIZE, steps=3)
    pair = Pair(case, params, lambda array: gpu.put(array, 1), backend=backend)
    for grads in gradients:
        pair.step(grads)


@pytest.mark.parametrize(
    ("backend", "case"),
    [(backend, case) for backend, cases in CASES_OF.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) else case_id(value),
)
def test_bits_of_the_cpu(monkeypatch, rng, backend, case):
    assert_runs(monkeypatch, rng, backend, case)


def types_of(rule, dtype="float32"):
    return Coefficients(FAMILY[rule]()._hyperparameters, np.dtype(dtype)).types


@each_backend
@pytest.mark.parametrize("rule", FAMILY)
def test_instructions_of_a_step(backend, rule):
    """Roots and divisions are IEEE's, nothing is fused or flushed, and nothing else is there."""
    for dtype, suffix in SUFFIX.items() if backend == "cupy" else [("float32", "f32")]:
        ops = count(ptx_of(backend, "step", types_of(rule, dtype)))
        assert foreign(ops, suffix) == set()
        assert ops[f"add.rn.{suffix}"] + ops[f"sub.rn.{suffix}"] > 0


@pytest.mark.parametrize(
    ("rule", "right", "wrong"),
    [
        ("sgd", "mul.rn.f32", "add.rn.f32"),
        ("lion", "setp.lt.f32", "setp.gt.f32"),
        ("adadelta", "div.rn.f32", "mul.rn.f32"),
    ],
)
def test_wrong_instructions_are_seen(monkeypatch, rng, rule, right, wrong):
    def spoilt(backend, entry, types):
        if entry != "step":
            return program(backend, entry, types)
        code = ptx_of(backend, entry, types)
        assert f"{right} " in code
        return Program(code.replace(f"{right} ", f"{wrong} "))

    case = {"units": "", "storage": "float32", "capturable": False, "decides": False, "ema_decay": None}
    with pytest.raises(AssertionError):
        assert_runs(monkeypatch, rng, "cupy", {"rule": rule, **case}, spoilt)


# --- States in 8 bits ---------------------------------------------------------------------------------------

ENTRIES_OF_BLOCKS = ["step", "step_captured", "step_units", "step_units_observed", "step_across"]


@pytest.mark.parametrize("case", IN_8_BITS, ids=case_id)
def test_states_in_8_bits(monkeypatch, rng, case):
    gpu = StoredGpu("cupy")
    use(monkeypatch, gpu)
    step_in_8_bits(rng, case, gpu.put, backend="cupy")


def types_in_8_bits(rule):
    """Return those of a step of bfloat16 with all that there is."""
    flags = {"state_dtype": "8bit", "master_params": "split", "ema_decay": 0.9, "weight_decay": 0.1}
    flags |= {"max_grad_norm": 1.0, "max_grad_value": 1.0, "zero_grads": True}
    h = FAMILY[rule](**flags)._hyperparameters
    return Coefficients(h, np.dtype(np.float32)).scaled_types._replace(stored=storage_of(h, BFLOAT16))


MOST = "rmsprop-centered-momentum"
"""The rule with the most states."""


@pytest.mark.parametrize("capability", [SM_80, SM_90, SM_100], ids=str)
def test_registers_suffice_in_8_bits(capability):
    for entry in ENTRIES_OF_BLOCKS:
        kernel = kernel_of("cupy", entry, types_in_8_bits(MOST), capability)
        assert kernel.registers <= 128
        assert (kernel.stack, kernel.local) == (0, 0)


@pytest.mark.parametrize("rule", ["adadelta", MOST])
def test_nothing_is_fused_or_flushed_in_8_bits(rule):
    for entry in ENTRIES_OF_BLOCKS:
        ops = count(ptx_of("cupy", entry, types_in_8_bits(rule)))
        harmless = HARMLESS + SEEN if entry == "step_units_observed" else HARMLESS
        assert {op for op in ops if not re.fullmatch(harmless, op, re.VERBOSE)} == set()
        assert ops["sqrt.rn.f32"] * ops["div.rn.f32"] > 0


@pytest.mark.parametrize(
    ("right", "wrong"), [("1057523987", "1057523985"), ("2147483646", "1")], ids=["share", "least"]
)
def test_wrong_extents_are_seen(monkeypatch, rng, right, wrong):
    """The largest of states with a sign has its own share; no element is less than the least."""

    def spoilt(backend, name, types):
        code = ptx_of(backend, name, types)
        forms = {right: wrong, f"0f{int(right):08X}": f"0f{int(wrong):08X}"}
        found = [form for form in forms if re.search(rf"\b{form}\b", code)]
        assert found
        return Program(re.sub(rf"\b{found[0]}\b", forms[found[0]], code))

    gpu = StoredGpu("cupy", spoilt)
    use(monkeypatch, gpu)
    (case,) = (case for case in IN_8_BITS if case["rule"] == "adamax")
    with pytest.raises(AssertionError):
        step_in_8_bits(rng, {**case, "units": ""}, gpu.put, backend="cupy")
