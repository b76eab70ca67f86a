"""The generated machine code of the loop with telemetry: one packed pass, exact where it says so."""

from __future__ import annotations

import platform
import re

import numba
import numpy as np
import pytest
from segment_steps import FEATURES

from fastadam.adam import AdamHyperparameters
from fastadam.coefficients import Coefficients
from fastadam.kernels import chunks, compiling, observed, telemetry

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in {"x86_64", "amd64"}, reason="reads x86-64 assembly"
)

SUFFIX = {"float32": "ps", "float64": "pd"}


def assembly(dtype, features, *, parallel=False):
    """Of a fresh, uncached compilation: on a cache hit there is none to inspect."""
    h = AdamHyperparameters(**features)
    c = Coefficients(h, np.dtype(dtype))
    options = {**compiling.JIT_OPTIONS, "nogil": True, "parallel": parallel}
    dispatcher = numba.njit(telemetry._make_loop("for inspection"), **options)
    empty, first, values = np.empty(0, dtype), np.zeros(1, np.int64), np.empty((0, observed.WORK))
    table = np.empty((0, 3), np.int64), first, first, np.empty((0, 8), dtype), values, values.ravel()
    dispatcher(empty, empty, (empty,) * len(h.state), *table, *c.update(1), c.clear)
    (text,) = dispatcher.inspect_asm().values()
    return text


def instructions(text):
    return [op.removeprefix("v") for op in re.findall(r"^\s+(v?[a-z][a-z0-9]+)\s", text, re.MULTILINE)]


def unaligned_frames(text):
    """Functions that take their stack to be aligned to vectors, but do not align it."""
    wide = re.compile(r"^\s+vmov(?:dqa|ap)\w*\s(?=.*%[yz]mm)(?=.*\(%rsp\)).*$", re.MULTILINE)
    bodies = re.split(r"^\.Lfunc_end\d+:", text, flags=re.MULTILINE)
    return [body[:80] for body in bodies if wide.search(body) and not re.search(r"andq\s+\$-\d+, %rsp", body)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FEATURES)
def test_loop(name, dtype):
    """Of each set of features one dtype serially and the other in parallel: all pairs of two."""
    features, parallel = FEATURES[name], (dtype == "float64") == bool(list(FEATURES).index(name) % 2)
    text = assembly(dtype, features, parallel=parallel)
    ops = instructions(text)
    for name in ("sqrt", "div", "mul", "sub"):
        assert name + SUFFIX[dtype] in ops, f"no packed {name}"
    assert not [op for op in ops if re.match(r"(sqrt|div)s[sd]", op)], "scalars"
    assert not [op for op in ops if re.match(r"r(sqrt|cp)", op)], "approximate reciprocal"
    assert not [op for op in ops if re.match(r"fn?m(add|sub)\w*p" + SUFFIX[dtype][1] + "$", op)] or (
        dtype == "float32"
    ), "fused multiply-add"
    assert not [op for op in ops if re.match(r"fn?m(add|sub)\w*ps|fnm|fmsub", op)], "fused multiply-add"
    assert "mulpd" in ops, "squares of differences that are not rounded"
    assert any(op.startswith("prefetch") for op in ops)
    assert unaligned_frames(text) == []


def rows_alone():
    def step_rows(params, grads, states, work, c):
        return observed.step_rows(params, grads, states, work, 0, 2, c)

    c = Coefficients(AdamHyperparameters(), np.dtype(np.float32)).update(1)
    row = np.ones(64, np.float32)
    dispatcher = numba.njit(step_rows, **compiling.JIT_OPTIONS)
    dispatcher(row, row.copy(), (row.copy(), row.copy()), np.zeros(observed.WORK), tuple(c))
    (text,) = dispatcher.inspect_asm().values()
    return instructions(text)


def test_fused_squares_of_differences_show(monkeypatch):
    """The check above finds what the flag of a fused multiply-add would make of them."""
    add = observed._Emitter._add_square
    exact = rows_alone()
    assert "mulpd" in exact
    monkeypatch.setattr(
        observed._Emitter, "_add_square", lambda self, lanes, terms, _: add(self, lanes, terms, ("contract",))
    )
    fused = rows_alone()
    if any(op.startswith("fmadd") for op in exact):  # the machine has it
        assert "mulpd" not in fused


def test_a_frame_that_is_not_aligned_shows():
    text = "f:\n\tvmovdqa64\t%zmm0, 64(%rsp)\n\tretq\n.Lfunc_end0:\n"
    assert unaligned_frames(text) == ["f:\n\tvmovdqa64\t%zmm0, 64(%rsp)\n\tretq\n"]
    assert unaligned_frames(text.replace("f:", "f:\n\tandq\t$-64, %rsp")) == []
    assert unaligned_frames(text.replace("dqa64", "ups")) == []


def test_other_sums_are_other_code(monkeypatch):
    """What is emitted is part of the key of the disk cache."""
    compiling.digest.cache_clear()
    before = compiling.digest()
    for module in (observed, chunks):
        with monkeypatch.context() as patch:
            patch.setattr(module, "LANES", 16)
            compiling.digest.cache_clear()
            assert compiling.digest() != before
    compiling.digest.cache_clear()
