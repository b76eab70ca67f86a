"""What the tests read of compiled CUDA kernels, without a GPU and without a driver.

- :func:`kernels`: the PTX, the machine code and the resources of both backends' kernels.
- :class:`Ptx`: runs PTX, thread after thread, on NumPy scalars and on memory that traps what a GPU traps.

``python tests/cuda_tools.py`` prints what each kernel takes of a GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
from cuda import pathfinder
from cuda.bindings import nvjitlink, nvrtc
from numba.cuda import dispatcher
from oracles import flags_id

from fastadam.hyperparameters import Coefficients, Hyperparameters
from fastadam.kernels import cuda_numba, cuda_source
from fastadam.kernels.cuda import KernelTypes

ENTRIES = ("step", "step_captured", "form_coefficients", "set_lr")
CAPABILITIES = [(8, 0), (9, 0), (10, 0)]

CUPY_APPENDS = ("-ftz=true", "--device-as-default-execution-space")
"""What CuPy appends to a module's options: cupy/cuda/compiler.py, _compile_with_cache_cuda and below."""

TOOLS = ("nvdisasm", "cuobjdump")
MISSING = [tool for tool in TOOLS if pathfinder.find_nvidia_binary_utility(tool) is None]


class Kernel(NamedTuple):
    """One compiled kernel."""

    name: str

    ptx: str
    """The whole of its entry."""

    cubin: bytes
    """With the machine code of this kernel, and perhaps of others."""

    registers: int
    stack: int
    local: int

    @property
    def ops(self) -> Counter[str]:
        """How often each PTX instruction occurs."""
        return Counter(op for op, _ in instructions(self.ptx))

    @property
    def sass(self) -> tuple[str, ...]:
        """The machine instructions without their operands."""
        return tuple(line.split()[0] for line in self.machine_code)

    @property
    def machine_code(self) -> tuple[str, ...]:
        """The machine instructions, without their guards."""
        return _disassemble(self.cubin)[self.name]


# --- Compilers -----------------------------------------------------------------------------------------------


def types_of(dtype: str, flags: dict) -> KernelTypes:
    h = Hyperparameters(**flags)
    c = Coefficients(h, np.dtype(dtype))
    kinds = (type(part) for part in (c.direction, c.decay, c.rule(1)))
    return KernelTypes(np.dtype(dtype), len(h.moments), *kinds)


@cache
def nvrtc_kernels(
    source: str, capability: tuple[int, int] = (9, 0), options: tuple[str, ...] = ()
) -> dict[str, Kernel]:
    """Compile CUDA C++; whatever the compiler has to say is an error."""
    ptx, cubin = _nvrtc_outputs(source, capability, options, "PTX", "CUBIN")
    return _kernels(ptx.decode().rstrip("\0"), cubin)


def _nvrtc_outputs(
    source: str, capability: tuple[int, int], options: tuple[str, ...], *kinds: str
) -> list[bytes]:
    options = (f"-arch=sm_{capability[0]}{capability[1]}", *options)
    program = _nvrtc(nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], []))
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _text(program, "ProgramLog").decode()
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS or log.strip(" \n\0"):
            raise RuntimeError(f"NVRTC says: {error}\n{log}")
        return [_text(program, kind) for kind in kinds]
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _nvrtc(result):
    error, *values = result
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC refuses: {error}")
    return values[0] if values else None


def _text(program, kind: str) -> bytes:
    text = bytearray(_nvrtc(getattr(nvrtc, f"nvrtcGet{kind}Size")(program)))
    _nvrtc(getattr(nvrtc, f"nvrtcGet{kind}")(program, text))
    return bytes(text)


@cache
def numba_kernel(entry: str, types: KernelTypes, capability: tuple[int, int] = (9, 0)) -> Kernel:
    """Compile a kernel of the Numba backend, for a device that is not there."""
    device = SimpleNamespace(compute_capability=capability)
    with mock.patch.object(dispatcher, "get_current_device", lambda: device):
        ptx, cubin = (
            cuda_numba.compile_kernel(entry, types, capability, *options) for options in (["-ptx"], [])
        )
    (found,) = _kernels(ptx.decode().rstrip("\0"), cubin).values()
    return found


