"""The pass over gradients: the bits of its tree on any machine, an exact count of what is not finite."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
from tolerances import assert_same_bits
from trees import (
    array_partials,
    array_sum,
    literal_sum,
)

from fastadam.kernels import chunks, compiling, norms, threads

X86 = platform.machine().lower() in {"x86_64", "amd64"}
DTYPES = ["float32", "float64"]
SIZES = [0, 1, 31, 32, 33, 63, 64, 65, 2047, 2048, 2049, 4096, 4096 + 5, 5 * 2048 + 33]
PARALLEL = norms.PARALLEL_FROM + 37
THREE_LEVELS = 2048 * 2048 + 7


def measure(grads):
    """Measure with a scratch of exactly the promised size, full of NaN, between guards."""
    memory = np.full(norms.scratch_size(grads.size) + 2, np.nan)
    memory[[0, -1]] = 12.5
    before = grads.tobytes()
    total, nonfinite = norms.measure(grads, memory[1:-1])
    assert memory[0] == memory[-1] == 12.5
    assert grads.tobytes() == before
    assert type(total) is float
    assert type(nonfinite) is int
    return total, nonfinite


def assert_same(actual, expected):
    """Bit for bit, but for NaN."""
    assert actual.hex() == expected.hex()


def problem(rng, size, dtype):
    """Gradients of more than one magnitude, none so large that the others do not show in the sum."""
    return (10.0 ** rng.uniform(-1, 0.5, size) * rng.standard_normal(size)).astype(dtype)


@pytest.fixture(params=["serial", "parallel", "pool"])
def way(request, monkeypatch, all_threads):
    """Each of the three ways in which a pass may run, whatever the size."""
    if request.param == "serial":
        monkeypatch.setattr(norms, "PARALLEL_FROM", sys.maxsize)
    else:
        monkeypatch.setattr(norms, "PARALLEL_FROM", 1)
        safe = request.param == "parallel"
        monkeypatch.setattr(threads, "numba_is_safe", lambda: safe)
        monkeypatch.setattr(norms, "MIN_PIECE", norms.CHUNK)
    return request.param


# --- Bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_bits_of_the_tree(rng, size, dtype, way):
    for _ in range(10):
        grads = problem(rng, size, dtype)
        total, nonfinite = measure(grads)
        assert_same(total, literal_sum(grads))
        assert_same(total, array_sum(grads))
        assert nonfinite == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [PARALLEL, 2048 * 2048, THREE_LEVELS])
def test_bits_of_large_buffers(rng, size, dtype, way):
    """The largest have more than one chunk of partial sums."""
    grads = problem(rng, size, dtype)
    assert measure(grads) == (array_sum(grads), 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loop", [norms.serial, norms.parallel], ids=["serial", "parallel"])
def test_bits_of_every_chunk(rng, loop, dtype):
    """A thousand sums, where a slip in one addition cannot hide by luck."""
    size = 1000 * 2048 + 77
    grads, scratch = problem(rng, size, dtype), np.empty(norms.scratch_size(size))
    loop(grads, scratch, 0, 1001)
    assert_same_bits(scratch[:1001], array_partials(np.square(grads, dtype=np.float64)))
    assert not scratch[1001:].any()


def test_bits_of_three_levels_literally(rng):
    grads = problem(rng, THREE_LEVELS, "float32")
    assert_same(measure(grads)[0], literal_sum(grads))


@pytest.mark.parametrize("numba_is_safe", [True, False], ids=["numba", "pool"])
def test_any_number_of_threads(rng, all_threads, numba_is_safe, monkeypatch):
    monkeypatch.setattr(threads, "numba_is_safe", lambda: numba_is_safe)
    grads = problem(rng, 3 * norms.MIN_PIECE + 11, "float32")
    expected = array_sum(grads)
    for count in sorted({n for n in (1, 2, 3, all_threads) if n <= all_threads}):
        numba.set_num_threads(count)
        assert measure(grads) == (expected, 0)


def test_the_pool_gets_whole_chunks(rng, monkeypatch):
    calls = []
    monkeypatch.setattr(threads, "numba_is_safe", lambda: False)
    monkeypatch.setattr(threads, "count", lambda: 3)
    monkeypatch.setattr(
        threads, "run_in_pool", lambda given: [calls.append(call) or call() for call in given]
    )
    grads = problem(rng, 5 * norms.MIN_PIECE + 1, "float32")
    assert measure(grads) == (array_sum(grads), 0)
    ranges = [call.args[2:] for call in calls]
    assert len(ranges) == 3
    assert [first for first, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == 5 * norms.MIN_PIECE // 2048 + 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [33, 2049, PARALLEL])
def test_any_alignment(rng, size, dtype):
    grads = problem(rng, size, dtype)
    expected = array_sum(grads)
    for offset in (1, 2, 3):
        assert measure(np.concatenate([np.zeros(offset, dtype), grads])[offset:]) == (expected, 0)
    packed = np.frombuffer(b"x" + grads.tobytes(), dtype, offset=1)
    assert not packed.flags.aligned
    assert measure(packed) == (expected, 0)


@pytest.mark.parametrize("size", [100, PARALLEL])
def test_read_only(rng, size):
    grads = problem(rng, size, "float32")
    grads.flags.writeable = False
    assert measure(grads) == (array_sum(grads), 0)


def test_a_scratch_that_is_larger_and_used(rng):
    scratch = np.full(norms.scratch_size(THREE_LEVELS), np.inf)
    for size in (THREE_LEVELS, 5000, 0, 2048, 1):
        grads = problem(rng, size, "float32")
        assert norms.measure(grads, scratch) == (array_sum(grads), 0)


SUM_FOR_ANOTHER_MACHINE = """
import sys
import numpy as np
from fastadam.kernels import norms
grads, scratch = np.load(sys.argv[1]), np.zeros(norms.scratch_size(int(sys.argv[3])))
norms.serial(grads, scratch, 0, scratch.size // 2)
np.save(sys.argv[2], scratch)
(assembly,) = norms.serial.inspect_asm().values()
print(int("fmadd" in assembly or "%ymm" in assembly))
"""


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_vector_width(rng, dtype, tmp_path):
    """Compiled for a machine without wide vectors and fused multiply-adds: the same bits."""
    size = 200 * 2048 + 77
    grads = problem(rng, size, dtype)
    np.save(tmp_path / "grads.npy", grads)
    environment = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            SUM_FOR_ANOTHER_MACHINE,
            str(tmp_path / "grads.npy"),
            str(tmp_path / "sums.npy"),
            str(size),
        ],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    if X86:
        assert process.stdout == "0\n", "this test shows nothing"
    assert_same_bits(np.load(tmp_path / "sums.npy")[:201], array_partials(np.square(grads, dtype=np.float64)))


# --- Values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [100, 2048, THREE_LEVELS])
def test_accuracy(rng, size, dtype):
    """At most 64 + 5 roundings in each of three levels, and one of each square: terms are not negative."""
    grads = problem(rng, size, dtype)
    exact = math.fsum((grads.astype(np.longdouble) ** 2).astype(np.float64))
    assert abs(measure(grads)[0] - exact) <= 210 * 2.0**-53 * exact


@pytest.mark.parametrize("value", [3e38, 1e30, 1e-30, 1e-38, 1.4e-45], ids=str)
def test_range(value, way):
    """Squares of float32 neither overflow nor underflow: subnormals too count."""
    value = np.float32(value)
    grads = np.full(5000, value)
    total, nonfinite = measure(grads)
    assert_same(total, literal_sum(grads))
    assert 0 < total < math.inf
    assert math.isclose(total, 5000 * float(value) ** 2, rel_tol=1e-13)
    assert nonfinite == 0


def test_float64_that_overflows(way):
    grads = np.full(5000, 1e200)
    assert measure(grads) == (math.inf, 0), "infinite squares are not infinite gradients"
    grads[[3, 4999]] = math.nan
    total, nonfinite = measure(grads)
    assert math.isnan(total)
    assert nonfinite == 2
    assert_same(measure(np.full(5000, 1e-200))[0], 0.0)
    assert_same(measure(np.full(5000, 1e-160))[0], literal_sum(np.full(5000, 1e-160)))  # subnormal squares


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 33, 2048, 5000])
def test_zeros(size, dtype):
    for zero in (0.0, -0.0):
        total, nonfinite = measure(np.full(size, zero, dtype))
        assert_same(total, 0.0)
        assert nonfinite == 0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nonfinite_anywhere(rng, dtype, value, way):
    """First and last of a row, a chunk, the ragged row, the buffer."""
    size = 3 * 2048 + 3 * 32 + 7
    clean = problem(rng, size, dtype)
    positions = [0, 1, 31, 32, 1000, 2015, 2016, 2047, 2048, 4095, 4096, 6143, 6144, 6239, 6240, size - 1]
    for position in positions:
        grads = clean.copy()
        grads[position] = value
        total, nonfinite = measure(grads)
        assert nonfinite == 1
        assert math.isnan(total) if math.isnan(value) else total == math.inf
    grads = clean.copy()
    grads[positions] = value
    assert measure(grads)[1] == len(positions)
    grads[:] = value
    assert measure(grads)[1] == size


@pytest.mark.parametrize("dtype", DTYPES)
def test_counting_in_large_buffers(rng, dtype, way):
    grads = problem(rng, THREE_LEVELS, dtype)
    where = rng.random(grads.size) < 1e-4
    where[-1] = True
    grads[where] = rng.choice([math.inf, -math.inf, math.nan], where.sum())
    total, nonfinite = measure(grads)
    assert nonfinite == where.sum()
    assert not math.isfinite(total)
    assert measure(np.full(PARALLEL, math.nan, dtype))[1] == PARALLEL


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_one_in_many(rng, value, way):
    grads = problem(rng, THREE_LEVELS, "float32")
    for position in (0, 2048 * 2048 - 1, 2048 * 2048, THREE_LEVELS - 1):
        before = grads[position]
        grads[position] = value
        assert measure(grads)[1] == 1
        grads[position] = before


# --- Compilation --------------------------------------------------------------------------------------------


def fresh(make_loop, *, parallel=False):
    """An uncached compilation."""
    options = {**compiling.JIT_OPTIONS, "nogil": True, "parallel": parallel}
    return numba.njit(make_loop("for inspection"), **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prepare_leaves_nothing_to_compile(dtype, monkeypatch):
    loops = (
        fresh(norms._make_chunks_loop),
        fresh(norms._make_chunks_loop, parallel=True),
        fresh(norms._make_fold_loop),
    )
    for name, loop in zip(["serial", "parallel", "fold"], loops, strict=True):
        monkeypatch.setattr(norms, name, loop)
    norms.prepare(np.dtype(dtype))
    before = [len(loop.signatures) for loop in loops]
    for size in (0, 10, PARALLEL):
        grads = np.ones(size, dtype)
        measure(grads)
        grads.flags.writeable = False
        measure(grads)
    assert [len(loop.signatures) for loop in loops] == before


ADDS = r"^\s+(?:v?addpd|vfmadd\d+pd)\s"


def row_loop(assembly):
    """The block with the most packed additions."""
    blocks = re.split(r"^\S+:.*$", assembly, flags=re.MULTILINE)
    return max(blocks, key=lambda block: len(re.findall(ADDS, block, re.MULTILINE)))


@pytest.mark.skipif(not X86, reason="reads x86-64 assembly")
@pytest.mark.parametrize("parallel", [False, True], ids=["serial", "parallel"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_generated_code(dtype, parallel):
    """Rows are added in packed registers, and nothing else happens to them."""
    loop = fresh(norms._make_chunks_loop, parallel=parallel)
    loop(np.empty(0, dtype), np.empty(0), 0, 0)
    (assembly,) = loop.inspect_asm().values()
    rows = row_loop(assembly)
    ops = re.findall(r"^\s+([a-z][a-z0-9]+)\s", rows, re.MULTILINE)
    assert len(re.findall(ADDS, rows, re.MULTILINE)) >= 4
    assert not [op for op in ops if op.endswith(("sd", "ss")) or op.startswith("call")], "not packed"
    if dtype == "float64":
        assert "fmadd" not in assembly, "squares of float64 must be rounded"
    else:
        assert any(op.endswith("cvtps2pd") for op in ops)
    features = llvm.get_host_cpu_features()
    if features.get("avx2"):
        assert re.search(r"%[yz]mm", rows), "128-bit vectors on a machine with 256"
        assert not re.search(r"^\s+vmov\w+\s+%[xyz]mm\d+, .*\(", rows, re.MULTILINE), "lanes live in memory"
    if features.get("fma") and dtype == "float32":
        assert "vfmadd" in rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_permission_to_reorder(dtype):
    """What the compiler of today leaves alone, that of tomorrow may not, unless it is forbidden."""
    for make_loop, arguments in [
        (norms._make_chunks_loop, (np.empty(0, dtype), np.empty(0), 0, 0)),
        (norms._make_fold_loop, (np.empty(0), 0)),
    ]:
        loop = fresh(make_loop)
        loop(*arguments)
        (code,) = loop.inspect_llvm().values()
        flags = re.findall(r"= (?:tail |notail )?f(?:add|mul|sub|neg)\b([a-z ]*)(?:double|<)", code)
        assert flags
        may_fuse = dtype == "float32" and make_loop is norms._make_chunks_loop
        assert {flag.strip() for flag in flags} == ({"", "contract"} if may_fuse else {""})


# --- The checks bite ----------------------------------------------------------------------------------------


def fold_of_neighbours(lanes):
    while len(lanes) > 1:
        lanes = [a + b for a, b in zip(lanes[::2], lanes[1::2], strict=True)]
    return lanes[0]


@pytest.mark.parametrize(
    "tree",
    [
        {"fold": sum},
        {"fold": fold_of_neighbours},
        {"width": 16, "fold": sum},
        {"chunk": 1024},
        {"chunk": 4096},
    ],
    ids=["one after the other", "neighbours", "16 lanes", "chunks of 1024", "chunks of 4096"],
)
def test_another_tree_has_other_bits(rng, tree):
    """Not of every buffer: the last roundings of two orders are often the same."""
    problems = [problem(rng, 5000, "float32") for _ in range(20)]
    assert sum(measure(grads)[0] != literal_sum(grads, **tree) for grads in problems) >= 4


def emitted_fold_of_neighbours(builder, lanes, add):
    width = chunks.LANES
    i32 = chunks.ir.IntType(32)
    while width > 1:
        width //= 2
        masks = [
            chunks.ir.Constant(chunks.ir.VectorType(i32, width), list(range(first, 2 * width, 2)))
            for first in (0, 1)
        ]
        lanes = add(*(builder.shuffle_vector(lanes, lanes, mask) for mask in masks))
    return builder.extract_element(lanes, i32(0))


def make_sums_loop(_):
    def sums_of_chunks(values, sums):
        for c in range(sums.size):
            sums[c] = chunks.sum_of_squares(values, c * 2048, 2048)

    return sums_of_chunks


def test_another_order_of_additions_shows(rng, monkeypatch):
    grads, sums = problem(rng, 100 * 2048, "float32"), np.empty(100)
    expected = array_partials(np.square(grads, dtype=np.float64))
    fresh(make_sums_loop)(grads, sums)
    assert_same_bits(sums, expected)
    monkeypatch.setattr(chunks, "fold", emitted_fold_of_neighbours)
    fresh(make_sums_loop)(grads, sums)
    assert_same(float(sums[0]), literal_sum(grads[:2048], fold=fold_of_neighbours))
    assert (sums != expected).sum() > 20


def test_a_fused_multiply_add_of_float64_would_show(rng):
    """One rounding less: the reason why only float32 may be fused."""
    if np.finfo(np.longdouble).eps == np.finfo(np.float64).eps:
        pytest.skip("no wider type here")
    fused = rounded = np.zeros(32)
    for row in problem(rng, 2048, "float64").reshape(64, 32):
        fused = (fused + row.astype(np.longdouble) ** 2).astype(np.float64)
        rounded = rounded + row**2
    assert (fused != rounded).any()
