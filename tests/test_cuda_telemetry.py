"""Telemetry in GPU memory without a GPU, behind the stand-in for CuPy: the bits of the CPU."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from cuda_steps import DTYPES, MODES, assert_same, ones, problem
from test_run_chunks import by_levels
from trees import literal_tree
from unit_steps import KINDS, Pair, parts, take

from fastadam import FusedAdam, Segment
from fastadam.kernels import cuda_clock, cuda_source, cuda_units, run_chunks
from fastadam.kernels.run_chunks import RunChunks
from fastadam.kernels.tree import CHUNK
from fastadam.kernels.units import Units

SIZES = [1, 31, 33, CHUNK, CHUNK + 1, 3 * CHUNK + 77]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_seen(cupy, rng, dtype, kind):
    """With the gradient as given, whatever becomes of it, and in the order of the tree."""
    for size in SIZES if kind == "plain" else SIZES[-2:]:
        params, gradients = problem(rng, size, dtype)
        if size > 40:
            gradients[0][3:9], gradients[1][7] = 0, np.nan
            gradients[2][size // 2 :: 40] = -np.inf
        flags = {**KINDS[kind], "segments": parts(size) if size > 40 else ()}
        take(Pair(cupy, params, telemetry=True, **flags), gradients, [None, 3.0, 1e-3])


@MODES
def test_updates_that_vanish(cupy, rng, capturable):
    """A step so small that it rounds to nothing; without a moment or a learning rate there is none."""
    params = np.full(100, 1e4, np.float32)
    grads = np.ones(100, np.float32)
    grads[:10] = 0
    segments = [Segment(20, 30, lr=0.0), Segment(30, 40, frozen=True), Segment(50, 60, lr=1.0)]
    pair = Pair(cupy, params, telemetry=True, segments=segments, lr=1e-6, capturable=capturable)
    pair.step(grads)
    assert pair.device.last_step.vanished == 100 - 10 - 10 - 10 - 10
    assert pair.device.last_step.update_norm == pytest.approx(np.sqrt(10), rel=1e-3)


def test_it_changes_no_bit(cupy, rng):
    params, gradients = problem(rng, 3 * CHUNK)
    flags = {"weight_decay": 0.1, "amsgrad": True, "ema_decay": 0.9, "max_grad_norm": 1.0, "zero_grads": True}
    plain, cpu = FusedAdam(**flags), FusedAdam(backend="cpu", **flags)
    opt, buffer, copied = FusedAdam(telemetry=True, **flags), cupy.asarray(params), params.copy()
    other = cupy.asarray(params)
    for grads in gradients:
        opt.step(buffer, cupy.asarray(grads))
        plain.step(other, cupy.asarray(grads))
        cpu.step(copied, grads.copy())
    assert_same((opt, buffer), (cpu, copied))
    assert_same((plain, other), (cpu, copied))
    assert opt.last_step.grad_norm == plain.last_step.grad_norm
    assert plain.last_step.update_norm is None


def test_it_is_turned_on_and_off(cupy, rng):
    params, gradients = problem(rng, 65, steps=4)
    opt, buffer = FusedAdam(), cupy.asarray(params)
    for grads, on in zip(gradients, (False, True, False, True), strict=True):
        opt.telemetry = on
        opt.step(buffer, cupy.asarray(grads))
        assert (opt.last_step.param_norm is not None) is on
        assert (opt.last_step.nonfinite is not None) is on
    assert opt.state.step == 4


def test_a_copy_that_shares_the_moments_has_its_own(cupy):
    opt, params = FusedAdam(segments=[Segment(0, 1)]), ones(cupy)
    opt.step(params, ones(cupy))
    twin = copy.copy(opt)
    twin.telemetry = True
    for one, on in ((twin, True), (opt, False), (twin, True)):
        one.step(params, ones(cupy))
        assert (one.last_step.param_norm is not None) is on
    assert opt.state.step == 4


@MODES
@pytest.mark.parametrize(
    "options", [{}, {"telemetry": True}, {"segments": [Segment(0, 1)]}, {"max_grad_norm": 0.1}]
)
def test_copies_that_share_the_moments_have_their_own_numbers(cupy, options, capturable):
    """They share what counts on the device, too."""
    device = [FusedAdam(lr=0.1, capturable=capturable, **options), ones(cupy)]
    cpu = [FusedAdam(lr=0.1, backend="cpu", **options), np.ones(8, np.float32)]
    for (opt, params), grads in ((device, ones(cupy)), (cpu, np.ones(8, np.float32))):
        opt.step(params, grads)
        twin = copy.copy(opt)
        if not capturable:
            twin.betas = (0.0, 0.0)
        twin.lr = 0.5
        twin.step(params, grads)
        opt.step(params, grads)
        assert (opt.lr, twin.lr) == (0.1, 0.5)
        assert (opt.last_step.lr, twin.last_step.lr) == (0.1, 0.5)
        opt.lr = 0.2
        opt.step(params, grads)
        twin.step(params, grads)
    assert_same(device, cpu)


def test_what_was_seen_is_read_when_asked(cupy):
    opt, params = FusedAdam(telemetry=True), ones(cupy)
    opt.step(params, ones(cupy))
    first, seen = opt.last_step, float(np.linalg.norm(params.host.astype(np.float64)))
    before = len(cupy.log)
    opt.step(params, ones(cupy))
    assert ("synchronize", 0, None) not in cupy.log[before:]
    assert first.param_norm == pytest.approx(seen, rel=1e-12)
    assert ("synchronize", 0, None) in cupy.log[before:]
    assert opt.last_step.param_norm < first.param_norm


def test_runs_of_two_levels(cupy, rng, monkeypatch):
    """With chunks of 32 elements, of which a buffer as small as this has thousands."""
    chunk = 32
    for module in (cuda_clock, cuda_source, cuda_units, run_chunks):
        monkeypatch.setattr(module, "CHUNK", chunk)
    sizes = (1, 3 * chunk + 1, chunk * chunk + 5, 7, chunk * chunk * 2 + 33)
    stops = np.cumsum([size + 1 for size in sizes])
    segments = [Segment(int(stop) - 1, int(stop), frozen=True) for stop in stops]
    params, (grads,) = problem(rng, int(stops[-1]), steps=1)
    opt, buffer = FusedAdam(telemetry=True, segments=segments, max_grad_norm=1.0), cupy.asarray(params)
    before = len(cupy.log)
    opt.step(buffer, cupy.asarray(grads))
    names = [entry[0] for entry in cupy.log[before:]]
    assert names.count("sum_groups") == 2 * 2

    units = np.array([(stop - 1 - size, stop - 1, 0) for size, stop in zip(sizes, stops, strict=True)])
    chunks = RunChunks(Units(units))
    assert len(chunks.levels) == 2

    def tree(terms):
        sums = [lanes(terms[a:b]) for a, b in chunks.bounds.tolist()]
        return by_levels(chunks, sums, lambda values: literal_tree(values, chunk=chunk))

    grads, was, now = (array.astype(np.float64) for array in (grads, params, buffer.host))
    assert opt.last_step.grad_norm == np.sqrt(tree(grads * grads))
    assert opt.last_step.update_norm == np.sqrt(tree((now - was) ** 2))
    assert opt.last_step.param_norm == np.sqrt(tree(now * now))


def lanes(terms):
    """The sum of a chunk of at most 32 terms: one each lane, folded."""
    sums = np.zeros(32)
    sums[: len(terms)] = terms
    for width in (16, 8, 4, 2, 1):
        sums = sums[:width] + sums[width : 2 * width]
    return float(sums[0])
