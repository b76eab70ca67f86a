"""What a rule computes, found out from its source: numbers, truths and tuples of them.

:mod:`fastadam.kernels.translation` knows what Python has a counterpart in C++. Here is checked, before any
compiler sees it, that the parts fit: arguments, tuples, coefficients; and that nothing leaves the dtype of
the arithmetic, as a comparison that is multiplied with, or an integer that is returned, would.
"""

from __future__ import annotations

import ast
import dis
import inspect
import math
from types import CodeType
from typing import Any, TypeAlias

from .translation import Function, called, definition, is_from_outside

Kind: TypeAlias = Any
"""``NUMBER``, ``TRUTH``, a tuple of kinds, or the NamedTuple of the coefficients."""

NUMBER, TRUTH = "a number", "a comparison"

_NUMBERS = (ast.Add, ast.Sub, ast.Mult, ast.Div)
_COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)
_BRANCH = "Choose a number instead: a if condition else b."
_COEFFICIENT = "Make it a coefficient, which is rounded as all numbers are."
_LANGUAGE = (
    "assignments to names, one return at the end, + - * /, comparisons, and, conditional expressions, tuples,"
    " math.sqrt, and functions of the same kind"
)
_REMEDIES: dict[type[ast.AST], str] = {
    ast.If: _BRANCH,
    ast.For: "Write the repetitions out.",
    ast.While: "Write the repetitions out.",
    ast.AugAssign: "Write name = name + value.",
    ast.AnnAssign: "Leave the annotation out.",
    ast.Constant: _COEFFICIENT,
    ast.Or: "Choose twice: a if one else (a if other else b).",
    ast.Not: "Turn the comparison around, or exchange what it chooses.",
    ast.Subscript: "Unpack the tuple: first, second = state.",
    ast.Lambda: "Write a def.",
}


def require_rule(function: Any, coefficients: type, n_states: int) -> list[Function]:
    """Return the functions that a rule calls, each after those it calls, and the rule itself.

    Raises
    ------
    TypeError
        If it is no rule with these coefficients and so many states.
    """
    if not inspect.isfunction(function):
        raise TypeError(f"rule must be a Python function; got {type(function).__name__}.")
    given = tuple(inspect.signature(function).parameters)
    if len(given) != 4:
        raise TypeError(
            f"{function.__qualname__} must have the parameters (param, grad, state, c); got"
            f" ({', '.join(given)})."
        )
    states = (NUMBER,) * n_states
    kinds = _Kinds()
    found = kinds.of(function, (NUMBER, NUMBER, states, coefficients))
    if found != (NUMBER, states):
        raise TypeError(
            f"{function.__qualname__} must return (param, state), the state a tuple of {n_states}; got"
            f" {_said(found)}."
        )
    return list(kinds.found)


class _Kinds:
    """What functions return, each found out once for what it is called with."""

    def __init__(self) -> None:
        self.found: dict[Function, dict[tuple[Kind, ...], Kind]] = {}
        self._open: list[Function] = []

    def of(self, function: Function, kinds: tuple[Kind, ...]) -> Kind:
        known = self.found.get(function, {})
        if kinds not in known:
            if function in self._open:
                raise TypeError(f"{function.__qualname__} must not call itself; got such a call.")
            self._open.append(function)
            known[kinds] = _Body(self, function, kinds).result()
            self._open.pop()
            self.found[function] = known
        return known[kinds]


