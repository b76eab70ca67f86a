"""The memory roofline of a step: a kernel with the same traffic and next to no arithmetic.

Reads parameters, gradients and two moments, writes parameters and moments: 28 bytes per float32 element.
Adam in the same time cannot be made faster but by moving fewer bytes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from bench.oracle import Array, Contender, WrongUpdateError
from bench.placement import placed_copy
from fastadam.benchmark import bytes_per_element
from fastadam.benchmark import roofline as move

_CHECKED = 2**18
"""Elements of the check, at most: enough for the parallel loop."""


def bytes_moved(size: int, dtype: Any) -> int:
    """Return the bytes that a step must read and write."""
    return size * bytes_per_element(dtype)


def start(params: Array, grads: Array) -> Contender:
    """Return the kernel as a contender; it has checked itself.

    However often it runs, its values stay finite and normal: a sum of equal terms stops growing where the
    next term is below its rounding, and a difference of floats is zero or at least the spacing of the
    smaller.
    """
    _check(move, params[:_CHECKED], grads[:_CHECKED])
    moments = placed_copy(np.zeros_like(params)), placed_copy(np.zeros_like(params))

    def write_grads(new: Array) -> None:
        grads[...] = new

    return Contender(partial(move, params, grads, *moments), lambda: params, write_grads)


def _check(kernel: Any, params: Array, grads: Array) -> None:
    arrays = [params.copy(), np.zeros_like(params), np.ones_like(params)]
    expected = [array + grads for array in arrays]
    kernel(arrays[0], grads, *arrays[1:])
    if not all(np.array_equal(array, right) for array, right in zip(arrays, expected, strict=True)):
        raise WrongUpdateError("the roofline kernel must add the gradient to three arrays; it does not.")
