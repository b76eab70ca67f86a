"""Moments in 8 bits: the same bits for any number of threads, and any split that leaves blocks whole."""

from __future__ import annotations

from itertools import pairwise

import ml_dtypes
import numba
import numpy as np
import pytest
from eight_bit_steps import literal_blocks
from hypothesis import given
from hypothesis import strategies as st
from segment_steps import slices
from tolerances import assert_same_bits

from fastadam import FusedAdam, Segment
from fastadam.kernels import groups, stored, threads
from fastadam.kernels.units import Units

FLAGS = {
    "both": {"state_dtype": "8bit"},
    "amsgrad": {"state_dtype": ("bfloat16", "8bit"), "amsgrad": True, "weight_decay": 0.1},
}


def problem(rng, size, steps=3):
    gradients = rng.standard_normal((steps, size)) * np.exp2(rng.integers(-3, 4, (steps, size)))
    gradients[:, ::11] = 0
    return rng.standard_normal(size).astype(np.float32), list(gradients.astype(np.float32))


def memory_of(opt):
    """Return codes and scales of all moments."""
    views, scales = opt.state._views, opt.state._scales
    return [*(view.view(f"u{view.itemsize}") for view in views), *(scale.view(np.uint32) for scale in scales)]


def run(params, gradients, cuts=(), segments=(), **flags):
    """Step parts of the buffers, each by an optimizer with its offset; return all that was written."""
    params, found = params.copy(), []
    for a, b in pairwise([0, *cuts, params.size]):
        opt = FusedAdam(0.1, segments=segments, **{**flags, "offset": flags.get("offset", 0) + a})
        for grads in gradients:
            opt.step(params[a:b], grads[a:b])
        found.append(memory_of(opt))
    return [params, *map(np.concatenate, zip(*found, strict=True))]


def assert_same(one, other):
    for k, (found, expected) in enumerate(zip(one, other, strict=True)):
        assert_same_bits(found, expected, str(k))


SEGMENTS = [
    Segment(50, 1000, lr=0.3),
    Segment(1000, 1001, frozen=True),
    Segment(3000, 7777, betas=(0.8, 0.9)),
]


@pytest.mark.parametrize("segments", [[], SEGMENTS], ids=["whole", "segments"])
@pytest.mark.parametrize("name", FLAGS)
def test_any_number_of_threads(rng, all_threads, name, segments, monkeypatch):
    size = 3 * threads.MIN_PIECE + 11
    params, gradients = problem(rng, size)
    gradients[1][[777, 5000, size - 1]] = np.nan, np.inf, 1e30
    with monkeypatch.context() as patch:
        patch.setattr(stored, "PARALLEL_FROM", size + 1)
        expected = run(params, gradients, segments=segments, **FLAGS[name])
    for numba_is_safe in (True, False):
        monkeypatch.setattr(threads, "numba_is_safe", lambda safe=numba_is_safe: safe)
        for count in sorted({n for n in (1, 2, all_threads) if n <= all_threads}):
            numba.set_num_threads(count)
            assert_same(run(params, gradients, segments=segments, **FLAGS[name]), expected)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_any_number_of_shares(rng, monkeypatch, count):
    """More of them than threads, with little in each."""
    params, gradients = problem(rng, 9000)
    expected = run(params, gradients, segments=SEGMENTS, state_dtype="8bit")
    monkeypatch.setattr(threads, "shares", lambda *_: (True, count))
    assert_same(run(params, gradients, segments=SEGMENTS, state_dtype="8bit"), expected)


@pytest.mark.parametrize("name", FLAGS)
def test_any_split_between_blocks(rng, name):
    params, gradients = problem(rng, 1000)
    expected = run(params, gradients, **FLAGS[name])
    for cuts in ([128], [512], [128, 256, 896]):
        assert_same(run(params, gradients, cuts, **FLAGS[name]), expected)


def test_a_split_inside_of_a_block_shows(rng):
    """Where it does not leave blocks whole, they get scales of their own: other numbers, as good."""
    params, gradients = problem(rng, 1000)
    whole, split = (run(params, gradients, cuts, state_dtype="8bit") for cuts in ([], [100]))
    assert (whole[0] != split[0]).any()
    np.testing.assert_allclose(split[0], whole[0], atol=0.03)


