"""The machine code of NVIDIA's GPUs, read with tools of the CUDA toolkit.

Importing this module skips the tests that do, with the reason, where a tool is missing.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("cuda.pathfinder", reason="needs cuda.pathfinder", exc_type=ImportError)

from cuda import pathfinder

TOOLS = {name: pathfinder.find_nvidia_binary_utility(name) for name in ("nvdisasm", "cuobjdump")}

if missing := [name for name, path in TOOLS.items() if path is None]:
    pytest.skip(f"needs {' and '.join(missing)}", allow_module_level=True)

INSTRUCTION = 16
"""Bytes of an instruction, on every architecture from sm_70 on."""


class Kernel(NamedTuple):
    """The code of a kernel, and what a thread takes: registers, and bytes of memory of its own."""

    code: bytes
    registers: int
    stack: int
    local: int


def kernels(cubin: bytes) -> dict[str, Kernel]:
    """Return the kernels of a module by name."""
    usage = _run("cuobjdump", cubin, "-res-usage")
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    sections = _sections(cubin)
    return {name: Kernel(sections[f".text.{name}"], *map(int, numbers)) for name, *numbers in found}


def disassemble(codes: Sequence[bytes], capability: tuple[int, int]) -> list[list[str]]:
    """Return the instructions of some kernels, without guards and operands.

    The disassembler reads them in one go, for its start takes most of its time.
    """
    listing = _run("nvdisasm", b"".join(codes), "--no-dataflow", "--binary", "SM{}{}".format(*capability))
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing)
    offsets = [int(offset, 16) for offset, _ in found]
    assert offsets == list(range(0, sum(map(len, codes)), INSTRUCTION)), "instructions were lost"
    names = iter([name for _, name in found])
    return [[next(names) for _ in range(0, len(code), INSTRUCTION)] for code in codes]


def arithmetic(names: Iterable[str]) -> Counter[str]:
    """Count the additions, multiplications and fused multiply-adds of float32 and float64, by their modes."""
    return Counter(name for name in names if re.match(r"[FD](ADD|MUL|FMA)", name))


def _sections(cubin: bytes) -> dict[str, bytes]:
    """Return the sections of a 64-bit ELF file by name."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    width, count, of_names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<I4x8x8xQQ", cubin, table + k * width) for k in range(count)]
    names = headers[of_names][1]
    return {
        cubin[names + name : cubin.index(b"\0", names + name)].decode(): cubin[start : start + size]
        for name, start, size in headers
    }


def _run(tool: str, content: bytes, *options: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "code")
        path.write_bytes(content)
        command = [TOOLS[tool], *options, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
