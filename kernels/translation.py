"""Rules in CUDA C++: translates the scalar Python of :mod:`fastadam.kernels.rules`, line by line.

A rule is straight-line code: assignments of expressions, then one return. Each Python function becomes a C++
function of the same name and parameters, each NamedTuple of coefficients a struct. C++ names are assigned
once: the second value of ``exp_avg`` is ``exp_avg_2``. Tuples stay tuples and numbers are of the type
``Real``, whose arithmetic no compiler flag changes: ``kernels/step.cu`` defines both.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Function: TypeAlias = Callable[..., Any]

_OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}

_CONSTANTS: dict[type, str] = {bool: "false", int: "Real{}"}
"""False and 0, the only ones that there are."""

_ALLOWED = (
    "assignments, one return, + - * /, comparisons, and, 0, False, conditional expressions, tuples, sqrt and"
    " calls of rules"
)


def translate(function: Function, choices: Mapping[Function, Mapping[type, Function]]) -> str:
    """Return the C++ definitions of a function and of all that it calls.

    Parameters
    ----------
    function : callable
        A Python function of scalars, tuples of scalars and coefficients.
    choices : mapping
        Functions that the type of their last argument selects: function -> type -> what it selects; nothing
        where ``kernels/step.cu`` has them.

    Raises
    ------
    TypeError
        If a function uses Python that has no counterpart here.
    """
    translation = _Translation(choices)
    translation.define(function)
    return "\n\n".join(translation.definitions.values())


class _Translation:
    """C++ definitions, each after those it needs."""

    def __init__(self, choices: Mapping[Function, Mapping[type, Function]]) -> None:
        self.choices = choices
        self.definitions: dict[object, str] = {}

    def define(self, function: Function) -> None:
        if function in self.definitions:
            return
        if function in self.choices and not self.choices[function]:
            return
        if function not in self.choices:
            code = _Body(self, function).translate()
            self.definitions[function] = code
            return
        overloads = [
            self._overload(function, coefficients, selected)
            for coefficients, selected in self.choices[function].items()
        ]
        self.definitions[function] = "\n".join(overloads)

    def _overload(self, function: Function, coefficients: type, selected: Function) -> str:
        struct = "None" if coefficients is type(None) else coefficients.__name__
        members = "".join(f"Real {field}; " for field in getattr(coefficients, "_fields", ()))
        if coefficients is not type(None):
            self.definitions.setdefault(coefficients, f"struct {struct} {{ {members}}};")
        self.define(selected)
        names = list(inspect.signature(function).parameters)
        parameters = ", ".join([*(f"auto {name}" for name in names[:-1]), f"{struct} {names[-1]}"])
        arguments = ", ".join(names)
        return f"DEVICE auto {function.__name__}({parameters}) {{ return {selected.__name__}({arguments}); }}"


class _Body:
    """Translates the definition of one function."""

    def __init__(self, translation: _Translation, function: Function) -> None:
        self._translation = translation
        self._function = function
        self._names: dict[str, str] = {}  # of Python -> the present one of C++
        self._used: set[str] = set()

    def translate(self) -> str:
        tree = ast.parse(textwrap.dedent(inspect.getsource(self._function))).body[0]
        if not isinstance(tree, ast.FunctionDef):
            raise self._refused(tree)
        parameters = ", ".join(f"auto {self._assign(argument.arg)}" for argument in tree.args.args)
        body = tree.body[1:] if ast.get_docstring(tree) else tree.body
        lines = [f"    {self._statement(statement)};" for statement in body]
        return "\n".join([f"DEVICE auto {tree.name}({parameters}) {{", *lines, "}"])

    def _statement(self, node: ast.stmt) -> str:
        match node:
            case ast.Return(value=ast.expr() as value):
                return f"return {self._expression(value)}"
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                code = self._expression(value)  # before the name has its new value
                return f"auto {self._assign(name)} = {code}"
            case ast.Assign(targets=[ast.Tuple(elts=elements)], value=value) if all(
                isinstance(element, ast.Name) for element in elements
            ):
                code = self._expression(value)
                names = ", ".join(self._assign(element.id) for element in elements)  # type: ignore[attr-defined]
                return f"auto [{names}] = {code}"
        raise self._refused(node)

    def _expression(self, node: ast.expr) -> str:
        match node:
            case ast.Name(id=name) if name in self._names:
                return self._names[name]
            case ast.Attribute(value=value, attr=field):
                return f"{self._expression(value)}.{field}"
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
                return f"({self._expression(left)} {_OPERATORS[type(operator)]} {self._expression(right)})"
            case ast.Compare(left=left, ops=[operator], comparators=[right]) if type(operator) in _OPERATORS:
                return f"({self._expression(left)} {_OPERATORS[type(operator)]} {self._expression(right)})"
            case ast.BoolOp(op=ast.And(), values=conditions):
                return f"({' && '.join(self._expression(condition) for condition in conditions)})"
            case ast.Constant(value=False | 0 as value) if type(value) in _CONSTANTS:
                return _CONSTANTS[type(value)]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return f"(-{self._expression(operand)})"
            case ast.IfExp(test=test, body=body, orelse=orelse):
                parts = [self._expression(part) for part in (test, body, orelse)]
                return "({} ? {} : {})".format(*parts)
            case ast.Tuple(elts=elements):
                return f"tuple({', '.join(self._expression(element) for element in elements)})"
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                values = ", ".join(self._expression(argument) for argument in arguments)
                return f"{self._called(name, node)}({values})"
        raise self._refused(node)

    def _called(self, name: str, node: ast.expr) -> str:
        function = inspect.getclosurevars(self._function)
        target = {**function.globals, **function.nonlocals}.get(name)
        if target is math.sqrt:
            return "sqrt"
        if not inspect.isfunction(target):
            raise self._refused(node)
        self._translation.define(target)
        return target.__name__

    def _assign(self, name: str) -> str:
        number, unique = 1, name
        while unique in self._used:
            number += 1
            unique = f"{name}_{number}"
        self._used.add(unique)
        self._names[name] = unique
        return unique

    def _refused(self, node: ast.AST) -> TypeError:
        return TypeError(
            f"{self._function.__qualname__} must use only {_ALLOWED}; got {ast.unparse(node)!r}."
        )
