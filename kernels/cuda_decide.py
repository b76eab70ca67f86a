"""The Numba-CUDA kernels before a step on a clock: the pass over all gradients, and the coefficients.

As ``kernels/clock.cu`` does it. Sums are pairs in float64: of squares, and the count of inf and NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, float64

from . import rules
from .grids import BLOCK
from .storage import load
from .tree import CHUNK, LANES

_WARPS = BLOCK // LANES


@cuda.jit(device=True)
def fold(squares: Any, nonfinite: Any, lane: int) -> None:
    """Fold the lanes of each warp; every thread of the block comes here."""
    here, width = cuda.threadIdx.x, LANES // 2
    while width > 0:
        cuda.syncthreads()
        if lane < width:
            squares[here] += squares[here + width]
            nonfinite[here] += nonfinite[here + width]
        width //= 2


def measure(grads: Any, size: int, sums: Any) -> None:
    """Sum the squares of each chunk, and count what is not finite; a warp takes a chunk at a time."""
    squares = cuda.shared.array(BLOCK, float64)  # in two lines: the simulator tells them by their line
    nonfinite = cuda.shared.array(BLOCK, float64)
    here = cuda.threadIdx.x
    lane = here % LANES
    chunks = (size + CHUNK - 1) // CHUNK
    first = cuda.blockIdx.x * _WARPS
    while first < chunks:
        chunk = first + here // LANES
        total, count = 0.0, 0.0
        if chunk < chunks:
            stop = min(chunk * CHUNK + CHUNK, size)
            i = chunk * CHUNK + lane
            while i < stop:
                value = np.float64(load(grads, i))
                total += value * value
                if value - value != 0:
                    count += 1.0
                i += LANES
        cuda.syncthreads()  # the fold of the chunk before has read its lanes
        squares[here], nonfinite[here] = total, count
        fold(squares, nonfinite, lane)
        if lane == 0 and chunk < chunks:
            sums[2 * chunk], sums[2 * chunk + 1] = squares[here], nonfinite[here]
        first += cuda.gridDim.x * _WARPS


@cuda.jit(device=True)
def sum_level(squares: Any, nonfinite: Any, sums: Any, source: int, size: int, to: int) -> None:
    """Sum the chunks of one level, which begins at pair ``source``, to the next, at ``to``; one block."""
    here = cuda.threadIdx.x
    lane = here % LANES
    chunks = (size + CHUNK - 1) // CHUNK
    first = 0
    while first < chunks:
        chunk = first + here // LANES
        total, count = 0.0, 0.0
        if chunk < chunks:
            stop = min(chunk * CHUNK + CHUNK, size)
            i = chunk * CHUNK + lane
            while i < stop:
                total += sums[2 * (source + i)]
                count += sums[2 * (source + i) + 1]
                i += LANES
        cuda.syncthreads()
        squares[here], nonfinite[here] = total, count
        fold(squares, nonfinite, lane)
        if lane == 0 and chunk < chunks:
            sums[2 * (to + chunk)], sums[2 * (to + chunk) + 1] = squares[here], nonfinite[here]
        first += _WARPS
    cuda.syncthreads()


@cuda.jit(device=True)
def sum_all(squares: Any, nonfinite: Any, sums: Any, source: int, left: int) -> Any:
    """Sum what lies from pair ``source`` on by the tree, level by level; one block, all of it."""
    while left > 1:
        sum_level(squares, nonfinite, sums, source, left, source + left)
        source += left
        left = (left + CHUNK - 1) // CHUNK
    total, count = 0.0, 0.0
    if left == 1:
        total, count = sums[2 * source], sums[2 * source + 1]
    return total, count


@cuda.jit(device=True)
def scale_of(value: float, narrow: Any, wide: Any, nbytes: int) -> Any:
    """Return a scale of the host, times one of 4 or 8 bytes in device memory, if there is one."""
    if nbytes == 4:
        return value * np.float64(narrow[0])
    if nbytes == 8:
        return value * wide[0]
    return value


@cuda.jit(device=True)
def form_column(
    coefficients: Any, begin: int, columns: Any, k: int, numbers: Any, lr: float, taken: int
) -> None:
    """Form a coefficient of a row, which begins at ``begin``, of the next step: ``Column::form``."""
    number = numbers[columns[4 * k + 2] + min(taken, columns[4 * k + 3] - 1)]
    formed = rules.step_size(lr, number) if columns[4 * k + 1] != 0 else number
    coefficients[begin + columns[4 * k]] = formed


@cuda.jit(device=True)
def form_rule(
    step: Any, lrs: Any, lr_base: int, lr_count: int, columns: Any, n_columns: int, numbers: Any,
    coefficients: Any,
) -> None:  # fmt: skip
    """Form the rule's coefficients of the next step; one block, of which a thread takes one at a time."""
    taken = step[0]
    k = cuda.threadIdx.x
    while k < n_columns:
        form_column(coefficients, 0, columns, k, numbers, lrs[min(taken - lr_base, lr_count - 1)], taken)
        k += cuda.blockDim.x