@pytest.mark.parametrize("name", FLAGS)
def test_segments_like_the_rest_change_nothing(rng, name):
    params, gradients = problem(rng, 1000)
    gradients[1][[60, 300, 990]] = np.nan, 1e30, -np.inf
    expected = run(params, gradients, **FLAGS[name])
    for segments in (
        [Segment(17, 300), Segment(300, 301), Segment(900, 1000)],
        [Segment(0, 128), Segment(128, 256), Segment(500, 600)],
        [Segment(k, k + 1) for k in range(100, 300, 3)],
        [Segment(0, 1000)],
    ):
        assert_same(run(params, gradients, segments=segments, **FLAGS[name]), expected)


# --- Behind the first four billion elements -----------------------------------------------------------------


@pytest.mark.parametrize("numba_is_safe", [True, False])
@pytest.mark.parametrize("before", [256, 300, 17])
def test_where_the_upper_half_of_the_index_changes(rng, before, numba_is_safe, monkeypatch):
    """Between blocks and inside of one."""
    monkeypatch.setattr(threads, "numba_is_safe", lambda: numba_is_safe)
    params, gradients = problem(rng, 700)
    flags = {"lr": 0.1, "state_dtype": "8bit", "offset": 2**32 - before}
    for segments in ((), [Segment(280, 320, lr=0.3), Segment(5, 30, frozen=True)]):
        expected, found = literal_blocks(params, **flags), params.copy()
        opt = FusedAdam(**flags)
        for step, unit in enumerate(gradients):
            grads = unit * np.float32(1 + 4 * step)  # scales grow: what is frozen is written again
            if step == 2:
                opt.segments, expected.parts = segments, slices(segments, 700)
            opt.step(found, grads)
            expected.step(grads)
            expected.assert_same(opt, found, assert_same_bits, step)


# --- How units are cut --------------------------------------------------------------------------------------


