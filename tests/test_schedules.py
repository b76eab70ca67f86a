"""Schedules: against exact arithmetic, at their ends, composed, pickled."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastadam import schedules
from fastadam.schedules import (
    chain,
    constant,
    cosine,
    exponential,
    inverse_sqrt,
    inverse_time,
    linear,
    linear_warmup,
    piecewise,
)

LAST = 2**53 - 1
"""The last step that there is."""
STEPS = 240
EPS = float(np.finfo(np.float64).eps)

SCHEDULES = [
    constant(1e-3),
    linear_warmup(1e-3, 50),
    linear_warmup(cosine(1e-3, 150, 1e-5), 50),
    cosine(1e-3, 200, 1e-4),
    cosine(1e-4, 200, 1e-3),
    linear(1e-3, 200, 1e-4),
    linear(1e-4, 200, 1e-3),
    exponential(1e-3, 0.97),
    exponential(1e-3, 0.5, 50),
    exponential(1e-3, 0.5, 50, staircase=True),
    inverse_time(1e-3, 0.02),
    inverse_sqrt(1e-3, 50),
    inverse_sqrt(1e-3, 50, warmup=False),
    piecewise([1e-3, 3e-4, 1e-4], [100, 180]),
    chain([constant(1e-3), cosine(1e-3, 80), 1e-5], [60, 140]),
]


def rates(schedule, steps=STEPS):
    return [schedule(step) for step in range(1, steps + 1)]


# --- Against exact arithmetic -------------------------------------------------------------------------------


def exact_linear(lr, final_lr, steps, step):
    return Fraction(lr) + (Fraction(final_lr) - Fraction(lr)) * min(Fraction(step - 1, steps), 1)


EXACT = {
    "linear": (linear(1e-3, 200, 1e-4), lambda t: exact_linear(1e-3, 1e-4, 200, t)),
    "linear-to-0": (linear(1e-3, 200), lambda t: exact_linear(1e-3, 0, 200, t)),
    "exponential": (exponential(1e-3, 0.97), lambda t: Fraction(1e-3) * Fraction(0.97) ** (t - 1)),
    "staircase": (
        exponential(1e-3, 0.7, 9, staircase=True),
        lambda t: Fraction(1e-3) * Fraction(0.7) ** ((t - 1) // 9),
    ),
    "inverse_time": (inverse_time(1e-3, 0.02), lambda t: Fraction(1e-3) / (1 + Fraction(0.02) * (t - 1))),
    "linear_warmup": (linear_warmup(1e-3, 49), lambda t: Fraction(1e-3) * min(Fraction(t, 49), 1)),
}


@pytest.mark.parametrize("case", EXACT)
def test_is_exact_to_a_few_roundings(case):
    schedule, exact = EXACT[case]
    for step in (*range(1, STEPS), 10**4):
        expected = exact(step)
        # Difference, share, product, sum: at most three and a half of them count, half an ulp each.
        assert abs(Fraction(schedule(step)) - expected) <= Fraction(2 * EPS) * expected


def test_powers_are_correctly_rounded():
    schedule = exponential(1.0, 0.9997)
    assert [schedule(step) for step in range(1, 20_000, 97)] == [
        float(Fraction(0.9997) ** (step - 1)) for step in range(1, 20_000, 97)
    ]


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("rate", [0.5, 0.97, 1.0])
def test_powers_with_a_fractional_exponent(rate, steps):
    schedule = exponential(1.0, rate, steps)
    for step in range(1, STEPS + 1):
        expected = Fraction(rate) ** (step - 1)
        # Two powers, their product, the exponent (below 1) rounded: two eps, raised to the power `steps`.
        assert abs(Fraction(schedule(step)) ** steps - expected) <= Fraction(2 * EPS * steps) * expected


def test_cosine_keeps_all_digits_near_its_end():
    steps = 10**6
    schedule = cosine(1.0, steps)
    for left in (1, 2, 3, 10):
        x = math.pi / 2 * left / steps
        assert schedule(steps + 1 - left) == pytest.approx(x**2 * (1 - x**2 / 3), rel=8 * EPS)


def test_inverse_sqrt_is_the_transformers():
    schedule = inverse_sqrt((512 * 4000) ** -0.5, 4000)
    for step in (1, 2, 3999, 4000, 4001, 10**5):
        assert schedule(step) == pytest.approx(512**-0.5 * min(step**-0.5, step * 4000**-1.5), rel=8 * EPS)


# --- Ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [linear, cosine])
@pytest.mark.parametrize("steps", [1, 2, 3, 1000, LAST - 1])
@pytest.mark.parametrize(("lr", "final_lr"), [(1e-3, 0.0), (1e-3, 7e-5), (0.1, 0.3), (0.3, 0.3), (0.0, 0.0)])
def test_ends_are_exact(make, steps, lr, final_lr):
    schedule = make(lr, steps, final_lr)
    assert schedule(1) == lr
    for step in {steps + 1, min(steps + 2, LAST), LAST}:
        assert schedule(step) == final_lr
    if steps > 1 and lr > final_lr == 0:
        assert schedule(steps) > 0


def test_no_rounding_leads_beyond_the_first_rate(rng):
    for lr, final_lr in rng.random((2000, 2)).tolist():
        schedule = linear(lr, LAST - 1, final_lr)
        first, *more = (schedule(step) for step in (1, 2, 3))
        assert first == lr
        assert all(rate <= lr if lr > final_lr else rate >= lr for rate in more)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_float_in_range_at_every_step(schedule):
    for step in (*range(1, STEPS), 2**31, 2**32 + 1, 2**52, LAST):
        lr = schedule(step)
        assert type(lr) is float
        assert 0 <= lr <= 1e-3
        assert schedule(np.int64(step)) == lr


def test_decays_never_end_in_anything_but_zero():
    assert exponential(1e-3, 0.97)(LAST) == 0.0
    assert exponential(1e-3, 0.5, 7)(LAST) == 0.0
    assert 0 < inverse_time(1e-3, 0.02)(LAST) < 1e-16
    assert 0 < inverse_sqrt(1e-3, 50)(LAST) < 1e-9
    assert exponential(1e-3, 1.0)(LAST) == 1e-3
    assert inverse_time(1e-3, 1e300)(LAST) == 0.0


def test_boundaries():
    assert rates(piecewise([3, 2, 1], [2, 4]), 6) == [3, 3, 2, 2, 1, 1]
    assert rates(chain([3, 2, 1], [2, 4]), 6) == [3, 3, 2, 2, 1, 1]
    assert rates(piecewise([3], []), 2) == [3, 3]
    assert rates(linear_warmup(1.0, 1), 2) == [1, 1]
    assert rates(inverse_sqrt(1.0, 1), 4) == [1, math.sqrt(1 / 2), math.sqrt(1 / 3), 0.5]
    assert rates(inverse_sqrt(1.0, 2, warmup=False), 3) == [1, 1, math.sqrt(2 / 3)]
    assert rates(exponential(1.0, 0.5, 2, staircase=True), 5) == [1, 1, 0.5, 0.5, 0.25]


# --- Properties ---------------------------------------------------------------------------------------------

LRS = st.floats(0, 1e6)
COUNTS = st.integers(1, 10**6) | st.integers(1, LAST)


@pytest.mark.parametrize("make", [linear, cosine])
@given(lr=LRS, final_lr=LRS, steps=COUNTS, data=st.data())
def test_stays_between_its_ends_and_never_turns(make, lr, final_lr, steps, data):
    schedule = make(lr, steps, final_lr)
    step = data.draw(st.integers(1, min(steps + 1, LAST - 1)))
    here, there = schedule(step), schedule(step + 1)
    assert min(lr, final_lr) <= here <= max(lr, final_lr)
    # The C library's sine may turn by its last bit: no more than the squared one's two.
    slack = 0.0 if make is linear else 2 * EPS * max(lr, final_lr)
    assert there <= here + slack if lr >= final_lr else there >= here - slack


@given(lr=LRS, rate=st.floats(0.01, 1), decay=st.floats(0, 1e3), steps=COUNTS, step=st.integers(1, 10**5))
def test_endless_decays_never_rise(lr, rate, decay, steps, step):
    for schedule in (
        exponential(lr, rate),
        exponential(lr, rate, steps, staircase=True),
        inverse_time(lr, decay),
        inverse_sqrt(lr, steps, warmup=False),
    ):
        assert 0 <= schedule(step + 1) <= schedule(step) <= lr


@given(lr=st.floats(1e-6, 1e6), steps=st.integers(1, 10**5), length=st.integers(1, 10**5))
def test_warmup_joins_what_follows(lr, steps, length):
    then = cosine(lr, length)
    schedule = linear_warmup(then, steps)
    assert schedule(1) == lr * (1 / steps)
    assert schedule(steps) == schedule(steps + 1) == lr
    assert schedule(steps + length) == then(length)
    assert schedule(steps + length + 1) == 0


@given(st.lists(st.tuples(LRS, st.integers(1, 50)), min_size=1, max_size=6))
def test_chain_is_its_parts_one_after_the_other(parts):
    lengths = [length for _, length in parts]
    each = [cosine(lr, length) for lr, length in parts]
    schedule = chain(each, list(itertools.accumulate(lengths))[:-1])
    expected = [rate for part, length in zip(each, lengths, strict=True) for rate in rates(part, length)]
    assert rates(schedule, sum(lengths)) == expected
    constants = piecewise([lr for lr, _ in parts], list(itertools.accumulate(lengths))[:-1])
    assert rates(constants, sum(lengths)) == [lr for lr, length in parts for _ in range(length)]


def test_any_function_composes():
    asked = []

    def own(step):
        asked.append(step)
        return 0.5**step

    assert rates(chain([1.0, own], [2]), 4) == [1.0, 1.0, 0.5, 0.25]
    assert asked == [1, 2]
    assert all(type(step) is int for step in asked)
    assert rates(linear_warmup(own, 2), 4) == [0.25, 0.5, 0.5, 0.25]


def test_chains_nest():
    inner = linear_warmup(linear(1.0, 4), 2)
    assert rates(chain([inner, inner], [6]), 12) == rates(inner, 6) * 2


# --- Values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_repr_pickle_and_copy_are_the_same_call(schedule):
    names = {name: getattr(schedules, name) for name in schedules.__all__}
    for twin in (
        eval(repr(schedule), names),
        *(pickle.loads(pickle.dumps(schedule, protocol)) for protocol in range(2, 6)),
        copy.copy(schedule),
        copy.deepcopy(schedule),
    ):
        assert twin == schedule
        assert hash(twin) == hash(schedule)
        assert rates(twin) == rates(schedule)


def test_different_calls_are_unequal():
    assert len(set(SCHEDULES)) == len(SCHEDULES)
    assert cosine(1e-3, 100) != cosine(1e-3, 101)
    assert cosine(1e-3, 100) != linear(1e-3, 100)
    assert cosine(1e-3, 100) == cosine(np.float64(1e-3), np.int64(100), 0)
    assert linear_warmup(1, 2) == linear_warmup(constant(1.0), 2)


def test_repr():
    assert repr(SCHEDULES[2]) == "linear_warmup(lr=cosine(lr=0.001, steps=150, final_lr=1e-05), steps=50)"
    assert repr(cosine(np.float32(0.5), np.int8(3))) == "cosine(lr=0.5, steps=3, final_lr=0.0)"
    assert repr(piecewise([1, 2], [3])) == "piecewise(values=(1.0, 2.0), boundaries=(3,))"


def test_is_frozen_and_keeps_no_list():
    with pytest.raises(dataclasses.FrozenInstanceError):
        constant(1.0).arguments = ()
    values, boundaries = [1.0, 2.0], [3]
    schedule = piecewise(values, boundaries)
    values[0], boundaries[0] = 5.0, 1
    assert rates(schedule, 4) == [1.0, 1.0, 1.0, 2.0]
