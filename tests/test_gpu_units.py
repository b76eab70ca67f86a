"""On a real GPU: segments have the CPU's bits, telemetry too, in graphs as well."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_libraries import DTYPES, MODES, assert_same, of_backend, problem
from segment_steps import FEATURES

from fastadam import FusedAdam, Segment, schedules

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

WHOLE = {
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "skip_nonfinite": True,
    "ema_decay": 0.9,
    "zero_grads": True,
}
# Around chunks of 2,048, of warps, blocks and the second level of the tree.
SIZES = [40, 2049, 100_003, 2048 * 2048 + 4097]


def parts(size):
    """Segments with every hyperparameter, touching, of one element, frozen."""
    return [
        Segment(0, 3, lr=0.05),
        Segment(3, 4, weight_decay=0.0),
        Segment(5, size // 3, weight_decay=0.3, betas=(0.8, 0.5)),
        Segment(size // 3, size // 3 + 2, frozen=True),
        Segment(size // 2, size - 3, lr=0.0, eps=1e-3, betas=(0.3, 0.999)),
        Segment(size - 1, size, lr=0.01, weight_decay=0.2),
    ]


def together(library, backend, params, gradients, scales=None, **options):
    """Step on the CPU and on the device with the same gradients; return both as (optimizer, parameters)."""
    cpu = FusedAdam(backend="cpu", **{**options, "capturable": False}), params.copy()
    device = FusedAdam(backend=backend, **options)
    buffer = library.put(params)
    for k, grads in enumerate(gradients):
        sent, left = library.put(grads), grads.copy()
        scale = None if scales is None else scales[k]
        cpu[0].step(cpu[1], left, grad_scale=scale)
        device.step(buffer, sent, grad_scale=scale)
        np.testing.assert_array_equal(library.get(sent), left)
        assert repr(device.last_step) == repr(cpu[0].last_step)  # NaN is NaN
    return (device, buffer), cpu


@MODES
@pytest.mark.parametrize("telemetry", [False, True], ids=["segments", "telemetry"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_phase(backend, rng, dtype, telemetry, capturable):
    library = of_backend(backend)
    for size in SIZES:
        params, gradients = problem(rng, size, dtype, steps=3)
        gradients[1][size // 4] = np.inf
        options = {**WHOLE, "capturable": capturable, "telemetry": telemetry}
        scales = [8.0, 3.0, 1e-3]
        device, cpu = together(library, backend, params, gradients, scales, segments=parts(size), **options)
        assert_same(library, device, cpu)


@pytest.mark.parametrize("feature", FEATURES)
def test_features(backend, library, rng, feature):
    params, gradients = problem(rng, 4099)
    for segments in (parts(4099), ()):
        device, cpu = together(
            library, backend, params, gradients, telemetry=True, segments=segments, **FEATURES[feature]
        )
        assert_same(library, device, cpu)


def test_ten_thousand_segments(backend, rng):
    library = of_backend(backend)
    segments = [
        Segment(100 * k, 100 * k + 99, lr=k % 7 / 10, weight_decay=k % 2 / 10, frozen=k % 11 == 0)
        for k in range(10_000)
    ]
    params, gradients = problem(rng, 1_000_000)
    device, cpu = together(
        library, backend, params, gradients, telemetry=True, segments=segments, max_grad_norm=1.0
    )
    assert_same(library, device, cpu)


def test_schedules_of_segments_with_skipped_steps(backend, rng):
    library = of_backend(backend)
    segments = [
        Segment(0, 1, lr=schedules.linear_warmup(schedules.cosine(0.1, 350), 20)),
        Segment(1, 2, lr=lambda step: 1 / step),
    ]
    params, gradients = problem(rng, 257, steps=400)
    for grads in gradients[::3]:
        grads[1] = np.nan
    device, cpu = together(
        library, backend, params, gradients, telemetry=False, segments=segments, skip_nonfinite=True
    )
    assert_same(library, device, cpu)


@MODES
def test_changes_between_steps(backend, library, rng, capturable):
    params, gradients = problem(rng, 4099, steps=6)
    cpu, device = FusedAdam(), FusedAdam(backend=backend, capturable=capturable)
    copied, buffer = params.copy(), library.put(params)
    for k, grads in enumerate(gradients):
        for opt in (cpu, device):
            if k == 3 and capturable:
                opt.reset()
            if k % 3 == 0:
                opt.segments = parts(4099)[k // 3 :]
            opt.lr = 0.01 * (k + 1)
        cpu.step(copied, grads)
        device.step(buffer, library.put(grads))
    assert_same(library, (device, buffer), (cpu, copied))


@MODES
def test_the_whole_sum_is_cleared(backend, library, rng, capturable):
    params, gradients = problem(rng, 4099, steps=4)
    segments = [Segment(0, 2049, frozen=True)]
    cpu = FusedAdam(segments=segments)
    device = FusedAdam(backend=backend, segments=segments, capturable=capturable)
    copied, buffer = params.copy(), library.put(params)
    for k, grads in enumerate(gradients):
        cpu.accumulate(grads)
        device.accumulate(library.put(grads))
        if k % 2:
            cpu.step(copied)
            device.step(buffer)
    assert_same(library, (device, buffer), (cpu, copied))
    total = device._accumulator
    assert not total._kernels.to_host(total._memory, total.total.device).any()


@pytest.mark.parametrize("telemetry", [False, True], ids=["segments", "telemetry"])
def test_a_replay(backend, rng, telemetry):
    library = of_backend("cupy")
    params, gradients = problem(rng, 4099, steps=6)
    gradients[3][9] = np.nan
    segments = parts(4099)
    options = {**WHOLE, "segments": segments, "telemetry": telemetry}
    cpu, copied = FusedAdam(backend="cpu", **options), params.copy()
    opt = FusedAdam(backend=backend, capturable=True, **options)
    buffer, sent = library.put(params), library.put(gradients[0])
    library.synchronize()
    stream = library.stream()
    with library.on(stream):
        opt.step(buffer, sent)
        library.synchronize()
        stream.begin_capture()
        opt.step(buffer, sent)
        graph = stream.end_capture()
        cpu.step(copied, gradients[0].copy())
        for k, grads in enumerate(gradients[1:]):
            opt.lr = cpu.lr = 0.01 * (k + 1)
            library.fill(sent, grads)
            graph.launch(stream)
            cpu.step(copied, grads.copy())
            if telemetry:
                assert repr(opt.last_step) == repr(cpu.last_step)  # NaN is NaN
    assert_same(library, (opt, buffer), (cpu, copied))
