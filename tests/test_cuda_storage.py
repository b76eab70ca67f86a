"""16-bit storage in GPU memory without a GPU, behind the stand-in for CuPy: the bits of the CPU."""

from __future__ import annotations

import copy
import pickle

import ml_dtypes
import numpy as np
import pytest
from cuda_steps import MODES, Exported, assert_refused, ones
from storage_cases import CASES, DTYPES, case_id, encoded, options
from tolerances import assert_same_bits
from unit_steps import parts

import fastadam
from fastadam import FusedAdam, Segment
from fastadam.kernels.tree import CHUNK

BF16 = ml_dtypes.bfloat16
ODD = {"seed": 3, "offset": 2**32 - 20}
"""Other random bits than by default, and two keys for one buffer."""


def problem(rng, size, params="bfloat16", grads="bfloat16", steps=3):
    gradients = (10.0 ** rng.uniform(-6, 3, (steps, size)) * rng.standard_normal((steps, size))).astype("f4")
    return encoded(rng.standard_normal(size).astype("f4"), params), [encoded(g, grads) for g in gradients]


class Pair:
    """An optimizer on the CPU and one on the device, with the same parameters, and copies of them."""

    def __init__(self, cupy, params, out=None, capturable=False, **options):
        self.cupy = cupy
        self.cpu, self.device = (
            FusedAdam(backend="cpu", **options),
            FusedAdam(capturable=capturable, **options),
        )
        self.params, self.buffer = params.copy(), cupy.asarray(params)
        self.out = None if out is None else np.zeros(params.size, DTYPES[out])
        self.there = None if out is None else cupy.asarray(self.out)

    def step(self, grads=None, **scale):
        sent, left = (None, None) if grads is None else (self.cupy.asarray(grads), grads.copy())
        self.cpu.step(self.params, left, out=self.out, **scale)
        self.device.step(self.buffer, sent, out=self.there, **scale)
        if grads is not None:
            assert_same_bits(sent.host, left, "gradients")
        self.compare()

    def accumulate(self, grads):
        sent, left = self.cupy.asarray(grads), grads.copy()
        self.cpu.accumulate(left)
        self.device.accumulate(sent)
        assert_same_bits(sent.host, left, "gradients")

    def compare(self):
        assert_same_bits(self.buffer.host, self.params, "params")
        if self.out is not None:
            assert_same_bits(self.there.host, self.out, "out")
        moments = self.device.state.moments
        for name, moment in self.cpu.state.moments.items():
            assert_same_bits(moments[name].host, moment, name)
        assert repr(self.device.last_step) == repr(self.cpu.last_step)  # NaN is NaN


@MODES
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_all_pairs_of_features(cupy, rng, case, capturable):
    for size in (75, CHUNK + 130) if case["segments"] else (75,):
        rounding = "nearest" if capturable == bool(CASES.index(case) % 2) else "stochastic"
        flags = {**options(case), **ODD, "rounding": rounding}
        flags["segments"] = parts(size) if case["segments"] else ()
        params, gradients = problem(rng, size, case["params"], case["grads"], steps=4)
        gradients[1][5] = np.inf
        pair = Pair(cupy, params, case["out"], capturable, **flags)
        for grads in gradients:
            pair.step(grads, grad_scale=case["grad_scale"])


@pytest.mark.parametrize("size", [0, 1, 3, 31, 33, 257])
@pytest.mark.parametrize("kind", DTYPES)
def test_sizes_and_places(cupy, rng, kind, size):
    """Buffers at one place of a pack and at different ones, as views of larger ones."""
    params, gradients = problem(rng, size + 3, kind, kind)
    for at in ((0, 0), (1, 1), (3, 3), (1, 2)):
        cpu, device = (FusedAdam(state_dtype="bfloat16", zero_grads=True, **ODD) for _ in range(2))
        ours, theirs = params.copy(), cupy.asarray(params)
        mine, there = (slice(k, k + size) for k in at)
        for grads in gradients:
            left, sent = grads.copy(), cupy.asarray(grads)
            cpu.step(ours[mine], left[there])
            device.step(theirs[mine], sent[there])
            assert_same_bits(theirs.host, ours)
            assert_same_bits(sent.host, left)
        for name in ("exp_avg", "exp_avg_sq"):
            assert_same_bits(getattr(device.state, name).host, getattr(cpu.state, name), name)


