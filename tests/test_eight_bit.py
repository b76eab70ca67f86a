"""Steps of moments in 8 bits: the bits of the NumPy reference, whatever else is asked for and comes in."""

from __future__ import annotations

import numpy as np
import pytest
from block_cases import BLOCK_CASES, FACTORS
from eight_bit_steps import DTYPES, literal_blocks
from storage_cases import case_id, encoded, options
from tolerances import assert_same_bits

from fastadam import FusedAdam, Segment

N = 300

SEGMENTS = [
    Segment(5, 40, lr=0.03),
    Segment(40, 100, betas=(0.3, 0.9), weight_decay=0.2),
    Segment(120, 140, frozen=True),
    Segment(250, 251, lr=0.5, eps=1e-3, betas=(0.95, 0.99)),
]


def gradients(rng, size, spread, zeros=7):
    """Return gradients of magnitudes that are 2**(-spread) to 2**spread, some of them zero."""
    grads = rng.standard_normal(size) * np.exp2(rng.integers(-spread, spread + 1, size))
    grads[rng.integers(zeros) :: zeros] = 0
    return grads.astype(np.float32)


@pytest.mark.parametrize("case", BLOCK_CASES, ids=case_id)
def test_a_step_has_the_bits_of_the_reference(rng, case):
    segments = SEGMENTS if case["segments"] else ()
    opt = FusedAdam(0.01, segments=segments, **options(case))
    params = encoded(rng.standard_normal(N), case["params"])
    expected = literal_blocks(params, segments, lr=0.01, **options(case))
    out = None if case["out"] is None else np.full(N, 7, DTYPES[case["out"]])
    for step in range(30):
        given = encoded(gradients(rng, N, 2) * (case["grad_scale"] or 1), case["grads"])
        grads = given.copy()
        opt.step(params, grads, grad_scale=case["grad_scale"], out=out)
        expected.step(given, grad_scale=case["grad_scale"], clip_factor=opt.last_step.clip_factor)
        if case["master_params"] == "split":  # ties away from zero: another half, the same sum
            high = params.view(np.int16).astype(np.int64) << 16
            exact = (high + opt.state.param_remainder).astype(np.uint32).view(np.float32)
            assert_same_bits(exact, expected.exact, f"exact {step}")
            expected.params = params
        expected.assert_same(opt, params, assert_same_bits, step)
        is_stepped = np.ones(N, bool)
        for segment in segments:
            is_stepped[segment.start : segment.stop] = not segment.frozen
        if out is not None:
            copy = np.where(is_stepped, encoded(expected.new, case["out"]), DTYPES[case["out"]](7))
            assert_same_bits(out, copy, f"out {step}")
        left = np.where(is_stepped & case["zero_grads"], np.zeros_like(given), given)
        assert_same_bits(grads.astype(np.float32), left.astype(np.float32), f"grads {step}")


def test_cases_have_every_level():
    for name, levels in FACTORS.items():
        assert {str(case[name]) for case in BLOCK_CASES} == set(map(str, levels))


def assert_follows(rng, make_gradients, size=N, steps=200, segments=(), **flags):
    """Step and compare; return the optimizer."""
    flags = {"lr": 0.01, "state_dtype": "8bit", **flags}
    params = rng.standard_normal(size).astype(np.float32)
    opt = FusedAdam(segments=segments, **flags)
    expected = literal_blocks(params, segments, **flags)
    for step in range(steps):
        grads = make_gradients(step)
        opt.step(params, grads)
        expected.step(grads)
        expected.assert_same(opt, params, assert_same_bits, step)
    return opt


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 255, 256, 257, 640, 1000])
def test_sizes(rng, size):
    assert_follows(rng, lambda _: gradients(rng, size, 3), size, steps=40)


@pytest.mark.parametrize("how", ["stochastic", "nearest"])
@pytest.mark.parametrize("spread", [0, 1, 2, 30])
def test_spread_of_gradients(rng, spread, how):
    scales = np.exp2(rng.integers(-spread, spread + 1, N).astype(np.float32))
    opt = assert_follows(rng, lambda _: gradients(rng, N, 0, zeros=1000) * scales, rounding=how)
    coarseness = opt.state._scales[1].view(np.uint32) & 3
    assert coarseness.max() == {0: 0, 1: 1, 2: 2, 30: 3}[spread]


def test_subnormal_gradients(rng):
    scales = np.exp2(rng.integers(-149, -100, N).astype(np.float32))
    opt = assert_follows(rng, lambda _: gradients(rng, N, 1) * scales, eps=1e-30)
    assert np.isfinite(opt.state.exp_avg).all()
    assert_follows(rng, lambda _: gradients(rng, N, 1) * np.float32(1e-21), eps=1e-30)


SPOILED = [np.nan, np.inf, -np.inf, 1e30, -1e38, 3.4e38, 1.9e19, np.uint32(0xFFFFFFFF).view(np.float32)]


