"""On a real GPU: 16-bit and 8-bit storage has the CPU's bits, eager, captured, with segments and sums."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from block_cases import BLOCK_CASES, assert_same_state, gradients_of
from gpu_libraries import MODES, of_backend
from storage_cases import CASES, DTYPES, case_id, encoded, options
from tolerances import assert_same_bits
from unit_steps import parts

from fastadam import FusedAdam, Segment

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

BF16 = ml_dtypes.bfloat16
ODD = {"seed": 3, "offset": 2**32 - 1000}
"""Other random bits than by default, and two keys for one buffer."""


def put(library, array):
    """Return an array of the library, of its own bfloat16 if it has one."""
    if array.dtype != BF16:
        return library.put(array)
    codes = library.put(array.view(np.int16))
    return codes.view(library.torch.bfloat16 if hasattr(library, "torch") else BF16)


def get(library, array):
    """Return a copy of it in CPU memory."""
    if "bfloat16" not in str(array.dtype):
        return library.get(array)
    codes = array.view(library.torch.int16 if hasattr(library, "torch") else np.int16)
    return library.get(codes).view(BF16)


def problem(rng, size, params="bfloat16", grads="bfloat16", steps=3):
    gradients = (10.0 ** rng.uniform(-6, 3, (steps, size)) * rng.standard_normal((steps, size))).astype("f4")
    return encoded(rng.standard_normal(size).astype("f4"), params), [encoded(g, grads) for g in gradients]


def assert_same(library, device, cpu):
    (opt, params), (expected, expected_params) = device, cpu
    library.synchronize()
    assert_same_bits(get(library, params), expected_params, "params")
    saved, wanted = opt.state_dict(), expected.state_dict()
    assert saved["step"] == wanted["step"]
    for name, moment in expected.state.moments.items():
        assert_same_bits(saved[name].view(moment.dtype), moment, name)


def together(library, backend, size, case, rng, *, capturable=False, **flags):
    """Step on the CPU and on the device with the same gradients, of which one is not finite."""
    flags = {**options(case), **ODD, **flags, "segments": parts(size) if case["segments"] else ()}
    params, gradients = problem(rng, size, case["params"], case["grads"], steps=4)
    cpu = FusedAdam(backend="cpu", **flags)
    device = FusedAdam(backend=backend, capturable=capturable, **flags)
    buffer, out = put(library, params), None if case["out"] is None else np.zeros(size, DTYPES[case["out"]])
    there = None if out is None else put(library, out)
    for k, left in enumerate(gradients):
        left[size // 2] = np.inf if k == 1 else 1
        sent = put(library, left)
        cpu.step(params, left, out=out, grad_scale=case["grad_scale"])
        device.step(buffer, sent, out=there, grad_scale=case["grad_scale"])
        assert repr(device.last_step) == repr(cpu.last_step)  # NaN is NaN
        library.synchronize()
        assert_same_bits(get(library, sent), left, "gradients")
        if out is not None:
            assert_same_bits(get(library, there), out, "out")
    assert_same(library, (device, buffer), (cpu, params))


@MODES
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_all_pairs_of_features(backend, rng, case, capturable):
    library = of_backend(backend)
    for size in (75, 100_003):
        for rounding in ("stochastic", "nearest"):
            together(library, backend, size, case, rng, capturable=capturable, rounding=rounding)


@MODES
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_telemetry(backend, rng, case, capturable):
    library = of_backend(backend)
    for size in (75, 100_003):
        together(library, backend, size, case, rng, capturable=capturable, telemetry=True)


@pytest.mark.parametrize("kind", DTYPES)
def test_arrays_of_each_library(backend, library, rng, kind):
    params, gradients = problem(rng, 4099, kind, kind)
    cpu = FusedAdam(state_dtype="bfloat16", zero_grads=True), params.copy()
    device = FusedAdam(backend=backend, state_dtype="bfloat16", zero_grads=True), put(library, params)
    for grads in gradients:
        sent = put(library, grads)
        cpu[0].step(cpu[1], grads)
        device[0].step(device[1], sent)
        library.synchronize()
        assert_same_bits(get(library, sent), grads)
    assert_same(library, device, cpu)


def test_every_code_is_read_and_written(backend, rng):
    """To the nearest: codes of each format become parameters of the others, without a change."""
    library, every = of_backend(backend), np.arange(2**16, dtype=np.uint16)
    for kind in ("bfloat16", "float16"):
        params = every.view(DTYPES[kind]).copy()
        grads, still = np.ones_like(params), {"lr": 0.0, "rounding": "nearest"}
        for out in DTYPES:
            expected = np.zeros(2**16, DTYPES[out])
            buffer, there = put(library, params), put(library, expected)
            FusedAdam(backend=backend, **still).step(buffer, put(library, grads), out=there)
            FusedAdam(**still).step(params.copy(), grads, out=expected)
            library.synchronize()
            assert_same_bits(get(library, there), expected)
            assert_same_bits(get(library, buffer), params)


@MODES
@pytest.mark.parametrize("grads", DTYPES)
def test_accumulated_gradients(backend, library, rng, grads, capturable):
    params, gradients = problem(rng, 4099, "bfloat16", grads, steps=4)
    cpu = FusedAdam(state_dtype="bfloat16")
    device = FusedAdam(backend=backend, state_dtype="bfloat16", capturable=capturable)
    buffer = put(library, params)
    for k, each in enumerate(gradients):
        cpu.accumulate(each)
        device.accumulate(put(library, each))
        if k % 2:
            cpu.step(params, grad_scale=3.0)
            device.step(buffer, grad_scale=3.0)
    assert_same(library, (device, buffer), (cpu, params))


@pytest.mark.parametrize("telemetry", [False, True], ids=["plain", "telemetry"])
@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
def test_a_replay_draws_anew(backend, rng, state_dtype, telemetry):
    library = of_backend("cupy")
    params, gradients = problem(rng, 4099, steps=8)
    gradients[3][9] = np.nan  # is skipped, and its bits are drawn by the next one
    flags = {"state_dtype": state_dtype, "skip_nonfinite": True, "telemetry": telemetry, **ODD}
    cpu = FusedAdam(backend="cpu", **flags)
    opt, buffer = FusedAdam(backend=backend, capturable=True, **flags), put(library, params)
    sent = put(library, gradients[0])
    library.synchronize()
    stream = library.stream()
    with library.on(stream):
        opt.step(buffer, sent)
        library.synchronize()
        stream.begin_capture()
        opt.step(buffer, sent)
        graph = stream.end_capture()
        cpu.step(params, gradients[0])
        for grads in gradients[1:]:
            library.fill(sent.view(np.int16), grads.view(np.int16))
            graph.launch(stream)
            cpu.step(params, grads)
    assert_same(library, (opt, buffer), (cpu, params))


def test_a_checkpoint_moves_between_machines(backend, rng):
    library = of_backend(backend)
    params, gradients = problem(rng, 4099, steps=4)
    flags = {"state_dtype": "bfloat16", "master_params": "split"}
    cpu, device = FusedAdam(backend="cpu", **flags), FusedAdam(backend=backend, **flags)
    ours, theirs = params.copy(), put(library, params)
    for grads in gradients[:2]:
        cpu.step(ours, grads)
        device.step(theirs, put(library, grads))
    for opt, source in (
        (FusedAdam(backend=backend, **flags), cpu),
        (FusedAdam(backend="cpu", **flags), device),
    ):
        opt.load_state_dict(source.state_dict())
        buffer = put(library, ours) if opt._backend != "cpu" else ours.copy()
        for grads in gradients[2:]:
            opt.step(buffer, grads if opt._backend == "cpu" else put(library, grads))
        found = buffer if opt._backend == "cpu" else get(library, buffer)
        expected = ours.copy()
        again = FusedAdam(backend="cpu", **flags)
        again.load_state_dict(cpu.state_dict())
        for grads in gradients[2:]:
            again.step(expected, grads)
        assert_same_bits(found, expected)


# --- Moments in 8 bits --------------------------------------------------------------------------------------


def in_blocks(library, backend, size, case, rng, *, capturable=False, **flags):
    """Step on the CPU and on the device with the same gradients, of which some are not finite."""
    flags = {**options(case), "seed": 3, "offset": 2**32 - 128, **flags}
    flags["segments"] = parts(size) if case["segments"] else ()
    params = encoded(rng.standard_normal(size).astype("f4"), case["params"])
    cpu = FusedAdam(backend="cpu", **flags)
    device = FusedAdam(backend=backend, capturable=capturable, **flags)
    buffer = put(library, params)
    for left in gradients_of(rng, size, case["grads"]):
        sent = put(library, left)
        cpu.step(params, left, grad_scale=case["grad_scale"])
        device.step(buffer, sent, grad_scale=case["grad_scale"])
        assert repr(device.last_step) == repr(cpu.last_step)  # NaN is NaN
        library.synchronize()
        assert_same_bits(get(library, sent), left, "gradients")
        assert_same_bits(get(library, buffer), params, "params")
        assert_same_state(device.state_dict(), cpu.state_dict())
    return device, cpu


@MODES
@pytest.mark.parametrize("case", BLOCK_CASES, ids=case_id)
def test_all_pairs_of_features_in_8_bits(backend, rng, case, capturable):
    library = of_backend(backend)
    for size in (300, 100_003):
        in_blocks(library, backend, size, case, rng, capturable=capturable)


@MODES
@pytest.mark.parametrize("case", BLOCK_CASES, ids=case_id)
def test_telemetry_in_8_bits(backend, rng, case, capturable):
    library = of_backend(backend)
    for size in (300, 100_003):
        in_blocks(library, backend, size, case, rng, capturable=capturable, telemetry=True)


def test_telemetry_of_thousands_of_segments(backend, rng):
    """Of which most blocks have elements of two, and of many blocks that begin at any lane."""
    library, size = of_backend(backend), 1_000_000
    frozen = [Segment(100 * k, 100 * k + 1, frozen=True) for k in range(5_000)]
    options = {"telemetry": True, "segments": [*frozen, Segment(500_000, 500_003, frozen=True)]}
    for state_dtype in ("8bit", "bfloat16"):
        params, gradients = problem(rng, size)
        cpu = FusedAdam(state_dtype=state_dtype, **options)
        device = FusedAdam(backend=backend, state_dtype=state_dtype, **options)
        buffer = put(library, params)
        for grads in gradients:
            cpu.step(params, grads)
            device.step(buffer, put(library, grads))
            assert device.last_step == cpu.last_step
        library.synchronize()
        assert_same_bits(get(library, buffer), params)
        assert_same_state(device.state_dict(), cpu.state_dict())


@pytest.mark.parametrize("telemetry", [False, True], ids=["plain", "telemetry"])
@pytest.mark.parametrize("size", [1, 127, 128, 129, 2**20 + 77])
def test_sizes_in_8_bits(backend, rng, size, telemetry):
    library = of_backend(backend)
    params, gradients = problem(rng, size + 1, "float32", "float32")
    for at in (0, 1):
        flags = {"state_dtype": "8bit", "telemetry": telemetry}
        cpu, device = (FusedAdam(backend=name, **flags) for name in ("cpu", backend))
        ours, theirs = params.copy(), put(library, params)
        for grads in gradients:
            cpu.step(ours[at:], grads[at:])
            device.step(theirs[at:], put(library, grads)[at:])
            assert device.last_step == cpu.last_step
        library.synchronize()
        assert_same_bits(get(library, theirs), ours)
        assert_same_state(device.state_dict(), cpu.state_dict())


def test_a_checkpoint_in_8_bits_moves_between_machines(backend, rng):
    library, case = of_backend(backend), {**BLOCK_CASES[0], "state_dtype": "8bit", "segments": False}
    device, cpu = in_blocks(library, backend, 4099, case, rng)
    flags = {**options(case), "seed": 3, "offset": 2**32 - 128}
    params = encoded(rng.standard_normal(4099).astype("f4"), case["params"])
    grads = encoded(rng.standard_normal(4099).astype("f4"), case["grads"])
    one, other = FusedAdam(backend=backend, **flags), FusedAdam(backend="cpu", **flags)
    one.load_state_dict(cpu.state_dict())
    other.load_state_dict(device.state_dict())
    buffer = put(library, params)
    one.step(buffer, put(library, grads))
    other.step(params, grads)
    library.synchronize()
    assert_same_bits(get(library, buffer), params)
    assert_same_state(one.state_dict(), other.state_dict())