@cache
def linked_kernels(source: str, capability: tuple[int, int]) -> dict[str, Kernel]:
    """Compile CUDA C++ as the Numba backend compiles: to link-time code, then by its linker and options."""
    (code,) = _nvrtc_outputs(source, capability, ("-dlto",), "LTOIR")
    ptx, cubin = (_link(code, capability, *options) for options in (["-ptx"], []))
    return _kernels(ptx.decode().rstrip("\0"), cubin)


def _link(code: bytes, capability: tuple[int, int], *options: str) -> bytes:
    options = (*cuda_numba._LINK_OPTIONS, f"-arch=sm_{capability[0]}{capability[1]}", *options)
    linker = nvjitlink.create(len(options), options)
    try:
        nvjitlink.add_data(linker, nvjitlink.InputType.LTOIR, code, len(code), "kernels")
        nvjitlink.complete(linker)
        kind = "ptx" if "-ptx" in options else "cubin"
        linked = bytearray(getattr(nvjitlink, f"get_linked_{kind}_size")(linker))
        getattr(nvjitlink, f"get_linked_{kind}")(linker, linked)
    finally:
        nvjitlink.destroy(linker)
    return bytes(linked)


def kernel(backend: str, entry: str, types: KernelTypes, capability: tuple[int, int] = (9, 0)) -> Kernel:
    """Return a kernel as a backend makes it."""
    if backend == "numba-cuda":
        return numba_kernel(entry, types, capability)
    return nvrtc_kernels(cuda_source.source(types), capability, (*cuda_source.OPTIONS, *CUPY_APPENDS))[entry]


# --- Reading -------------------------------------------------------------------------------------------------


def _kernels(ptx: str, cubin: bytes) -> dict[str, Kernel]:
    entries = {part.split("(", 1)[0].strip(): part for part in ptx.split(".entry")[1:]}
    usage = _usage(cubin)
    if len(entries) == 1:  # Numba's names differ from one compilation to the next
        (part,), (name,) = entries.values(), usage
        return {name: Kernel(name, part, cubin, *usage[name])}
    return {name: Kernel(name, part, cubin, *usage[name]) for name, part in entries.items()}


