"""The PTX of every rule of the family: the bits of the CPU on NumPy scalars, nothing fused or approximate."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_builds import BACKENDS, SUFFIX
from cuda_family import FAMILY, Pair, case_id, problem, some_cases
from ptx import Program, count
from ptx_checks import foreign
from stored_gpu import StoredGpu, program, ptx_of, use

from fastadam.coefficients import Coefficients

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
