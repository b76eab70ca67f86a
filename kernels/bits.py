"""LLVM code on the bits of float32 numbers, as 32-bit integers: Numba computes with 64."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

_SHORT, _INT, _FLOAT = ir.IntType(16), ir.IntType(32), ir.FloatType()

ABS, SIGN, INF = 0x7FFFFFFF, 0x80000000, 0x7F800000
"""Of a float32: all bits but its sign, its sign, and those of inf."""


def _number(bits: Any) -> Any:
    return _INT(bits & 0xFFFFFFFF) if isinstance(bits, int) else bits


class Bits:
    """Builds integer code on one value after the other; what is an int is a constant."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def of(self, number: Any) -> Any:
        """Return the bits of a float32."""
        return self.b.bitcast(number, _INT)

    def float(self, bits: Any) -> Any:
        """Return the float32 of bits."""
        return self.b.bitcast(bits, _FLOAT)

    def plus(self, bits: Any, other: Any) -> Any:
        """Return the sum, modulo 2**32."""
        return self.b.add(bits, _number(other))

    def masked(self, bits: Any, mask: int) -> Any:
        """Return what a mask leaves."""
        return self.b.and_(bits, _number(mask))

    def up(self, bits: Any, places: int) -> Any:
        """Return bits, shifted to the left."""
        return self.b.shl(bits, _INT(places))

    def down(self, bits: Any, places: int) -> Any:
        """Return bits, shifted to the right; zeros follow."""
        return self.b.lshr(bits, _INT(places))

    def larger(self, bits: Any, other: Any) -> Any:
        """Return the larger of two unsigned numbers."""
        return self.choose(">", bits, other, bits, _number(other))

    def smaller(self, bits: Any, other: Any) -> Any:
        """Return the smaller of two unsigned numbers."""
        return self.choose("<", bits, other, bits, _number(other))

    def choose(self, sign: str, bits: Any, limit: Any, this: Any, other: Any) -> Any:
        """Return ``this`` where unsigned bits compare so with a limit, else ``other``."""
        return self.b.select(self.b.icmp_unsigned(sign, bits, _number(limit)), this, other)

    def magnitude(self, number: Any) -> Any:
        """Return a float32 without its sign."""
        return self.float(self.masked(self.of(number), ABS))

    def code(self, bits: Any) -> Any:
        """Return the lower 16 bits."""
        return self.b.trunc(bits, _SHORT)
