"""Numbers to 16-bit codes and back, over all codes and what lies between: the bits of NumPy and ml_dtypes."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

import ml_dtypes
import numba
import numpy as np
import pytest

from fastadam import formats as host
from fastadam.kernels import formats
from fastadam.kernels.compiling import JIT_OPTIONS

ALL = np.arange(2**16, dtype=np.uint16)
KINDS = {
    "bfloat16": (np.int16, ml_dtypes.bfloat16, formats.bfloat16_nearest, formats.bfloat16_stochastic),
    "float16": (np.uint16, np.float16, formats.float16_nearest, formats.float16_stochastic),
}


@cache
def loop(function):
    @numba.njit(**JIT_OPTIONS)
    def each(values, out):
        for i in range(values.size):
            out[i] = function(values[i])

    return each


decode = loop(formats.decoded)


def numbers(kind):
    """Return what all codes mean."""
    return ALL.view(KINDS[kind][1]).astype(np.float32)


def neighbours(kind):
    """Return all numbers of a format, what lies half way between two, and the float32 beside each of them."""
    found = numbers(kind)
    found = np.sort(found[np.isfinite(found)])
    beyond = found[-1] + (found[-1] - found[-2]) / 2  # half way to what would come next
    points = np.concatenate([found, found[1:] / 2 + found[:-1] / 2, [beyond, -beyond, 3e38, np.inf, -np.inf]])
    points = points.astype(np.float32)
    with np.errstate(over="ignore"):  # behind the largest
        return np.concatenate([points, *(np.nextafter(points, np.float32(end)) for end in (np.inf, -np.inf))])


def random_floats(rng):
    return rng.integers(0, 2**32, 2**20, dtype=np.uint32).view(np.float32)


def nearest(kind, values):
    dtype, _, function, _ = KINDS[kind]
    out = np.empty(values.size, dtype)
    loop(function)(values, out)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_decoded(kind):
    dtype, meaning, *_ = KINDS[kind]
    out, expected = np.empty(2**16, np.float32), numbers(kind)
    decode(ALL.view(dtype), out)
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(out.view(np.uint32)[~is_nan], expected.view(np.uint32)[~is_nan])
    assert np.isnan(out[is_nan]).all()
    np.testing.assert_array_equal(host.decoded(ALL.view(dtype)), expected)
    # Back again: all but NaN are themselves.
    np.testing.assert_array_equal(nearest(kind, out)[~is_nan], ALL.view(dtype)[~is_nan])
    assert np.isnan(nearest(kind, out)[is_nan].view(meaning).astype(np.float32)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["neighbours", "random"])
def test_to_the_nearest(rng, kind, which):
    values = neighbours(kind) if which == "neighbours" else random_floats(rng)
    dtype, meaning, *_ = KINDS[kind]
    with np.errstate(all="ignore"):
        expected = values.astype(meaning).view(dtype)
    is_nan = np.isnan(values)
    assert is_nan.any() == (which == "random")
    for found in (nearest(kind, values), *([host.encoded(values, host.BFLOAT16)] * (kind == "bfloat16"))):
        np.testing.assert_array_equal(found[~is_nan], expected[~is_nan])
        assert np.isnan(found[is_nan].view(meaning).astype(np.float32)).all()
    assert np.isinf(expected.view(meaning).astype(np.float32)).any()  # some overflowed


# --- Stochastic ---------------------------------------------------------------------------------------------


@cache
def stochastic_loop(kind):
    function = KINDS[kind][3]

    @numba.njit(**JIT_OPTIONS)
    def each(number, words, out):
        for i in range(words.size):
            out[i] = function(number, words[i])

    return each


def stochastic(kind, number, words):
    dtype, meaning, *_ = KINDS[kind]
    out = np.empty(words.size, dtype)
    stochastic_loop(kind)(np.float32(number), words, out)
    return out.view(meaning).astype(np.float64)


WORDS = np.arange(2**16, dtype=np.uint32)


@pytest.mark.parametrize("kind", KINDS)
def test_expected_value_is_the_number(rng, kind):
    """Over all random words, so exactly; below the normal float16 to one 2**-16th of the last place."""
    values = [1.0, -1.0, 1 + 2**-9, 1 + 2**-23, -3.14159274, 0.1, 1e-3, 65000.0, 0.0, -0.0, 2.0**-14]
    values += [*(rng.standard_normal(20) * 10.0 ** rng.uniform(-4, 4, 20))]
    subnormal = [2.0**-24, 2.0**-25, 3e-6, -5e-5, 1e-8, 1e-12]
    for value in [*values, *subnormal]:
        number = np.float32(value)
        found = stochastic(kind, number, WORDS)
        one, *rest = np.unique(found)
        assert len(rest) <= 1
        assert one <= number <= (rest or [one])[0]
        error = found.mean() - float(number)
        assert abs(error) <= (2.0**-40 if kind == "float16" and value in subnormal else 0)
        assert np.signbit(found).all() == bool(np.signbit(number))


@pytest.mark.parametrize("kind", KINDS)
def test_stochastic_special_values(kind):
    words = np.array([0, 0xFFFF, 0xFFFFFFFF, 0x1FFF, 0x12345678], np.uint32)
    codes = numbers(kind)
    for number in codes[np.isfinite(codes)][::37]:  # what a code means is never rounded
        np.testing.assert_array_equal(stochastic(kind, number, words), np.full(words.size, number))
    for number in (np.inf, -np.inf):
        assert (stochastic(kind, number, words) == number).all()
    for bits in (0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF):
        number = np.array([bits], np.uint32).view(np.float32)[0]
        assert np.isnan(stochastic(kind, number, words)).all()
    largest = codes[np.isfinite(codes)].max()
    gap = 2.0 ** (119 if kind == "bfloat16" else 5)
    between = stochastic(kind, np.float32(largest + gap * 0.75), WORDS)
    assert set(between) == {largest, np.inf}
    assert np.isinf(between).mean() == 0.75 if kind == "float16" else np.isinf(between).mean() == 0.375
    assert (stochastic(kind, 3.4e38, words[:1] + 0xFFFF) == np.inf).all()


@pytest.mark.skipif(platform.machine().lower() not in {"x86_64", "amd64"}, reason="is one for x86-64")
def test_a_machine_that_does_not_convert_float16():
    """All of float16, and the norm of its codes, in a process that compiles for x86-64 without extensions."""
    code = """
