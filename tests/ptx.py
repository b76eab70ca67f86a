"""PTX, read and run.

- :func:`entries` and :func:`instructions`: the kernels of a module, and what one consists of.
- :class:`Program`: runs a kernel, thread after thread from barrier to barrier, on NumPy scalars.
- :class:`Memory`: traps what the memory of a GPU traps.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Instruction(NamedTuple):
    guard: str
    """A predicate, perhaps behind an exclamation mark, or nothing."""

    op: str
    """With all its suffixes; of a label, its name, which begins with a dollar sign."""

    operands: list[str]


def entries(ptx: str) -> dict[str, str]:
    """Return the kernels of a module by name: the text from each name on."""
    return {part.split("(", 1)[0].strip(): part for part in ptx.split(".entry")[1:]}


def instructions(entry: str) -> list[Instruction]:
    """Return the instructions and labels of a kernel, in their order."""
    body = entry[entry.index("{") + 1 : entry.rindex("}")]
    body = re.sub(r"//.*", "", body)
    body = re.sub(r"\{ \.reg \.pred p; (.*) \}", r"\1", body)  # a scope of inline assembly
    body = re.sub(r"(\$\w+):", r"\1 ;", body)
    statements = filter(None, (statement.strip() for statement in body.split(";")))
    return [_instruction(statement) for statement in statements if not statement.startswith(".")]


def _instruction(statement: str) -> Instruction:
    guard, op, operands = re.fullmatch(r"(?:@(\S+)\s+)?(\S+)\s*(.*)", statement, re.DOTALL).groups()
    return Instruction(guard or "", op, re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", operands))


def count(entry: str) -> Counter[str]:
    """Return how often each instruction occurs in a kernel."""
    return Counter(instruction.op for instruction in instructions(entry))


# --- Memory -------------------------------------------------------------------------------------------------


class Memory:
    """Arrays at addresses; access to anything else, or across its own alignment, is an error as on a GPU."""

    def __init__(self) -> None:
        self._arrays: list[tuple[int, np.ndarray]] = []

    def add(self, array: np.ndarray, address: int | None = None) -> int:
        """Place an array, at its own address if at no other; return the address."""
        address = array.ctypes.data if address is None else address
        self._arrays.append((address, array.view(np.uint8)))
        return address

    def load(self, address: int, n: int, dtype: type) -> list:
        return list(self._find(address, n, dtype))

    def store(self, address: int, dtype: type, *values) -> None:
        assert all(type(value) is dtype for value in values), "a number of another type"
        self._find(address, len(values), dtype)[:] = values

    def _find(self, address: int, n: int, dtype: type) -> np.ndarray:
        width = n * np.dtype(dtype).itemsize
        assert address % width == 0, "misaligned address"
        for first, content in self._arrays:
            if first <= address and address + width <= first + content.size:
                return content[address - first :][:width].view(dtype)
        raise AssertionError("an illegal memory access was encountered")


# --- Instructions -------------------------------------------------------------------------------------------

U32, U64 = 2**32 - 1, 2**64 - 1
TYPES = {"f32": "np.float32", "f64": "np.float64", "u32": "np.uint32", "u64": "np.uint64"}
TYPES |= {"u16": "np.uint16", "b16": "np.uint16", "s16": "np.int16", "b32": "np.uint32"}
TYPES |= {"u8": "np.uint8", "s8": "np.int8", "b8": "np.uint8", "s32": "np.int32"}


def signed(value: int, bits: int = 64) -> int:
    """Return what the lowest bits of a number say in two's complement."""
    value &= 2**bits - 1
    return value - (value >> (bits - 1) << bits)


def permuted(low: int, high: int, selector: int) -> int:
    """Return four bytes out of eight, each at the place that four bits of a selector say."""
    assert not selector & 0x8888, "no signs"
    eight = low | high << 32
    return sum((eight >> 8 * (selector >> 4 * k & 7) & 0xFF) << 8 * k for k in range(4))


