"""Chunks of runs: every element in one chunk, every unit in pieces, sums put together run by run."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from test_units import elements, tables
from trees import array_tree

from fastadam.kernels.run_chunks import RunChunks
from fastadam.kernels.tree import CHUNK
from fastadam.kernels.units import Units


@given(tables())
def test_every_run_is_cut_as_a_buffer_of_its_own(table):
    units = Units(table)
    chunks = RunChunks(units)
    expected = [
        [(at, min(at + CHUNK, stop)) for at in range(start, stop, CHUNK)]
        for start, stop in units.runs.tolist()
    ]
    first = chunks.first_of_run.tolist()
    actual = list(map(tuple, chunks.bounds.tolist()))
    assert [actual[a:b] for a, b in itertools.pairwise(first)] == expected


@given(tables())
def test_pieces_have_every_element_once_and_lie_in_one_chunk(table):
    chunks = RunChunks(Units(table))
    assert elements(chunks.pieces) == elements(table)
    first = chunks.first_piece.tolist()
    assert len(first) == len(chunks.bounds) + 1
    assert first[0] == 0
    assert first[-1] == len(chunks.pieces)
    for (start, stop), a, b in zip(chunks.bounds.tolist(), first[:-1], first[1:], strict=True):
        pieces = chunks.pieces[a:b]
        assert pieces[0, 0] == start
        assert pieces[-1, 1] == stop
        assert (pieces[1:, 0] == pieces[:-1, 1]).all()


def by_levels(chunks, values, tree=array_tree):
    for groups in chunks.levels:
        values = np.array([tree(values[a:b]) for a, b in groups.tolist()])
    return tree(values)


def test_levels_leave_one_sum_for_each_run(rng):
    sizes = (1, 3 * CHUNK + 1, CHUNK * CHUNK + 5, 7)
    starts = np.cumsum([0, *(size + 1 for size in sizes)])[:-1]
    runs = [(int(start), int(start) + size, 0) for start, size in zip(starts, sizes, strict=True)]
    chunks = RunChunks(Units(np.array(runs)))
    assert [len(groups) for groups in chunks.levels] == [5, 4]
    sums = rng.standard_normal(len(chunks.bounds))
    first = chunks.first_of_run.tolist()
    expected = array_tree([array_tree(sums[a:b]) for a, b in itertools.pairwise(first)])
    assert by_levels(chunks, sums) == expected


@given(tables())
def test_one_run_needs_no_levels(table):
    chunks = RunChunks(Units(table))
    if len(chunks.first_of_run) <= 2 or np.diff(chunks.first_of_run).max() == 1:
        assert chunks.levels == []
    else:
        assert len(chunks.levels[-1]) == len(chunks.first_of_run) - 1
