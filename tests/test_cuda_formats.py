"""Numbers to 16-bit codes and back on GPUs, as host code and as PTX that NumPy runs: the bits of the CPU."""

from __future__ import annotations

from functools import cache, partial
from types import SimpleNamespace
from unittest import mock

import ml_dtypes
import numba
import numpy as np
import pytest
from cuda_builds import SM_90, compile_cuda, text
from numba import cuda, types
from numba.cuda import dispatcher
from ptx import Memory, Program, entries
from tolerances import assert_same_bits

from fastadam.kernels import cuda_numba, cuda_source, cuda_stored_source, formats
from fastadam.kernels.compiling import JIT_OPTIONS
from fastadam.kernels.storage import load, store
from fastadam.rounding import rounding

ALL = np.arange(2**16, dtype=np.uint16)
MEANINGS = {"int16": ml_dtypes.bfloat16, "uint16": np.float16}
C_TYPES = {"int16": "Bfloat16", "uint16": "Float16"}
BY_BITS = {"int16": formats.bfloat16_stochastic, "uint16": formats.float16_stochastic}

each_kind = pytest.mark.parametrize("kind", MEANINGS)


def source(kind):
    """Return CUDA C++ that converts ``n`` numbers to the nearest and by random bits, and codes to numbers."""
    code = C_TYPES[kind]
    return "\n".join(
        [
            cuda_source._TYPES["float32"],
            cuda_source._read("step.cu"),
            cuda_stored_source.hash_constants(),
            cuda_source._read("formats.cu"),
            f"""
#define EACH const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; if (i < n)
extern "C" __global__ void decode(const {code}* from, Real* to, long long n) {{
    EACH to[i] = decoded(from[i]);
}}
extern "C" __global__ void nearest(const Real* from, {code}* to, long long n) {{
    EACH encode(from[i], to[i], Nearest{{}});
}}
extern "C" __global__ void drawn(const Real* from, const unsigned* bits, {code}* to, long long n) {{
    EACH encode(from[i], to[i], Random{{bits[i]}});
}}
extern "C" __global__ void halves(const Real* from, Bfloat16* to, Remainder* rest, long long n) {{
    EACH halve(from[i], to[i], rest[i]);
}}
extern "C" __global__ void whole(const Bfloat16* from, const Remainder* rest, Real* to, long long n) {{
    EACH to[i] = joined(from[i], rest[i]);
}}
extern "C" __global__ void
words(unsigned* moments, unsigned* params, long long bits, long long first, long long n) {{
    EACH {{
        const Words found = AtRandom{{bits, first}}.words(i);
        moments[i] = found.moments, params[i] = found.params;
    }}
}}
""",
        ]
    )


# --- Who converts -------------------------------------------------------------------------------------------


