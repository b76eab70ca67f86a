"""What NumPy makes of moments that come from elsewhere: the codes of kernels, within derived bounds."""

from __future__ import annotations

import numpy as np
import pytest
from eight_bit_kernels import encode
from hypothesis import given
from hypothesis import strategies as st
from test_eight_bit_codes import EPS32, FIRST, FORMATS, LARGEST, U
from tolerances import assert_same_bits

from fastadam import eight_bit
from fastadam.kernels import bounds


def deviation(codes, scales, values):
    """Return errors of finite numbers over their bounds, those of a rounding to the nearest."""
    words = np.repeat(scales.view(U), 128)[: values.size]
    with np.errstate(all="ignore"):
        errors = np.abs(eight_bit.decode(codes, scales).astype(np.float64) - values)
    if codes.dtype == FIRST:
        scale = (words & U(0x7FFFFFFF)).view(np.float32).astype(np.float64)
        within = (np.abs(values) + 2.0**-15 * scale) / 16
    else:
        scale = (words & U(0x7FFFFFFC)).view(np.float32).astype(np.float64)
        coarse = (words & U(3)).astype(np.float64)
        floor = 2.0 ** (1 - 4 * 2.0**coarse) * (1 + 2.0 ** (coarse - 6)) * scale
        within = np.maximum(np.abs(values) * 2.0 ** (coarse - 7), np.where(values > 0, floor, 0))
    return errors, within * (1 + 4 * EPS32) + 2.0**-149


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("spread", [0, 1, 3, 12, 60])
def test_numpy_encodes_as_kernels_do(rng, kind, spread):
    values = rng.standard_normal(128 * 50 + 17) * np.exp2(rng.uniform(-spread, spread, 128 * 50 + 17))
    values[::9] = 0
    values = values.astype(np.float32) if kind == "first" else np.abs(values).astype(np.float32)
    codes, scales = eight_bit.encode(values, FORMATS[kind])
    assert eight_bit.is_possible(codes, scales)
    for k, word in enumerate(scales.view(U)):
        block = slice(128 * k, 128 * (k + 1))
        assert_same_bits(encode(values[block], FORMATS[kind], word), codes[block])
    errors, within = deviation(codes, scales, values)
    assert (errors <= within).all()
    assert ((codes == 0) == (values == 0)).all() or kind == "first"


def test_constants_are_alike():
    for name, theirs in (("_LEAST", bounds._LEAST), ("_LARGEST", bounds._LARGEST), ("_UP", bounds._UP)):
        assert getattr(eight_bit, name) == theirs
    assert np.float32(bounds._PER_PEAK) == eight_bit._PER_PEAK
    assert np.float32(bounds._PER_SQUARE) == eight_bit._PER_SQUARE


@pytest.mark.parametrize("kind", FORMATS)
def test_numpy_encodes_what_is_not_finite(rng, kind):
    values = np.abs(rng.standard_normal(300)).astype(np.float32)
    values[[3, 130]] = np.nan, np.inf
    values[[4, 131, 260]] = 3.4e38
    codes, scales = eight_bit.encode(values, FORMATS[kind])
    assert eight_bit.is_possible(codes, scales)
    assert np.signbit(scales).tolist() == [True, True, False]
    found = eight_bit.decode(codes, scales)
    lost = ~np.isfinite(values)
    assert (np.isnan(found[lost]) if kind == "first" else np.isinf(found[lost])).all()
    assert np.isfinite(found[~lost]).all()
    large = values == np.float32(3.4e38)
    assert (found[large] >= 3.1e38).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_and_zeros(kind):
    for size in (0, 1, 128, 129):
        codes, scales = eight_bit.encode(np.zeros(size, np.float32), FORMATS[kind])
        assert (codes.size, scales.size) == (size, eight_bit.blocks_of(size))
        assert not codes.any()
        assert not scales.any()
        assert eight_bit.is_possible(codes, scales)


@given(
    st.lists(st.floats(0, 3.4028234663852886e38, width=32, allow_subnormal=True), min_size=1, max_size=200),
    st.sampled_from(["first", "second"]),
)
def test_any_numbers(values, kind):
    values = np.array(values, np.float32)
    if kind == "first":
        values[::2] *= -1
    codes, scales = eight_bit.encode(values, FORMATS[kind])
    assert eight_bit.is_possible(codes, scales)
    errors, within = deviation(codes, scales, values)
    assert (errors <= within).all()
    for k, word in enumerate(scales.view(U)):
        block = slice(128 * k, 128 * (k + 1))
        if word:
            assert_same_bits(encode(values[block], FORMATS[kind], word), codes[block])
    if kind == "second":
        assert ((codes == 0) == (values == 0)).all()


IMPOSSIBLE = {
    "nan": ("first", 0x7FC00000, 0),
    "inf": ("first", 0x7F800000, 0),
    "too-large": ("first", LARGEST + 4, 0),
    "flagged-too-large": ("second", 0xFF7FFFFF, 0),
    "flagged-too-fine": ("second", 0xBF800002, 0),
    "code-6-bits": ("second", 0x3F800000, 249),
    "code-5-bits": ("second", 0x3F800001, 253),
    "code-4-bits": ("second", 0x3F800002, 255),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_is_no_moment(name):
    kind, word, code = IMPOSSIBLE[name]
    codes = np.zeros(130, FORMATS[kind])
    codes[129:] = np.uint8(code).view(FORMATS[kind])
    scales = np.array([0x3F800000, word], U).view(np.float32)
    assert not eight_bit.is_possible(codes, scales)
    if code:
        codes[129] -= 1
        assert eight_bit.is_possible(codes, scales)
        scales[1:] = np.array([0xBF800003], U).view(np.float32)
        codes[129] = 255  # inf
        assert eight_bit.is_possible(codes, scales)
    else:
        scales[1] = 1
        assert eight_bit.is_possible(codes, scales)
