"""Memory of a loop as pointers of which compilers know that they do not meet: the caller has checked that.

LLVM tests whether arrays of a loop overlap each time that the loop is entered: for the 128 elements of a
block that is a tenth of the time. Where it takes more than eight tests, with six arrays, LLVM gives up and
leaves the loop scalar, at ten times the time. Accesses through these pointers carry scopes that say so
instead. And pointers are cheap to pass: of arrays in a tuple that is made in a loop references are counted
there.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.extending import intrinsic, models, register_model

from .groups import BLOCK

PLACES = 8
CACHE_LINE = 64
AHEAD = 512
"""Elements from those that are stepped to those that are fetched to the second cache (32 Mi elements, Zen 4:
1.1 times as fast as without, as with 1,024)."""

_NUMBER, _INDEX, _BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()


class Distinct(types.CPointer):  # type: ignore[misc]
    """A pointer to elements that no pointer of another place reaches, of at most ``PLACES`` in a loop."""

    def __init__(self, dtype: Any, place: int) -> None:
        self.place = place
        super().__init__(dtype)
        self.name = f"distinct{place}({dtype})"

    @property
    def key(self) -> tuple[Any, int]:
        """What tells types apart."""
        return self.dtype, self.place


register_model(Distinct)(models.PointerModel)


def _say_distinct(builder: Any, access: Any, place: int) -> None:
    module = builder.module
    domain = module.add_metadata(["fastadam"])
    scopes = [module.add_metadata([f"fastadam {k}", domain]) for k in range(PLACES)]
    access.set_metadata("alias.scope", module.add_metadata([scopes.pop(place)]))
    access.set_metadata("noalias", module.add_metadata(scopes))


def get(builder: Any, kind: Distinct, pointer: Any, index: Any) -> Any:
    """Emit the load of an element."""
    element = builder.load(builder.gep(pointer, [index], inbounds=True))
    _say_distinct(builder, element, kind.place)
    return element


def put(builder: Any, kind: Distinct, pointer: Any, index: Any, element: Any) -> None:
    """Emit the store of an element."""
    access = builder.store(element, builder.gep(pointer, [index], inbounds=True))
    _say_distinct(builder, access, kind.place)


@lower_builtin(operator.getitem, Distinct, types.Integer)
def _get(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return get(builder, signature.args[0], *arguments)


@lower_builtin(operator.setitem, Distinct, types.Integer, types.Any)
def _set(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    (kind, _, of_value), (pointer, index, value) = signature.args, arguments
    put(builder, kind, pointer, index, context.cast(builder, value, of_value, kind.dtype))
    return context.get_dummy_value()


@intrinsic
def memory_of(typing_context: Any, params: Any, grads: Any, states: Any, master: Any, out: Any) -> Any:
    """Return pointers to the memory of a step: ``(params, grads, states, master, out)``, None for None."""

    def pointer(array: Any, place: int) -> Any:
        return types.none if isinstance(array, types.NoneType) else Distinct(array.dtype, place)

    kinds = (
        pointer(params, 0),
        pointer(grads, 1),
        types.Tuple([pointer(state, 4 + k) for k, state in enumerate(states)]),
        pointer(master, 2),
        pointer(out, 3),
    )

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def data(kind: Any, value: Any) -> Any:
            if isinstance(kind, types.NoneType):
                return context.get_dummy_value()
            if isinstance(kind, types.BaseTuple):
                values = [
                    data(*pair) for pair in zip(kind, cgutils.unpack_tuple(builder, value), strict=True)
                ]
                return context.make_tuple(builder, kinds[2], values)
            return context.make_array(kind)(context, builder, value).data

        found = [data(kind, value) for kind, value in zip(signature.args, arguments, strict=True)]
        return context.make_tuple(builder, signature.return_type, found)

    return types.Tuple(kinds)(params, grads, states, master, out), emit


@intrinsic
def memory_at(
    typing_context: Any,
    params: Any,
    grads: Any,
    states: Any,
    out: Any,
    table: Any,
    row: Any,
    column: Any,
) -> Any:
    """Return what :func:`memory_of` does, of arrays whose addresses stand in a row of a table.

    From ``column`` on: of the parameters, the gradients, each state, and the copy unless it is None. The
    arrays that are passed only say of which dtype they are.
    """
    moments = types.Tuple([Distinct(state.dtype, 4 + k) for k, state in enumerate(states)])
    copy = out if isinstance(out, types.NoneType) else Distinct(out.dtype, 3)
    kinds = (Distinct(params.dtype, 0), Distinct(grads.dtype, 1), moments, types.none, copy)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        addresses = context.make_array(table)(context, builder, arguments[4])
        width = cgutils.unpack_tuple(builder, addresses.shape)[1]
        first = builder.gep(addresses.data, [builder.add(builder.mul(arguments[5], width), arguments[6])])

        def pointer(kind: Distinct, place: int) -> Any:
            address = builder.load(builder.gep(first, [_INDEX(place)]))
            return builder.inttoptr(address, context.get_value_type(kind))

        found = context.make_tuple(builder, moments, [pointer(kind, 2 + k) for k, kind in enumerate(moments)])
        nothing = context.get_dummy_value()
        written = pointer(copy, 2 + len(moments)) if isinstance(copy, Distinct) else nothing
        parts = [pointer(kinds[0], 0), pointer(kinds[1], 1), found, nothing, written]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.Tuple(kinds)(params, grads, states, out, table, row, column), emit


@intrinsic
def pointers_to(typing_context: Any, arrays: Any) -> Any:
    """Return pointers to the arrays of a tuple, which may meet others."""
    pointers = types.Tuple([types.CPointer(array.dtype) for array in arrays])

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = [
            context.make_array(kind)(context, builder, value).data
            for kind, value in zip(arrays, cgutils.unpack_tuple(builder, arguments[0]), strict=True)
        ]
        return context.make_tuple(builder, pointers, found)

    return pointers(arrays), emit


@intrinsic
def moved(typing_context: Any, memory: Any, elements: Any) -> Any:
    """Return memory from so many elements on."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def move(kind: Any, value: Any) -> Any:
            if isinstance(kind, types.NoneType):
                return value
            if isinstance(kind, types.BaseTuple):
                values = [
                    move(*pair) for pair in zip(kind, cgutils.unpack_tuple(builder, value), strict=True)
                ]
                return context.make_tuple(builder, kind, values)
            return builder.gep(value, [arguments[1]], inbounds=True)

        return move(memory, arguments[0])

    return memory(memory, elements), emit


@intrinsic
def prefetch(typing_context: Any, memory: Any) -> Any:
    """Have the elements fetched to the second cache that come ``AHEAD`` behind those of a block."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_BYTES, _NUMBER, _NUMBER, _NUMBER])
        function = builder.module.declare_intrinsic("llvm.prefetch", [_BYTES], kind)

        def fetch(kind: Any, value: Any) -> None:
            if isinstance(kind, types.BaseTuple):
                for pair in zip(kind, cgutils.unpack_tuple(builder, value), strict=True):
                    fetch(*pair)
            elif not isinstance(kind, types.NoneType):
                itemsize = context.get_abi_sizeof(context.get_data_type(kind.dtype))
                base = builder.bitcast(value, _BYTES)
                for line in range(AHEAD * itemsize, (AHEAD + BLOCK) * itemsize, CACHE_LINE):
                    ahead = builder.gep(base, [_INDEX(line)])
                    # To be read, kept in all caches but the first, data.
                    builder.call(function, [ahead, _NUMBER(0), _NUMBER(2), _NUMBER(1)])

        fetch(memory, arguments[0])
        return context.get_dummy_value()

    return types.void(memory), emit
