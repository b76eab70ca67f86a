"""What the CUDA C++ of a step is told of storage: see ``kernels/formats.cu`` and ``kernels/stored.cu``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .cuda import KernelTypes
from .device_storage import StoredTypes
from .relatives import FORESEEN
from .rounding import MULTIPLIER, WEYL, WEYL_OF_HIGH

_NAMES = {
    **dict.fromkeys(("float32", "float64"), "Real"),
    "uint16": "Float16",
    "int16": "Bfloat16",
    "int8": "Signed",
    "uint8": "Unsigned",
}
_SCALES = 3
"""States that may have scales: all but the average behind them."""


def name_of(dtype: np.dtype[Any] | None) -> str:
    """Return the C++ type of what is stored in a dtype."""
    return "None" if dtype is None else _NAMES[dtype.name]


def hash_constants() -> str:
    """Return the constants of the hash that random bits are."""
    values = {"WEYL": WEYL, "WEYL_OF_HIGH": WEYL_OF_HIGH, "MULTIPLIER": MULTIPLIER}
    return f"constexpr unsigned {', '.join(f'{name} = {value:#x}' for name, value in values.items())};"


class _Buffers(NamedTuple):
    """Of each buffer, its name, that of its type, and the type."""

    name: str
    kind: str
    type: str

    @property
    def is_there(self) -> bool:
        return self.type != "None"


def _of(types: KernelTypes) -> list[_Buffers]:
    stored: StoredTypes = types.stored  # type: ignore[assignment]
    states = [*map(name_of, stored.states), *["None"] * (4 - len(stored.states))]
    const = "const " if types.clear is type(None) else ""
    master = "Remainder" if stored.master == np.int16 else name_of(stored.master)
    return [
        _Buffers("params", "Param", name_of(stored.params)),
        _Buffers("grads", "Grad", const + name_of(stored.grads)),
        *(_Buffers(f"state{k}", f"State{k}", state) for k, state in enumerate(states)),
        _Buffers("master", "Master", master),
        _Buffers("out", "Out", name_of(stored.out)),
    ]


def arrays(types: KernelTypes) -> str:
    """Return the types of all buffers."""
    return "\n".join(f"using {buffer.kind} = {buffer.type};" for buffer in _of(types))


def foreseen(types: KernelTypes) -> str:
    """Return whether blocks of new states follow gradients as a rule says, or are computed first."""
    return f"constexpr bool FORESEEN = {str(types.rule in FORESEEN).lower()};"


def buffers(types: KernelTypes) -> str:
    """Return the parameters of a kernel that are its buffers, and their scales."""
    found = [f"{buffer.kind}* {buffer.name}" for buffer in _of(types) if buffer.is_there]
    stored: StoredTypes = types.stored  # type: ignore[assignment]
    return ", ".join([*found, *(f"unsigned* scales{k}" for k in stored.in_blocks)])


def together(types: KernelTypes) -> str:
    """Return the statements that have them together."""
    values = ", ".join(buffer.name if buffer.is_there else "nullptr" for buffer in _of(types))
    found = f"const Arrays arrays{{{values}}};"
    in_blocks = types.stored.in_blocks if types.stored else ()
    if not in_blocks:
        return found
    scales = ", ".join(f"scales{k}" if k in in_blocks else "nullptr" for k in range(_SCALES))
    return f"{found}\n    const Scales scales{{{{{scales}}}}};"


class Keys(NamedTuple):
    """How a kernel comes to the keys of stochastic rounding."""

    parameters: str = ""
    rounding: str = ""


def keys(types: KernelTypes) -> tuple[Keys, Keys]:
    """Return how a kernel gets them that is told its coefficients, and how one that reads them."""
    if types.stored is None:
        return Keys(), Keys()
    if not types.stored.rounds:
        return (Keys("", "\n    const ToNearest rounding{};"),) * 2
    return (
        Keys(", long long bits, long long first", "\n    const AtRandom rounding{bits, first};"),
        Keys(", const long long* keys", "\n    const AtRandom rounding{keys[0], keys[1]};"),
    )
