"""The compile policy: how Numba sees the rules, and one decorator for every compiled loop.

The policy, and why:

- ``error_model="numpy"`` on loops and rules: Python's raises on division by zero, a branch in the loop that
  removes SIMD. ``x / 0`` is inf or NaN in the element, as in NumPy.
- ``nogil``: a step runs beside other Python threads.
- no ``fastmath``, not even ``contract``: the bits of a step are those of :mod:`fastadam.kernels.rules`.
- cached on disk, where the disk allows it (:class:`_TolerantCache`). Numba's cache knows nothing of functions
  in other files (rules, storage) and of jit options. A loop's closure is part of the cache's key, so each
  loop closes over a key with the digest of all sources of this package and the options: an edit of any file
  here is an edit of every loop, and the parallel loop never runs the machine code of the serial one.
"""

from __future__ import annotations

import contextlib
import hashlib
import marshal
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.caching import FunctionCache
from numba.extending import overload, register_jitable

from . import (
    bits,
    bounds,
    chunks,
    distinct,
    draws,
    eight_bits,
    elements,
    formats,
    observed,
    relatives,
    rows,
    rules,
    storage,
    translation,
    views,
)

JIT_OPTIONS = {"error_model": "numpy"}
INLINED = {**JIT_OPTIONS, "forceinline": True}

called = register_jitable(**JIT_OPTIONS)
"""Decorates functions that loops call."""
inlined = register_jitable(**INLINED)
"""Decorates those of a block: as calls, their arguments took a tenth of the time."""

_EMITTERS = (
    bits,
    bounds,
    chunks,
    distinct,
    draws,
    eight_bits,
    elements,
    formats,
    observed,
    relatives,
    rows,
    rules,
    storage,
    views,
)
"""Modules of what loops call, and of what emits code for them."""


@cache
def digest() -> str:
    """Digest all source files of this package, and what loops call as loaded.

    Python may load a rule from a stale ``.pyc`` (same size, same second): its machine code must not be cached
    as that of the new source.
    """
    sha = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        sha.update(source.read_bytes())
    for module in _EMITTERS:
        for value in vars(module).values():
            function = getattr(value, "__wrapped__", value)  # an intrinsic's
            if isinstance(function, FunctionType):
                # From version 3 on it depends on refcounts.
                sha.update(marshal.dumps(_placeless(function.__code__), 2))
            elif isinstance(value, (int, float)):  # a constant that loops are compiled with
                sha.update(str(value).encode())
    return sha.hexdigest()


def _placeless(code: CodeType) -> CodeType:
    """Return code without the name of its file: a cache that is moved with the package still holds."""
    inner = tuple(_placeless(value) if isinstance(value, CodeType) else value for value in code.co_consts)
    return code.replace(co_filename="", co_consts=inner)


