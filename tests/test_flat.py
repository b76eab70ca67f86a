"""Flat storage: one buffer, views of the shapes given, names and segments."""

from __future__ import annotations

import copy
import pickle
import re
from collections import OrderedDict
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from tolerances import assert_same_bits

import fastadam
from fastadam import FusedAdam, Segment


class Layer(NamedTuple):
    weight: object
    bias: object


def layers(rng, dtype="float32"):
    weight = rng.standard_normal((4, 6)).astype(dtype)
    return {
        "first": Layer(weight.T, weight[0, ::2]),  # neither is contiguous
        "others": [np.array(2.5, dtype), (np.zeros((0, 3), dtype), np.full(5, 1, dtype))],
    }


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("align", [1, 16])
def test_views_hold_what_was_given(rng, dtype, align):
    given = layers(rng, dtype)
    flat = fastadam.flatten(given, align=align)
    assert flat.params.ctypes.data % 64 == 0
    assert flat.params.dtype == dtype
    assert flat.names == ("first.weight", "first.bias", "others.0", "others.1.0", "others.1.1")
    assert flat.shapes == ((6, 4), (3,), (), (0, 3), (5,))
    assert flat.sizes == (24, 3, 1, 0, 5)
    assert flat.offsets == ((0, 24, 27, 28, 28) if align == 1 else (0, 32, 48, 64, 64))
    assert flat.params.size == flat.offsets[-1] + 5
    views = flat.views
    assert isinstance(views["first"], Layer)
    assert isinstance(views["others"][1], tuple)
    for view, array in (
        (views["first"].weight, given["first"].weight),
        (views["first"].bias, given["first"].bias),
        (views["others"][0], given["others"][0]),
        (views["others"][1][1], given["others"][1][1]),
    ):
        np.testing.assert_array_equal(view, array)
        assert view.flags.c_contiguous
        assert np.shares_memory(view, flat.params)
        assert not np.shares_memory(view, array)
    flat.params[:] = 7
    assert views["others"][0] == 7
    assert list(flat.by_name) == list(flat.names)
    assert flat.by_name["first.bias"] is views["first"].bias


def test_gradients_are_zeros_made_once(rng):
    flat = fastadam.flatten(layers(rng))
    grads = flat.grads
    assert grads is flat.grads
    assert grads.ctypes.data % 64 == 0
    assert not grads.any()
    assert not np.shares_memory(grads, flat.params)
    flat.grad_views["first"].bias[1] = 3
    assert np.flatnonzero(grads).tolist() == [25]


def test_step_of_the_buffer_is_the_step_of_each_array(rng):
    given = layers(rng)
    flat, names = fastadam.flatten(given, align=8), ["first.weight", "first.bias", "others.1.1"]
    alone = {name: np.ascontiguousarray(flat.by_name[name]).copy() for name in names}
    opts = {name: FusedAdam(lr=0.1) for name in names}
    opt = FusedAdam(
        lr=0.1, weight_decay=0.1, segments=flat.segments(lambda name: name in names, weight_decay=0.0)
    )
    for _ in range(3):
        flat.grads[:] = 0
        for name, view in zip(flat.names, _leaves(flat.grad_views), strict=True):
            view[...] = rng.standard_normal(view.shape)
            if name in names:
                opts[name].step(alone[name], np.ascontiguousarray(view))
        opt.step(flat.params, flat.grads)
    for name in names:
        assert_same_bits(flat.by_name[name], alone[name], name)
    assert not flat.params[27:32].any()  # what lies between stays zero


def _leaves(tree):
    return [tree["first"].weight, tree["first"].bias, tree["others"][0], *tree["others"][1]]


def test_an_array_given_twice_is_stored_once(rng):
    array = rng.standard_normal((3, 4))
    flat = fastadam.flatten({"embedding": array, "other": np.ones(2), "head": array[:]})
    assert flat.params.size == 14
    assert flat.names == ("embedding", "other")
    assert flat.views["embedding"] is flat.views["head"]
    assert flat.segments("head", lr=0.0) == (Segment(0, 12, lr=0.0),)
    transposed = fastadam.flatten([array, array.T])
    assert transposed.params.size == 24  # another layout is another array


def test_copies_are_refused_for_their_views_would_be_none(rng):
    message = "flat must not be copied or pickled; got such a call. Flatten a copy of its views."
    for call in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            call(fastadam.flatten(layers(rng)))


def test_read_only_and_broadcast_arrays_are_copied_in():
    ones = np.broadcast_to(np.float32(1), (2, 3))
    flat = fastadam.flatten([ones])
    assert flat.views[0].flags.writeable
    assert flat.params.tolist() == [1] * 6


def test_subclasses_and_mappings():
    flat = fastadam.flatten(OrderedDict(b=np.zeros(2).view(np.matrix), a=np.ones(3)))
    assert flat.names == ("b", "a")  # the order given, not that of the alphabet
    assert type(flat.params) is np.ndarray
    assert flat.views["b"].shape == (1, 2)


