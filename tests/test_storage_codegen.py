"""The machine code of steps in any storage: packed, no calls, nothing fused, no float64 or wide products."""

from __future__ import annotations

import platform
import re

import numba
import numpy as np
import pytest

from fastadam.adam import AdamHyperparameters
from fastadam.coefficients import Coefficients
from fastadam.kernels import compiling, stored
from fastadam.kernels.rounding import Storage
from fastadam.kernels.units import columns_of
from fastadam.rmsprop import RMSpropHyperparameters
from fastadam.rounding import rounding

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in {"x86_64", "amd64"}, reason="reads x86-64 assembly"
)

F32, F16, BF16 = np.float32, np.uint16, np.int16
FIRST, SECOND = np.int8, np.uint8  # moments in 8 bits
ALL = {"amsgrad": True, "ema_decay": 0.9, "zero_grads": True}
CASES = {
    "moments": (F32, F32, [BF16, BF16], None, None, {}),
    "all-bfloat16": (BF16, BF16, [BF16, BF16], None, None, {}),
    "float16": (F16, F16, [F32, F32], None, None, {}),
    "master": (F16, BF16, [BF16, BF16], F32, None, {}),
    "split": (BF16, BF16, [BF16, BF16], BF16, F16, {}),
    # So many arrays that compilers would rather not ask whether they overlap.
    "all": (BF16, F32, [BF16, BF16, BF16, F32], BF16, F16, ALL),
    "8bit": (F32, F32, [FIRST, SECOND], None, None, {}),
    "8bit-pair": (F32, F32, [BF16, SECOND], None, None, {"weight_decay": 0.1}),
    "8bit-all": (BF16, BF16, [FIRST, SECOND, SECOND, F32], BF16, F16, ALL),
    # Of a rule that computes blocks twice.
    "8bit-rmsprop": (F32, F32, [SECOND, FIRST, FIRST], None, None, {"centered": True, "momentum": 0.9}),
}


def assembly(params, grads, states, master, out, flags, *, parallel=False, nearest=False):
    """Of a fresh, uncached compilation: on a cache hit there is none to inspect."""
    options = {**compiling.JIT_OPTIONS, "nogil": True, "parallel": parallel}
    dispatcher = numba.njit(stored._make_loop("for inspection"), **options)
    of_rule = RMSpropHyperparameters if "centered" in flags else AdamHyperparameters
    c = Coefficients(of_rule(**flags), np.dtype(F32))
    params, grads, *states = (np.empty(0, dtype) for dtype in (params, grads, *states))
    more = [None if dtype is None else np.empty(0, dtype) for dtype in (master, out)]
    is_blocked = any(state.itemsize == 1 for state in states)
    scales = tuple(np.empty(0, F32) for _ in states) if is_blocked else None
    storage = Storage(None if nearest else rounding(0, 1, 0), *more, scales)
    pieces, first = np.empty((0, 3), np.int64), np.zeros(1, np.int64)
    coefficients = np.empty((0, len(columns_of(c.types.rule))), F32)
    arguments = (params, grads, tuple(states), pieces, first, first, coefficients)
    dispatcher(*arguments, *c.update(1), c.clear, *storage)
    (text,) = dispatcher.inspect_asm().values()
    return text


def body_of_loop(text):
    """Return the function that has the loop, not those that Numba wraps it in."""
    (body,) = (body for body in re.split(r"^\.Lfunc_end\d+:", text, flags=re.MULTILINE) if "sqrtps" in body)
    return body


@pytest.mark.parametrize("parallel", [False, True], ids=["serial", "parallel"])
@pytest.mark.parametrize("name", CASES)
def test_loop(name, parallel):
    """To the nearest and at random: of each case one serially and the other in parallel, all pairs of two."""
    nearest = parallel == bool(list(CASES).index(name) % 2)
    body = body_of_loop(assembly(*CASES[name], nearest=nearest, parallel=parallel))
    ops = [op.removeprefix("v") for op in re.findall(r"^\s+(v?[a-z][a-z0-9]+)\s", body, re.MULTILINE)]
    for op in ("sqrtps", "divps", "mulps", "subps"):
        assert op in ops, f"no packed {op}"
    # What comes after whole vectors has some; a loop over blocks that were scalar would add its own.
    assert 2 * ops.count("sqrtss") < ops.count("sqrtps"), "scalars"
    assert not [op for op in ops if op.startswith("call")], "calls"
    assert not [op for op in ops if re.match(r"fn?m(add|sub)", op)], "fused multiply-add"
    assert not {"sqrtpd", "divpd", "mulpd", "cvtps2pd", "cvtpd2ps"} & set(ops), "float64"
    assert not {"pmullq", "pmuludq"} & set(ops), "64-bit products"