EXPRESSIONS: dict[str, str] = {
    **{f"mov.{kind}": "{0}" for kind in ("u64", "f32", "f64")},
    "mov.u32": "{0} & U32",
    **{f"selp.{kind}": "{0} if {2} else {1}" for kind in ("s32", "u32", "u64", "b64", "f32", "f64")},
    "cvta.to.global.u64": "{0}",
    "cvta.global.u64": "{0}",
    "cvt.u64.u32": "{0}",
    "cvt.u32.u64": "{0} & U32",
    "cvt.s64.s32": "signed({0}, 32) & U64",
    "cvt.rn.f32.f64": "np.float32({0})",
    "cvt.f64.f32": "np.float64({0})",
    "cvt.rn.f64.s64": "np.float64(signed({0}, 64))",
    "cvt.rn.f64.u32": "np.float64({0})",
    "add.s32": "({0} + {1}) & U32",
    "sub.s32": "({0} - {1}) & U32",
    "and.b32": "{0} & {1}",
    "shl.b32": "({0} << {1}) & U32",
    "shr.u32": "{0} >> {1}",
    "shr.u64": "{0} >> {1}",
    "shr.s64": "(signed({0}, 64) >> {1}) & U64",
    "add.s64": "({0} + {1}) & U64",
    "sub.s64": "({0} - {1}) & U64",
    "mul.lo.s64": "({0} * {1}) & U64",
    "mul.wide.u32": "{0} * {1}",
    "mul.wide.s32": "(signed({0}, 32) * signed({1}, 32)) & U64",
    "shl.b64": "({0} << {1}) & U64",
    "and.b64": "{0} & {1}",
    "or.b64": "{0} | {1}",
    "not.b64": "{0} ^ U64",
    "or.b32": "({0} | {1}) & U32",
    "or.pred": "{0} or {1}",
    "and.pred": "{0} and {1}",
    "not.pred": "not {0}",
    "xor.pred": "{0} is not {1}",
    "mov.pred": "bool({0})",
    "neg.s64": "-{0} & U64",
    "div.u32": "{0} // {1}",
    "div.u64": "{0} // {1}",
    "min.s64": "min({0}, {1}, key=signed)",
    "max.s64": "max({0}, {1}, key=signed)",
    "mul.f64": "{0} * {1}",  # to nearest as well, but it could be fused
    "add.f64": "{0} + {1}",
    "sub.f64": "{0} - {1}",
}
EXPRESSIONS |= {  # 16 bits, which registers of 16 and of 32 hold, and float16 in them
    "mov.u16": "{0}",
    "mov.b16": "{0}",
    "cvt.u32.u16": "{0}",
    "cvt.u16.u32": "{0} & 0xFFFF",
    "cvt.u16.u64": "{0} & 0xFFFF",
    "cvt.s32.s16": "signed({0}, 16) & U32",
    "add.s16": "({0} + {1}) & 0xFFFF",
    "sub.s16": "({0} - {1}) & 0xFFFF",
    "and.b16": "{0} & {1} & 0xFFFF",
    "or.b16": "({0} | {1}) & 0xFFFF",
    "mul.lo.s32": "({0} * {1}) & U32",
    "mad.lo.s32": "({0} * {1} + {2}) & U32",
    "xor.b32": "({0} ^ {1}) & U32",
    "xor.b64": "{0} ^ {1}",
    "selp.b32": "{0} if {2} else {1}",
    "setp.nan.f32": "{0} != {0} or {1} != {1}",
    "cvt.f32.f16": "np.float32(np.uint16({0}).view(np.float16))",
    "cvt.f64.f16": "np.float64(np.uint16({0}).view(np.float16))",
    "cvt.rn.f16.f32": "int(np.float16({0}).view(np.uint16))",
    "cvt.rzi.u32.f32": "min(int(min(max({0}, np.float32(0)), np.float32(2**32))), U32) if {0} == {0} else 0",
}
EXPRESSIONS |= {  # of moments in 8 bits
    "not.b32": "{0} ^ U32",
    "not.b16": "{0} ^ 0xFFFF",
    "xor.b16": "({0} ^ {1}) & 0xFFFF",
    "shl.b16": "({0} << {1}) & 0xFFFF",
    "shr.u16": "({0} & 0xFFFF) >> {1}",
    "neg.s32": "-{0} & U32",
    "cvt.u32.u8": "{0} & 0xFF",
    "cvt.u16.u8": "{0} & 0xFF",
    "cvt.u64.u16": "{0} & 0xFFFF",
    "cvt.s32.s8": "signed({0}, 8) & U32",
    "cvt.s16.s8": "signed({0}, 8) & 0xFFFF",
    "selp.u16": "{0} if {2} else {1}",
    "selp.s64": "{0} if {2} else {1}",
    "selp.b16": "{0} if {2} else {1}",
    "min.u32": "min({0}, {1} & U32)",
    "max.u32": "max({0}, {1} & U32)",
    "min.s32": "min({0}, {1}, key=lambda value: signed(value, 32))",
    "max.s32": "max({0}, {1}, key=lambda value: signed(value, 32))",
    "bfe.u32": "{0} >> {1} & (1 << {2}) - 1",
    "bfi.b32": "({1} & ~((1 << {3}) - 1 << {2}) | ({0} & (1 << {3}) - 1) << {2}) & U32",
    "bfi.b64": "({1} & ~((1 << {3}) - 1 << {2}) | ({0} & (1 << {3}) - 1) << {2}) & U64",
    "rcp.rn.f32": "np.float32(1) / {0}",
    "min.f32": "min({0}, {1})",  # of numbers
    "prmt.b32": "permuted({0}, {1}, {2})",
}
"""What PTX computes, in Python: integers are unsigned of their width, floats are NumPy scalars.

NumPy's ``+ - * /`` and ``sqrt`` of scalars are ``.rn`` without ``.ftz``.
"""

