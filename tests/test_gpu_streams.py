"""On a real GPU: steps follow and precede the work of streams, and replay in graphs."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_libraries import DTYPES, MODES, CuPy, Numba, Torch, assert_same, on_cpu, problem
from oracles import FLAGS, flags_id

from fastadam import FusedAdam

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


def test_a_step_follows_what_its_stream_does_before(backend, streaming, rng):
    """On a stream that no other waits for: were the step on another, it would see the old gradients."""
    params, gradients = problem(rng, 1 << 22, steps=4)
    opt, buffer = FusedAdam(backend=backend), streaming.put(params)
    sources, sent = [streaming.put(grads) for grads in gradients], streaming.put(np.zeros_like(params))
    streaming.synchronize()
    with streaming.on(streaming.stream()):
        for source in sources:
            sent[:] = source
            opt.step(buffer, sent)
        sent[:] = 0
    assert_same(streaming, (opt, buffer), on_cpu(params, gradients))


def test_a_stream_that_is_asked_for(backend, streaming, rng):
    params, gradients = problem(rng, 4099)
    opt, buffer, stream = FusedAdam(backend=backend), streaming.put(params), streaming.stream()
    sources = [streaming.put(grads) for grads in gradients]
    streaming.synchronize()
    for source in sources:
        opt.step(buffer, source, stream=stream)
    assert_same(streaming, (opt, buffer), on_cpu(params, gradients))


def test_two_streams_at_once(backend, streaming, rng):
    params, gradients = problem(rng, 1 << 20, steps=5)
    sources = [streaming.put(grads) for grads in gradients]
    runs = [(FusedAdam(backend=backend), streaming.put(params), streaming.stream()) for _ in range(2)]
    streaming.synchronize()
    for source in sources:
        for opt, buffer, stream in runs:
            with streaming.on(stream):
                opt.step(buffer, source)
    expected = on_cpu(params, gradients)
    for opt, buffer, _ in runs:
        assert_same(streaming, (opt, buffer), expected)


def test_parameters_and_gradients_of_two_libraries(backend, rng):
    """Each on its own stream: the step waits for the gradients, and the next gradients for the step."""
    cupy, torch = CuPy(), Torch()
    params, gradients = problem(rng, 1 << 20, steps=4)
    opt, buffer, sent = FusedAdam(backend=backend), torch.put(params), cupy.put(np.zeros_like(params))
    sources = [cupy.put(grads) for grads in gradients]
    cupy.synchronize()
    with torch.on(torch.stream()), cupy.on(cupy.stream()):
        for source in sources:
            sent[:] = source
            opt.step(buffer, sent)
    assert_same(torch, (opt, buffer), on_cpu(params, gradients))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", FLAGS, ids=flags_id)
def test_a_graph_replays_with_a_changing_lr(backend, streaming, rng, flags, dtype):
    params, gradients = problem(rng, 4099, dtype, steps=5)
    opt, buffer = FusedAdam(backend=backend, capturable=True, **flags), streaming.put(params)
    sent = streaming.put(gradients[0])
    expected, copied = FusedAdam(**flags), params.copy()
    expected.step(copied, gradients[0])
    streaming.synchronize()
    stream = streaming.stream()
    with streaming.on(stream):
        opt.step(buffer, sent)
        streaming.synchronize()
        if isinstance(streaming, CuPy):
            stream.begin_capture()
            opt.step(buffer, sent)
            replay = stream.end_capture().launch
        else:
            graph = streaming.torch.cuda.CUDAGraph()
            with streaming.torch.cuda.graph(graph, stream=stream):
                opt.step(buffer, sent)
            replay = graph.replay
        for k, grads in enumerate(gradients[1:]):
            opt.lr = expected.lr = 1e-3 * (k + 2)
            streaming.fill(sent, grads)
            replay()
            expected.step(copied, grads)
    assert_same(streaming, (opt, buffer), (expected, copied))


def test_a_plain_step_refuses_a_capture(backend):
    library = CuPy()
    params, grads = library.put(np.ones(8, np.float32)), library.put(np.ones(8, np.float32))
    opt, stream = FusedAdam(backend=backend), library.stream()
    opt.step(params, grads)
    library.synchronize()
    with stream:
        stream.begin_capture()
        try:
            with pytest.raises(ValueError, match="stream must not be in capture"):
                opt.step(params, grads)
        finally:
            stream.end_capture()
    assert opt.state.step == 1


@pytest.mark.parametrize("capturable", [False, True], ids=["eager", "capturable"])
def test_the_current_device_and_stream_stay(backend, capturable):
    cupy, torch = CuPy(), Torch()
    mine, other = cupy.stream(), torch.stream()
    before = cupy.cupy.cuda.get_current_stream()
    params, grads = cupy.put(np.ones(8, np.float32)), cupy.put(np.ones(8, np.float32))
    cupy.synchronize()
    mine.use()
    try:
        with torch.on(other):
            opt = FusedAdam(backend=backend, capturable=capturable)
            opt.step(params, grads)
            opt.step(params, grads, stream=cupy.stream())
            assert cupy.cupy.cuda.get_current_stream() == mine
            assert torch.torch.cuda.current_stream() == other
            assert cupy.cupy.cuda.runtime.getDevice() == 0
    finally:
        before.use()
        cupy.synchronize()


@MODES
def test_a_second_device(backend, rng, capturable):
    library = CuPy()
    if library.cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    params, gradients = problem(rng, 4099)
    opt = FusedAdam(backend=backend, capturable=capturable)
    with library.cupy.cuda.Device(1):
        buffer, sources = library.put(params), [library.put(grads) for grads in gradients]
    for grads in sources:
        opt.step(buffer, grads)
    assert library.cupy.cuda.runtime.getDevice() == 0
    with library.cupy.cuda.Device(1):
        assert_same(library, (opt, buffer), on_cpu(params, gradients))


@MODES
def test_a_loaded_state_is_there_before_the_first_step(backend, streaming, rng, capturable):
    """Also on a stream that waits for no other."""
    params, gradients = problem(rng, 1 << 22, steps=2)
    first, half = on_cpu(params, gradients[:1])
    opt = FusedAdam(backend=backend, capturable=capturable)
    opt.load_state_dict(first.state_dict())
    buffer, source = streaming.put(half), streaming.put(gradients[1])
    streaming.synchronize()
    with streaming.on(streaming.stream()):
        opt.step(buffer, source)
    assert_same(streaming, (opt, buffer), on_cpu(params, gradients))


@MODES
def test_a_capture_of_one_of_two_libraries(backend, capturable):
    cupy, torch = CuPy(), Torch()
    params, grads = torch.put(np.ones(8, np.float32)), cupy.put(np.ones(8, np.float32))
    opt, stream = FusedAdam(backend=backend, capturable=capturable), cupy.stream()
    cupy.synchronize()
    with stream:
        opt.step(params, grads)
        cupy.synchronize()
        stream.begin_capture()
        try:
            with pytest.raises(ValueError, match="flat_grads must be on the stream of flat_params"):
                opt.step(params, grads)
        finally:
            stream.end_capture()
        opt.step(params, grads)
    cupy.synchronize()
    assert opt.state.step == 2


def test_lr_is_set_in_order_on_another_stream(backend, streaming, rng):
    """After the steps that are queued, before those to come: large buffers keep the streams apart."""
    params, gradients = problem(rng, 1 << 22, steps=4)
    expected, copied = FusedAdam(), params.copy()
    opt, buffer = FusedAdam(backend=backend, capturable=True), streaming.put(params)
    sources = [streaming.put(grads) for grads in gradients]
    streaming.synchronize()
    last, now = streaming.stream(), streaming.stream()
    for k, (grads, source) in enumerate(zip(gradients, sources, strict=True)):
        with streaming.on(last):
            opt.step(buffer, source)
        with streaming.on(now):
            opt.lr = 0.1 * (k + 1)
        expected.step(copied, grads)
        expected.lr = 0.1 * (k + 1)
    assert_same(streaming, (opt, buffer), (expected, copied))


def test_numba_parameters_with_gradients_of_torch(backend, rng):
    numba, torch = Numba(), Torch()
    params, gradients = problem(rng, 1 << 20, steps=4)
    opt, buffer, sent = FusedAdam(backend=backend), numba.put(params), torch.put(np.zeros_like(params))
    sources = [torch.put(grads) for grads in gradients]
    torch.synchronize()
    with torch.on(torch.stream()):
        for source in sources:
            sent[:] = source
            opt.step(buffer, sent)
    assert_same(numba, (opt, buffer), on_cpu(params, gradients))
