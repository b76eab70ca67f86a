"""The memory roofline of the optimizer phase on a GPU: two passes with its traffic, in CuPy.

As :mod:`bench.phase_roofline`: one that reads the gradients and sums them, for the norm must be known before
the first element is clipped; and one that moves what a step moves. Together 44 bytes per float32 element.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from bench import gpu, gpu_references
from bench.gpu_buffers import Buffers, Running
from bench.gpu_timer import EventTimer
from bench.oracle import WrongUpdateError

READ = """
extern "C" __global__ void read_gradients(const float* __restrict__ g, long long n, float* sums) {
    __shared__ float lanes[1024];
    const long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long threads = (long long)gridDim.x * blockDim.x;
    float total = 0;
#pragma unroll 4
    for (long long i = first; i < n / 4; i += threads) {
        const float4 grad = ((const float4*)g)[i];
        total += (grad.x + grad.y) + (grad.z + grad.w);
    }
    for (long long i = n / 4 * 4 + first; i < n; i += threads) total += g[i];
    lanes[threadIdx.x] = total;
    for (unsigned width = blockDim.x / 2; width > 0; width /= 2) {
        __syncthreads();
        if (threadIdx.x < width) lanes[threadIdx.x] += lanes[threadIdx.x + width];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = lanes[0];
}
"""

MOVE = (
    gpu_references.SUM
    + """
extern "C" __global__ void move_all(float* p, float* g, float* m, float* v, float* a, long long n) {
    const long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long threads = (long long)gridDim.x * blockDim.x;
    float4 *p4 = (float4*)p, *g4 = (float4*)g, *m4 = (float4*)m, *v4 = (float4*)v, *a4 = (float4*)a;
    for (long long i = first; i < n / 4; i += threads) {
        const float4 grad = g4[i], b = m4[i], c = v4[i], d = p4[i], e = a4[i];
        m4[i] = sum(b, grad);
        v4[i] = sum(c, grad);
        p4[i] = sum(d, grad);
        a4[i] = sum(e, grad);
        g4[i] = make_float4(0, 0, 0, 0);
    }
    for (long long i = n / 4 * 4 + first; i < n; i += threads) {
        m[i] += g[i];
        v[i] += g[i];
        p[i] += g[i];
        a[i] += g[i];
        g[i] = 0;
    }
}
"""
)


def start_two_passes(buffers: Buffers) -> Running:
    """Return both passes, each by its fastest launch; they have checked themselves."""
    size = len(buffers.params)
    read, move = _fastest_read(buffers), _fastest_move(buffers)

    def step() -> None:
        read()
        move()

    return Running(step, 44 * size)


def start_read(buffers: Buffers) -> Running:
    """Return the first pass by its fastest launch; it has checked itself."""
    return Running(_fastest_read(buffers), 4 * len(buffers.params))


def _fastest_read(buffers: Buffers) -> Callable[[], object]:
    device, size = buffers.device, len(buffers.grads)
    kernel = import_module("cupy").RawKernel(READ, "read_gradients")
    launches = gpu_references.launches(device, size)
    sums = device.empty(max(blocks for (blocks,), _ in launches))
    calls: list[Callable[[], object]] = [
        partial(kernel, *launch, (buffers.grads, np.int64(size), sums)) for launch in launches
    ]
    call = gpu_references.fastest(calls, EventTimer(device), buffers.before)
    (blocks,), (block,) = launches[calls.index(call)]
    check_read(call, sums[:blocks], -(-size // (4 * blocks * block)), buffers)
    return call


def check_read(call: Callable[[], object], sums: Any, packs: int, buffers: Buffers) -> None:
    """Raise WrongUpdateError unless a call reads everything, so many packs by each thread.

    Of the magnitudes: random signs nearly cancel, so that a sum of half of the gradients would pass.
    """
    magnitudes = np.abs(buffers.host_grads)
    buffers.write_grads(magnitudes)
    if buffers.before is not None:
        buffers.before()
    call()
    repeats, rest = divmod(len(buffers.grads), magnitudes.size)
    wide = magnitudes.astype(np.float64)
    expected = repeats * wide.sum() + wide[:rest].sum()
    # An addition rounds by at most half of eps, relative. On the way from an element to the sum of its block
    # are one for each pack, three around, one for the tail, and ten to fold 1,024 threads.
    allowed = (packs + 14) * float(np.finfo(np.float32).eps) / 2
    error = abs(float(buffers.device.download(sums).sum(dtype=np.float64)) - expected)
    if not error <= allowed * expected:
        raise WrongUpdateError("the reading kernel must sum all gradients; it does not.")


def _fastest_move(buffers: Buffers) -> Callable[[], object]:
    """Return ``p += g; m += g; v += g; a += g; g = 0`` in 16-byte packs."""
    device, size = buffers.device, len(buffers.params)
    kernel = import_module("cupy").RawKernel(MOVE, "move_all")
    states = [device.empty(size) for _ in range(3)]
    arguments = (buffers.params, buffers.grads, *states, np.int64(size))
    calls = [partial(kernel, *launch, arguments) for launch in gpu_references.launches(device, size)]
    for state in states:
        gpu.fill(state, device.upload(buffers.host_params))
    buffers.restore()
    calls[0]()
    check_move(buffers, states)
    return gpu_references.fastest(calls, EventTimer(device), buffers.before)


def check_move(buffers: Buffers, states: list[Any]) -> None:
    """Raise WrongUpdateError unless the gradient was added to all, which began alike, and cleared."""
    device, moved = buffers.device, buffers.host_params + buffers.host_grads
    added = all(gpu.same_bits(device, array, moved) for array in (buffers.params, *states))
    if not (added and gpu.same_bits(device, buffers.grads, np.zeros(1, np.float32))):
        raise WrongUpdateError(
            "the moving kernel must add the gradient to four arrays and clear it; it does not."
        )