for _name, _symbol in {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}.items():
    for _kind in ("u16", "b16"):
        EXPRESSIONS[f"setp.{_name}.{_kind}"] = f"({{0}} & 0xFFFF) {_symbol} ({{1}} & 0xFFFF)"
    EXPRESSIONS[f"setp.{_name}.s16"] = f"signed({{0}}, 16) {_symbol} signed({{1}}, 16)"

for _kind in ("f32", "f64"):
    EXPRESSIONS[f"neg.{_kind}"] = "-{0}"
    EXPRESSIONS[f"sqrt.rn.{_kind}"] = "np.sqrt({0})"
    for _name, _symbol in {"add": "+", "sub": "-", "mul": "*", "div": "/"}.items():
        EXPRESSIONS[f"{_name}.rn.{_kind}"] = f"{{0}} {_symbol} {{1}}"

for _name, _symbol in {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}.items():
    for _kind in ("f32", "f64", "u64", "b64"):
        EXPRESSIONS[f"setp.{_name}.{_kind}"] = f"{{0}} {_symbol} {{1}}"
    EXPRESSIONS[f"setp.{_name}.u32"] = f"{{0}} {_symbol} {{1}}"
    for _bits in (32, 64):
        EXPRESSIONS[f"setp.{_name}.s{_bits}"] = f"signed({{0}}, {_bits}) {_symbol} signed({{1}}, {_bits})"

for _kind in ("f32", "f64"):  # of a NaN, nothing is true but what is unordered
    EXPRESSIONS[f"setp.ne.{_kind}"] = "{0} < {1} or {0} > {1}"
    EXPRESSIONS[f"setp.neu.{_kind}"] = "{0} != {1}"
    EXPRESSIONS[f"setp.num.{_kind}"] = "{0} == {0} and {1} == {1}"
    EXPRESSIONS[f"setp.geu.{_kind}"] = "not {0} < {1}"
    EXPRESSIONS[f"setp.ltu.{_kind}"] = "not {0} >= {1}"


# --- Programs -----------------------------------------------------------------------------------------------


