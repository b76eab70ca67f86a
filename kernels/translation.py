"""Rules in CUDA C++: translates the scalar Python of :mod:`fastadam.kernels.rules`, line by line.

A rule is straight-line code: assignments of expressions, then one return. Each Python function becomes a C++
function of the same name and parameters, each NamedTuple of coefficients a struct. C++ names are assigned
once: the second value of ``exp_avg`` is ``exp_avg_2``. Tuples stay tuples and numbers are of the type
``Real``, whose arithmetic no compiler flag changes: ``kernels/step.cu`` defines both. Names of functions from
outside of this package are changed: they may be words of C++, or names of ``kernels/step.cu``.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Callable, Mapping
from functools import cache
from types import CellType, FunctionType
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

_CPP = """
alignas alignof asm auto bool case catch char concept const constexpr const_cast decltype default
delete do double dynamic_cast enum explicit export extern false float friend goto inline int long
mutable namespace new noexcept operator private protected public register requires short signed
sizeof static static_assert static_cast struct switch template this throw true typedef typeid
typename union unsigned using virtual void volatile
"""
_WORDS = frozenset(_CPP.split())
"""Of C++, and not of Python."""

_ALLOWED = (
    "assignments, one return, + - * /, comparisons, and, 0, False, conditional expressions, tuples, sqrt and"
    " calls of rules"
)


@cache
def definition(function: Function) -> ast.FunctionDef:
    """Return the definition of a function as its source was when this was first asked for.

    Raises
    ------
    OSError
        If there is no source.
    TypeError
        If it was not made by ``def``.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    if not isinstance(tree, ast.FunctionDef):
        raise refused(function, tree)
    return tree


def called(function: Function, node: ast.expr) -> object:
    """Return what a call in a function calls, by a name or ``module.name``; None for others."""
    known = inspect.getclosurevars(function)
    names = {**known.globals, **known.nonlocals}
    match node:
        case ast.Name(id=name):
            return names.get(name)
        case ast.Attribute(value=ast.Name(id=name), attr=attribute) if inspect.ismodule(names.get(name)):
            return getattr(names[name], attribute, None)
    return None


def frozen(function: Function) -> Function:
    """Return a copy of a function from outside, and of those that it calls: no name changes any more.

    Kernels are compiled one by one, when they are needed: by then a notebook may have another helper.
    """
    return _frozen(function, {})


def _frozen(function: Function, done: dict[Function, Function]) -> Function:
    if function not in done:
        given: Any = function
        known = inspect.getclosurevars(function)
        names = {**known.globals, **known.nonlocals}
        copies = {
            name: _frozen(value, done) if inspect.isfunction(value) and is_from_outside(value) else value
            for name, value in names.items()
        }
        cells = tuple(CellType(copies[name]) for name in given.__code__.co_freevars)
        scope = {"__name__": given.__module__, **copies}
        copy = FunctionType(given.__code__, scope, given.__name__, given.__defaults__, cells)
        copy.__qualname__, copy.__module__ = given.__qualname__, given.__module__
        done[function] = copy
    return done[function]


def refused(function: Function, node: ast.AST) -> TypeError:
    """Return what to raise for Python that has no counterpart."""
    return TypeError(f"{function.__qualname__} must use only {_ALLOWED}; got {ast.unparse(node)!r}.")


def is_from_outside(thing: Any) -> bool:
    """Return whether a function or a class is none of this package."""
    return not str(thing.__module__).startswith("fastadam.")


def _spelled(name: str) -> str:
    """Return a name as C++ takes it."""
    name = "".join(letter if letter.isascii() else f"u{ord(letter):x}" for letter in name)
    return f"{name}_" if name in _WORDS else name


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
        self._outside: list[Function] = []

    def name_of(self, function: Function) -> str:
        if not is_from_outside(function):
            return function.__name__
        if function not in self._outside:
            self._outside.append(function)
        return f"{_spelled(function.__name__)}_{self._outside.index(function)}"

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
        members = "".join(f"Real {_spelled(field)}; " for field in getattr(coefficients, "_fields", ()))
        if coefficients is not type(None):
            self.definitions.setdefault(coefficients, f"struct {struct} {{ {members}}};")
        self.define(selected)
        names = list(inspect.signature(function).parameters)
        parameters = ", ".join([*(f"auto {name}" for name in names[:-1]), f"{struct} {names[-1]}"])
        arguments = ", ".join(names)
        call = f"{self.name_of(selected)}({arguments})"
        return f"DEVICE auto {function.__name__}({parameters}) {{ return {call}; }}"


class _Body:
    """Translates the definition of one function."""

    def __init__(self, translation: _Translation, function: Function) -> None:
        self._translation = translation
        self._function = function
        self._suffix = "_" * is_from_outside(function)  # no word of C++ and no name of ours ends with it
        self._names: dict[str, str] = {}  # of Python -> the present one of C++
        self._used: set[str] = set()

    def translate(self) -> str:
        tree = definition(self._function)
        parameters = ", ".join(f"auto {self._assign(argument.arg)}" for argument in tree.args.args)
        body = tree.body[1:] if ast.get_docstring(tree) else tree.body
        lines = [f"    {self._statement(statement)};" for statement in body]
        name = self._translation.name_of(self._function)
        return "\n".join([f"DEVICE auto {name}({parameters}) {{", *lines, "}"])

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
        raise refused(self._function, node)

    def _expression(self, node: ast.expr) -> str:
        match node:
            case ast.Name(id=name) if name in self._names:
                return self._names[name]
            case ast.Attribute(value=value, attr=field):
                return f"{self._expression(value)}.{_spelled(field)}"
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
                return f"({self._expression(left)} {_OPERATORS[type(operator)]} {self._expression(right)})"
            case ast.Compare(left=left, ops=[operator], comparators=[right]) if type(operator) in _OPERATORS:
                return f"({self._compared(left)} {_OPERATORS[type(operator)]} {self._compared(right)})"
            case ast.BoolOp(op=ast.And(), values=conditions):
                return f"({' && '.join(self._expression(condition) for condition in conditions)})"
            case ast.Constant(value=False):
                return "false"
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return f"(-{self._expression(operand)})"
            case ast.IfExp(test=test, body=body, orelse=orelse):
                parts = [self._expression(part) for part in (test, body, orelse)]
                return "({} ? {} : {})".format(*parts)
            case ast.Tuple(elts=elements):
                return f"tuple({', '.join(self._expression(element) for element in elements)})"
            case ast.Call(func=function, args=arguments, keywords=[]):
                values = ", ".join(self._expression(argument) for argument in arguments)
                return f"{self._called(function, node)}({values})"
        raise refused(self._function, node)

    def _compared(self, node: ast.expr) -> str:
        """Translate what is compared: 0, too, which elsewhere would be an integer to Numba."""
        match node:
            case ast.Constant(value=0 as value) if type(value) is int:
                return "Real{}"
        return self._expression(node)

    def _called(self, function: ast.expr, node: ast.expr) -> str:
        target = called(self._function, function)
        if target is math.sqrt:
            return "sqrt"
        if not inspect.isfunction(target):
            raise refused(self._function, node)
        self._translation.define(target)
        return self._translation.name_of(target)

    def _assign(self, name: str) -> str:
        number, unique = 1, f"{_spelled(name)}{self._suffix}"
        while unique in self._used:
            number += 1
            unique = f"{_spelled(name)}_{number}{self._suffix}"
        self._used.add(unique)
        self._names[name] = unique
        return unique