class _Body:
    """Finds out what one function returns."""

    def __init__(self, kinds: _Kinds, function: Function, arguments: tuple[Kind, ...]) -> None:
        self._kinds, self._function = kinds, function
        self._tree = _source(function)
        names = [argument.arg for argument in self._tree.args.args]
        self._names: dict[str, Kind] = dict(zip(names, arguments, strict=True))

    def result(self) -> Kind:
        body = self._tree.body[1:] if ast.get_docstring(self._tree) is not None else self._tree.body
        *assignments, last = body or [ast.Pass()]
        for statement in assignments:
            self._assign(statement)
        match last:
            case ast.Return(value=ast.expr() as value):
                return self._kind(value)
        raise self._refused(last)

    def _assign(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self._names[name] = self._kind(value)
                return
            case ast.Assign(targets=[ast.Tuple(elts=elements)], value=value) if all(
                isinstance(element, ast.Name) for element in elements
            ):
                kind = self._kind(value)
                if not _is_tuple(kind) or len(kind) != len(elements) or not elements:
                    raise self._error(f"unpack {_said(kind)} to as many names", node)
                self._names |= {element.id: k for element, k in zip(elements, kind, strict=True)}  # type: ignore[attr-defined]
                return
        raise self._refused(node)

    def _kind(self, node: ast.expr) -> Kind:
        match node:
            case ast.Name(id=name):
                if name not in self._names:
                    raise self._error("use only its parameters and variables", node, _COEFFICIENT)
                return self._names[name]
            case ast.Attribute(value=ast.Name(id=name), attr=field) if hasattr(
                self._names.get(name), "_fields"
            ):
                fields = list(self._names[name]._fields)
                if field not in fields:
                    raise self._error(f"use coefficients that there are, {fields}", node)
                return NUMBER
            case ast.BinOp(left=left, op=operator, right=right) if isinstance(operator, _NUMBERS):
                return self._of_numbers(node, left, right)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._of_numbers(node, operand)
            case ast.Compare(left=left, ops=[operator], comparators=[right]) if isinstance(
                operator, _COMPARISONS
            ):
                # 0 is compared with, but computed with nowhere: to Numba it is an integer.
                self._of_numbers(node, *(side for side in (left, right) if not _is_zero(side)))
                return TRUTH
            case ast.BoolOp(op=ast.And(), values=conditions):
                for condition in conditions:
                    self._require(TRUTH, condition, node)
                return TRUTH
            case ast.Constant(value=False):
                return TRUTH
            case ast.IfExp(test=test, body=body, orelse=orelse):
                self._require(TRUTH, test, node)
                kind = self._kind(body)
                if kind not in (NUMBER, TRUTH):
                    raise self._error(f"choose numbers, not {_said(kind)}", node)
                self._require(kind, orelse, node)
                return kind
            case ast.Tuple(elts=elements):
                return tuple(map(self._kind, elements))
            case ast.Call(func=function, args=arguments, keywords=[]):
                return self._call(function, arguments, node)
        raise self._refused(node)

    def _call(self, function: ast.expr, arguments: list[ast.expr], node: ast.expr) -> Kind:
        target = None if _root(function) in self._names else called(self._function, function)
        if target is math.sqrt:
            if len(arguments) != 1:
                raise self._error("call math.sqrt with 1 argument", node)
            return self._of_numbers(node, *arguments)
        if not inspect.isfunction(target):
            raise self._error("call only math.sqrt and Python functions of the same kind", node)
        parameters = inspect.signature(target).parameters
        if len(parameters) != len(arguments):
            raise self._error(f"call {target.__name__} with {len(parameters)} arguments", node)
        return self._kinds.of(target, tuple(map(self._kind, arguments)))

    def _of_numbers(self, whole: ast.expr, *parts: ast.expr) -> Kind:
        for part in parts:
            self._require(NUMBER, part, whole)
        return NUMBER

    def _require(self, wanted: Kind, part: ast.expr, whole: ast.expr) -> None:
        found = self._kind(part)
        if found != wanted:
            raise self._error(f"have {_said(wanted)}, not {_said(found)}, for {ast.unparse(part)!r}", whole)

    def _error(self, rule: str, node: ast.AST, remedy: str = "") -> TypeError:
        where = f"{ast.unparse(node)!r} in its line {getattr(node, 'lineno', 1)}"
        return TypeError(
            f"{self._function.__qualname__} must {rule}; got {where}.{' ' * bool(remedy)}{remedy}"
        )

    def _refused(self, node: ast.AST) -> TypeError:
        kind = type(node.op) if isinstance(node, (ast.BoolOp, ast.UnaryOp)) else type(node)
        return self._error(f"use only {_LANGUAGE}", node, _REMEDIES.get(kind, ""))


def _source(function: Function) -> ast.FunctionDef:
    """Return the definition of a function, if that is what it runs."""
    name = function.__qualname__
    if function.__name__ == "<lambda>":
        raise TypeError(f"{name} must be made by def; got a lambda.")
    try:
        tree = definition(function)
    except OSError:
        raise TypeError(
            f"{name} must have its source where Python finds it; got a function without, as at a prompt or by"
            " exec. Define it in a file or in a notebook."
        ) from None
    except (SyntaxError, TypeError, IndexError):
        tree = None
    if tree is None or not _is_made_of(function, tree):
        raise TypeError(
            f"{name} must be what its source says; got another function. Leave decorators out, and start"
            " Python again where the file was edited."
        )
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.default is not parameter.empty:
            raise TypeError(f"{name} must have plain parameters; got '{parameter}'.")
    return tree


def _is_made_of(function: Function, tree: ast.FunctionDef) -> bool:
    """Return whether a function is the code of a definition, as far as that can be compared."""
    code = function.__code__
    if not is_from_outside(function) or code.co_freevars:
        return tree.name == code.co_name
    if tree.decorator_list:
        return False
    module = compile(ast.Module([tree], []), "<rule>", "exec", dont_inherit=True)
    (other,) = (constant for constant in module.co_consts if inspect.iscode(constant))
    return _operands(code) == _operands(other)


def _operands(code: CodeType) -> list[object]:
    """Return names, numbers and operators of a code, in their order.

    Not the code itself: the compiler makes another one of ``math.sqrt`` where it sees the import.
    """
    jumps = {*dis.hasjrel, *dis.hasjabs}
    found = (instruction for instruction in dis.get_instructions(code) if instruction.opcode not in jumps)
    return [instruction.argval for instruction in found if instruction.argval is not None]


def _is_zero(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int and node.value == 0


def _root(node: ast.expr) -> str:
    """Return the first name of ``name`` or ``name.attribute``."""
    inner = node.value if isinstance(node, ast.Attribute) else node
    return inner.id if isinstance(inner, ast.Name) else ""


def _is_tuple(kind: Kind) -> bool:
    return isinstance(kind, tuple)


def _said(kind: Kind) -> str:
    if _is_tuple(kind):
        return f"({', '.join(map(_said, kind))}{',' * (len(kind) == 1)})"
    return kind if isinstance(kind, str) else "the coefficients"