@cuda.jit(device=True)
def form(
    scale: float, norm: float, factor: float, nonfinite: float, skipped: int,
    step: Any, lrs: Any, lr_base: int, lr_count: int, weight_decay: float, coefficients: Any,
    decay_at: int, scale_at: int, clip_at: int, skip: Any, report: Any,
) -> None:  # fmt: skip
    """Form the other coefficients, the flag and the report; one thread, and may be repeated."""
    taken = step[0]
    lr = lrs[min(taken - lr_base, lr_count - 1)]
    coefficients[decay_at] = rules.lr_times_weight_decay(lr, weight_decay)
    coefficients[scale_at] = scale
    coefficients[clip_at] = factor
    skip[0] = skipped
    report[0], report[1], report[2] = norm, factor, skipped
    report[3], report[4], report[5], report[6] = nonfinite, taken + 1 - skipped, lr, scale


def form_coefficients(
    scale: float, scale32: Any, scale64: Any, scale_bytes: int,
    step: Any, lrs: Any, lr_base: int, lr_count: int, weight_decay: float,
    columns: Any, n_columns: int, numbers: Any, coefficients: Any,
    decay_at: int, scale_at: int, clip_at: int, skip: Any, report: Any,
) -> None:  # fmt: skip
    """Form the coefficients of the next step; one block."""
    form_rule(step, lrs, lr_base, lr_count, columns, n_columns, numbers, coefficients)
    if cuda.threadIdx.x == 0:
        form(
            scale_of(scale, scale32, scale64, scale_bytes), 0.0, 1.0, 0.0, 0,
            step, lrs, lr_base, lr_count, weight_decay, coefficients,
            decay_at, scale_at, clip_at, skip, report,
        )  # fmt: skip


def decide(
    sums: Any, left: int, clips: int, max_norm: float, skips: int,
    scale: float, scale32: Any, scale64: Any, scale_bytes: int,
    step: Any, lrs: Any, lr_base: int, lr_count: int, weight_decay: float,
    columns: Any, n_columns: int, numbers: Any, coefficients: Any,
    decay_at: int, scale_at: int, clip_at: int, skip: Any, report: Any,
) -> None:  # fmt: skip
    """Sum what ``measure`` left, level by level, and decide; one block."""
    squares = cuda.shared.array(BLOCK, float64)  # in two lines: the simulator tells them by their line
    nonfinite = cuda.shared.array(BLOCK, float64)
    form_rule(step, lrs, lr_base, lr_count, columns, n_columns, numbers, coefficients)
    total, count = sum_all(squares, nonfinite, sums, 0, left)
    if cuda.threadIdx.x != 0:
        return
    by = scale_of(scale, scale32, scale64, scale_bytes)
    norm = rules.grad_norm(total, by)
    factor = 1.0
    if clips != 0:
        factor = rules.clip_factor(norm, max_norm, rules.CLIP_EPS, 1.0)
    skipped = 1 if skips != 0 and count > 0 else 0
    form(
        by, norm, factor, count, skipped,
        step, lrs, lr_base, lr_count, weight_decay, coefficients, decay_at, scale_at, clip_at, skip, report,
    )  # fmt: skip


def accumulate(total: Any, grads: Any, size: int, clear: int) -> None:
    """Add gradients to their sum, and set them to zero with ``clear``."""
    i = cuda.grid(1)
    while i < size:
        total[i] += load(grads, i)
        if clear != 0:
            grads[i] = 0
        i += cuda.gridsize(1)


def widen(to: Any, source: Any, size: int) -> None:
    """Write numbers of any storage as those of the arithmetic."""
    i = cuda.grid(1)
    while i < size:
        to[i] = load(source, i)
        i += cuda.gridsize(1)


def form_keys(keys: Any, step: Any, seed: int, first: int) -> None:
    """Form the keys of stochastic rounding in the next step, as :mod:`fastadam.rounding`; one thread."""
    bits = np.uint64(seed) ^ np.uint64(step[0] + 1)
    bits += np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    keys[0], keys[1] = np.int64(bits ^ (bits >> np.uint64(31))), first


def set_lr(lrs: Any, value: float) -> None:
    """Change the learning rate of the steps after; one thread."""
    lrs[0] = value
