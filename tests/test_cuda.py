"""Steps in GPU memory without a GPU: the CUDA C++ kernels as host code, behind a stand-in for CuPy."""

from __future__ import annotations

import copy
import pickle
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from oracles import FLAGS, flags_id
from tolerances import assert_same_bits

from fastadam import FusedAdam
from fastadam.kernels import grids

DTYPES = ["float32", "float64"]
SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 63, 65, 257, 1023]
MODES = pytest.mark.parametrize("capturable", [False, True], ids=["eager", "capturable"])


def problem(rng, size, dtype="float32", steps=3):
    params = rng.standard_normal(size).astype(dtype)
    return params, [
        (10.0 ** rng.uniform(-6, 3, size) * rng.standard_normal(size)).astype(dtype) for _ in range(steps)
    ]


def on_cpu(params, gradients, **options):
    opt, params = FusedAdam(backend="cpu", **options), params.copy()
    for grads in gradients:
        opt.step(params, grads)
    return opt, params


def on_device(cupy, params, gradients, **options):
    opt, params = FusedAdam(**options), cupy.asarray(params)
    for grads in gradients:
        opt.step(params, cupy.asarray(grads))
    return opt, params


def assert_same(device, cpu):
    (opt, params), (expected, expected_params) = device, cpu
    assert_same_bits(params.host, expected_params, "params")
    assert opt.state.step == expected.state.step
    for name, moment in expected.state.moments.items():
        assert_same_bits(opt.state.moments[name].host, moment, name)


@MODES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", FLAGS, ids=flags_id)
def test_bits_of_the_cpu(cupy, rng, flags, dtype, capturable):
    for size in SIZES:
        params, gradients = problem(rng, size, dtype)
        device = on_device(cupy, params, gradients, capturable=capturable, **flags)
        assert_same(device, on_cpu(params, gradients, **flags))
        assert device[0].backend == "cupy"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [FLAGS[0], FLAGS[-1]], ids=flags_id)
def test_special_values(cupy, flags, dtype):
    finfo = np.finfo(dtype)
    values = [0.0, 1.0, finfo.tiny, finfo.tiny / 2, finfo.smallest_subnormal, finfo.max, np.inf, np.nan]
    values = np.array([sign * value for value in values for sign in (1, -1)]).astype(dtype)
    params, grads = (a.ravel() for a in np.meshgrid(values, values))
    gradients = [grads, np.roll(grads, 1), grads]
    assert_same(on_device(cupy, params, gradients, **flags), on_cpu(params, gradients, **flags))


