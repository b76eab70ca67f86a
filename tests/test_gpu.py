"""On a real GPU: every backend has the CPU's bits, for arrays of every library, on streams and in graphs.

``pytest -m gpu`` runs these; without a GPU they skip and say why.
"""

from __future__ import annotations

import numpy as np
import pytest
from gpu_libraries import DTYPES, MODES, CuPy, assert_same, of_backend, on_cpu, problem
from oracles import FLAGS, PHASES, flags_id
from tolerances import assert_same_bits

from fastadam import FusedAdam, backends
from fastadam.kernels import grids

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

# Around packs, blocks, and the grid of a whole device, from where threads loop.
SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 33, 255, 257, 1023, 1025, 4096, 100_003]


@MODES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", FLAGS + PHASES, ids=flags_id)
def test_bits_of_the_cpu(backend, rng, flags, dtype, capturable):
    library = of_backend(backend)
    for size in SIZES:
        params, gradients = problem(rng, size, dtype)
        opt, buffer = FusedAdam(backend=backend, capturable=capturable, **flags), library.put(params)
        for grads in gradients:
            opt.step(buffer, library.put(grads))
        assert opt.backend == backend
        assert_same(library, (opt, buffer), on_cpu(params, gradients, **flags))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [FLAGS[0], *PHASES[-2:]], ids=flags_id)
@pytest.mark.parametrize("scale", [3.0, 2.0**16, 1e-3])
def test_bits_of_the_cpu_with_a_grad_scale(backend, rng, scale, flags, dtype):
    library = of_backend(backend)
    for size in (1, 9, 1025):
        params, gradients = problem(rng, size, dtype)
        opt, buffer = FusedAdam(backend=backend, **flags), library.put(params)
        for grads in gradients:
            sent = library.put(grads)
            opt.step(buffer, sent, grad_scale=scale)
            library.synchronize()
            wanted = np.zeros_like(grads) if opt.zero_grads else grads
            assert_same_bits(library.get(sent), wanted, "grads")
        assert_same(library, (opt, buffer), on_cpu(params, gradients, grad_scale=scale, **flags))


@MODES
@pytest.mark.parametrize("dtype", DTYPES)
def test_swap_with_the_average(backend, library, rng, dtype, capturable):
    params, gradients = problem(rng, 4099, dtype)
    opt = FusedAdam(backend=backend, capturable=capturable, **PHASES[-2])
    cpu, expected = on_cpu(params, gradients, **PHASES[-2])
    buffer = library.put(params)
    for grads in gradients:
        opt.step(buffer, library.put(grads))
    for _ in range(2):
        opt.swap_ema(buffer)
        cpu.swap_ema(expected)
        assert_same(library, (opt, buffer), (cpu, expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_every_library(backend, library, rng, dtype):
    params, gradients = problem(rng, 4099, dtype)
    opt, buffer = FusedAdam(backend=backend), library.put(params)
    for grads in gradients:
        opt.step(buffer, library.put(grads))
    assert_same(library, (opt, buffer), on_cpu(params, gradients))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [FLAGS[0], FLAGS[-1], *PHASES[-2:]], ids=flags_id)
def test_special_values(backend, rng, flags, dtype):
    """Subnormals, too: nothing flushes them."""
    library = of_backend(backend)
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
@pytest.mark.parametrize("flags", [FLAGS[0], FLAGS[-1], *PHASES[-2:]], ids=flags_id)
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
    library = of_backend(backend)
    params, gradients = problem(rng, 1031, dtype)
    buffer, sent = (library.put(np.zeros(1031 + 3, dtype))[offset : offset + 1031] for offset in offsets)
    library.fill(buffer, params)
    opt = FusedAdam(backend=backend)
    for grads in gradients:
        library.fill(sent, grads)
        opt.step(buffer, sent)
    assert_same(library, (opt, buffer), on_cpu(params, gradients))


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
    library = of_backend(backend)
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
