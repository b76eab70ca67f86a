"""What the Numba-CUDA kernels of an observed step see, as ``Observed`` in ``kernels/units.cu``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from . import rules
from .grids import BLOCK
from .storage import load, load_param
from .tree import LANES

SEEN = 5
"""Sums of what a step sees: of squares of gradients, updates and parameters, and counts of what is not finite
and of what vanished. All in float64."""

SHARED = SEEN * BLOCK
"""Numbers in shared memory, of every sum one for each thread."""


def make_see(*, observed: bool) -> Any:
    """Return the device function that adds an element to what was seen, or nothing.

    ``moved_by`` is what is zero where there is no update.
    """

    def see_nothing(seen: Any, before: Any, grad: Any, after: Any, moved_by: Any, step_size: Any) -> Any:
        return seen

    def see(seen: Any, before: Any, grad: Any, after: Any, moved_by: Any, step_size: Any) -> Any:
        value, was, now = np.float64(grad), np.float64(before), np.float64(after)
        change = now - was
        nonfinite = 1.0 if value - value != 0 else 0.0
        vanishes = rules.vanishes(before, after, moved_by, step_size)
        return (
            seen[0] + value * value,
            seen[1] + change * change,
            seen[2] + now * now,
            seen[3] + nonfinite,
            seen[4] + (1.0 if vanishes else 0.0),
        )

    return cuda.jit(device=True)(see if observed else see_nothing)


def make_see_stored(*, magnitude: int | None = None, has_moments: bool = True, observed: bool) -> Any:
    """Return that which finds the parameter and the first moment at ``k`` of buffers, where they were stored.

    A moment in 8 bits is zero where the bits are of ``magnitude``, whatever the scale; None for others.
    Where there is no moment, ``has_moments`` false, the gradient takes its place.
    """
    see = make_see(observed=True)

    def moment_in_block(states: Any, k: int, grad: Any) -> Any:
        return states[0][k] & magnitude

    def moment_alone(states: Any, k: int, grad: Any) -> Any:
        return load(states[0], k)

    def no_moment(states: Any, k: int, grad: Any) -> Any:
        return grad

    alone = moment_alone if has_moments else no_moment
    moved = alone if magnitude is None else moment_in_block
    moved_by = cuda.jit(device=True)(moved)

    def see_nothing(
        seen: Any, before: Any, grad: Any, params: Any, master: Any, states: Any, k: int, step_size: Any
    ) -> Any:
        return seen

    def see_stored(
        seen: Any, before: Any, grad: Any, params: Any, master: Any, states: Any, k: int, step_size: Any
    ) -> Any:
        return see(seen, before, grad, load_param(params, master, k), moved_by(states, k, grad), step_size)

    return cuda.jit(device=True)(see_stored if observed else see_nothing)


@cuda.jit(device=True)
def _fold(sums: Any, lane: int) -> None:
    """Fold the lanes of each warp, of all sums at once; every thread of the block comes here."""
    here, width = cuda.threadIdx.x, LANES // 2
    while width > 0:
        cuda.syncthreads()
        if lane < width:
            for kind in range(SEEN):
                sums[kind * BLOCK + here] += sums[kind * BLOCK + here + width]
        width //= 2


@cuda.jit(device=True)
def sum_up(lanes: Any, seen: Any, chunk: int, chunks: int, sums: Any, apart: int) -> None:
    """Write the sums of each warp's chunk, if it has one; every thread of the block comes here."""
    here = cuda.threadIdx.x
    lane = here % LANES
    cuda.syncthreads()  # the fold of the chunk before has read its lanes
    lanes[here], lanes[BLOCK + here], lanes[2 * BLOCK + here] = seen[0], seen[1], seen[2]
    lanes[3 * BLOCK + here], lanes[4 * BLOCK + here] = seen[3], seen[4]
    _fold(lanes, lane)
    if lane == 0 and chunk < chunks:
        at, beside = 2 * chunk, 2 * (apart + chunk)
        last = 2 * (2 * apart + chunk)
        sums[at], sums[at + 1] = lanes[here], lanes[3 * BLOCK + here]
        sums[beside], sums[beside + 1] = lanes[BLOCK + here], lanes[4 * BLOCK + here]
        sums[last], sums[last + 1] = lanes[2 * BLOCK + here], 0.0
