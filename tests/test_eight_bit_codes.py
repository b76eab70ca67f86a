"""All 256 codes of both formats, and what lies between: kernels and NumPy have the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from eight_bit_kernels import decode, encode, scale_of
from eight_bit_steps import encode_first, encode_second
from tolerances import EPS, assert_same_bits

from fastadam import eight_bit
from fastadam.kernels import bits, bounds, compiling, draws, eight_bits, views

U = np.uint32
EPS32 = EPS[np.dtype(np.float32)]
FIRST, SECOND = np.dtype(np.int8), np.dtype(np.uint8)
FORMATS = {"first": FIRST, "second": SECOND}
ALL = np.arange(256, dtype=np.uint8)
LEAST, LARGEST = 0x00800000, 0x7F088888
SCALES = [LEAST, LEAST + 4, 0x1E3CE508, 0x33333334, 0x3F800000, 0x3F99999C, 0x5F000004, LARGEST - 4, LARGEST]
"""From 2**-126 to the largest."""
WORDS = {
    "first": [U(word) for word in SCALES],
    "second": [U(word | coarse) for word in SCALES for coarse in range(4)],
}
CASES = [(kind, word) for kind, words in WORDS.items() for word in words]
FLAG = U(0x80000000)


def case_id(value):
    return value if isinstance(value, str) else f"{int(value):#010x}"


def codes_of(kind):
    return ALL.view(FORMATS[kind])


def possible(kind, word):
    """Return the codes that numbers become: those up to 1.875, in order of magnitude, zero first."""
    if kind == "first":
        return np.arange(128, dtype=np.int8)
    return np.arange([249, 253, 255, 256][int(word & U(3))], dtype=np.uint8)


def blocks(codes, word):
    """Return codes and scales as a state has them, each code in a block with this scale."""
    return eight_bit.decode(codes, np.full(eight_bit.blocks_of(codes.size), word, U).view(np.float32))


def points(kind, word, rng):
    """Return numbers of a scale: those of codes, half way between two, beside each, and random ones."""
    numbers = decode(possible(kind, word), word).astype(np.float64)
    scale = float(scale_of(FORMATS[kind], word))
    halves = (numbers[1:] + numbers[:-1]) / 2
    within = scale * 1.87 * np.exp2(-rng.uniform(0, 40, 500))
    found = np.concatenate([numbers, halves, within]).astype(np.float32)
    top = np.float32(numbers.max())
    found = np.concatenate([found, np.nextafter(found, np.float32(0)), np.nextafter(found, top)])
    return np.concatenate([found, -found]) if kind == "first" else found


# --- Decoding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [U(0), FLAG], ids=["finite", "flagged"])
@pytest.mark.parametrize(("kind", "word"), [*CASES, ("first", U(0)), ("second", U(0))], ids=case_id)
def test_every_code_is_decoded(kind, word, flag):
    word, codes = word | flag, codes_of(kind)
    found = decode(codes, word)
    assert_same_bits(found, blocks(codes, word))
    largest = (codes & 127) == 127 if kind == "first" else codes == 255
    lost = largest & bool(flag)
    np.testing.assert_array_equal(np.isnan(found), lost & (kind == "first"))
    if kind == "first" or word & U(3) == 3:  # else the upper codes are of no moment
        np.testing.assert_array_equal(np.isinf(found), lost & (kind == "second"))
    if kind == "first":
        np.testing.assert_array_equal(np.signbit(found), codes < 0)
    assert not found[codes_of(kind) & 127 == 0].any() or kind == "second"
    assert found[0] == 0


@pytest.mark.parametrize(("kind", "word"), CASES, ids=case_id)
def test_decoding_is_in_order(kind, word):
    numbers = decode(possible(kind, word), word)
    assert numbers[0] == 0
    assert np.isfinite(numbers).all()
    gaps = np.diff(numbers.astype(np.float64))
    assert (gaps >= 0).all()
    if word > LEAST + 7:  # else the smallest are subnormal numbers, some of them the same
        assert (gaps > 0).all()
    top = float(scale_of(FORMATS[kind], word)) * (1.875 - (2**-15 if kind == "first" else 0))
    assert abs(numbers.max() - top) <= EPS32 * top


def test_steps_between_codes():
    """As the text of the format says."""
    one = U(0x3F800000)
    first = decode(np.arange(128, dtype=np.int8), one).astype(np.float64)
    assert first[1] == 2.0**-18
    np.testing.assert_array_equal(np.diff(first)[:8], 2.0**-18)
    steps = np.diff(first) / (first[1:] + 2.0**-15)
    assert steps.min() >= 1 / 16
    assert steps.max() <= 1 / 8
    for coarse, (places, octaves) in enumerate([(6, 4), (5, 8), (4, 16), (3, 32)]):
        word = one | U(coarse)
        second = decode(possible("second", word), word)[1:].astype(np.float64)
        assert (np.diff(second) / second[:-1]).max() <= 2.0**-places
        assert 2.0 ** (1 - octaves) <= second[0] <= 2.0 ** (1 - octaves) * (1 + 2.0**-places)


# --- Encoding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clamped", [False, True], ids=["finite", "clamped"])
@pytest.mark.parametrize(("kind", "word"), CASES, ids=case_id)
def test_kernels_encode_as_the_text_says(rng, kind, word, clamped):
    values = points(kind, word, rng)
    if clamped:
        more = np.array([np.inf, np.nan, 3.4e38, 1e30], np.float32)
        values = np.concatenate([values, more, -more] if kind == "first" else [values, more])
    literal = encode_first if kind == "first" else encode_second
    nearest = np.full(values.size, 1 << (19 if kind == "first" else 31), U)
    for random in (nearest, rng.integers(0, 2**32, values.size, dtype=U), ~nearest * U(0), ~(nearest * U(0))):
        with np.errstate(all="ignore"):
            expected = literal(values, word, random, clamped)
        assert_same_bits(encode(values, FORMATS[kind], word, random, clamped).view(np.uint8), expected)


def usual(kind, codes, numbers):
    """Return which codes mean zero or a normal number: others may mean the same."""
    return (np.abs(numbers) >= 2.0**-126) | ((codes & 127 if kind == "first" else codes) == 0)


@pytest.mark.parametrize(("kind", "word"), CASES, ids=case_id)
def test_what_codes_mean_is_encoded_to_them(kind, word):
    codes = codes_of(kind)
    codes = codes[codes <= possible(kind, word)[-1]]
    numbers = decode(codes, word)
    found, same = encode(numbers, FORMATS[kind], word), usual(kind, codes, numbers)
    assert_same_bits(found[same], codes[same])


@pytest.mark.parametrize(("kind", "word"), CASES, ids=case_id)
def test_flagged_codes_are_encoded_to_themselves(kind, word):
    if kind == "second" and word & U(3) != 3:
        return  # no such block is flagged
    codes = codes_of(kind)
    numbers = decode(codes, word | FLAG)
    found, same = encode(numbers, FORMATS[kind], word, clamped=True), usual(kind, codes, numbers)
    same |= ~np.isfinite(numbers)
    assert_same_bits(found[same], codes[same])


@pytest.mark.parametrize(("kind", "word"), CASES, ids=case_id)
def test_expected_value_is_the_number(rng, kind, word):
    """Over all random bits, so exact but for the roundings of ``x * (1 / scale)``, and of its offset."""
    scale = float(scale_of(FORMATS[kind], word))
    if scale < 1e-30 or scale > 1e30:
        return  # the mean of what is not normal tells less
    places = 20 if kind == "first" else 17 + int(word & U(3))
    random = np.arange(2**places, dtype=U) << U(0 if kind == "first" else 32 - places)
    floor = decode(possible(kind, word)[1:2], word)[0] / scale
    for x in np.float32(scale * np.exp2(rng.uniform(np.log2(max(floor, 2.0**-20)), 0.9, 5))):
        codes = encode(np.full(random.size, x), FORMATS[kind], word, random)
        used, counts = np.unique(codes, return_counts=True)
        assert used.size <= 2
        mean = (decode(used, word).astype(np.float64) * counts).sum() / random.size
        # Three roundings of at most half an ulp, and that of a decoded code.
        slack = 2 * EPS32 * (abs(float(x)) + (2.0**-15 * scale if kind == "first" else 0))
        assert abs(mean - float(x)) <= slack


def test_second_moments_never_become_zero():
    """Not even what is so small beside the scale that the product with its inverse is zero."""
    for coarse in range(4):
        for random in (U(0), U(0xFFFFFFFF)):
            words = [U(LARGEST | coarse), U(0x3F800000 | coarse), U(LEAST | coarse)]
            for word in words:
                values = np.array([2.0**-149, 2.0**-126, 1e-30], np.float32)
                values = values[values < 1.8 * scale_of(SECOND, word)]
                for clamped in (False, True):
                    found = encode(values, SECOND, word, np.full(values.size, random), clamped)
                    assert (found > 0).all()
                    assert encode(np.zeros(1, np.float32), SECOND, word, np.full(1, random), clamped) == 0


def test_signed_zeros():
    zeros = np.array([0.0, -0.0], np.float32)
    for random in (None, np.zeros(2, U), np.full(2, 7, U)):
        assert encode(zeros, FIRST, U(0x3F800000), random).tolist() == [0, -128]
    for word in (U(0), U(0x3F800000), U(0x3F800000) | FLAG):
        assert_same_bits(decode(np.array([0, -128], np.int8), word), zeros)


# --- The disk cache -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (eight_bits, "OFFSET"),
        (eight_bits, "SHIFT"),
        (bounds, "_UP"),
        (bits, "ABS"),
        (draws, "WEYL"),
        (views, "TWO"),
    ],
)
def test_another_format_is_other_code(monkeypatch, module, name):
    """What is emitted is part of the key of the disk cache."""
    compiling.digest.cache_clear()
    before = compiling.digest()
    with monkeypatch.context() as patch:
        patch.setattr(module, name, getattr(module, name) + 1)
        compiling.digest.cache_clear()
        assert compiling.digest() != before
    compiling.digest.cache_clear()


def test_all_that_is_emitted_is_part_of_the_key():
    """Every module of the CPU that has an intrinsic."""
    folder = Path(compiling.__file__).parent
    emitters = {path.stem for path in folder.glob("*.py") if "@intrinsic" in path.read_text(encoding="utf-8")}
    emitters = {name for name in emitters if not name.startswith("cuda_")}  # those are of a GPU
    known = {module.__name__.rpartition(".")[2] for module in compiling._EMITTERS}
    assert emitters - known == set()
