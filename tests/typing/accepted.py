"""Code of users, as a strict type checker sees it; ``tests/test_typing.py`` runs it."""

from __future__ import annotations

import array
from collections.abc import Callable
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt

from fastadam import DynamicLossScale, FusedAdam, Segment, schedules, warmup
from fastadam.arrays import BackendName, FlatArray, StateFormat


def arrays_of_numpy() -> None:
    """Of each dtype and shape; a view, a memmap's class, an array that says nothing of itself."""
    for dtype in (np.float32, np.float64, np.float16):
        params = np.ones((2, 3), dtype)
        FusedAdam().step(params, np.ones(6, dtype))
    FusedAdam().step(np.ones(4, np.float32)[1:], np.ones(3, np.float16), out=np.empty(3, np.float16))
    untyped: npt.NDArray[Any] = np.ones(3)
    FusedAdam().step(untyped, untyped.copy())


def arrays_of_others() -> None:
    params, grads = array.array("f", [1.0, 2.0]), array.array("f", [1.0, 2.0])
    opt = FusedAdam(ema_decay=0.5)
    opt.step(params, memoryview(grads))
    opt.swap_ema(params)


def some_rows() -> None:
    table, grads = np.ones((4, 2), np.float32), np.ones((3, 2), np.float32)
    for rows in ([0, 1, 0], (0, 1, 0), range(3), np.array([0, 1, 0])):
        assert_type(FusedAdam().step_rows(table, rows, grads, grad_scale=2.0), None)


def a_phase() -> None:
    params, grads = np.ones(4, np.float32), np.ones(4, np.float32)
    scaler = DynamicLossScale(2.0**10)
    opt = FusedAdam(max_grad_norm=1, skip_nonfinite=True)
    opt.step(params, grads, grad_scale=scaler.scale)
    opt.step(params, grads, grad_scale=np.float32(2))
    opt.step(params, grads, grad_scale=np.array(2.0))
    opt.accumulate(grads)
    opt.accumulate(grads)
    opt.step(params)
    last = opt.last_step
    assert_type(opt.step(params, grads), None)
    assert last is not None
    assert_type(last.step, int)
    assert_type(last.grad_norm, float | None)
    assert_type(last.skipped, bool)
    scaler.update(last.skipped)
    scaler.update(~np.isfinite(grads).all())
    assert_type(opt.state.step, int)
    assert_type(opt.state.moments, dict[str, Any])
    mean = opt.state.exp_avg.mean()  # of the library of the parameters
    assert np.isfinite(mean)


def hyperparameters() -> None:
    opt = FusedAdam(np.float32(0.1), [0.9, 0.99], weight_decay=1, ema_decay=np.float64(0.9), seed=np.int64(3))
    opt.lr *= 0.5
    opt.lr = np.float64(0.1)
    opt.lr = schedules.cosine(1e-3, steps=10)
    opt.lr = lambda step: 0.1 / step
    if not callable(opt.lr):
        assert_type(opt.lr, float | Any)
    opt.betas = (0.9, np.float32(0.5))
    opt.eps = 1
    opt.max_grad_norm, opt.max_grad_value = np.float32(1), None
    assert_type(opt.betas, tuple[float, float])
    assert_type(opt.weight_decay, float)
    assert_type(opt.backend, str | None)


def formats() -> None:
    formats: tuple[StateFormat, ...] = ("float32", "bfloat16", "8bit")
    for first in formats:
        FusedAdam(state_dtype=first, rounding="nearest")
        FusedAdam(state_dtype=(first, "8bit"), master_params="split")
    name: BackendName = "cpu"
    FusedAdam(backend=name)
    warmup(dtype="float64", weight_decay=0.1)
    warmup(dtype=np.dtype(np.float32), scaled=True, segments=[Segment(0, 2)])


def segments() -> None:
    ends = np.cumsum([3, 4])
    rate: Callable[[int], float] = schedules.constant(0.1)
    parts = [Segment(0, ends[0], lr=rate), Segment(ends[0], ends[1], np.float32(0.1), betas=[0.8, 0.9])]
    opt = FusedAdam(segments=parts)
    opt.segments = (part for part in parts)
    assert_type(opt.segments, tuple[Segment, ...])
    assert_type(opt.segments[0].start, int)
    assert_type(opt.segments[1].betas, tuple[float, float] | None)


def checkpoints() -> None:
    params = np.ones(4)
    opt = FusedAdam()
    opt.step(params, params.copy())
    state = opt.state_dict()
    assert_type(state, dict[str, Any])
    opt.reset()
    opt.load_state_dict(state)


def a_function_of_a_user(params: FlatArray, grads: FlatArray) -> FusedAdam:
    """Whatever a step takes has a name, for functions around it."""
    opt = FusedAdam()
    opt.step(params, grads)
    return opt


def functions_of_users() -> None:
    a_function_of_a_user(np.ones(3), np.ones(3))
