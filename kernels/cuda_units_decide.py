"""The Numba-CUDA kernels that surround a step over units, as ``kernels/rows.cu`` has them.

Sums are pairs in float64, as in :mod:`fastadam.kernels.cuda_decide`.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
from numba import cuda, float64

from . import rules
from .cuda_decide import fold, form_column, sum_all
from .grids import BLOCK
from .storage import load
from .tree import LANES

_WARPS = BLOCK // LANES


def measure_units(grads: Any, bounds: Any, chunks: int, sums: Any) -> None:
    """Sum the squares of each chunk of a table, and count what is not finite."""
    squares = cuda.shared.array(BLOCK, float64)  # in two lines: the simulator tells them by their line
    nonfinite = cuda.shared.array(BLOCK, float64)
    here = cuda.threadIdx.x
    lane = here % LANES
    first = cuda.blockIdx.x * _WARPS
    while first < chunks:
        chunk = first + here // LANES
        total, count = 0.0, 0.0
        if chunk < chunks:
            i, stop = bounds[2 * chunk] + lane, bounds[2 * chunk + 1]
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


def sum_groups(source: Any, groups: Any, count: int, to: Any, arrays: int, apart: int) -> None:
    """Sum one level of some arrays of sums, ``apart`` from each other, each to the same place in its own."""
    squares = cuda.shared.array(BLOCK, float64)  # in two lines: the simulator tells them by their line
    nonfinite = cuda.shared.array(BLOCK, float64)
    here = cuda.threadIdx.x
    lane = here % LANES
    begin = 0
    while begin < arrays * apart:
        first = cuda.blockIdx.x * _WARPS
        while first < count:
            group = first + here // LANES
            total, number = 0.0, 0.0
            if group < count:
                i, stop = groups[2 * group] + lane, groups[2 * group + 1]
                while i < stop:
                    total += source[2 * (begin + i)]
                    number += source[2 * (begin + i) + 1]
                    i += LANES
            cuda.syncthreads()
            squares[here], nonfinite[here] = total, number
            fold(squares, nonfinite, lane)
            if lane == 0 and group < count:
                to[2 * (begin + group)], to[2 * (begin + group) + 1] = squares[here], nonfinite[here]
            first += cuda.gridDim.x * _WARPS
        begin += apart


def form_rows(
    rows: Any, count: int, width: int, sources: Any, weight_decays: Any,
    columns: Any, n_columns: int, numbers: Any, decoupled: int,
    step: Any, lrs: Any, lr_base: int, lr_count: int,
) -> None:  # fmt: skip
    """Form the coefficients of each row that change from step to step; a thread takes a row at a time.

    The decay's is the first of a row, where that is decoupled.
    """
    taken = step[0]
    at = min(taken - lr_base, lr_count - 1)
    row = cuda.grid(1)
    while row < count:
        lr = lrs[sources[row] * lr_count + at]
        k = row * n_columns
        while k < (row + 1) * n_columns:
            form_column(rows, width * row, columns, k, numbers, lr, taken)
            k += 1
        if decoupled != 0:
            rows[width * row] = rules.lr_times_weight_decay(lr, weight_decays[row])
        row += cuda.gridsize(1)


def conclude(sums: Any, left: int, apart: int, skip: Any, report: Any) -> None:
    """Sum what a step has seen, unless it was skipped, and report it; one block."""
    squares = cuda.shared.array(BLOCK, float64)  # in two lines: the simulator tells them by their line
    counts = cuda.shared.array(BLOCK, float64)
    if skip[0] != 0:
        return
    grads, nonfinite = sum_all(squares, counts, sums, 0, left)
    updates, vanished = sum_all(squares, counts, sums, apart, left)
    params, _ = sum_all(squares, counts, sums, 2 * apart, left)
    if cuda.threadIdx.x == 0:
        report[0], report[3] = rules.grad_norm(grads, report[6]), nonfinite
        report[7], report[8], report[9] = sqrt(updates), sqrt(params), vanished


def clear_units(grads: Any, bounds: Any, chunks: int) -> None:
    """Set the elements of the chunks of a table to zero."""
    chunk = cuda.blockIdx.x * _WARPS + cuda.threadIdx.x // LANES
    while chunk < chunks:
        i = bounds[2 * chunk] + cuda.threadIdx.x % LANES
        while i < bounds[2 * chunk + 1]:
            grads[i] = 0
            i += LANES
        chunk += cuda.gridDim.x * _WARPS