def _on_host(host_kernels, kind, name, *arguments, n):
    from fake_cupy import _c, compile_for_the_host

    library = compile_for_the_host(source(kind), host_kernels)
    values = [_c(a.ctypes.data if isinstance(a, np.ndarray) else a) for a in (*arguments, n)]
    for block in range(-(-n // 1024)):
        for thread in range(1024):
            library.place(block, thread, 1024, 1)
            library[name](*values)


@cache
def _program(kind, name):
    return Program(entries(compile_cuda(source(kind))[0])[name])


def _run(program, arguments, n):
    memory = Memory()
    passed = [memory.add(a) if isinstance(a, np.ndarray) else a for a in arguments]
    program.launch(-(-n // 256), 256, (*passed, n), memory)


def _on_ptx(_folder, kind, name, *arguments, n):
    _run(_program(kind, name), arguments, n)


@cache
def _numba_program(kind, name):
    code, real = types.CPointer(getattr(types, kind)), types.CPointer(types.float32)
    word, short = types.CPointer(types.uint32), types.CPointer(types.int16)

    def nearest(source, to, n):
        i = cuda.grid(1)
        if i < n:
            store(to, i, load(source, i))

    def drawn(source, bits, to, n):
        i = cuda.grid(1)
        if i < n:
            store(to, i, source[i], bits[i])

    def halves(source, to, rest, n):
        i = cuda.grid(1)
        if i < n:
            to[i], rest[i] = formats.halves(source[i])

    def whole(source, rest, to, n):
        i = cuda.grid(1)
        if i < n:
            to[i] = formats.joined(source[i], rest[i])

    function, signature = {
        "decode": (nearest, (code, real)),
        "nearest": (nearest, (real, code)),
        "drawn": (drawn, (real, word, code)),
        "halves": (halves, (real, short, short)),
        "whole": (whole, (short, short, real)),
    }[name]
    device = SimpleNamespace(compute_capability=SM_90)
    with mock.patch.object(dispatcher, "get_current_device", return_value=device):
        made, _ = cuda.compile(
            function,
            types.void(*signature, types.int64),
            device=False,
            abi="numba",
            cc=SM_90,
            output="ltoir",
            debug=False,
            opt=True,
        )
    (only,) = entries(text(cuda_numba._link(made, name, "sm_90", "-ptx"))).values()
    return Program(only)


def _on_numba(_folder, kind, name, *arguments, n):
    _run(_numba_program(kind, name), arguments, n)


WHO = {"host": _on_host, "cupy": _on_ptx, "numba-cuda": _on_numba}


@pytest.fixture(params=WHO)
def convert(request, host_kernels):
    """What converts with a kernel; NumPy's programs are slow, and get a part of the numbers."""
    convert = partial(WHO[request.param], host_kernels)
    convert.step = 1 if request.param == "host" else 29
    return convert


# --- What converts ------------------------------------------------------------------------------------------


def numbers(rng, kind, step):
    """Return numbers of a format, the float32 beside them and half way between, and random ones."""
    found = ALL.view(MEANINGS[kind]).astype(np.float32)
    found = np.sort(found[np.isfinite(found)])
    ends = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, 2**16, 3.4e38, 1e-45], "f4")
    points = np.concatenate([found[::step], (found[1:] / 2 + found[:-1] / 2)[::step], ends, -ends])
    with np.errstate(over="ignore", invalid="ignore"):
        beside = [np.nextafter(points, np.float32(end)) for end in (np.inf, -np.inf)]
    anything = rng.integers(0, 2**32, 2**18 // step, dtype=np.uint32).view(np.float32)
    ones = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)  # NaN
    small = (10.0 ** rng.uniform(-9, -3, 2**14 // step)).astype(np.float32)  # subnormal float16
    return np.concatenate([points, *beside, anything, ones, small, -small])


@each_kind
def test_every_code_is_decoded(convert, kind):
    found = np.zeros(2**16, np.float32)
    convert(kind, "decode", ALL.view(kind), found, n=2**16)
    assert_same_bits(found, ALL.view(MEANINGS[kind]).astype(np.float32))


@each_kind
def test_to_the_nearest(rng, convert, kind):
    values = numbers(rng, kind, convert.step)
    found = np.zeros(values.size, kind)
    convert(kind, "nearest", values, found, n=values.size)
    with np.errstate(over="ignore", invalid="ignore"):
        assert_same_bits(found.view(MEANINGS[kind]), values.astype(MEANINGS[kind]))


@each_kind
def test_by_random_bits(rng, convert, kind):
    values = numbers(rng, kind, convert.step)
    bits = rng.integers(0, 2**32, values.size, dtype=np.uint32)
    bits[::5], bits[1::5] = 0, 2**32 - 1
    function = BY_BITS[kind]

    @numba.njit(**JIT_OPTIONS)
    def each(values, bits, out):
        for i in range(values.size):
            out[i] = function(values[i], bits[i])

    expected, found = np.zeros(values.size, kind), np.zeros(values.size, kind)
    each(values, bits, expected)
    convert(kind, "drawn", values, bits, found, n=values.size)
    assert_same_bits(found.view(MEANINGS[kind]), expected.view(MEANINGS[kind]))


def test_halves_are_the_whole(rng, convert):
    values = numbers(rng, "int16", convert.step)
    codes, rests, again = (np.zeros(values.size, kind) for kind in ("int16", "int16", "float32"))
    convert("int16", "halves", values, codes, rests, n=values.size)
    convert("int16", "whole", codes, rests, again, n=values.size)
    assert_same_bits(again, values)

    @numba.njit(**JIT_OPTIONS)
    def each(values, codes, rests):
        for i in range(values.size):
            codes[i], rests[i] = formats.halves(values[i])

    expected = np.zeros(values.size, np.int16), np.zeros(values.size, np.int16)
    each(values, *expected)
    np.testing.assert_array_equal(codes, expected[0])
    np.testing.assert_array_equal(rests, expected[1])


@pytest.mark.parametrize("first", [0, 7, 2**32 - 5, 2**53 - 1])
@pytest.mark.parametrize("who", ["host", "cupy"])
def test_random_bits(host_kernels, who, first):
    key = rounding(11, 5, first)
    bits = int(key.moments) | int(key.params) << 32
    moments, params = np.zeros(40, np.uint32), np.zeros(40, np.uint32)
    signed = bits - 2**64 if bits >= 2**63 else bits
    WHO[who](host_kernels, "int16", "words", moments, params, signed, first, n=40)
    for found, of_step in ((moments, key.moments), (params, key.params)):
        for i in range(40):
            low, high = (first + i) % 2**32, (first + i) // 2**32
            word = (low * 0xC2B2AE3D + high * 0x27D4EB2F + int(of_step)) % 2**32
            assert found[i] == (word ^ word >> 15) * 0xD35A2D97 % 2**32


def test_a_wrong_instruction_is_seen(rng):
    ptx = entries(compile_cuda(source("int16"))[0])["nearest"]
    assert "32767" in ptx
    spoilt = Program(ptx.replace("32767", "32768"))  # ties away from zero
    values = numbers(rng, "int16", 29)
    found = np.zeros(values.size, np.int16)
    _run(spoilt, (values, found), values.size)
    with pytest.raises(AssertionError), np.errstate(over="ignore", invalid="ignore"):
        assert_same_bits(found.view(ml_dtypes.bfloat16), values.astype(ml_dtypes.bfloat16))