NAMES = {"0.weight": 6, "0.bias": 2, "norm.bias": 2, "norm.empty.bias": 0, "1.weight": 4, "1.bias": 1}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.bias", [(6, 10), (14, 15)]),
        ("1.*", [(10, 15)]),
        ("*", [(0, 15)]),
        ("0.BIAS*", None),
        ("norm.empty.bias", []),
        (re.compile(r"^\d\.w"), [(0, 6), (10, 14)]),
        (re.compile("norm"), [(8, 10)]),
        (lambda name: name == "0.bias", [(6, 8)]),
    ],
    ids=lambda value: "by function" if callable(value) else repr(value),
)
def test_segments_by_name(pattern, expected):
    flat = fastadam.flatten({name: np.zeros(size) for name, size in NAMES.items()})
    if expected is None:
        with pytest.raises(ValueError, match="pattern must match a name"):
            flat.segments(pattern)
        return
    segments = flat.segments(pattern, weight_decay=0.0, lr=0.5)
    assert segments == tuple(Segment(*bounds, weight_decay=0.0, lr=0.5) for bounds in expected)


def test_arrays_beside_each_other_are_one_segment_in_an_aligned_buffer_too():
    flat = fastadam.flatten({name: np.zeros(size) for name, size in NAMES.items()}, align=8)
    assert [(s.start, s.stop) for s in flat.segments("*.bias")] == [(8, 18), (32, 33)]


ONES = np.ones(2, np.float32)
SHARED = (
    (TypeError, ONES, {}, "arrays must be a dict, a list or a tuple of arrays; got ndarray."),
    (ValueError, {"a": []}, {}, "arrays must hold an array; got none."),
    (
        TypeError,
        {"a": {"b": [1.0]}},
        {},
        "arrays['a.b.0'] must be an array of NumPy, CuPy or PyTorch; got float.",
    ),
    (TypeError, [ONES, None], {}, "arrays['1'] must be an array of NumPy, CuPy or PyTorch; got NoneType."),
    (
        TypeError,
        [np.ma.masked_array(ONES)],
        {},
        "arrays['0'] must be an array of NumPy, CuPy or PyTorch; got numpy.MaskedArray.",
    ),
    (
        TypeError,
        [np.ones(2, int)],
        {},
        "arrays['0'] must be float32, float64, float16 or bfloat16; got int64.",
    ),
    (
        TypeError,
        [np.ones(2, ">f4")],
        {},
        "arrays['0'] must be float32, float64, float16 or bfloat16; got >f4.",
    ),
    (
        TypeError,
        {"a": ONES, "b": np.ones(2)},
        {},
        "arrays['b'] must have the dtype of arrays['a'] (float32); got float64."
        " Flatten each dtype on its own.",
    ),
    (
        ValueError,
        {"a.b": ONES, "a": {"b": np.ones(2, np.float32)}},
        {},
        "arrays must have different dotted names; got 'a.b' twice.",
    ),
    (ValueError, [ONES], {"align": 0}, "align must be in [1, 2**53); got 0."),
    (TypeError, [ONES], {"in_place": 1}, "in_place must be True or False; got int."),
    (
        ValueError,
        [ONES],
        {"in_place": True},
        "in_place must be False for arrays of NumPy; got True. Use flat.views.",
    ),
)


@pytest.mark.parametrize(("kind", "arrays", "options", "message"), SHARED)
def test_errors(kind, arrays, options, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        fastadam.flatten(arrays, **options)


def test_errors_of_patterns():
    flat = fastadam.flatten({f"w{k}": ONES + k for k in range(10)})
    names = "w0, w1, w2, w3, w4, w5, w6, w7, ..."
    for kind, pattern, message in (
        (ValueError, "bias", f"pattern must match a name; got 'bias'. The names: {names}."),
        (
            TypeError,
            3,
            "pattern must be a string, a compiled regular expression or a function of a name; got int.",
        ),
    ):
        with pytest.raises(kind, match=f"^{re.escape(message)}$"):
            flat.segments(pattern)
    with pytest.raises(
        ValueError, match=r"^attach must follow flatten with in_place=True; got in_place=False\.$"
    ):
        flat.attach()


def test_jax_arrays_are_sent_elsewhere():
    jax = pytest.importorskip("jax")
    with pytest.raises(
        TypeError, match=r"got jaxlib\..* Use jax\.flatten_util\.ravel_pytree and fastadam\.jax\.$"
    ):
        fastadam.flatten([jax.numpy.ones(3)])


def test_cupy(cupy, rng):
    arrays = {"w": rng.standard_normal((3, 4)).astype(np.float32), "b": np.ones(4, np.float32)}
    with cupy.cuda.Device(1):
        flat = fastadam.flatten({name: cupy.asarray(array) for name, array in arrays.items()})
    expected = fastadam.flatten(arrays)
    assert isinstance(flat.params, cupy.ndarray)
    assert flat.params.device_id == flat.grads.device_id == 1
    assert flat.params.data.ptr % 64 == 0
    assert repr(flat) == "Flat(float32[16] of CuPy in CUDA device 1, 2 arrays)"
    assert flat.views["w"].shape == (3, 4)
    for one in (flat, expected):
        opt = FusedAdam(lr=0.1, segments=one.segments("b", lr=0.2))
        one.grad_views["b"][:] = one.views["b"]
        opt.step(one.params, one.grads)
    assert_same_bits(flat.params.host, expected.params)
    with pytest.raises(TypeError, match=r"\(CUDA device 1\); got CUDA device 0\. Flatten each device"):
        fastadam.flatten([flat.params, cupy.asarray(ONES)])
    with pytest.raises(TypeError, match=r"must be of the library of arrays\['0'\] \(CuPy\); got NumPy\.$"):
        fastadam.flatten([flat.params, ONES])