@given(
    st.integers(1, 1500),
    st.lists(st.integers(0, 1500), max_size=12, unique=True),
    st.integers(1, 9),
    st.lists(st.integers(1, 1499), max_size=3),
    st.randoms(use_true_random=False),
)
def test_groups(size, edges, count, places, random):
    """Each element is in one group, each block in the groups of one share, parts of a block in one group."""
    edges = sorted({0, size, *(edge for edge in edges if edge < size)})
    units = [(a, b, k) for k, (a, b) in enumerate(pairwise(edges)) if random.random() < 0.7] or [(0, size, 9)]
    places = tuple(sorted(place for place in set(places) if place < size))
    cuts = groups.Cuts(Units(np.array(units, np.int64)), size)
    pieces, first_piece, first_group = cuts.groups(count, places, in_blocks=True)
    assert first_group[0] == 0
    assert first_piece[0] == 0
    assert (np.diff(first_group) > 0).all()
    assert (np.diff(first_piece) > 0).all()
    assert first_group.size <= count + 1
    assert (first_piece[-1], first_group[-1]) == (len(pieces), first_piece.size - 1)
    assert (pieces[1:, 0] >= pieces[:-1, 1]).all()
    rows, wanted = np.full(size, -2), np.full(size, -2)
    for start, stop, row in pieces:
        assert start < stop
        rows[start:stop] = row
        assert not any(start < place < stop for place in places)
    for start, stop, row in units:
        wanted[start:stop] = row
    stepped = np.unique(np.flatnonzero(wanted >= 0) // 128)
    kept = (wanted == -2) & np.isin(np.arange(size) // 128, stepped)
    wanted[kept] = groups.KEPT  # beside what is stepped in a block
    np.testing.assert_array_equal(rows, wanted)
    share_of_block = {}
    for share, (a, b) in enumerate(pairwise(first_group)):
        for group in range(a, b):
            mine = pieces[first_piece[group] : first_piece[group + 1]]
            start, stop = mine[0, 0], mine[-1, 1]
            if len(mine) > 1:
                assert start // 128 == (stop - 1) // 128
                assert (mine[1:, 0] == mine[:-1, 1]).all()
            assert start % 128 == 0
            assert stop % 128 == 0 or stop == size
            for block in range(start // 128, (stop - 1) // 128 + 1):
                assert share_of_block.setdefault(block, (share, group)) == (share, group)
    assert cuts.groups(count, places, in_blocks=True).pieces is pieces  # kept


# --- What is frozen -----------------------------------------------------------------------------------------


def test_frozen_parts_stay(rng):
    """Parameters and codes do not change while scale and coarseness do not; when these do, they follow."""
    size, frozen = 256, slice(30, 200)
    params = rng.standard_normal(size).astype(np.float32)
    opt = FusedAdam(0.01, betas=(0.9, 0.99), state_dtype="8bit")
    for _ in range(50):
        opt.step(params, rng.standard_normal(size).astype(np.float32))
    opt.segments = [Segment(frozen.start, frozen.stop, frozen=True)]
    before, moments = params.copy(), (opt.state.exp_avg, opt.state.exp_avg_sq)

    def shrunken(steps):  # smaller gradients: scales stay those of what is frozen
        for _ in range(steps):
            opt.step(params, rng.choice(np.array([-0.01, 0.01], np.float32), size))

    shrunken(1000)  # mantissas become coarser: second moments are rounded to those, once
    memory = [array.copy() for array in memory_of(opt)]
    assert ((memory[3] & 3) > 0).all()
    assert_same_bits(opt.state.exp_avg[frozen], moments[0][frozen])
    error = np.abs(opt.state.exp_avg_sq[frozen] - moments[1][frozen])
    assert (error <= moments[1][frozen] / 4).all()  # finer before coarser: 1/32, 1/16 and 1/8
    shrunken(1000)
    for k, (found, old) in enumerate(zip(memory_of(opt), memory, strict=True)):
        part = frozen if k < 2 else slice(None)
        assert_same_bits(found[part], old[part], str(k))
    for _ in range(20):  # larger ones: scales grow
        opt.step(params, rng.standard_normal(size).astype(np.float32) * np.float32(5))
    assert (memory_of(opt)[3] > memory[3]).all()
    assert_same_bits(params[frozen], before[frozen])
    assert (params[:30] != before[:30]).all()
    # Rounded at random when a scale has grown: 20 times, each by a step of codes at most.
    for found, old in zip((opt.state.exp_avg, opt.state.exp_avg_sq), moments, strict=True):
        error = np.abs(found[frozen] - old[frozen])
        assert (error <= 20 * (np.abs(old[frozen]) / 8 + 2.0**-16)).all()
        assert abs(np.abs(found[frozen]).mean() / np.abs(old[frozen]).mean() - 1) < 0.05


@pytest.mark.parametrize("factor", [1.05, 3.0])
def test_a_frozen_part_is_written_again_when_its_scale_grows(rng, factor):
    """Once, so it is a step of codes off at most."""
    params, grads = np.zeros(128, np.float32), rng.uniform(0.5, 1, 128).astype(np.float32)
    opt = FusedAdam(0.01, state_dtype="8bit", betas=(0.5, 0.6))
    for _ in range(10):
        opt.step(params, grads)
    opt.segments = [Segment(0, 127, frozen=True)]
    old = opt.state.exp_avg[:127], opt.state.exp_avg_sq[:127]
    scales = [scale.copy() for scale in opt.state._scales]
    grads[127] = 2 * factor
    opt.step(params, grads)
    assert all((new > scale).all() for new, scale in zip(opt.state._scales, scales, strict=True))
    for found, expected in zip((opt.state.exp_avg, opt.state.exp_avg_sq), old, strict=True):
        assert (np.abs(found[:127] - expected) <= expected / 8 * (1 + 1e-6) + 1e-6).all()


def test_all_frozen_is_no_step_of_anything(rng):
    params, gradients = problem(rng, 300)
    opt = FusedAdam(state_dtype="8bit")
    opt.step(params, gradients[0])
    before = [params.copy(), *(array.copy() for array in memory_of(opt))]
    opt.segments = [Segment(0, 300, frozen=True)]
    opt.step(params, gradients[1])
    assert_same([params, *memory_of(opt)], before)


def test_bfloat16_parameters_split_too(rng):
    params, gradients = problem(rng, 512)
    params = params.astype(ml_dtypes.bfloat16)
    flags = {"state_dtype": "8bit", "master_params": "split"}
    whole, split = (run(params, gradients, cuts, **flags) for cuts in ([], [128, 384]))
    assert_same([split[0].view(np.uint16), *split[1:]], [whole[0].view(np.uint16), *whole[1:]])