def _run(tool: str, cubin: bytes, *options: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.cubin")
        path.write_bytes(cubin)
        command = [pathfinder.find_nvidia_binary_utility(tool), *options, path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def _disassemble(cubin: bytes) -> dict[str, tuple[str, ...]]:
    parts = re.split(r"^//-+ \.text\.", _run("nvdisasm", cubin, "-c"), flags=re.MULTILINE)[1:]
    line = re.compile(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*[^;]*)")
    return {part.split(None, 1)[0]: tuple(line.findall(part)) for part in parts}


def _usage(cubin: bytes) -> dict[str, tuple[int, ...]]:
    text = _run("cuobjdump", cubin, "-res-usage")
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    return {name: tuple(map(int, numbers)) for name, *numbers in found}


def instructions(ptx: str) -> list[tuple[str, str]]:
    """Return the (opcode, operands) of each instruction of an entry; labels as (label, "")."""
    body = ptx[ptx.index("{") + 1 : ptx.rindex("}")]
    body = re.sub(r"//.*", "", body)
    body = re.sub(r"\{ \.reg \.pred p; (.*) \}", r"\1", body)  # a scope of inline assembly
    body = re.sub(r"(\$\w+):", r"\1 ;", body)
    statements = filter(None, (statement.strip() for statement in body.split(";")))
    pairs = (re.fullmatch(r"((?:@\S+\s+)?\S+)\s*(.*)", statement, re.DOTALL) for statement in statements)
    return [pair.groups() for pair in pairs if not pair[1].startswith(".")]


# --- Running -------------------------------------------------------------------------------------------------

_MASKS = {32: 0xFFFF_FFFF, 64: 0xFFFF_FFFF_FFFF_FFFF}
_NUMBERS = {"f32": np.float32, "f64": np.float64, "u64": np.int64}
_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=", "neu": "!="}
_BINARY = {"add": "+", "sub": "-", "mul": "*", "div": "/", "and": "&", "or": "|", "shl": "<<"}
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


class Memory:
    """Arrays at addresses; anything outside of them, or not aligned to its size, is an error as on a GPU."""

    def __init__(self) -> None:
        self._arrays: list[tuple[int, int, np.ndarray]] = []

    def add(self, array: np.ndarray, address: int | None = None) -> int:
        """Place an array, at its own address if at no other."""
        address = array.ctypes.data if address is None else address
        self._arrays.append((address, address + array.nbytes, array))
        return address

    def _find(self, address: int, count: int, dtype: type) -> np.ndarray:
        width = count * np.dtype(dtype).itemsize
        assert address % width == 0, "misaligned address"
        for first, end, array in self._arrays:
            if first <= address and address + width <= end:
                return array.view(np.uint8)[address - first :][:width].view(dtype)
        raise AssertionError("an illegal memory access was encountered")

    def load(self, address: int, count: int, dtype: type) -> list:
        return list(self._find(address, count, dtype))

    def store(self, address: int, dtype: type, *values) -> None:
        assert dtype is np.int64 or all(type(value) is dtype for value in values)
        self._find(address, len(values), dtype)[:] = values


def _signed(value: int, bits: int) -> int:
    value &= _MASKS[bits]
    return value - (1 << bits) if value >> (bits - 1) else value


def _f32(bits: int) -> np.float32:
    return np.uint32(bits).view(np.float32)


def _f64(bits: int) -> np.float64:
    return np.uint64(bits).view(np.float64)


class Ptx:
    """An entry of PTX, translated to Python: floats as NumPy scalars, integers as unsigned Python ints.

    Knows the instructions that kernels of this package consist of, each by its rules in the PTX manual, and
    raises on any other. NumPy's scalar ``+ - * /`` and ``sqrt`` are ``.rn`` without ``.ftz``.
    """

    def __init__(self, ptx: str) -> None:
        lines, block = (
            ["def run(arguments, memory, special):", " block = 0", " while True:", "  if block <= 0:"],
            0,
        )
        code = instructions(ptx)
        labels = {label: n for n, (label, _) in enumerate((i for i in code if i[0].startswith("$")), start=1)}
        for op, operands in code:
            if op in labels:
                block = labels[op]
                lines.append(f"  if block <= {block}:")
                continue
            guard, _, rest = op.partition(" ") if op.startswith("@") else ("", "", op)
            condition = guard.replace("@!", "not ").replace("@", "").replace("%", "")
            body = self._statement(rest.strip(), _OPERAND.findall(operands), labels)
            lines.append(f"   if {condition}: {body}" if condition else f"   {body}")
        scope = {"_signed": _signed, "_f32": _f32, "_f64": _f64, "np": np, **_NUMBERS}
        exec("\n".join(lines), scope)
        self._thread = scope["run"]

    def launch(self, blocks: int, threads: int, arguments: tuple, memory: Memory) -> None:
        """Run all threads of a grid."""
        for block in range(blocks):
            for thread in range(threads):
                self.thread(block, thread, blocks, threads, arguments, memory)

    def thread(
        self, block: int, thread: int, blocks: int, threads: int, arguments: tuple, memory: Memory
    ) -> None:
        """Run one thread."""
        special = {"ctaid": block, "tid": thread, "nctaid": blocks, "ntid": threads}
        arguments = [
            np.float64(a) if type(a) is float else a if isinstance(a, np.floating) else int(a) & _MASKS[64]
            for a in arguments
        ]
        with np.errstate(all="ignore"):
            self._thread(arguments, memory, special)

    @staticmethod
    def _value(operand: str) -> str:
        if operand.startswith("0f"):
            return f"_f32(0x{operand[2:]})"
        if operand.startswith("0d"):
            return f"_f64(0x{operand[2:]})"
        if special := re.fullmatch(r"%(n?tid|n?ctaid)\.x", operand):
            return f"special['{special[1]}']"
        if re.fullmatch(r"-?\d+", operand):
            return str(int(operand) & _MASKS[64])
        return operand.replace("%", "")

    def _statement(self, op: str, operands: list[str], labels: dict[str, int]) -> str:
        name, *how = op.split(".")
        kind = how[-1] if how else ""
        value = self._value
        if name == "bra":
            return f"block = {labels[operands[0]]}; continue"
        if name == "ret":
            return "return"
        if op.startswith("ld.param."):
            number = re.search(r"_param_(\d+)\]", operands[1])[1]
            return f"{value(operands[0])} = arguments[{number}]"
        if op.startswith(("ld.global.", "st.global.")):
            registers, place = operands if name == "ld" else reversed(operands)
            names = ", ".join(value(register) for register in re.findall(r"[^{},\s]+", registers))
            base, _, offset = place.strip("[]").partition("+")
            address = f"({value(base)} + {int(offset or 0)}) & {_MASKS[64]}"
            count = int(how[1][1:]) if how[1].startswith("v") else 1
            dtype = f"np.{_NUMBERS[kind].__name__}"
            if name == "ld":
                suffix = " & " + str(_MASKS[64]) if kind == "u64" else ""
                right = f"int(memory.load({address}, 1, {dtype})[0]){suffix}"
                return (
                    f"{names} = {right}" if suffix else f"{names}, = memory.load({address}, {count}, {dtype})"
                )
            return f"memory.store({address}, {dtype}, {f'_signed({names}, 64)' if kind == 'u64' else names})"
        result, *rest = operands
        return f"{value(result)} = {self._right(op, name, how, kind, [value(operand) for operand in rest])}"

    @staticmethod
    def _right(op: str, name: str, how: list[str], kind: str, v: list[str]) -> str:
        bits = int(kind[1:]) if kind[1:].isdigit() else 0
        mask = _MASKS.get(bits)
        if name in {"mov", "cvta"} or op == "cvt.u64.u32":
            return v[0]
        if op in {"cvt.u32.u64", "cvt.s64.s32"}:
            return f"{v[0]} & {_MASKS[32]}" if op == "cvt.u32.u64" else f"_signed({v[0]}, 32) & {_MASKS[64]}"
        if op == "cvt.rn.f32.f64":
            return f"np.float32({v[0]})"
        if name == "selp":
            return f"{v[0]} if {v[2]} else {v[1]}"
        if name == "setp" and how[0] in _COMPARISONS and len(how) == 2:
            if kind.startswith("s"):
                v = [f"_signed({operand}, {bits})" for operand in v]
            return f"bool({v[0]} {_COMPARISONS[how[0]]} {v[1]})"
        if kind in {"f32", "f64"}:
            if how == ["rn", kind] and name in {"add", "sub", "mul", "div"}:
                return f"{v[0]} {_BINARY[name]} {v[1]}"
            if op == "sqrt.rn." + kind:
                return f"np.sqrt({v[0]})"
            if op == "neg." + kind:
                return f"-{v[0]}"
            if op == "mul.f64":  # rounds to nearest, and could be fused
                return f"{v[0]} * {v[1]}"
        if name in {"min", "max"} and kind == "s64":
            return f"{name}({v[0]}, {v[1]}, key=lambda x: _signed(x, 64))"
        if op == "not.b64":
            return f"~{v[0]} & {mask}"
        if op in {"div.u32", "div.u64"}:
            return f"{v[0]} // {v[1]}"
        if op in {"mul.wide.u32", "mul.wide.s32"}:
            factors = v if kind == "u32" else [f"_signed({factor}, 32)" for factor in v]
            return f"{factors[0]} * {factors[1]} & {_MASKS[64]}"
        if op in {"add.s64", "sub.s64", "mul.lo.s64", "shl.b64", "and.b64", "or.b64"}:
            return f"({v[0]} {_BINARY[name]} {v[1]}) & {mask}"
        raise NotImplementedError(f"PTX instruction {op}")


# --- The table -----------------------------------------------------------------------------------------------


def table(combinations: list[dict]) -> str:
    """Return the registers of every kernel of a step."""
    rows = ["backend     dtype    flags                    kernel         " + "  ".join(
        f"sm_{a}{b}".rjust(6) for a, b in CAPABILITIES
    )]  # fmt: skip
    for backend in ("cupy", "numba-cuda"):
        for dtype in ("float32", "float64"):
            for flags in combinations:
                types = types_of(dtype, flags)
                for entry in ("step", "step_captured"):
                    counts = [kernel(backend, entry, types, c).registers for c in CAPABILITIES]
                    name = f"{backend:11} {dtype:8} {flags_id(flags):24} {entry:14} "
                    rows.append(name + "  ".join(f"{count:6}" for count in counts))
    return "\n".join(rows)


if __name__ == "__main__":
    from oracles import FLAGS

    print(table(FLAGS))