class Program:
    """A kernel translated to Python.

    Knows the instructions that kernels of this package consist of on sm_90, and refuses any other. (For newer
    architectures, loads do not say whether they load floats.)
    """

    def __init__(self, entry: str) -> None:
        code = instructions(entry)
        self._shared = _shared(entry)
        self.waits = any(op.startswith("bar.sync") for _, op, _ in code)
        """Whether the threads of a block wait for each other."""
        self.exchanges = any(re.match(_EXCHANGE, op) for _, op, _ in code)
        """Whether the lanes of a warp exchange numbers."""
        labels = [instruction.op for instruction in code if instruction.op.startswith("$")]
        self._blocks = {label: number for number, label in enumerate(labels, start=1)}
        # A jump names a block and goes back to the top, from where all blocks before that one are skipped.
        lines = [
            "def run(arguments, memory, special, shared):",
            " block = 0",
            " while True:",
            "  if block <= 0:",
        ]
        for guard, op, operands in code:
            if op in self._blocks:
                lines.append(f"  if block <= {self._blocks[op]}:")
                lines.append(f"   unreached.discard('{op}')")
                continue
            condition = guard.replace("!", "not ").replace("%", "")
            statement = self._statement(op, operands)
            lines.append(f"   if {condition}: {statement}" if guard else f"   {statement}")
        self.unreached = set(labels)
        """Labels that no thread has come to."""
        scope = {"unreached": self.unreached, "np": np, "signed": signed, "U32": U32, "U64": U64}
        scope["permuted"] = permuted
        exec("\n".join(lines), scope)
        self._run = scope["run"]

    def launch(self, blocks: int, threads: int, arguments: tuple, memory: Memory) -> None:
        """Run all threads of a grid."""
        for block in range(blocks):
            shared = Memory()
            for address, size in self._shared.values():
                shared.add(np.full(size, 0xFF, np.uint8), address)  # NaN: nothing has been written
            runs = [
                self.thread(block, thread, blocks, threads, arguments, memory, shared)
                for thread in range(threads)
            ]
            while (self.waits or self.exchanges) and runs:
                waiting = []
                for first in range(0, threads, WARP):
                    with np.errstate(all="ignore"):
                        waiting += _to_barrier(runs[first : first + WARP])
                assert len(waiting) in (0, len(runs)), "threads of a block left others at a barrier"
                runs = waiting

    def thread(
        self,
        block: int,
        thread: int,
        blocks: int,
        threads: int,
        arguments: tuple,
        memory: Memory,
        shared: Memory | None = None,
    ) -> Iterator[bool] | None:
        """Run one thread; an int is passed in 64 bits, a NumPy scalar as it is.

        Of a kernel whose threads wait for each other, return an iterator that runs to the next barrier.
        """
        passed = [argument & U64 if type(argument) is int else argument for argument in arguments]
        special = {"ctaid": block, "tid": thread, "nctaid": blocks, "ntid": threads}
        with np.errstate(all="ignore"):
            return self._run(passed, memory, special, shared)

    def _statement(self, op: str, operands: list[str]) -> str:
        """Return the Python of an instruction."""
        name, *_, kind = op.split(".") if "." in op else (op, "")
        if name == "bra":
            return f"block = {self._blocks[operands[0]]}; continue"
        if name == "ret":
            return "return"
        if re.match(_EXCHANGE, op):
            return _exchanged(op, operands)
        if name == "bar":
            return "yield True"
        if op.startswith("ld.param.") and kind in TYPES:
            (number,) = re.findall(r"_param_(\d+)\]", operands[1])
            return f"{_value(operands[0])} = arguments[{number}]"
        if op.startswith(("ld.global.", "st.global.")) and kind in TYPES:
            return _access(name, kind, operands)
        if op.startswith(("ld.shared.", "st.shared.")) and kind in TYPES:
            return _access(name, kind, [self._placed(operand) for operand in operands], "shared")
        if op == "mov.b32":
            return _moved_bits(*operands)
        if op not in EXPRESSIONS:
            raise NotImplementedError(f"PTX instruction {op}")
        result, *values = (_value(self._placed(operand)) for operand in operands)
        return f"{result} = {EXPRESSIONS[op].format(*values)}"

    def _placed(self, operand: str) -> str:
        """Return an operand with the address of shared memory in place of its name."""
        for name, (address, _) in self._shared.items():
            operand = re.sub(rf"(?<![\w$]){re.escape(name)}(?![\w$])", str(address), operand)
        return operand


def _shared(entry: str) -> dict[str, tuple[int, int]]:
    """Return where the shared arrays of a kernel lie, and their bytes, by name."""
    found, address = {}, 1 << 12
    for name, size in re.findall(r"\.shared \.align \d+ \.b8 ([\w$]+)\[(\d+)\];", entry):
        found[name] = address, int(size)
        address += int(size) + (1 << 12)  # what is not there lies between them
    return found


# --- Warps: what lanes give to each other -------------------------------------------------------------------

WARP = 32
_EXCHANGE = r"shfl\.sync\.bfly\.b32|redux\.sync\.max\.u32|bar\.warp\.sync"


