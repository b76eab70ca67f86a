"""On a real GPU: every backend has the CPU's bits, for arrays of every library, on streams and in graphs.

``pytest -m gpu`` runs these; without a GPU they skip and say why.
"""

from __future__ import annotations

import numpy as np
import pytest
from oracles import FLAGS, flags_id
from tolerances import assert_same_bits

from fastadam import FusedAdam, backends
from fastadam.kernels import grids

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

DTYPES = ["float32", "float64"]
# Around packs, blocks, and the grid of a whole device, from where threads loop.
SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 33, 255, 257, 1023, 1025, 4096, 100_003]
MODES = pytest.mark.parametrize("capturable", [False, True], ids=["eager", "capturable"])


@pytest.fixture(scope="module", params=["cupy", "numba-cuda"])
def backend(request):
    status = backends.status()[request.param]
    if status != "ready":
        pytest.skip(f"{request.param}: {status}")
    return request.param


class CuPy:
    def __init__(self):
        self.cupy = pytest.importorskip("cupy")

    def put(self, array):
        return self.cupy.asarray(array)

    def get(self, array):
        return self.cupy.asnumpy(array)

    def fill(self, array, values):
        array.set(values)

    def stream(self):
        return self.cupy.cuda.Stream(non_blocking=True)

    def on(self, stream):
        return stream

    def synchronize(self):
        self.cupy.cuda.runtime.deviceSynchronize()


class Numba:
    def __init__(self):
        self.cuda = pytest.importorskip("numba.cuda")

    def put(self, array):
        return self.cuda.to_device(array)

    def get(self, array):
        return array.copy_to_host()

    def fill(self, array, values):
        array.copy_to_device(values)

    def synchronize(self):
        self.cuda.synchronize()


class Torch:
    def __init__(self):
        self.torch = pytest.importorskip("torch")
        if not self.torch.cuda.is_available():
            pytest.skip("this PyTorch sees no GPU")

    def put(self, array):
        return self.torch.from_numpy(np.array(array)).cuda()

    def get(self, array):
        return array.cpu().numpy()

    def fill(self, array, values):
        array.copy_(self.torch.from_numpy(values))

    def stream(self):
        return self.torch.cuda.Stream()

    def on(self, stream):
        return self.torch.cuda.stream(stream)

    def synchronize(self):
        self.torch.cuda.synchronize()


LIBRARIES = {"cupy": CuPy, "numba": Numba, "torch": Torch}


@pytest.fixture(params=LIBRARIES)
def library(request, backend):
    return LIBRARIES[request.param]()


@pytest.fixture(params=["cupy", "torch"])
def streaming(request, backend):
    """A library with a current stream."""
    return LIBRARIES[request.param]()


def problem(rng, size, dtype="float32", steps=3):
    params = rng.standard_normal(size).astype(dtype)
    return params, [
        (10.0 ** rng.uniform(-6, 3, size) * rng.standard_normal(size)).astype(dtype) for _ in range(steps)
    ]


def on_cpu(params, gradients, **options):
    opt, params = FusedAdam(**options), params.copy()
    for grads in gradients:
        opt.step(params, grads)
    return opt, params


def assert_same(library, device, cpu):
    (opt, params), (expected, expected_params) = device, cpu
    library.synchronize()
    assert_same_bits(library.get(params), expected_params, "params")
    saved, wanted = opt.state_dict(), expected.state_dict()
    assert saved["step"] == wanted["step"]
    for name in expected.state.moments:
        assert_same_bits(saved[name], wanted[name], name)


@MODES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", FLAGS, ids=flags_id)
def test_bits_of_the_cpu(backend, rng, flags, dtype, capturable):
    library = LIBRARIES["cupy" if backend == "cupy" else "numba"]()
    for size in SIZES:
        params, gradients = problem(rng, size, dtype)
        opt, buffer = FusedAdam(backend=backend, capturable=capturable, **flags), library.put(params)
        for grads in gradients:
            opt.step(buffer, library.put(grads))
        assert opt.backend == backend
        assert_same(library, (opt, buffer), on_cpu(params, gradients, **flags))


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_every_library(backend, library, rng, dtype):
    params, gradients = problem(rng, 4099, dtype)
    opt, buffer = FusedAdam(backend=backend), library.put(params)
    for grads in gradients:
        opt.step(buffer, library.put(grads))
    assert_same(library, (opt, buffer), on_cpu(params, gradients))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [FLAGS[0], FLAGS[-1]], ids=flags_id)
