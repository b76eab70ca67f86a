"""Units in device memory: the tables of a step over them, and what is queued around it."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from . import grids
from .block_tables import block_tables
from .cuda import STEP_ACROSS, Cuda, KernelTypes
from .device_storage import StoredTypes
from .groups import BLOCK as SCALED
from .run_chunks import RunChunks
from .tree import CHUNK
from .units import Integers, RowTables, Units

Launch: TypeAlias = tuple[Any, int, int, tuple[Any, ...]]
"""A kernel, blocks, threads of each, and arguments."""

_PAIR = 16
"""Bytes of a sum of squares and a count."""

_KEPT = SCALED * grids.MATH.itemsize
"""Bytes of what the parameters of a block were."""


class DeviceUnits:
    """Units of buffers of one size, each with a row of coefficients.

    All tables are made here, none later; a kernel is compiled when a launch of it is asked for. No method
    queues anything.

    Parameters
    ----------
    backend : Cuda
    device, stream : int
        Where, and in which order, it is made.
    types : KernelTypes
        With the decay that any row has.
    size : int
        Elements of the buffers.
    units : Units
    rows : RowTables
        Of the coefficients.
    observed : bool
        Whether a step has sums of what it sees.
    in_blocks : bool
        Whether some states come in blocks.
    """

    def __init__(
        self,
        backend: Cuda,
        device: int,
        stream: int,
        types: KernelTypes,
        size: int,
        units: Units,
        rows: RowTables,
        *,
        observed: bool,
        in_blocks: bool = False,
    ) -> None:
        self.observed = observed
        self._backend, self._device, self._types = backend, device, types
        chunks = RunChunks(units)
        self._chunks, self._rows = len(chunks.bounds), len(rows.sources)
        gaps = RunChunks(units.gaps(size)).bounds
        self._gaps = len(gaps)
        self._resident = backend.resident_threads(device)

        tables: list[Any] = [chunks.bounds, chunks.pieces, chunks.first_piece, gaps, rows.sources]
        tables += [rows.weight_decays, *rows.columns, *chunks.levels, rows.coefficients]
        self._memory, starts = self._placed(tables, stream)
        self._size, self._of_blocks = size, None
        if in_blocks:
            found = block_tables(units, size, chunks.bounds if observed else None)
            self._blocks_memory, (pieces, first, of_block) = self._placed(list(found[:3]), stream)
            self._of_blocks, self._across = (of_block, pieces, first), found.across
            self._kept_memory = backend.zeros(_KEPT * max(found.across, 1), device, stream)
            self._kept = backend.address(self._kept_memory)
        self._bounds, self._pieces, self._first, self._gaps_at, sources, weight_decays = starts[:6]
        width, n_columns = rows.coefficients.shape[1], rows.columns.table.shape[1]
        self._coefficients = starts[-1]
        of_rows = (self._coefficients, self._rows, width, sources, weight_decays)
        self._forming = (*of_rows, starts[6], n_columns, starts[7], int(rows.decoupled))

        self._levels: list[tuple[int, int]] = [
            (at, len(groups)) for at, groups in zip(starts[8:-1], chunks.levels, strict=True)
        ]
        self._apart = _sums_of(self._chunks, chunks.levels)
        arrays = 3 if observed else 1
        self._sums_memory = backend.zeros(_PAIR * arrays * self._apart, device, stream)
        self._sums = backend.address(self._sums_memory)

    def _placed(self, tables: list[Any], stream: int) -> tuple[Any, list[int]]:
        """Copy tables to the device; return their memory, and where each begins."""
        flat = [np.ascontiguousarray(table).reshape(-1).view(np.uint8) for table in tables]
        memory = self._backend.to_device(np.concatenate(flat), self._device, stream)
        ends = np.cumsum([table.size for table in flat])
        return memory, [int(at) + self._backend.address(memory) for at in np.append(0, ends[:-1])]

    @property
    def step_entry(self) -> str:
        """The kernel of a step."""
        return "step_units_observed" if self.observed else "step_units"

    def _kernel(self, entry: str, grads: np.dtype[Any] | None = None) -> Any:
        types = self._types.without_rule(self._types.dtype, grads)
        return self._backend.kernel(entry, types, self._device)

    def _over_chunks(
        self, entry: str, chunks: int, arguments: tuple[Any, ...], grads: np.dtype[Any] | None = None
    ) -> Launch:
        return self._kernel(entry, grads), grids.tree_blocks(chunks, self._resident), grids.BLOCK, arguments

    def _sum_levels(self, arrays: int) -> tuple[list[Launch], int, int]:
        """Return the launches that leave a sum for each run, where these lie, and how many they are."""
        launches, source, left = [], self._sums, self._chunks
        for groups, count in self._levels:
            to = source + _PAIR * left
            arguments = (source, groups, count, to, arrays, self._apart)
            launches.append(self._over_chunks("sum_groups", count, arguments))
            source, left = to, count
        return launches, source, left

    def measure(self, grads: int, dtype: np.dtype[Any]) -> tuple[list[Launch], int, int]:
        """Return the pass over the gradients, where its sums lie, and how many they are."""
        arguments = (grads, self._bounds, self._chunks, self._sums)
        levels, sums, left = self._sum_levels(1)
        first = self._over_chunks("measure_units", self._chunks, arguments, dtype)
        return [first, *levels], sums, left

    def form(self, step: int, lrs: tuple[int, int, int]) -> Launch:
        """Return what forms the coefficients of the next step, from the step counter and learning rates."""
        blocks = grids.blocks(self._rows, 0, 1, self._resident)
        return self._kernel("form_rows"), blocks, grids.BLOCK, (*self._forming, step, *lrs)

    def clear_gaps(self, grads: int, dtype: np.dtype[Any]) -> list[Launch]:
        """Return what clears the gradients that no unit covers."""
        arguments = (grads, self._gaps_at, self._gaps)
        return [self._over_chunks("clear_units", self._gaps, arguments, dtype)] if self._gaps else []

    def steps(
        self,
        pointers: tuple[int, ...],
        decided: tuple[int, ...],
        stored: StoredTypes | None = None,
        layout: tuple[int, int] = (0, 0),
    ) -> list[Launch]:
        """Return the step of some buffers; ``decided`` is what a clock has for it.

        ``layout`` is what :func:`grids.packs` says of them, where states come in blocks.
        """
        types = self._types._replace(stored=stored)
        seen = (self._sums, self._apart) if self.observed else ()

        def over(count: int, entry: str, *tables: int, seen: tuple[int, ...] = ()) -> Launch:
            kernel, blocks = self._backend.kernel(entry, types, self._device), self._resident
            arguments = (*pointers, *tables, self._coefficients, *decided, *seen)
            return kernel, grids.tree_blocks(count, blocks), grids.BLOCK, arguments

        of_blocks, entry = self._of_blocks, self.step_entry
        if of_blocks is None:
            return [over(self._chunks, entry, self._pieces, self._first, self._chunks, seen=seen)]
        if not self.observed:
            return [over(-(-self._size // SCALED), entry, *of_blocks, self._size, *layout)]
        tables = (*of_blocks, self._kept, self._across, self._size)
        first = [over(self._across, STEP_ACROSS, *tables)] if self._across else []
        return [*first, over(self._chunks, entry, *tables, self._bounds, self._chunks, seen=seen)]

    def conclude(self, skip: int, report: int) -> list[Launch]:
        """Return what sums up what a step has seen, and reports it."""
        if not self.observed:
            return []
        levels, sums, left = self._sum_levels(3)
        arguments = (sums, left, self._apart, skip, report)
        return [*levels, (self._kernel("conclude"), 1, grids.BLOCK, arguments)]


def _sums_of(chunks: int, levels: list[Integers]) -> int:
    """Return the sums of all levels of the tree."""
    sizes = [chunks, *map(len, levels)]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // CHUNK))
    return max(1, sum(sizes))
