"""Steps in GPU memory without a GPU: the CUDA C++ kernels as host code, behind a stand-in for CuPy."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from cuda_steps import DTYPES, MODES, Exported, assert_same, on_cpu, on_device, ones, problem
from oracles import FLAGS, PHASES, flags_id
from tolerances import assert_same_bits

from fastadam import FusedAdam, backends, buffers, warmup
from fastadam.kernels import grids

SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 63, 65, 257, 1023]


@MODES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", FLAGS + PHASES, ids=flags_id)
def test_bits_of_the_cpu(cupy, rng, flags, dtype, capturable):
    for size in SIZES:
        params, gradients = problem(rng, size, dtype)
        device = on_device(cupy, params, gradients, capturable=capturable, **flags)
        assert_same(device, on_cpu(params, gradients, **flags))
        assert device[0].backend == "cupy"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [FLAGS[0], FLAGS[-1], *PHASES[-2:]], ids=flags_id)
def test_special_values(cupy, flags, dtype):
    finfo = np.finfo(dtype)
    values = [0.0, 1.0, finfo.tiny, finfo.tiny / 2, finfo.smallest_subnormal, finfo.max, np.inf, np.nan]
    values = np.array([sign * value for value in values for sign in (1, -1)]).astype(dtype)
    params, grads = (a.ravel() for a in np.meshgrid(values, values))
    gradients = [grads, np.roll(grads, 1), grads]
    assert_same(on_device(cupy, params, gradients, **flags), on_cpu(params, gradients, **flags))


@MODES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.5, 0.5), (0.99, 0.9), (0.9, 0.99999)])
def test_bits_over_many_steps_with_a_changing_lr(cupy, rng, dtype, betas, capturable):
    """Past the step from which the bias correction of the first moment is 1, too."""
    flags = {"betas": betas, "weight_decay": 0.05, "decoupled_weight_decay": True}
    params, (grads,) = problem(rng, 5, dtype, steps=1)
    device = FusedAdam(capturable=capturable, **flags), cupy.asarray(params)
    cpu = FusedAdam(**flags), params.copy()
    for k in range(1000):
        grads = np.roll(grads, 1)
        for (opt, buffer), sent in ((device, cupy.asarray(grads)), (cpu, grads)):
            opt.lr = 1e-3 / (1 + k % 7)
            opt.step(buffer, sent)
    assert_same(device, cpu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offsets", [(0, 0), (1, 1), (2, 2), (3, 3), (0, 1), (2, 1)])
def test_any_alignment(cupy, rng, dtype, offsets):
    """Aligned alike: packs with a head and a tail, in the moments too. Otherwise one by one."""
    params, gradients = problem(rng, 257, dtype)
    opt, itemsize = FusedAdam(), params.itemsize
    buffers = [cupy.asarray(np.zeros(257 + 19, dtype)) for _ in range(2)]
    # NumPy aligns to 16 bytes at least; do not count on more.
    views = [
        b[-b.data.ptr % 16 // itemsize + offset :][:257] for b, offset in zip(buffers, offsets, strict=True)
    ]
    views[0].host[:] = params
    for grads in gradients:
        views[1].host[:] = grads
        opt.step(*views)
    assert_same((opt, views[0]), on_cpu(params, gradients))

    lanes = 16 // itemsize
    pointers = [view.data.ptr for view in [*views, *opt.state.arrays]]
    head, packs = grids.packs(pointers, itemsize, 257)
    if offsets[0] % lanes == offsets[1] % lanes:
        assert head == -offsets[0] % lanes
        assert packs == (257 - head) // lanes
    else:
        assert (head, packs) == (0, 0)


def test_launch_shape():
    itemsize, resident = 4, 2048 * 132
    assert grids.blocks(0, 0, itemsize, resident) == 1
    assert grids.blocks(1, 0, itemsize, resident) == 1
    assert grids.blocks(grids.BLOCK * 4 + 1, grids.BLOCK, itemsize, resident) == 1
    assert grids.blocks(grids.BLOCK * 4 + 4, grids.BLOCK + 1, itemsize, resident) == 2
    huge = 2**33
    assert grids.blocks(huge, huge // 4, itemsize, resident) == grids.WAVES * resident // grids.BLOCK
    assert grids.packs([2**40, 2**41], itemsize, huge) == (0, huge // 4)
    assert grids.packs([2**40 + 12, 2**41 + 12], itemsize, 0) == (0, 0)


@MODES
def test_a_checkpoint_moves_between_cpu_and_gpu(cupy, rng, capturable):
    params, gradients = problem(rng, 65, steps=6)
    whole = on_cpu(params, gradients)

    opt, half = on_device(cupy, params, gradients[:3], capturable=capturable)
    saved = opt.state_dict()
    assert all(isinstance(value, np.ndarray) for name, value in saved.items() if name.startswith("exp"))
    on, rest = FusedAdam(), half.host.copy()
    on.load_state_dict(saved)
    for grads in gradients[3:]:
        on.step(rest, grads)
    assert_same_bits(rest, whole[1])

    first = on_cpu(params, gradients[:3])
    for start in (
        FusedAdam(capturable=capturable),
        on_device(cupy, params, gradients[:1], capturable=capturable)[0],
    ):
        start.load_state_dict(first[0].state_dict())
        assert start.state.step == 3
        back = cupy.asarray(first[1])
        for grads in gradients[3:]:
            start.step(back, cupy.asarray(grads))
        assert_same((start, back), whole)


@MODES
def test_a_shallow_copy_shares_the_state(cupy, rng, capturable):
    """As on the CPU: the attributes are the copy's own, the moments and the step counter are shared."""
    params, gradients = problem(rng, 33, steps=4)
    opt, buffer = on_device(cupy, params, gradients[:2], capturable=capturable)
    other = copy.copy(opt)
    assert other.state is opt.state
    for one, grads in zip((other, opt), gradients[2:], strict=True):
        one.step(buffer, cupy.asarray(grads))
    assert_same((opt, buffer), on_cpu(params, gradients))


