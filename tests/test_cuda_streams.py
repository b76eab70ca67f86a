"""Streams and CUDA graphs without a GPU, behind a stand-in for CuPy: in which order work is queued."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from cuda_steps import DTYPES, MODES, Exported, assert_refused, assert_same, on_cpu, on_device, ones, problem
from oracles import FLAGS, flags_id
from tolerances import assert_same_bits

from fastadam import FusedAdam, backends

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


class DriverStream:
    def __init__(self, stream):
        self.stream = stream

    def __int__(self):
        return self.stream.ptr


DriverStream.__module__ = "cuda.bindings.driver"


@pytest.mark.parametrize(
    "form", [lambda s: s, lambda s: s.ptr, lambda s: np.int64(s.ptr), TorchStream, CuPyStream, DriverStream]
)
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
    FusedAdam().step(params, Exported(ones(cupy), stream=1))  # two names of one stream
    assert [entry[0] for entry in launches(cupy)[3:]] == ["step"]


def test_two_optimizers_on_two_streams(cupy, rng):
    params, gradients = problem(rng, 65)
    runs = [(FusedAdam(), cupy.asarray(params), cupy.cuda.Stream()) for _ in range(2)]
    for grads in gradients:
        for opt, buffer, stream in runs:
            with stream:
                opt.step(buffer, cupy.asarray(grads))
    for opt, buffer, _ in runs:
        assert_same((opt, buffer), on_cpu(params, gradients))


def test_lr_is_set_in_order_with_the_last_step_and_the_next(cupy):
    """Also where another stream is current: replays may be queued there, and the next step on either."""
    last, now = cupy.cuda.Stream(), cupy.cuda.Stream()
    opt, params, grads = FusedAdam(capturable=True), ones(cupy), ones(cupy)
    with last:
        opt.step(params, grads)
    before = len(cupy.log)
    with now:
        opt.lr = 0.1
    assert [(entry[0], *entry[2:]) for entry in cupy.log[before:]] == [
        ("wait", now.ptr, last.ptr),
        ("set_lr", now.ptr, 1),
        ("wait", last.ptr, now.ptr),
    ]
    before = len(cupy.log)
    with last:
        opt.lr = 0.2
    assert [entry[0] for entry in cupy.log[before:]] == ["set_lr"]


# --- Steps that fail on their way ---------------------------------------------------------------------------


@pytest.fixture
def kernels(cupy):
    return backends.load("cupy")


def fail(monkeypatch, kernels, method, error, *, after=0, queue=False):
    """Let a method raise once it was called so many times; with ``queue`` it does its work before."""
    work, calls = getattr(kernels, method), []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) <= after:
            return work(*arguments)
        if queue:
            work(*arguments)
        monkeypatch.setattr(kernels, method, work)
        raise error

    monkeypatch.setattr(kernels, method, failing)


@pytest.mark.parametrize("taken", [0, 1])
@MODES
def test_a_launch_that_cuda_refuses_took_no_step(cupy, kernels, rng, monkeypatch, taken, capturable):
    params, gradients = problem(rng, 17, steps=taken + 1)
    opt, buffer = on_device(cupy, params, gradients[:taken], capturable=capturable)
    before = buffer.host.copy()
    launches_before_the_step = 1 if capturable else 0
    fail(monkeypatch, kernels, "launch", cupy.Refused("no"), after=launches_before_the_step)
    with pytest.raises(cupy.Refused):
        opt.step(buffer, cupy.asarray(gradients[taken]))
    assert opt.state.step == taken
    assert_same_bits(buffer.host, before)
    opt.step(buffer, cupy.asarray(gradients[taken]))
    assert_same((opt, buffer), on_cpu(params, gradients))


@MODES
def test_what_orders_streams_is_made_before_the_step(cupy, kernels, monkeypatch, capturable):
    opt, params = FusedAdam(capturable=capturable), ones(cupy)
    grads = Exported(ones(cupy), stream=cupy.cuda.Stream().ptr)
    opt.step(params, grads)
    for after in (0, 1):
        fail(monkeypatch, kernels, "event", cupy.Refused("no more"), after=after)
        before = params.host.copy()
        with pytest.raises(cupy.Refused):
            opt.step(params, grads)
        assert opt.state.step == 1
        assert_same_bits(params.host, before)


def test_an_interrupted_step_is_counted_with_its_work_on_the_device(cupy, kernels, rng, monkeypatch):
    params, gradients = problem(rng, 17)
    opt, buffer = on_device(cupy, params, gradients[:1], capturable=True)
    fail(monkeypatch, kernels, "launch", KeyboardInterrupt, after=1, queue=True)
    with pytest.raises(KeyboardInterrupt):
        opt.step(buffer, cupy.asarray(gradients[1]))
    opt.step(buffer, cupy.asarray(gradients[2]))
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
            "stream must not be in capture: a replay would know nothing of steps and changes since."
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
    with pytest.raises(ValueError, match="lr must be set outside of a capture"):
        capturable.lr = 0.1  # on another stream, but in order with the one in capture


@pytest.mark.parametrize("captured", ["params", "grads"])
@MODES
def test_a_capture_of_one_of_two_streams(cupy, captured, capturable):
    ours, theirs = cupy.cuda.Stream(), cupy.cuda.Stream()
    params, grads = ones(cupy), Exported(ones(cupy), stream=theirs.ptr)
    opt = FusedAdam(capturable=capturable)
    message = (
        "flat_grads must be on the stream of flat_params in a capture; got two streams."
        " Make one stream current in both libraries, or pass stream=."
    )
    with ours:
        for _ in range(2):  # the first step, and a later one
            stream = ours if captured == "params" else theirs
            stream.begin_capture()
            assert_stays(opt, message, params, grads)
            assert stream.end_capture().calls == []
            opt.step(params, grads)
        assert opt.state.step == 2
        if capturable:  # the remedy
            ours.begin_capture()
            opt.step(params, grads, stream=ours)
            assert len(ours.end_capture().calls) == 2


def assert_stays(opt, message, params, grads):
    taken, before = opt.state.step, params.host.copy()
    with pytest.raises(ValueError, match="stream") as caught:
        opt.step(params, grads)
    assert str(caught.value) == message
    assert opt.state.step == taken
    np.testing.assert_array_equal(params.host, before)
