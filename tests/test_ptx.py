"""What runs PTX: it computes, traps and refuses as it should."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_builds import compile_cuda, plant
from ptx import Memory, Program, entries, signed


def planted_ptx(statement):
    module, _ = compile_cuda(plant(statement))
    return entries(module)["planted"]


COPY = """copy() {
    ld.param.u64 %rd1, [copy_param_0];
    ld.param.u64 %rd2, [copy_param_1];
    ld.global.KIND REGISTERS, [%rd1+4];
    st.global.KIND [%rd2], REGISTERS;
    ret;
}"""
ONE = COPY.replace("KIND", "f32").replace("REGISTERS", "%f1")
FOUR = COPY.replace("KIND", "v4.f32").replace("REGISTERS", "{%f1, %f2, %f3, %f4}")


def copy(entry, source, target):
    """Copy from 4 bytes behind an address to another; memory has 16 bytes at 256 and at 512."""
    memory, values = Memory(), np.zeros(4, np.float32)
    memory.add(np.array([1, 2, 3, 4], np.float32), 256)
    memory.add(values, 512)
    Program(entry).thread(0, 0, 1, 1, (source, target), memory)
    return values.tolist()


def test_what_is_in_memory_is_read_and_written():
    assert copy(ONE, 252, 512) == [1, 0, 0, 0]
    assert copy(ONE, 264, 520) == [0, 0, 4, 0]
    assert copy(FOUR, 252, 512) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("entry", "source", "target", "message"),
    [
        (ONE, 248, 512, "illegal memory access"),
        (ONE, 268, 512, "illegal memory access"),
        (ONE, 256, 528, "illegal memory access"),
        (FOUR, 268, 512, "illegal memory access"),
        (FOUR, 252, 528, "illegal memory access"),
        (ONE, 250, 512, "misaligned address"),
        (FOUR, 256, 512, "misaligned address"),
        (FOUR, 252, 516, "misaligned address"),
    ],
    ids={ONE: "one", FOUR: "four"}.get,
)
def test_what_a_gpu_traps_is_trapped(entry, source, target, message):
    with pytest.raises(AssertionError, match=message):
        copy(entry, source, target)


def test_a_number_of_another_type_is_not_stored():
    with pytest.raises(AssertionError, match="another type"):
        Memory().store(0, np.float32, np.float64(1))


def test_code_that_never_ran_is_known():
    skipped = Program("k() { bra $done; $skipped: ret; $done: ret; }")
    assert skipped.unreached == {"$skipped", "$done"}
    skipped.thread(0, 0, 1, 1, (), Memory())
    assert skipped.unreached == {"$skipped"}


EXCHANGE = """
__shared__ float there[2];
there[threadIdx.x] = a[threadIdx.x];
LEAVE __syncthreads();
b[threadIdx.x] = there[1 - threadIdx.x];
"""


def exchange(entry):
    """Run two threads that exchange a number by the memory of their block."""
    memory, values = Memory(), np.zeros(2, np.float32)
    memory.add(np.array([1, 2], np.float32), 256)
    memory.add(values, 512)
    Program(entry).launch(1, 2, (256, 512, 1), memory)
    return values.tolist()


def test_threads_wait_at_a_barrier():
    usual = planted_ptx(EXCHANGE.replace("LEAVE", ""))
    assert exchange(usual) == [2, 1]
    first, _ = exchange(usual.replace("bar.sync", "// bar.sync"))
    assert np.isnan(first)


def test_a_thread_that_leaves_others_at_a_barrier_is_seen():
    with pytest.raises(AssertionError, match="left others"):
        exchange(planted_ptx(EXCHANGE.replace("LEAVE", "if (threadIdx.x >= n) return;")))


@pytest.mark.parametrize(
    ("comparison", "expected"), [("setp.ne", 0), ("setp.neu", 1), ("setp.lt", 0), ("setp.eq", 0)]
)
def test_comparisons_of_nan(comparison, expected):
    memory, values = Memory(), np.zeros(1, np.float32)
    memory.add(np.full(1, np.nan, np.float32), 256)
    memory.add(values, 512)
    entry = planted_ptx("*b = a[0] != 1 ? 1.f : 0.f;")
    assert "setp.neu.ftz.f32" in entry
    Program(entry.replace("setp.neu.ftz", comparison)).thread(0, 0, 1, 1, (256, 512, 0), memory)
    assert values == [expected]


def test_unknown_instructions_are_refused():
    with pytest.raises(NotImplementedError, match=r"fma\.rn\.ftz\.f32"):
        Program(planted_ptx("*b = a[0] * a[1] + a[2];"))


@pytest.mark.parametrize(
    ("value", "bits", "expected"),
    [(0, 32, 0), (2**31 - 1, 32, 2**31 - 1), (2**31, 32, -(2**31)), (2**40 - 1, 32, -1), (2**64 - 2, 64, -2)],
)
def test_signed(value, bits, expected):
    assert signed(value, bits) == expected


def test_a_wrapped_address_is_seen():
    """In 32 bits, the number of a block times the threads of each wraps."""
    wide = planted_ptx("b[(long long)blockIdx.x * blockDim.x] = a[0];")
    narrow = wide.replace("mul.wide.u32", "mul.wide.s32")
    assert narrow != wide
    block, threads = 2**31 + 7, 2
    memory = Memory()
    a = memory.add(np.ones(1, np.float32), 4)
    b = memory.add(np.zeros(1, np.float32), 2**50) - 4 * block * threads
    Program(wide).thread(block, 0, block + 1, threads, (a, b, 0), memory)
    with pytest.raises(AssertionError, match="illegal memory access"):
        Program(narrow).thread(block, 0, block + 1, threads, (a, b, 0), memory)