@MODES
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_copies_go_their_own_way(cupy, rng, duplicate, capturable):
    params, gradients = problem(rng, 33, steps=4)
    opt, buffer = on_device(cupy, params, gradients[:2], capturable=capturable)
    other, twin = duplicate(opt), cupy.asarray(buffer.host)
    for grads in gradients[2:]:
        opt.step(buffer, cupy.asarray(grads))
        other.step(twin, cupy.asarray(grads))
    expected = on_cpu(params, gradients)
    assert_same((opt, buffer), expected)
    assert_same((other, twin), expected)


@MODES
def test_reset(cupy, rng, capturable):
    params, gradients = problem(rng, 9)
    opt, _ = on_device(cupy, params, gradients, capturable=capturable)
    opt.reset()
    assert (opt.state.step, opt.state.arrays, opt.backend) == (0, (), None)
    if not capturable:
        opt.step(params.copy(), gradients[0])
        assert opt.backend == "cpu"


def test_no_allocation_copy_or_wait_after_the_first_step(cupy, rng):
    params, gradients = problem(rng, 65)
    for options in ({}, {"capturable": True}):
        opt, buffer = on_device(cupy, params, gradients[:1], **options)
        grads = cupy.asarray(gradients[1])
        before = len(cupy.log)
        opt.step(buffer, grads)
        opt.lr = 0.1
        opt.step(buffer, grads)
        assert {entry[0] for entry in cupy.log[before:]} <= {
            "step",
            "step_captured",
            "form_coefficients",
            "set_lr",
        }


def test_a_change_of_lr_compiles_nothing(cupy, rng, monkeypatch):
    params, gradients = problem(rng, 65)
    opt, buffer = on_device(cupy, params, gradients[:1])
    monkeypatch.setattr(cupy, "RawModule", None)
    opt.lr, opt.eps, opt.betas = 0.5, 1e-3, (0.5, 0.6)
    opt.step(buffer, cupy.asarray(gradients[1]))


@MODES
def test_warmup_compiles_all_that_a_step_needs(cupy, rng, monkeypatch, capturable):
    flags = {"capturable": capturable, "weight_decay": 0.1}
    warmup(backend="cupy", **flags)
    params, gradients = problem(rng, 9)
    params, gradients = cupy.asarray(params), [cupy.asarray(grads) for grads in gradients]
    monkeypatch.setattr(cupy, "RawModule", None)
    opt = FusedAdam(**flags)
    opt.step(params, gradients[0])
    opt.lr = 0.1
    opt.step(params, gradients[1])