def test_special_values(backend, rng, flags, dtype):
    """Subnormals, too: nothing flushes them."""
    library = LIBRARIES["cupy" if backend == "cupy" else "numba"]()
    finfo = np.finfo(dtype)
    values = [0.0, 1.0, finfo.tiny, finfo.tiny / 2, finfo.smallest_subnormal, finfo.max, finfo.max / 2]
    values += [np.sqrt(finfo.max), np.sqrt(finfo.max) * 2, np.sqrt(finfo.tiny), 1e-20, np.inf, np.nan]
    values = np.array([sign * value for value in values for sign in (1, -1)]).astype(dtype)
    params, grads = (a.ravel() for a in np.meshgrid(values, values))
    gradients = [grads, np.roll(grads, 1), grads]
    opt, buffer = FusedAdam(backend=backend, **flags), library.put(params)
    for sent in gradients:
        opt.step(buffer, library.put(sent))
    assert_same(library, (opt, buffer), on_cpu(params, gradients, **flags))


@MODES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [FLAGS[0], FLAGS[-1]], ids=flags_id)
def test_a_thousand_steps_with_a_changing_lr(backend, library, rng, flags, dtype, capturable):
    params, (grads,) = problem(rng, 257, dtype, steps=1)
    device = FusedAdam(backend=backend, capturable=capturable, **flags), library.put(params)
    cpu, sent = (FusedAdam(**flags), params.copy()), library.put(grads)
    for k in range(1000):
        for (opt, buffer), gradient in ((device, sent), (cpu, grads)):
            opt.lr = 1e-3 / (1 + k % 7)
            opt.step(buffer, gradient)
    assert_same(library, device, cpu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offsets", [(0, 0), (1, 1), (2, 2), (3, 3), (0, 1), (2, 1)])
def test_any_alignment(backend, rng, dtype, offsets):
    library = LIBRARIES["cupy" if backend == "cupy" else "numba"]()
    params, gradients = problem(rng, 1031, dtype)
    buffer, sent = (library.put(np.zeros(1031 + 3, dtype))[offset : offset + 1031] for offset in offsets)
    library.fill(buffer, params)
    opt = FusedAdam(backend=backend)
    for grads in gradients:
        library.fill(sent, grads)
        opt.step(buffer, sent)
    assert_same(library, (opt, buffer), on_cpu(params, gradients))


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


def test_the_backends_agree_on_a_checkpoint(rng):
    for name in ("cupy", "numba-cuda"):
        if backends.status()[name] != "ready":
            pytest.skip(f"{name}: {backends.status()[name]}")
    library = CuPy()
    params, gradients = problem(rng, 1031, steps=6)
    saved, buffer = None, library.put(params)
    for name, part in (("cupy", gradients[:2]), ("numba-cuda", gradients[2:4]), ("cupy", gradients[4:])):
        opt = FusedAdam(backend=name)
        if saved is not None:
            opt.load_state_dict(saved)
        for grads in part:
            opt.step(buffer, library.put(grads))
        library.synchronize()
        saved = opt.state_dict()
    assert_same(library, (opt, buffer), on_cpu(params, gradients))


def test_the_compiled_kernel_loops_where_the_grid_ends(backend, rng, monkeypatch):
    """As with 2**31 elements and more, at a size that the CPU checks quickly."""
    library = LIBRARIES["cupy" if backend == "cupy" else "numba"]()
    monkeypatch.setattr(grids, "WAVES", 1)
    monkeypatch.setattr(grids, "blocks", lambda *_: 3)
    params, gradients = problem(rng, 100_003)
    opt, buffer = FusedAdam(backend=backend), library.put(params)
    for grads in gradients:
        opt.step(buffer, library.put(grads))
    assert_same(library, (opt, buffer), on_cpu(params, gradients))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(backend):
    cupy = pytest.importorskip("cupy")
    size = 2**31 + 1031
    free, _ = cupy.cuda.runtime.memGetInfo()
    if free < 18 * size:
        pytest.skip(f"needs {18 * size / 2**30:.0f} GiB of GPU memory; {free / 2**30:.0f} are free")
    pool = cupy.get_default_memory_pool()
    params, grads = cupy.empty(size, np.float32), cupy.empty(size, np.float32)
    pattern = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
    for start in range(0, size, pattern.size):
        stop = min(start + pattern.size, size)
        params[start:stop] = cupy.asarray(pattern[: stop - start])
        grads[start:stop] = cupy.asarray(pattern[::-1][: stop - start])
    opt = FusedAdam(backend=backend, lr=0.1)
    opt.step(params, grads)
    _, expected = on_cpu(pattern, [pattern[::-1].copy()], lr=0.1)
    for start in (0, (2**31 // pattern.size - 1) * pattern.size, size - 1031):
        got = cupy.asnumpy(params[start : start + pattern.size])
        assert_same_bits(got, expected[: got.size], f"params from {start}")
    wanted = cupy.asarray(expected)
    for start in range(0, size, pattern.size):
        assert bool((params[start : start + pattern.size] == wanted[: size - start]).all())
    opt.reset()
    del params, grads, wanted
    pool.free_all_blocks()