def test_states_lie_as_the_parameters_in_packs(cupy):
    """Four of each kind go together then, in 8 or 16 bytes."""
    params = cupy.asarray(np.ones(11, BF16))[3:]
    opt = FusedAdam(state_dtype=("bfloat16", "float32"), master_params="float32", ema_decay=0.9)
    opt.step(params, params.__class__(params.host.copy(), 0))
    places = {array.data.ptr // array.dtype.itemsize % 4 for array in (params, *opt.state.moments.values())}
    assert places == {params.data.ptr // 2 % 4}


@MODES
@pytest.mark.parametrize("grads", DTYPES)
@pytest.mark.parametrize("params", DTYPES)
def test_accumulated_gradients(cupy, rng, params, grads, capturable):
    start, gradients = problem(rng, 67, params, grads, steps=4)
    flags = {"zero_grads": True, "segments": [Segment(3, 9, frozen=True)] if capturable else ()}
    pair = Pair(cupy, start, capturable=capturable, state_dtype="bfloat16", **flags)
    for k, each in enumerate(gradients):
        pair.accumulate(each)
        if k % 2:
            pair.step(grad_scale=3.0)


@MODES
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("master_params", [None, "float32", "split"])
def test_checkpoints_and_copies_go_on(cupy, rng, master_params, state_dtype, capturable):
    """From the device to the CPU and back, and between formats."""
    params, gradients = problem(rng, 67, steps=4)
    flags = {"master_params": master_params, "state_dtype": state_dtype, "ema_decay": 0.9}
    pair = Pair(cupy, params, capturable=capturable, **flags)
    pair.step(gradients[0])
    saved, expected = pair.device.state_dict(), pair.cpu.state_dict()
    np.testing.assert_equal(saved, expected)
    assert {key: np.asarray(saved[key]).dtype for key in saved} == {
        key: np.asarray(expected[key]).dtype for key in expected
    }
    other = {"float32": "bfloat16", "bfloat16": "float32"}[state_dtype]
    for change in (
        copy.deepcopy,
        lambda opt: pickle.loads(pickle.dumps(opt)),
        lambda opt: loaded(FusedAdam(**flags), opt),
        lambda opt: loaded(FusedAdam(**{**flags, "state_dtype": other}), opt),
    ):
        resumed = change(pair.device), cupy.asarray(pair.params)
        expected = change(pair.cpu), pair.params.copy()
        for grads in gradients[1:]:
            resumed[0].step(resumed[1], cupy.asarray(grads))
            expected[0].step(expected[1], grads)
        assert_same_bits(resumed[1].host, expected[1])
        np.testing.assert_equal(resumed[0].state_dict(), expected[0].state_dict())


def loaded(opt, source):
    opt.load_state_dict(source.state_dict())
    return opt


@pytest.mark.parametrize("params", ["bfloat16", "float16"])
def test_masters_that_no_checkpoint_has_begin_with_the_parameters(cupy, rng, params):
    start, gradients = problem(rng, 33, params, params)
    start[:3] = 0.0, 1e-7, -1e-7  # and subnormals
    saved = FusedAdam(0.0, ema_decay=0.5)
    buffer = cupy.asarray(start)
    saved.step(start, gradients[0])
    cpu, device = (loaded(FusedAdam(master_params="float32"), saved) for _ in range(2))
    cpu.step(start, np.abs(gradients[1]))
    device.step(buffer, cupy.asarray(np.abs(gradients[1])))
    assert_same_bits(device.state.param_master.host, cpu.state.param_master)
    assert_same_bits(device.state.param_ema.host, cpu.state.param_ema)
    assert_same_bits(device.state.param_master.host, start.astype(np.float32))


def test_formats_may_change_from_step_to_step(cupy, rng):
    for capturable in (False, True):
        opt, expected = FusedAdam(capturable=capturable), FusedAdam()
        for kind in ("bfloat16", "float32", "float16", "float32"):
            params, (grads,) = problem(rng, 33, kind, "float16" if kind == "bfloat16" else kind, steps=1)
            buffer = cupy.asarray(params)
            opt.step(buffer, cupy.asarray(grads))
            expected.step(params, grads)
            assert_same_bits(buffer.host, params)


# --- Arrays -------------------------------------------------------------------------------------------------


class Dlpack:
    """An array that exports nothing but DLPack, of which CuPy makes a view."""

    def __init__(self, array):
        self.to_cupy = lambda: array
        self.__dlpack_device__ = array.__dlpack_device__
        self.__dlpack__ = None


class _Torch:
    """What ``torch.bfloat16`` says of itself."""

    def __str__(self):
        return "torch.bfloat16"


def test_arrays_of_other_libraries(cupy, rng):
    params, (grads,) = problem(rng, 33, steps=1)
    expected = params.copy()
    FusedAdam().step(expected, grads)
    for wrap in (lambda a: exported(a, dtype=_Torch()), lambda a: exported(a, dtype=a.dtype), Dlpack):
        buffer = cupy.asarray(params)
        FusedAdam().step(wrap(buffer), wrap(cupy.asarray(grads)))
        assert_same_bits(buffer.host, expected)


def exported(array, dtype=None, **interface):
    found = Exported(array, **interface)
    if dtype is not None:
        found.dtype = dtype
    return found


# --- Streams and graphs -------------------------------------------------------------------------------------


@MODES
def test_a_copy_on_another_stream_is_waited_for(cupy, capturable):
    other = cupy.cuda.Stream()
    opt, params, out = FusedAdam(capturable=capturable), ones(cupy), ones(cupy)
    opt.step(params, ones(cupy), out=Exported(out, stream=other.ptr))
    waits = [entry for entry in cupy.log if entry[0] == "wait"]
    assert waits == [("wait", 0, 0, other.ptr), ("wait", 0, other.ptr, 0)]
    kernels = [k for k, entry in enumerate(cupy.log) if entry[0] in {"step", "step_captured"}]
    assert cupy.log.index(waits[0]) < kernels[0] < cupy.log.index(waits[1])
    assert_same_bits(out.host, params.host)

    cupy.log.clear()
    opt.step(params, ones(cupy), out=Exported(out, stream=other.ptr), stream=0)
    assert not [entry for entry in cupy.log if entry[0] == "wait"]


def test_a_replayed_step_draws_anew(cupy, rng):
    params, gradients = problem(rng, 65, steps=6)
    flags = {"state_dtype": "bfloat16", "skip_nonfinite": True, **ODD}
    gradients[2][3] = np.inf  # is skipped, and its bits are drawn by the next one
    opt, expected = FusedAdam(capturable=True, **flags), FusedAdam(**flags)
    buffer, sent, out = cupy.asarray(params), cupy.asarray(gradients[0]), cupy.asarray(np.zeros(65, "f4"))
    copied, of_cpu = params.copy(), np.zeros(65, np.float32)
    stream = cupy.cuda.Stream()
    with stream:
        opt.step(buffer, sent, out=out)
        expected.step(copied, gradients[0], out=of_cpu)
        stream.begin_capture()
        opt.step(buffer, sent, out=out)
        graph = stream.end_capture()
        for grads in gradients[1:]:
            sent.host[:] = grads
            graph.launch(stream)
            expected.step(copied, grads, out=of_cpu)
            assert_same_bits(buffer.host, copied)
            assert_same_bits(out.host, of_cpu)
            assert_same_bits(opt.state.exp_avg_sq.host, expected.state.exp_avg_sq)
    assert opt.state.step == expected.state.step == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"out": True},
            "stream must not be in capture: this step is compiled otherwise than the one before."
            " Take one step like it before.",
        ),
        (
            {"grads": np.float16},
            "stream must not be in capture: this step is compiled otherwise than the one before."
            " Take one step like it before.",
        ),
        (
            {"out": True, "elsewhere": True},
            "out must be on the stream of flat_params in a capture; got two streams."
            " Make one stream current in both libraries, or pass stream=.",
        ),
    ],
    ids=["out", "grads", "stream"],
)
def test_what_no_graph_can_hold(cupy, change, message):
    opt, stream, other = FusedAdam(capturable=True), cupy.cuda.Stream(), cupy.cuda.Stream()
    with stream:
        params, grads = ones(cupy, dtype=BF16), ones(cupy, dtype=change.get("grads", BF16))
        out = ones(cupy) if "out" in change else None
        if "elsewhere" in change:
            out = Exported(out, stream=other.ptr)
        opt.step(params, ones(cupy, dtype=BF16))
        stream.begin_capture()
        assert_refused(opt, params, grads, ValueError, message, out=out)
        assert not stream.end_capture().calls


