"""What GPU contenders are measured against besides peers: same traffic, a copy, a user's own kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from itertools import count

import numpy as np

from bench import gpu
from bench.gpu_buffers import Buffers, Running
from bench.gpu_timer import EventTimer
from bench.harness import Before, Timer
from bench.oracle import BETAS, EPS, LR, WrongUpdateError

MOST_COPIED = 2**31
"""Bytes: from there a copy's speed no longer depends on its length."""

LAUNCHES = ((256, None), (512, None), (1024, None), (256, 8), (512, 4), (1024, 2))
"""Of the same-traffic kernel: threads of a block, and blocks in multiples of what the device holds at once,
None for one pack per thread. The fastest is the reference, so that no launch flatters a step."""

SUM = """
static __device__ float4 sum(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
"""

_SAME_TRAFFIC = (
    SUM
    + """
extern "C" __global__ void same_traffic(float* p, const float* g, float* m, float* v, long long n) {
    const long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long threads = (long long)gridDim.x * blockDim.x;
    float4 *p4 = (float4*)p, *m4 = (float4*)m, *v4 = (float4*)v;
    for (long long i = first; i < n / 4; i += threads) {
        const float4 grad = ((const float4*)g)[i], a = m4[i], b = v4[i], c = p4[i];
        m4[i] = sum(a, grad);
        v4[i] = sum(b, grad);
        p4[i] = sum(c, grad);
    }
    for (long long i = n / 4 * 4 + first; i < n; i += threads) {
        m[i] += g[i];
        v[i] += g[i];
        p[i] += g[i];
    }
}
"""
)

_ELEMENTWISE = """
exp_avg += one_minus_beta1 * (grad - exp_avg);
exp_avg_sq += one_minus_beta2 * (grad * grad - exp_avg_sq);
param -= step_size * exp_avg / (sqrt(exp_avg_sq / bias_correction2) + eps);
"""


def start_same_traffic(buffers: Buffers) -> Running:
    """Return a kernel that reads 16 n and writes 12 n bytes in 16-byte packs; it has checked itself.

    ``m += g; v += g; p += g``. Its values stay normal however often it runs (:func:`bench.roofline.start`).
    """
    device, size = buffers.device, len(buffers.params)
    kernel = import_module("cupy").RawKernel(_SAME_TRAFFIC, "same_traffic")
    moments = device.empty(size), device.empty(size)
    for moment in moments:
        gpu.fill(moment, device.upload(buffers.host_params))
    arguments = (buffers.params, buffers.grads, *moments, np.int64(size))
    calls = [partial(kernel, *launch, arguments) for launch in launches(device, size)]

    buffers.restore()
    calls[0]()
    expected = buffers.host_params + buffers.host_grads
    if not all(gpu.same_bits(device, array, expected) for array in (buffers.params, *moments)):
        raise WrongUpdateError("the same-traffic kernel must add the gradient to three arrays; it does not.")
    return Running(fastest(calls, EventTimer(device)), 28 * size)


def launches(device: gpu.Device, size: int) -> list[tuple[tuple[int], tuple[int]]]:
    """Return the grid and the block of each of :data:`LAUNCHES`."""
    resident = device.facts()["multiprocessors"] * 2048  # threads; what a launch means, not what it may hold
    found = []
    for block, waves in LAUNCHES:
        blocks = max(1, -(-(size // 4) // block))
        found.append(((blocks if waves is None else min(blocks, waves * resident // block),), (block,)))
    return found


def fastest(
    calls: Sequence[Callable[[], object]], timer: Timer, before: Before = None
) -> Callable[[], object]:
    """Return the call of the least median time, in turns."""
    for call in calls:
        timer(call, before)
    times = np.array([[timer(call, before) for call in calls] for _ in range(7)])
    return calls[int(np.argmin(np.median(times, axis=0)))]


def _copied(size: int) -> int:
    """Return the bytes of a copy that moves those of a step, or as many as tell its speed."""
    return min(14 * size, MOST_COPIED) // 4 * 4


def copy_needs(size: int) -> int:
    """Return what :func:`start_copy` allocates."""
    return 2 * _copied(size)


def start_copy(buffers: Buffers) -> Running:
    """Return the driver's device-to-device copy; it has checked itself."""
    device, nbytes = buffers.device, _copied(len(buffers.params))
    source, to = device.empty(nbytes // 4), device.empty(nbytes // 4)
    gpu.fill(source, device.upload(buffers.host_params))
    gpu.fill(to, device.upload(buffers.host_grads))
    device.copy(to, source)
    if not gpu.same_bits(device, to, buffers.host_params):
        raise WrongUpdateError("the copy must copy; it does not.")
    return Running(partial(device.copy, to, source), 2 * nbytes)


def start_elementwise(buffers: Buffers) -> Running:
    """Return Adam as CuPy's users write it, in one ``ElementwiseKernel``."""
    kernel = import_module("cupy").ElementwiseKernel(
        "float32 grad, float32 one_minus_beta1, float32 one_minus_beta2, float32 step_size,"
        " float32 bias_correction2, float32 eps",
        "float32 param, float32 exp_avg, float32 exp_avg_sq",
        _ELEMENTWISE,
        "elementwise_adam",
    )
    params, grads = buffers.params, buffers.grads
    exp_avg, exp_avg_sq = buffers.device.empty(len(params)), buffers.device.empty(len(params))
    exp_avg.fill(0)
    exp_avg_sq.fill(0)
    steps = count(1)

    def step() -> None:
        t = next(steps)
        coefficients = (1 - BETAS[0], 1 - BETAS[1], LR / (1 - BETAS[0] ** t), 1 - BETAS[1] ** t, EPS)
        kernel(grads, *coefficients, params, exp_avg, exp_avg_sq)

    return Running(step, 28 * len(params))