def _exchanged(op: str, operands: list[str]) -> str:
    """Return the Python of an instruction by which a lane gives a number to all others, and gets one."""
    if op == "bar.warp.sync":
        return f"yield '{op}', 0, 0, {_value(operands[0])}"
    result, _, _ = operands[0].partition("|")  # behind it, whether there was a lane to get it from
    value, *others = map(_value, operands[1:])
    mask, apart = others[-1], others[0] if len(others) > 1 else 0
    return f"{_value(result)} = yield '{op}', {value}, {apart}, {mask}"


def _to_barrier(lanes: list[Iterator]) -> list[Iterator]:
    """Run the lanes of a warp, from one exchange to the next; return those that wait at a barrier then.

    All of them take part in all exchanges.
    """
    asked = [next(lane, None) for lane in lanes]
    while any(type(request) is tuple for request in asked):
        assert all(type(request) is tuple for request in asked), "lanes of a warp left others at an exchange"
        ops, values, aparts, masks = zip(*asked, strict=True)
        assert len(lanes) == WARP, "a warp that is not whole"
        assert len(set(ops)) == len(set(aparts)) == 1, "lanes are not where others are"
        assert {mask & U32 for mask in masks} == {U32}, "lanes that are not there"
        if ops[0].startswith("shfl"):
            answers = [values[k ^ aparts[0]] for k in range(WARP)]
        else:
            answers = [max(values)] * WARP
        asked = [_sent(lane, answer) for lane, answer in zip(lanes, answers, strict=True)]
    return [lane for lane, request in zip(lanes, asked, strict=True) if request]


def _sent(lane: Iterator, answer: object) -> object:
    try:
        return lane.send(answer)
    except StopIteration:
        return None


def _access(name: str, kind: str, operands: list[str], memory: str = "memory") -> str:
    """Return the Python of a load from, or a store to, global or shared memory."""
    registers, place = operands if name == "ld" else operands[::-1]
    base, _, offset = place.strip("[]").partition("+")
    address = f"({_value(base)} + {int(offset or 0)}) & U64"
    values = [_value(register) for register in re.findall(r"[^{},\s]+", registers)]
    integer = not kind.startswith("f")
    if name == "ld":
        loaded = f"{memory}.load({address}, {len(values)}, {TYPES[kind]})"
        if kind.startswith("s"):  # extended to the width of a register
            width = "U64" if values[0].startswith("rd") else "U32"
            loaded = f"(int(value) & {width} for value in {loaded})"
        return f"{', '.join(values)}, = {f'map(int, {loaded})' if integer else loaded}"
    lowest = {"16": " & 0xFFFF", "b8": " & 0xFF", "u8": " & 0xFF"}.get(kind[-2:], "")
    stored = ", ".join(f"{TYPES[kind]}({value}{lowest})" if integer else value for value in values)
    return f"{memory}.store({address}, {TYPES[kind]}, {stored})"


def _moved_bits(result: str, operand: str) -> str:
    """Return the Python of a move of 32 bits: between floats, integers, and pairs of 16 bits."""
    if result.startswith("{"):
        low, high = map(_value, re.findall(r"[^{},\s]+", result))
        return f"{low}, {high} = {_value(operand)} & 0xFFFF, {_value(operand)} >> 16"
    if operand.startswith("{"):
        low, high = map(_value, re.findall(r"[^{},\s]+", operand))
        return f"{_value(result)} = {low} | {high} << 16"
    to, value = _value(result), _value(operand)
    if to[0] == value[0]:
        return f"{to} = {value}"
    return (
        f"{to} = np.uint32({value}).view(np.float32)"
        if to[0] == "f"
        else f"{to} = int({value}.view(np.uint32))"
    )


def _value(operand: str) -> str:
    """Return the Python of an operand: a special register, an integer, or a register."""
    if special := re.fullmatch(r"%(n?tid|n?ctaid)\.x", operand):
        return f"special['{special[1]}']"
    if literal := re.fullmatch(r"0([df])([0-9A-F]+)", operand):
        bits, number = (64, "float64") if literal[1] == "d" else (32, "float32")
        return f"np.uint{bits}(0x{literal[2]}).view(np.{number})"
    if re.fullmatch(r"-?\d+", operand):
        return str(int(operand) & U64)
    if number := re.fullmatch(r"0([fd])0+", operand):  # the only one that kernels have
        return "np.float32(0)" if number[1] == "f" else "np.float64(0)"
    if register := re.fullmatch(r"%?([a-z]+\d*)", operand):
        return register[1]
    raise NotImplementedError(f"PTX operand {operand}")
