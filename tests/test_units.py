"""Units of a buffer: cut into shares of equal work, nothing lost and nothing twice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastadam.kernels import units
from fastadam.kernels.units import ALIGN_FROM, ALIGNMENT, UNIT_COST, Units


@st.composite
def tables(draw):
    """Units with gaps: (start, stop, row)."""
    sizes = st.one_of(st.integers(1, 40), st.integers(ALIGN_FROM - 2, 3 * ALIGN_FROM))
    gaps = st.one_of(st.just(0), st.integers(0, 100))
    table, at = [], 0
    for row, (gap, size) in enumerate(draw(st.lists(st.tuples(gaps, sizes), max_size=30))):
        table.append((at + gap, at + gap + size, row))
        at += gap + size
    return np.array(table, np.int64).reshape(-1, 3)


def elements(table):
    """Every element of the units with its row, in the order in which they are listed."""
    return [(i, row) for start, stop, row in table.tolist() for i in range(start, stop)]


@given(tables(), st.integers(1, 9))
def test_shares_have_every_element_once(table, count):
    shares = Units(table).shares(count)
    assert elements(shares.units) == elements(table)
    assert (shares.units[:, 0] < shares.units[:, 1]).all()
    assert shares.first[0] == 0
    assert shares.first[-1] == len(shares.units)
    assert len(shares.first) <= count + 1
    assert (np.diff(shares.first) > 0).all() or not len(table)


@given(tables(), st.integers(2, 9))
def test_shares_are_equal(table, count):
    shares = Units(table).shares(count)
    ends = np.cumsum(shares.units[:, 1] - shares.units[:, 0] + UNIT_COST)
    work = np.diff(np.append(0, ends)[shares.first])
    total = ends[-1] if len(table) else 0
    assert work.size == 0 or work.max() <= total / count + 3 * (UNIT_COST + ALIGNMENT)


@given(tables(), st.integers(1, 9))
def test_cuts_are_aligned(table, count):
    starts = set(table[:, 0].tolist())
    cut = [start for start in Units(table).shares(count).units[:, 0].tolist() if start not in starts]
    assert all(start % ALIGNMENT == 0 for start in cut)


@given(tables())
def test_long_units_go_on_at_a_cache_line(table):
    for start, stop, _ in Units(table).shares(1).units.tolist():
        assert start % ALIGNMENT == 0 or stop - start < ALIGN_FROM


@given(tables())
def test_runs(table):
    runs = Units(table).runs.tolist()
    assert [i for a, b in runs for i in range(a, b)] == [i for i, _ in elements(table)]
    assert all(a[1] < b[0] for a, b in itertools.pairwise(runs))


@pytest.mark.parametrize("wrong", ["lost", "twice"])
def test_these_checks_can_fail(monkeypatch, wrong):
    change = {"lost": lambda table, _: table[1:], "twice": lambda table, _: np.repeat(table, 2, 0)}
    monkeypatch.setattr(units, "cut", change[wrong])
    table = np.array([[0, 100, 0], [100, 20_000, 1]])
    assert elements(Units(table).shares(2).units) != elements(table)