# --- What is refused ----------------------------------------------------------------------------------------


SPLIT = "master_params must be None or 'float32' for float16 parameters; got 'split'."


@pytest.mark.parametrize("stepped", [False, True], ids=["first-step", "later-step"])
@pytest.mark.parametrize(
    ("flags", "kinds", "error", "message"),
    [
        ({}, ("u2", "u2"), TypeError, "flat_params must be float32, float64, float16 or bfloat16; got uint16."
         " If it holds codes, say of what: x.view(numpy.float16) or x.view(ml_dtypes.bfloat16)."),
        ({}, ("f8", BF16), TypeError,
         "flat_grads must have the dtype of flat_params (float64); got bfloat16."),
        ({"state_dtype": "bfloat16"}, ("f8", "f8"), ValueError,
         "state_dtype must be 'float32', the default, for float64 parameters; got 'bfloat16'."),
        ({"master_params": "split"}, ("f2", "f2"), ValueError, SPLIT),
    ],
)  # fmt: skip
def test_storage_that_is_refused(cupy, flags, kinds, error, message, stepped):
    opt = FusedAdam(**flags)
    if stepped:
        good = "f4" if "master_params" not in flags else BF16
        opt.step(ones(cupy, dtype=good), ones(cupy, dtype=good))
        if kinds[0] == "f8":
            opt.reset()
    assert_refused(opt, *(ones(cupy, dtype=kind) for kind in kinds), error, message)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda _cupy, _params: np.ones(8, "f4"), TypeError,
         "out must be on the device of flat_params (CUDA device 0); got CPU memory. Pass a copy."),
        (lambda cupy, _: ones(cupy, 7), ValueError,
         "out must have the size of flat_params (8); got 7."),
        (lambda cupy, _: ones(cupy, dtype="f8"), TypeError,
         "out must be float32, float16 or bfloat16; got float64."),
        (lambda _, params: params, ValueError,
         "out must not overlap flat_params; got buffers that share memory. Pass a copy."),
        (lambda cupy, _: ones(cupy, 16)[::2], ValueError,
         "out must be C-contiguous; got shape (8,) with strides (8,)."
         " Keep one flat buffer and give views of it to the model."),
    ],
    ids=["memory", "size", "dtype", "overlap", "strided"],
)  # fmt: skip
@pytest.mark.parametrize("stepped", [False, True], ids=["first-step", "later-step"])
def test_copies_that_are_refused(cupy, make, error, message, stepped):
    opt, params, grads = FusedAdam(), ones(cupy), ones(cupy)
    if stepped:
        opt.step(params, grads)
    assert_refused(opt, params, grads, error, message, out=make(cupy, params))