@pytest.mark.parametrize("spoiled", SPOILED, ids=str)
@pytest.mark.parametrize("state_dtype", ["8bit", ("8bit", "float32"), ("float32", "8bit")])
def test_what_is_not_finite_stays_in_its_element(rng, state_dtype, spoiled):
    places = {0: 3, 50: 200, 100: 201, 101: 299}

    def make(step):
        grads = gradients(rng, N, 2, zeros=20)
        if step in places:
            grads[places[step]] = spoiled
        return grads

    opt = assert_follows(rng, make, steps=150, state_dtype=state_dtype)
    others = np.setdiff1d(np.arange(N), [*places.values()])
    assert np.isfinite(opt.state.exp_avg[others]).all()
    assert np.isfinite(opt.state.exp_avg_sq[others]).all()
    lost = ~np.isfinite(opt.state.exp_avg_sq[[*places.values()]])
    assert lost.all()  # as in float32: the square of each overflows
    if state_dtype == "8bit":
        # Block 0 and the others; a flag stays while something in its block is lost.
        assert np.signbit(opt.state._scales[1]).tolist() == [True, True, True]


def test_a_block_comes_back_from_large_gradients(rng):
    """A scale near the largest, whose elements reach beyond what it can say, and a way down again."""

    largest = np.nextafter(np.float32(2.0**64), np.float32(0))  # of which the square is finite

    def make(step):
        signs = rng.choice(np.array([-1, 1], np.float32), N)
        return signs * (largest if step < 60 else np.float32(1e-3))

    opt = assert_follows(rng, make, betas=(0.5, 0.6), steps=60)
    assert (opt.state._scales[1].view(np.uint32) & ~np.uint32(3) == 0x7F088888).all()
    opt = assert_follows(rng, make, betas=(0.5, 0.6), steps=400)
    assert np.isfinite(opt.state.exp_avg_sq).all()
    assert (opt.state.exp_avg_sq < 1e-5).all()
    assert not np.signbit(opt.state._scales[1]).any()


BETAS = [
    (0.0, 0.0),
    (0.1, 0.3),
    (0.4, 0.999),
    (0.9, 0.45),
    (0.5, 0.5),
    (0.999, 0.9),
    (1 - 2**-18, 1 - 2**-18),
]


@pytest.mark.parametrize("betas", BETAS, ids=str)
def test_betas(rng, betas):
    opt = assert_follows(rng, lambda _: gradients(rng, N, 3), betas=betas)
    assert np.isfinite(opt.state.exp_avg).all()


# --- Segments -----------------------------------------------------------------------------------------------


def test_segments_inside_of_blocks(rng):
    segments = [*SEGMENTS, Segment(251, 260, frozen=True), Segment(280, 300, lr=0.1)]
    assert_follows(rng, lambda _: gradients(rng, N, 4), segments=segments, weight_decay=0.1)


def test_segments_and_what_is_not_finite(rng):
    """In a frozen part, beside one, and with the largest codes in it, which mean something else then."""

    def make(step):
        grads = gradients(rng, N, 1)
        if step == 30:
            grads[[10, 130, 260]] = np.nan, np.inf, 1e30
        return grads

    assert_follows(rng, make, steps=80, segments=SEGMENTS)


def test_segments_that_change(rng):
    """Parts that freeze, with all of their moments, and thaw; a block of which a part is lost meanwhile."""
    params = rng.standard_normal(N).astype(np.float32)
    flags = {"lr": 0.01, "state_dtype": "8bit", "amsgrad": True}
    opt, expected = FusedAdam(**flags), literal_blocks(params, **flags)
    choices = [
        (),
        SEGMENTS,
        (Segment(0, 100, frozen=True),),
        (Segment(0, 128, frozen=True), Segment(200, 300, frozen=True)),
        (Segment(1, 300, frozen=True),),
        (Segment(0, 300, frozen=True),),
    ]
    from segment_steps import slices

    for step in range(240):
        if step % 5 == 0:
            segments = choices[int(rng.integers(len(choices)))] if step else ()
            opt.segments, expected.parts = segments, slices(segments, N)
        grads = gradients(rng, N, 1) * np.float32(2.0 ** rng.integers(-6, 7))
        if step == 121:
            grads[[40, 299]] = np.inf, np.nan
        opt.step(params, grads)
        expected.step(grads)
        expected.assert_same(opt, params, assert_same_bits, step)


def test_largest_codes_of_a_frozen_part_stay_numbers(rng):
    """The other part is lost: codes that were the largest numbers would mean inf and NaN beside it."""
    params, grads = np.zeros(128, np.float32), np.ones(128, np.float32)
    opt = FusedAdam(0.01, state_dtype="8bit", rounding="nearest")
    opt.step(params, grads)
    before = opt.state.exp_avg.copy(), opt.state.exp_avg_sq.copy()
    assert (opt.state._views[0] == 127).all()
    assert (opt.state._views[1] == 255).all()
    opt.segments = [Segment(0, 64, frozen=True)]
    grads[100] = np.nan
    opt.step(params, grads * np.float32(0.01))
    for moment, old in zip((opt.state.exp_avg, opt.state.exp_avg_sq), before, strict=True):
        assert not np.isfinite(moment[100])
        # One code lower at most, an eighth or a sixteenth.
        np.testing.assert_allclose(moment[:64], old[:64], rtol=1 / 8)
        assert np.isfinite(np.delete(moment, 100)).all()
