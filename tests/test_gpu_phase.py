"""On a real GPU: the whole optimizer phase, decided on the device, has the CPU's bits."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_libraries import DTYPES, MODES, assert_same, of_backend, problem

from fastadam import FusedAdam, schedules

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

WHOLE = {
    "lr": 0.01,
    "weight_decay": 0.1,
    "decoupled_weight_decay": True,
    "max_grad_norm": 1.0,
    "max_grad_value": 0.01,
    "skip_nonfinite": True,
    "ema_decay": 0.9,
    "zero_grads": True,
}
# Around chunks of 2,048, of warps, blocks and the second level of the tree.
SIZES = [0, 1, 33, 2047, 2049, 100_003, 2048 * 2048 + 4097]


def together(library, backend, params, gradients, options, scales=None):
    cpu = FusedAdam(backend="cpu", **{**options, "capturable": False}), params.copy()
    device = FusedAdam(backend=backend, **options), library.put(params)
    for k, grads in enumerate(gradients):
        sent, scale = library.put(grads), None if scales is None else scales[k]
        cpu[0].step(cpu[1], grads.copy(), grad_scale=scale)
        device[0].step(device[1], sent, grad_scale=scale)
        assert repr(device[0].last_step) == repr(cpu[0].last_step)  # NaN is NaN
        if options.get("zero_grads"):
            assert not library.get(sent).any()
    return device, cpu


@MODES
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_phase(backend, rng, dtype, capturable):
    library = of_backend(backend)
    for size in SIZES:
        params, gradients = problem(rng, size, dtype, steps=4)
        if size:
            gradients[1][size // 2] = np.inf
            gradients[2][-1] = np.nan
        options = {**WHOLE, "capturable": capturable}
        device, cpu = together(library, backend, params, gradients, options, scales=[8.0, 3.0, 1.0, 1e-3])
        assert_same(library, device, cpu)
        for opt, buffer in (device, cpu):
            opt.swap_ema(buffer)
        assert_same(library, device, cpu)


@pytest.mark.parametrize("feature", ["max_grad_norm", "skip_nonfinite", "max_grad_value", "ema_decay"])
def test_each_alone(backend, library, rng, feature):
    value = {"skip_nonfinite": True}.get(feature, 0.5)
    params, gradients = problem(rng, 4099)
    device, cpu = together(library, backend, params, gradients, {feature: value, "amsgrad": True})
    assert_same(library, device, cpu)


def test_a_scale_in_device_memory(backend, library, rng):
    params, gradients = problem(rng, 4099)
    cpu, device = FusedAdam(max_grad_norm=2.0), FusedAdam(backend=backend, max_grad_norm=2.0)
    copied, buffer, scale = params.copy(), library.put(params), library.put(np.ones(1, np.float32))
    for k, grads in enumerate(gradients):
        library.fill(scale, np.full(1, 1.7 * (k + 1), np.float32))
        cpu.step(copied, grads, grad_scale=float(np.float32(1.7 * (k + 1))))
        device.step(buffer, library.put(grads), grad_scale=scale)
    assert_same(library, (device, buffer), (cpu, copied))


def test_a_schedule_with_skipped_steps(backend, rng):
    library = of_backend(backend)
    options = {"lr": schedules.linear_warmup(schedules.cosine(0.1, 400), 20), "skip_nonfinite": True}
    params, gradients = problem(rng, 257, steps=600)
    for grads in gradients[::3]:
        grads[1] = np.nan
    device, cpu = together(library, backend, params, gradients, options)
    assert_same(library, device, cpu)


def test_a_replay_clips_and_skips(backend, rng):
    library = of_backend("cupy")
    params, gradients = problem(rng, 4099, steps=8)
    gradients[3][9], gradients[5][0] = np.nan, np.inf
    cpu, copied = FusedAdam(backend="cpu", **WHOLE), params.copy()
    opt, buffer = FusedAdam(backend=backend, capturable=True, **WHOLE), library.put(params)
    sent, scale = library.put(gradients[0]), library.put(np.full(1, 2.0, np.float32))
    library.synchronize()
    stream = library.stream()
    with library.on(stream):
        opt.step(buffer, sent, grad_scale=scale)
        library.synchronize()
        stream.begin_capture()
        opt.step(buffer, sent, grad_scale=scale)
        graph = stream.end_capture()
        cpu.step(copied, gradients[0].copy(), grad_scale=2.0)
        for k, grads in enumerate(gradients[1:]):
            opt.lr = cpu.lr = 0.01 * (k + 1)
            library.fill(sent, grads)
            library.fill(scale, np.full(1, k + 1.0, np.float32))
            graph.launch(stream)
            cpu.step(copied, grads.copy(), grad_scale=k + 1.0)
    assert_same(library, (opt, buffer), (cpu, copied))


@MODES
def test_accumulated_gradients(backend, library, rng, capturable):
    params, gradients = problem(rng, 4099, steps=4)
    cpu, device = FusedAdam(), FusedAdam(backend=backend, capturable=capturable)
    copied, buffer = params.copy(), library.put(params)
    for k, grads in enumerate(gradients):
        cpu.accumulate(grads)
        device.accumulate(library.put(grads))
        if k % 2:
            cpu.step(copied, grad_scale=3.0)
            device.step(buffer, grad_scale=3.0)
    assert_same(library, (device, buffer), (cpu, copied))