def test_a_scale_of_16_bits_is_refused(cupy):
    for kind, name in ((np.float16, "float16"), (BF16, "bfloat16")):
        scale = ones(cupy, 1, dtype=kind)
        message = f"grad_scale must be float32 or float64; got {name}."
        assert_refused(FusedAdam(), ones(cupy), ones(cupy), TypeError, message, grad_scale=scale)


def test_no_exchange_with_16_bits(cupy):
    opt, params = FusedAdam(ema_decay=0.9), ones(cupy, dtype=BF16)
    opt.step(params, ones(cupy, dtype=BF16))
    with pytest.raises(TypeError, match="flat_params must be float32 or float64 for swap_ema; got bfloat16"):
        opt.swap_ema(params)


def test_warmup_compiles_the_step(cupy, monkeypatch):
    from fastadam import backends

    kernels = backends.load("cupy")
    seen, compiled = [], kernels.kernel
    monkeypatch.setattr(kernels, "kernel", lambda *key: seen.append(key[:2]) or compiled(*key), raising=True)
    flags = {"state_dtype": "bfloat16", "max_grad_norm": 1.0, "capturable": True}
    fastadam.warmup(dtype=BF16, backend="cupy", **flags)
    ready = set(seen)
    seen.clear()
    FusedAdam(**flags).step(ones(cupy, dtype=BF16), ones(cupy, dtype=BF16))
    assert set(seen) <= ready
