"""Arithmetic in kernels of other people that rounds as the rules promise, whatever their compile options.

Numba-CUDA fuses multiply-adds unless it is told not to, and ``fastmath=True`` also approximates quotients and
roots and flushes subnormals. How a kernel is compiled is for its author to say; what is computed here must
not depend on it. So a number of a rule gets a type of its own, whose operators are PTX instructions by name:
``add.rn.f32`` is neither fused, reordered nor flushed (PTX manual). The rules stay as they are written: the
type of what they get selects the instructions.

The simulator of numba-cuda runs Python over NumPy scalars, which round like this by themselves.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import cuda, types
from numba.core.errors import TypingError

_FLOATS = (types.float32, types.float64)


def exact(values: Any) -> Any:
    """Return a number, or a tuple of them, for the rules to compute with; for compiled code."""
    return values


def plain(values: Any) -> Any:
    """Undo :func:`exact`."""
    return values


def require_types(param: Any, grad: Any, state: Any, c: Any, states: Any, numbers: Any) -> None:
    """Raise TypingError when a kernel is compiled whose arguments of an update are of other types.

    ``states`` and ``numbers`` are tuples of as many elements as ``state`` and ``c`` should have.
    """


def _require(param: Any, grad: Any, state: Any, c: Any, states: Any, numbers: Any) -> None:
    if not (isinstance(c, types.UniTuple) and c.dtype in _FLOATS):
        raise TypingError(f"c must be what coefficients() gives; got {c}.")
    if len(c) != len(numbers):
        raise TypingError(f"c must have {len(numbers)} numbers, as coefficients() gives; got {len(c)}.")
    for name, given in (("param", param), ("grad", grad)):
        if given != c.dtype:
            raise TypingError(f"{name} must be {c.dtype}, as the coefficients are; got {given}.")
    if state != types.UniTuple(c.dtype, len(states)):
        raise TypingError(f"state must be a tuple of {len(states)} {c.dtype}; got {state}.")


if hasattr(cuda, "extending"):  # not in the simulator
    from numba.cuda.extending import core_models, intrinsic, overload, register_model

    class Exact(types.Type):  # type: ignore[misc]
        """A float32 or float64 whose operators are not the compiler's to change."""

        def __init__(self, number: Any) -> None:
            self.number = number
            super().__init__(name=f"Exact({number})")

    @register_model(Exact)
    class _ExactModel(core_models.PrimitiveModel):  # type: ignore[misc]
        def __init__(self, dmm: Any, fe_type: Any) -> None:
            super().__init__(dmm, fe_type, dmm.lookup(fe_type.number).get_value_type())

    _EXACT = {number: Exact(number) for number in _FLOATS}

    def _converted(kind: Any, of: Callable[[Any], Any]) -> Any:
        return types.UniTuple(of(kind.dtype), kind.count) if isinstance(kind, types.UniTuple) else of(kind)

    def _same_bits(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return arguments[0]

    @intrinsic
    def _to_exact(typing_context: Any, values: Any) -> Any:
        """Change the type of numbers, and nothing else."""
        return _converted(values, _EXACT.__getitem__)(values), _same_bits

    @intrinsic
    def _to_plain(typing_context: Any, values: Any) -> Any:
        """Change it back."""
        return _converted(values, lambda kind: kind.number)(values), _same_bits

    @overload(exact, strict=False)
    def _compiled_exact(values: Any) -> Any:
        return lambda values: _to_exact(values)  # noqa: PLW0108

    @overload(plain, strict=False)
    def _compiled_plain(values: Any) -> Any:
        return lambda values: _to_plain(values)  # noqa: PLW0108

    @overload(require_types, strict=False)
    def _compiled_require_types(param: Any, grad: Any, state: Any, c: Any, states: Any, numbers: Any) -> Any:
        _require(param, grad, state, c, states, numbers)
        return lambda param, grad, state, c, states, numbers: None  # noqa: ARG005

    def _emit(builder: Any, returned: Any, instruction: str, letters: str, values: Any) -> Any:
        kinds = [value.type for value in values]
        code = ir.InlineAsm(ir.FunctionType(returned, kinds), instruction, letters, side_effect=False)
        return builder.call(code, values)

    def _arithmetic(name: str, count: int) -> Any:
        """Return what gives the instruction ``name`` for ``count`` numbers of a type."""

        @intrinsic
        def compute(typing_context: Any, numbers: Any) -> Any:
            kind = numbers.dtype
            bits = kind.number.bitwidth
            letter, operands = "f" if bits == 32 else "d", ", ".join(f"${k}" for k in range(count + 1))
            letters = ",".join([f"={letter}", *[letter] * count])

            def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                values = [builder.extract_value(arguments[0], k) for k in range(count)]
                return _emit(builder, values[0].type, f"{name}.f{bits} {operands};", letters, values)

            return kind(numbers), emit

        return compute

    def _comparison(name: str) -> Any:
        """Return what compares two numbers of a type, ``setp`` with a number for an answer."""

        @intrinsic
        def compare(typing_context: Any, numbers: Any) -> Any:
            bits = numbers.dtype.number.bitwidth
            letter = "f" if bits == 32 else "d"
            code = f"{{ .reg .pred p; setp.{name}.f{bits} p, $1, $2; selp.u32 $0, 1, 0, p; }}"

            def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                values = [builder.extract_value(arguments[0], k) for k in range(2)]
                answer = _emit(builder, ir.IntType(32), code, f"=r,{letter},{letter}", values)
                return builder.icmp_unsigned("!=", answer, ir.IntType(32)(0))

            return types.boolean(numbers), emit

        return compare

    def _with_one(function: Any, compute: Any) -> None:
        @overload(function, strict=False)
        def _one(x: Any) -> Any:
            return (lambda x: compute((x,))) if isinstance(x, Exact) else None

    def _with_two(function: Any, compute: Any) -> None:
        @overload(function, strict=False)
        def _two(x: Any, y: Any) -> Any:
            return (lambda x, y: compute((x, y))) if isinstance(x, Exact) and x == y else None

    _with_two(operator.add, _arithmetic("add.rn", 2))
    _with_two(operator.sub, _arithmetic("sub.rn", 2))
    _with_two(operator.mul, _arithmetic("mul.rn", 2))
    _with_two(operator.truediv, _arithmetic("div.rn", 2))
    _with_two(operator.lt, _comparison("lt"))
    _with_two(operator.gt, _comparison("gt"))
    _with_one(operator.neg, _arithmetic("neg", 1))
    _with_one(math.sqrt, _arithmetic("sqrt.rn", 1))