import numpy as np
from fastadam.kernels import formats, norms
from test_formats import ALL, neighbours, random_floats, nearest, numbers, decode
assert not formats.converts_half()
for values in (neighbours("float16"), random_floats(np.random.default_rng(0)), numbers("float16")):
    with np.errstate(all="ignore"):
        expected = values.astype(np.float16)
    found = nearest("float16", values).view(np.float16)
    is_nan = np.isnan(values)
    assert (found.view(np.uint16) == expected.view(np.uint16))[~is_nan].all()
    assert np.isnan(found[is_nan]).all()
out = np.empty(2**16, np.float32)
decode(ALL, out)
expected = numbers("float16")
is_nan = np.isnan(expected)
assert (out.view(np.uint32) == expected.view(np.uint32))[~is_nan].all() and np.isnan(out[is_nan]).all()
squares, _ = norms.measure(np.ones(1000, np.float16).view(np.uint16), np.empty(2))
assert squares == 1000
"""
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# --- Two halves ---------------------------------------------------------------------------------------------


def test_halves_are_exact(rng):
    @numba.njit(**JIT_OPTIONS)
    def both(values, code, rest, joined):
        for i in range(values.size):
            code[i], rest[i] = formats.halves(values[i])
            joined[i] = formats.joined(code[i], rest[i])

    values = np.concatenate([random_floats(rng), neighbours("bfloat16"), numbers("bfloat16")])
    code, rest = (np.empty(values.size, np.int16) for _ in range(2))
    joined = np.empty_like(values)
    both(values, code, rest, joined)
    is_nan = np.isnan(values)
    np.testing.assert_array_equal(joined.view(np.uint32)[~is_nan], values.view(np.uint32)[~is_nan])
    assert np.isnan(joined[is_nan]).all()
    parameter = code.view(ml_dtypes.bfloat16).astype(np.float32)
    assert np.isnan(parameter[is_nan]).all()
    with np.errstate(invalid="ignore"):
        expected = values.astype(ml_dtypes.bfloat16)
    is_tie = values.view(np.uint32) & 0xFFFF == 0x8000
    same = code == expected.view(np.int16)
    assert same[~is_nan & ~is_tie].all()
    assert not same[is_tie & ~is_nan].all()  # away from zero, not to even: the test can tell


def test_bfloat16_is_told_without_its_library():
    import torch

    for dtype in (np.dtype(ml_dtypes.bfloat16), torch.bfloat16):
        assert host.is_bfloat16(dtype)
    for dtype in (np.dtype("V2"), np.dtype(np.int16), np.dtype(np.float16), torch.float16, None):
        assert not host.is_bfloat16(dtype)