@MODES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.5, 0.5), (0.99, 0.9), (0.9, 0.99999)])
def test_bits_over_many_steps_with_a_changing_lr(cupy, rng, dtype, betas, capturable):
    """Past the step from which the bias correction of the first moment is 1, too."""
    flags = {"betas": betas, "weight_decay": 0.05, "decoupled_weight_decay": True}
    params, (grads,) = problem(rng, 5, dtype, steps=1)
    device = FusedAdam(capturable=capturable, **flags), cupy.asarray(params)
    cpu = FusedAdam(**flags), params.copy()
    for k in range(1000):
        grads = np.roll(grads, 1)
        for (opt, buffer), sent in ((device, cupy.asarray(grads)), (cpu, grads)):
            opt.lr = 1e-3 / (1 + k % 7)
            opt.step(buffer, sent)
    assert_same(device, cpu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offsets", [(0, 0), (1, 1), (2, 2), (3, 3), (0, 1), (2, 1)])
def test_any_alignment(cupy, rng, dtype, offsets):
    """Aligned alike: packs with a head and a tail, in the moments too. Otherwise one by one."""
    params, gradients = problem(rng, 257, dtype)
    opt, itemsize = FusedAdam(), params.itemsize
    buffers = [cupy.asarray(np.zeros(257 + 19, dtype)) for _ in range(2)]
    # NumPy aligns to 16 bytes at least; do not count on more.
    views = [
        b[-b.data.ptr % 16 // itemsize + offset :][:257] for b, offset in zip(buffers, offsets, strict=True)
    ]
    views[0].host[:] = params
    for grads in gradients:
        views[1].host[:] = grads
        opt.step(*views)
    assert_same((opt, views[0]), on_cpu(params, gradients))

    lanes = 16 // itemsize
    pointers = [view.data.ptr for view in [*views, *opt.state.arrays]]
    head, packs = grids.packs(pointers, itemsize, 257)
    if offsets[0] % lanes == offsets[1] % lanes:
        assert head == -offsets[0] % lanes
        assert packs == (257 - head) // lanes
    else:
        assert (head, packs) == (0, 0)


def test_launch_shape():
    itemsize, resident = 4, 2048 * 132
    assert grids.blocks(0, 0, itemsize, resident) == 1
    assert grids.blocks(1, 0, itemsize, resident) == 1
    assert grids.blocks(grids.BLOCK * 4 + 1, grids.BLOCK, itemsize, resident) == 1
    assert grids.blocks(grids.BLOCK * 4 + 4, grids.BLOCK + 1, itemsize, resident) == 2
    huge = 2**33
    assert grids.blocks(huge, huge // 4, itemsize, resident) == grids.WAVES * resident // grids.BLOCK
    assert grids.packs([2**40, 2**41], itemsize, huge) == (0, huge // 4)
    assert grids.packs([2**40 + 12, 2**41 + 12], itemsize, 0) == (0, 0)


@MODES
def test_a_checkpoint_moves_between_cpu_and_gpu(cupy, rng, capturable):
    params, gradients = problem(rng, 65, steps=6)
    whole = on_cpu(params, gradients)

    opt, half = on_device(cupy, params, gradients[:3], capturable=capturable)
    saved = opt.state_dict()
    assert all(isinstance(value, np.ndarray) for name, value in saved.items() if name.startswith("exp"))
    on, rest = FusedAdam(), half.host.copy()
    on.load_state_dict(saved)
    for grads in gradients[3:]:
        on.step(rest, grads)
    assert_same_bits(rest, whole[1])

    first = on_cpu(params, gradients[:3])
    for start in (
        FusedAdam(capturable=capturable),
        on_device(cupy, params, gradients[:1], capturable=capturable)[0],
    ):
        start.load_state_dict(first[0].state_dict())
        assert start.state.step == 3
        back = cupy.asarray(first[1])
        for grads in gradients[3:]:
            start.step(back, cupy.asarray(grads))
        assert_same((start, back), whole)


@MODES
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_copies_go_their_own_way(cupy, rng, duplicate, capturable):
    params, gradients = problem(rng, 33, steps=4)
    opt, buffer = on_device(cupy, params, gradients[:2], capturable=capturable)
    other, twin = duplicate(opt), cupy.asarray(buffer.host)
    for grads in gradients[2:]:
        opt.step(buffer, cupy.asarray(grads))
        other.step(twin, cupy.asarray(grads))
    expected = on_cpu(params, gradients)
    assert_same((opt, buffer), expected)
    assert_same((other, twin), expected)


@MODES
def test_reset(cupy, rng, capturable):
    params, gradients = problem(rng, 9)
    opt, _ = on_device(cupy, params, gradients, capturable=capturable)
    opt.reset()
    assert (opt.state.step, opt.state.arrays, opt.backend) == (0, (), None)
    if not capturable:
        opt.step(params.copy(), gradients[0])
        assert opt.backend == "cpu"


def test_no_allocation_copy_or_wait_after_the_first_step(cupy, rng):
    params, gradients = problem(rng, 65)
    for options in ({}, {"capturable": True}):
        opt, buffer = on_device(cupy, params, gradients[:1], **options)
        grads = cupy.asarray(gradients[1])
        before = len(cupy.log)
        opt.step(buffer, grads)
        opt.lr = 0.1
        opt.step(buffer, grads)
        assert {entry[0] for entry in cupy.log[before:]} <= {"step", "step_captured", "tick", "set_lr"}


def test_a_change_of_lr_compiles_nothing(cupy, rng, monkeypatch):
    params, gradients = problem(rng, 65)
    opt, buffer = on_device(cupy, params, gradients[:1])
    monkeypatch.setattr(cupy, "RawModule", None)
    opt.lr, opt.eps, opt.betas = 0.5, 1e-3, (0.5, 0.6)
    opt.step(buffer, cupy.asarray(gradients[1]))


# --- What is refused ----------------------------------------------------------------------------------------


def assert_refused(opt, params, grads, error, message, **options):
    before = [buffer.host.copy() for buffer in (params, grads) if not isinstance(buffer, np.ndarray)]
    state = opt.state_dict()
    with pytest.raises(error) as caught:
        opt.step(params, grads, **options)
    assert str(caught.value) == message
    after = [buffer.host for buffer in (params, grads) if not isinstance(buffer, np.ndarray)]
    np.testing.assert_equal(after, before)
    np.testing.assert_equal(opt.state_dict(), state)


def ones(cupy, *shape, dtype=np.float32):
    return cupy.asarray(np.ones(shape or 8, dtype))


def read_only(cupy):
    array = ones(cupy)
    array.host.flags.writeable = False
    return array


REFUSED = {
    "int32": (
        lambda cupy: ones(cupy, dtype=np.int32),
        TypeError,
        "flat_params must be float32 or float64; got int32.",
    ),
    "strided": (
        lambda cupy: ones(cupy, 16)[::2],
        ValueError,
        "flat_params must be C-contiguous; got shape (8,) with strides (8,)."
        " Keep one flat buffer and give views of it to the model.",
    ),
    "read-only": (
        read_only,
        ValueError,
        "flat_params must be writable; got a read-only array. Pass a writable copy.",
    ),
    "size": (
        lambda cupy: ones(cupy, 9),
        ValueError,
        "flat_grads must have the size of flat_params (9); got 8.",
    ),
    "dtype": (
        lambda cupy: ones(cupy, dtype=np.float64),
        TypeError,
        "flat_grads must have the dtype of flat_params (float64); got float32.",
    ),
    "cpu-params": (
        lambda _: np.ones(8, np.float32),
        TypeError,
        "flat_grads must be on the device of flat_params (CPU memory); got CUDA device 0. Pass a copy.",
    ),
}


@MODES
@pytest.mark.parametrize("stepped", [False, True], ids=["first-step", "later-step"])
@pytest.mark.parametrize("case", REFUSED)
def test_bad_params(cupy, case, stepped, capturable):
    make, error, message = REFUSED[case]
    opt = FusedAdam(capturable=capturable)
    if stepped:
        opt.step(ones(cupy), ones(cupy))
    assert_refused(opt, make(cupy), ones(cupy), error, message)


def test_elements_at_odd_addresses(cupy):
    params = cupy.asarray(np.zeros(33, np.uint8))[1:].view(np.float32)
    message = (
        f"flat_params must be aligned to its elements in GPU memory; got address {params.data.ptr:#x}."
        " Pass a copy."
    )
    assert_refused(FusedAdam(), params, ones(cupy), ValueError, message)


def test_overlaps(cupy):
    opt, both = FusedAdam(), ones(cupy, 12)
    message = "flat_grads must not overlap flat_params; got buffers that share memory. Pass a copy."
    assert_refused(opt, both[:8], both[4:], ValueError, message)
    opt.step(both[:4], both[4:8])  # side by side is well
    message = "flat_grads must not overlap the state; got buffers that share memory. Pass a copy."
    assert_refused(opt, both[:4], opt.state.exp_avg, ValueError, message)
    message = "flat_params must not overlap the state; got buffers that share memory. Pass a copy."
    assert_refused(opt, opt.state.exp_avg, both[:4], ValueError, message)


def test_other_memory_than_the_state(cupy):
    opt = FusedAdam()
    opt.step(ones(cupy), ones(cupy))
    message = "flat_params must be on the device of the state (CUDA device 0); got CPU memory. Pass a copy."
    assert_refused(opt, np.ones(8, np.float32), np.ones(8, np.float32), TypeError, message)
    with cupy.cuda.Device(1):
        there = [ones(cupy), ones(cupy)]
    message = (
        "flat_params must be on the device of the state (CUDA device 0); got CUDA device 1. Pass a copy."
    )
    assert_refused(opt, *there, TypeError, message)
    message = (
        "flat_grads must be on the device of flat_params (CUDA device 0); got CUDA device 1. Pass a copy."
    )
    assert_refused(opt, ones(cupy), there[0], TypeError, message)
    opt = FusedAdam()
    opt.step(np.ones(8, np.float32), np.ones(8, np.float32))
    message = "flat_params must be on the device of the state (CPU memory); got CUDA device 0. Pass a copy."
    assert_refused(opt, ones(cupy), ones(cupy), TypeError, message)


def test_other_memory_than_the_backend(cupy):
    message = "flat_params must be in CPU memory for backend='cpu'; got CUDA device 0."
    assert_refused(FusedAdam(backend="cpu"), ones(cupy), ones(cupy), TypeError, message)
    cpu = np.ones(8, np.float32), np.ones(8, np.float32)
    message = "flat_params must be in GPU memory for backend='cupy'; got CPU memory."
    assert_refused(FusedAdam(backend="cupy"), *cpu, TypeError, message)
    message = "flat_params must be in GPU memory with capturable=True; got CPU memory."
    assert_refused(FusedAdam(capturable=True), *cpu, TypeError, message)


def test_moments_of_a_checkpoint_in_gpu_memory(cupy):
    opt = FusedAdam()
    opt.step(ones(cupy), ones(cupy))
    saved = {**opt.state_dict(), "exp_avg": opt.state.exp_avg}
    with pytest.raises(TypeError) as caught:
        opt.load_state_dict(saved)
    assert (
        str(caught.value)
        == "state_dict['exp_avg'] must be in CPU memory; got CUDA device 0. Pass a CPU copy."
    )


def test_a_launch_that_cuda_refuses_took_no_step(cupy, monkeypatch):
    opt, params = FusedAdam(), ones(cupy)
    opt.step(params, ones(cupy))
    kernels = sys.modules["fastadam.kernels.cuda_cupy"].backend

    def refuse(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(kernels, "launch", refuse, raising=False)
    with pytest.raises(RuntimeError):
        opt.step(params, ones(cupy))
    assert opt.state.step == 1


def test_only_lr_changes_in_a_capturable_optimizer(cupy):
    opt = FusedAdam(capturable=True)
    opt.eps = 1e-6  # before the first step all may
    opt.step(ones(cupy), ones(cupy))
    with pytest.raises(ValueError, match="lr must be at least 0"):
        opt.lr = -1
    with pytest.raises(ValueError, match="lr must be at most"):
        opt.lr = 1e39
    assert opt.lr == 1e-3
    with pytest.raises(ValueError, match="eps must stay") as caught:
        opt.eps = 1e-3
    assert str(caught.value) == (
        "eps must stay 1e-06 once a capturable step was taken; got 0.001. Only lr may change, until reset."
    )
    opt.reset()
    opt.eps = 1e-3


# --- Arrays of other libraries ------------------------------------------------------------------------------


class Exported:
    """A device array of some library: what it exports and nothing else."""

    def __init__(self, array, **interface):
        self.array = array
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, "stream": None, **interface}


def test_an_array_that_does_not_tell_its_device(cupy, rng):
    params, gradients = problem(rng, 17)
    with cupy.cuda.Device(1):
        buffer, sent = cupy.asarray(params), [cupy.asarray(grads) for grads in gradients]
    opt = FusedAdam()
    for grads in sent:
        opt.step(Exported(buffer), Exported(grads))
    expected = on_cpu(params, gradients)
    assert_same_bits(buffer.host, expected[1])
    assert {entry[1] for entry in cupy.log if entry[0] == "step"} == {1}
    empty = Exported(cupy.asarray(np.zeros(0, np.float32)), data=(0, False))
    FusedAdam().step(empty, Exported(cupy.asarray(np.zeros(0, np.float32)), data=(0, False)))


def test_an_array_that_exports_only_dlpack(cupy):
    class ByDLPack:
        def __init__(self, array):
            self.to_cupy = lambda: array

        def __dlpack_device__(self):
            return 2, 0

        def __dlpack__(self, **_):
            raise AssertionError("the stand-in does not ask")

    params = ones(cupy)
    FusedAdam().step(ByDLPack(params), ByDLPack(ones(cupy)))
    assert (params.host < 1).all()


def test_masked_array(cupy):
    params = Exported(ones(cupy), mask=object())
    with pytest.raises(TypeError, match="flat_params must be a plain array; got a masked array"):
        FusedAdam().step(params, ones(cupy))


def test_any_shape(cupy):
    params = cupy.asarray(np.ones((2, 1, 4), np.float32))
    spread = Exported(params, strides=(16, 99, 4))  # the stride of an axis of one element says nothing
    FusedAdam().step(spread, cupy.asarray(np.ones((4, 2), np.float32)))
    assert (params.host < 1).all()


# --- Streams ------------------------------------------------------------------------------------------------


def launches(cupy):
    return [entry for entry in cupy.log if entry[0] not in {"allocate", "synchronize"}]


def test_work_is_queued_on_the_current_stream_of_cupy(cupy):
    stream = cupy.cuda.Stream()
    with stream:
        FusedAdam().step(ones(cupy), ones(cupy))
    assert {entry[2] for entry in cupy.log} >= {stream.ptr}
    assert [entry[2] for entry in launches(cupy)] == [stream.ptr]
    FusedAdam().step(ones(cupy), ones(cupy))
    assert launches(cupy)[-1][2] == 0


def test_a_stream_in_use_stays_in_use(cupy):
    mine, other = cupy.cuda.Stream(), cupy.cuda.Stream()
    mine.use()
    FusedAdam().step(ones(cupy), ones(cupy))
    FusedAdam().step(ones(cupy), ones(cupy), stream=other)
    assert [entry[2] for entry in launches(cupy)] == [mine.ptr, other.ptr]
    assert cupy.cuda.get_current_stream() is mine


def test_the_stream_of_a_device_that_is_not_current(cupy):
    with cupy.cuda.Device(1):
        params, grads, stream = ones(cupy), ones(cupy), cupy.cuda.Stream()
        stream.__enter__()
    FusedAdam().step(params, grads)
    assert launches(cupy)[-1][:3] == ("step", 1, stream.ptr)
    assert cupy.cuda.runtime.getDevice() == 0  # restored


@MODES
def test_the_current_stream_of_torch(cupy, monkeypatch, capturable):
    torch = ModuleType("torch")
    torch.cuda = SimpleNamespace(current_stream=lambda device: SimpleNamespace(cuda_stream=77 + device))
    monkeypatch.setitem(sys.modules, "torch", torch)

    class Tensor(Exported):
        pass

    Tensor.__module__ = "torch"
    cupy.cuda.Stream(77)
    opt = FusedAdam(capturable=capturable)
    opt.step(Tensor(ones(cupy)), Tensor(ones(cupy)))
    opt.lr = 0.5
    opt.step(Tensor(ones(cupy)), Tensor(ones(cupy)))
    assert {entry[2] for entry in launches(cupy)} == {77}


class TorchStream:
    def __init__(self, stream):
        self.cuda_stream = stream.ptr


class CuPyStream:
    def __init__(self, stream):
        self.ptr = stream.ptr


@pytest.mark.parametrize("form", [lambda s: s, lambda s: s.ptr, TorchStream, CuPyStream])
def test_a_stream_that_is_asked_for(cupy, form):
    stream = cupy.cuda.Stream()
    opt = FusedAdam(capturable=True)
    opt.step(ones(cupy), ones(cupy), stream=form(stream))
    opt.lr = 0.1
    assert [entry[2] for entry in launches(cupy)] == [stream.ptr] * 3


@pytest.mark.parametrize("stream", ["0", 1.5, True, None.__class__])
def test_what_is_no_stream(cupy, stream):
    name = type(stream).__name__
    message = f"stream must be a CUDA stream or its handle; got {name}."
    assert_refused(FusedAdam(), ones(cupy), ones(cupy), TypeError, message, stream=stream)


def test_gradients_of_another_stream(cupy):
    """The step waits for the stream that fills the gradients, and that one for the step."""
    params, filling = ones(cupy), cupy.cuda.Stream()
    FusedAdam().step(params, Exported(ones(cupy), stream=filling.ptr))
    assert [entry[:2] + entry[2:] for entry in launches(cupy)] == [
        ("wait", 0, 0, filling.ptr),
        ("step", 0, 0, 1),
        ("wait", 0, filling.ptr, 0),
    ]
    before = len(cupy.log)
    FusedAdam().step(params, Exported(ones(cupy), stream=1))  # two names of one stream
    assert [entry[0] for entry in launches(cupy)[3:]] == ["step"]
    assert before < len(cupy.log)


def test_two_optimizers_on_two_streams(cupy, rng):
    params, gradients = problem(rng, 65)
    runs = [(FusedAdam(), cupy.asarray(params), cupy.cuda.Stream()) for _ in range(2)]
    for grads in gradients:
        for opt, buffer, stream in runs:
            with stream:
                opt.step(buffer, cupy.asarray(grads))
    for opt, buffer, _ in runs:
        assert_same((opt, buffer), on_cpu(params, gradients))


# --- CUDA graphs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", FLAGS, ids=flags_id)
def test_a_replayed_step_counts_on_and_follows_lr(cupy, rng, flags, dtype):
    params, gradients = problem(rng, 65, dtype, steps=6)
    opt, buffer, sent = FusedAdam(capturable=True, **flags), cupy.asarray(params), cupy.asarray(gradients[0])
    expected, copied = FusedAdam(**flags), params.copy()
    stream = cupy.cuda.Stream()
    with stream:
        opt.step(buffer, sent)
        stream.begin_capture()
        opt.step(buffer, sent)
        graph = stream.end_capture()
        expected.step(copied, gradients[0])
        assert_same((opt, buffer), (expected, copied))  # capturing takes no step
        for k, grads in enumerate(gradients[1:]):
            opt.lr = expected.lr = 1e-3 * (k + 1)
            sent.host[:] = grads
            graph.launch(stream)
            expected.step(copied, grads)
    assert_same((opt, buffer), (expected, copied))


def test_what_cannot_be_captured(cupy):
    stream, params, grads = cupy.cuda.Stream(), ones(cupy), ones(cupy)
    opt, capturable = FusedAdam(), FusedAdam(capturable=True)
    opt.step(params, grads)
    with stream:
        stream.begin_capture()
        message = (
            "stream must not be in capture: every replay would repeat this step number."
            " Use FusedAdam(capturable=True)."
        )
        assert_refused(opt, params, grads, ValueError, message)
        message = "stream must not be in capture: the first step allocates the moments. Take one step before."
        assert_refused(capturable, params, grads, ValueError, message)
        stream.end_capture()
        capturable.step(params, grads)
        stream.begin_capture()
        with pytest.raises(ValueError, match="lr must be set outside of a capture"):
            capturable.lr = 0.1
        assert capturable.lr == 1e-3