def test_the_kernels_of_a_clock_serve_every_rule(cupy, monkeypatch):
    FusedAdam(capturable=True).step(ones(cupy), ones(cupy))
    sources, compile_module = [], cupy.RawModule
    monkeypatch.setattr(
        cupy, "RawModule", lambda **module: sources.append(module["code"]) or compile_module(**module)
    )
    FusedAdam(capturable=True, amsgrad=True).step(ones(cupy), ones(cupy))
    assert len(sources) == 1
    assert "step_captured" in sources[0]


def test_a_representation_does_not_wait_for_the_device(cupy):
    opt = FusedAdam(capturable=True)
    opt.step(ones(cupy), ones(cupy))
    assert repr(opt.state) == ("State(step=<in GPU memory>, exp_avg=float32[8], exp_avg_sq=float32[8])")
    assert ("synchronize", 0, None) not in cupy.log


# --- Arrays of other libraries ------------------------------------------------------------------------------


def test_an_array_that_does_not_tell_its_device(cupy, rng):
    params, gradients = problem(rng, 17)
    with cupy.cuda.Device(1):
        buffer, sent = cupy.asarray(params), [cupy.asarray(grads) for grads in gradients]
    opt = FusedAdam()
    for grads in sent:
        opt.step(Exported(buffer), Exported(grads))
    expected = on_cpu(params, gradients)
    assert_same_bits(buffer.host, expected[1])
    assert {entry[1] for entry in cupy.log if entry[0] == "step"} == {1}
    empty = Exported(cupy.asarray(np.zeros(0, np.float32)), data=(0, False))
    FusedAdam().step(empty, Exported(cupy.asarray(np.zeros(0, np.float32)), data=(0, False)))


def test_an_array_that_exports_only_dlpack(cupy):
    class ByDLPack:
        def __init__(self, array):
            self.to_cupy = lambda: array

        def __dlpack_device__(self):
            return 2, 0

        def __dlpack__(self, **_):
            raise AssertionError("the stand-in does not ask")

    params = ones(cupy)
    FusedAdam().step(ByDLPack(params), ByDLPack(ones(cupy)))
    assert (params.host < 1).all()


def test_masked_array(cupy):
    params = Exported(ones(cupy), mask=object())
    with pytest.raises(TypeError, match="flat_params must be a plain array; got a masked array"):
        FusedAdam().step(params, ones(cupy))


def test_any_shape(cupy):
    params = cupy.asarray(np.ones((2, 1, 4), np.float32))
    spread = Exported(params, strides=(16, 99, 4))  # the stride of an axis of one element says nothing
    FusedAdam().step(spread, cupy.asarray(np.ones((4, 2), np.float32)))
    assert (params.host < 1).all()


def test_a_buffer_keeps_the_view_of_an_array_that_exports_only_dlpack(cupy):
    view = ones(cupy)
    array = SimpleNamespace(to_cupy=lambda: view, __dlpack_device__=lambda: (2, 0))
    assert buffers.flat(array, "flat_params", writable=True).owner is view


def test_a_backend_that_was_asked_for_tells_the_device(cupy, monkeypatch):
    """Not CuPy, which may be installed and broken; and Numba tells of its own arrays."""
    asked = []

    def load(name):
        return SimpleNamespace(device_of=lambda _: asked.append(name) or 1, current_device=lambda: 0)

    class NumbaArray(Exported):
        pass

    NumbaArray.__module__ = "numba.cuda.cudadrv.devicearray"
    for array, backend, expected in (
        (Exported(ones(cupy)), None, "cupy"),
        (Exported(ones(cupy)), "cpu", "cupy"),
        (Exported(ones(cupy)), "numba-cuda", "numba-cuda"),
        (NumbaArray(ones(cupy)), None, "numba-cuda"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(backends, "load", load)
            assert buffers.flat(array, "flat_params", writable=True, backend=backend).device == 1
        assert asked.pop() == expected