class _TolerantCache(FunctionCache):  # type: ignore[misc]
    """Numba's disk cache, except that trouble with the disk only costs the cache.

    Numba raises when an index or a data file cannot be read or written (a read-only or full disk, a file
    cut short): an optimizer step must not fail for that. And two processes that save at once can leave an
    index that names the other's data file: code for arguments of other types is not taken.

    Nothing is kept of rules from outside of this package: the digest does not follow their source, and nobody
    can read an index that names a class which cannot be imported any more.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        if not all(map(_is_of_this_package, sig)):
            return None
        try:
            compiled = super().load_overload(sig, target_context)
        except Exception:
            return None
        return compiled if compiled is not None and compiled.signature.args == tuple(sig) else None

    def save_overload(self, sig: Any, data: Any) -> None:
        if not all(map(_is_of_this_package, sig)):
            return
        with contextlib.suppress(Exception):
            super().save_overload(sig, data)


def _is_of_this_package(kind: Any) -> bool:
    """Return whether no NamedTuple in a type of an argument is of somebody else."""
    of = getattr(kind, "instance_class", None)
    if of in rules.CALLED or (of is not None and translation.is_from_outside(of)):
        return False
    return all(map(_is_of_this_package, getattr(kind, "types", ())))


def jit(make_loop: Callable[[str], Callable[..., Any]], *, parallel: bool = False) -> Any:
    """Compile a loop over buffers by the policy of this module.

    ``make_loop(cache_key)`` returns the loop, which must name ``cache_key`` somewhere in its body.
    """
    options = {**JIT_OPTIONS, "nogil": True, "parallel": parallel}
    loop = make_loop(f"{digest()} {options}")
    # The name names the cache's index file: one for each loop.
    loop.__qualname__ = loop.__name__ = f"{loop.__name__}_{'parallel' if parallel else 'serial'}"
    dispatcher = numba.njit(loop, **options)
    with contextlib.suppress(RuntimeError):  # no writable place for a cache: do without
        dispatcher._cache = _TolerantCache(loop)
    return dispatcher


def each_form(
    loops: Iterable[Any], dtype: np.dtype[Any], *, written: bool = False
) -> Iterator[tuple[Any, np.ndarray[Any, Any]]]:
    """Yield loops with empty gradients of each type that Numba compiles them for: writable and not."""
    empty: np.ndarray[Any, Any] = np.empty(0, dtype)
    read_only = empty[:]
    read_only.flags.writeable = False
    for grads in (empty,) if written else (empty, read_only):
        for loop in loops:
            yield loop, grads


# What Numba compiles for a call of a function of the rules: the type of the coefficients decides.
# strict=False: Numba's strict check compares annotations as well as names.


def _selects_nothing(c: types.Type) -> bool:
    return isinstance(c, types.NoneType)


@overload(rules.update, jit_options=JIT_OPTIONS, strict=False)
def _update(param: Any, grad: Any, state: Any, c: Any) -> Any:
    return rules.update


@overload(rules.prepared, jit_options=JIT_OPTIONS, strict=False)
def _prepared(param: Any, grad: Any, c: Any) -> Any:
    return rules.prepared


@overload(rules.split, jit_options=JIT_OPTIONS, strict=False)
def _split(state: Any, c: Any) -> Any:
    if _selects_nothing(c):
        return lambda state, c: (state, None)  # noqa: ARG005
    return lambda state, c: (state[:-1], state[-1])  # noqa: ARG005


@overload(rules.join, jit_options=JIT_OPTIONS, strict=False)
def _join(moments: Any, average: Any) -> Any:
    if _selects_nothing(average):
        return lambda moments, average: moments  # noqa: ARG005
    return lambda moments, average: (*moments, average)


@overload(rules.step_size, jit_options=JIT_OPTIONS, strict=False)
def _step_size(lr: Any, bias_correction1: Any) -> Any:
    return rules.step_size


@overload(rules.lr_times_weight_decay, jit_options=JIT_OPTIONS, strict=False)
def _lr_times_weight_decay(lr: Any, weight_decay: Any) -> Any:
    return rules.lr_times_weight_decay


@overload(rules.clipped, jit_options=JIT_OPTIONS, strict=False)
def _clipped(grad: Any, clip_factor: Any, max_value: Any) -> Any:
    return rules.clipped


@overload(rules.grad_norm, jit_options=JIT_OPTIONS, strict=False)
def _grad_norm(sum_of_squares: Any, grad_scale: Any) -> Any:
    return rules.grad_norm


@overload(rules.clip_factor, jit_options=JIT_OPTIONS, strict=False)
def _clip_factor(norm: Any, max_grad_norm: Any, eps: Any, most: Any) -> Any:
    return rules.clip_factor


@overload(rules.moving_average, jit_options=JIT_OPTIONS, strict=False)
def _moving_average(average: Any, value: Any, beta: Any, one_minus_beta: Any) -> Any:
    return rules.moving_average


@overload(relatives.magnitude, jit_options=JIT_OPTIONS, strict=False)
def _magnitude(number: Any) -> Any:
    return relatives.magnitude


@overload(relatives.centered_root, jit_options=JIT_OPTIONS, strict=False)
def _centered_root(square_avg: Any, grad_avg: Any, zero: Any) -> Any:
    return relatives.centered_root


@overload(rules.transform, jit_options=JIT_OPTIONS, strict=False)
def _transform(param: Any, grad: Any, c: Any) -> Any:
    return rules.TRANSFORMS[type(None) if _selects_nothing(c) else c.instance_class]


@overload(rules.advance, jit_options=JIT_OPTIONS, strict=False)
def _advance(param: Any, grad: Any, state: Any, c: Any) -> Any:
    for function in rules.CALLED.get(c.instance_class, ()):
        _register(function)
    return rules.RULES[c.instance_class]


@cache
def _register(function: Callable[..., Any]) -> None:
    """Have Numba know a function that a rule of a user calls."""
    called(function)


@overload(rules.track, jit_options=JIT_OPTIONS, strict=False)
def _track(param: Any, average: Any, c: Any) -> Any:
    return rules.AVERAGES[type(None) if _selects_nothing(c) else c.instance_class]


@overload(rules.vanishes, jit_options=JIT_OPTIONS, strict=False)
def _vanishes(before: Any, after: Any, moved_by: Any, step_size: Any) -> Any:
    return rules.vanishes
