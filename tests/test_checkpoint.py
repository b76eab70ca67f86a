"""Checkpoints: what is in them, and runs that go on from them bit for bit."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from phase_cases import pairwise
from tolerances import assert_same_bits

from fastadam import DynamicLossScale, FusedAdam, Segment, checkpoint, eight_bit, schedules

N = 300
SCHEDULE = schedules.linear_warmup(schedules.cosine(0.01, steps=9), steps=3)
FACTORS = {
    "params": ["bfloat16", "float32", "float64"],
    "state_dtype": ["float32", "bfloat16", "8bit", ("8bit", "bfloat16"), ("float32", "8bit")],
    "master_params": [None, "float32", "split"],
    "ema_decay": [None, 0.9],
    "amsgrad": [False, True],
    "segments": [False, True],
    "lr": [0.01, SCHEDULE],
    "accumulated": [0, 2],
}
CASES = [
    {name: values[i] for (name, values), i in zip(FACTORS.items(), case, strict=True)}
    for case in pairwise(list(FACTORS.values()))
]
for case in CASES:
    if case["params"] == "float64":
        case["state_dtype"] = "float32"
    if case["params"] != "bfloat16":
        case["master_params"] = None
SEGMENTS = [Segment(3, 140, lr=0.02), Segment(140, 141, frozen=True), Segment(200, 290, lr=SCHEDULE)]


def case_id(case):
    return "-".join(str(value) for value in case.values() if value not in {None, False})


def make(case):
    kept = {name: value for name, value in case.items() if name not in {"params", "accumulated", "segments"}}
    return FusedAdam(**kept, seed=3, offset=7, segments=SEGMENTS if case["segments"] else ())


def dtype_of(case):
    return ml_dtypes.bfloat16 if case["params"] == "bfloat16" else np.dtype(case["params"])


def assert_same_state(one, other):
    found, expected = one.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype
            assert found[name].tobytes() == value.tobytes(), name
        else:
            assert found[name] == value


def filled(opt, case, rng):
    """Give an optimizer a state of random numbers, in every format, without compiling a step for it."""
    math = np.float64 if case["params"] == "float64" else np.float32
    entries = {**opt.state_dict(), "step": 5}
    first, second = (
        (case["state_dtype"],) * 2 if isinstance(case["state_dtype"], str) else case["state_dtype"]
    )
    kinds = {"exp_avg": first, "exp_avg_sq": second}
    kinds |= {"max_exp_avg_sq": second} if case["amsgrad"] else {}
    kinds |= {"param_ema": "float32"} if case["ema_decay"] else {}
    for name, kind in kinds.items():
        values = rng.random(N).astype(math)
        if kind == "8bit":
            dtype = eight_bit.SIGNED if name == "exp_avg" else eight_bit.UNSIGNED
            codes, entries[f"{name}_scales"] = eight_bit.encode(values, dtype)
            values = codes.view(np.uint8)
        entries[name] = values.astype(ml_dtypes.bfloat16).view(np.uint16) if kind == "bfloat16" else values
    if case["master_params"] == "float32":
        entries["param_master"] = rng.standard_normal(N).astype(np.float32)
    elif case["master_params"] == "split":
        entries["param_remainder"] = rng.integers(-(2**15), 2**15, N).astype(np.int16)
    if case["accumulated"]:
        entries |= {"grad_sum": rng.standard_normal(N).astype(math), "grads_summed": case["accumulated"]}
    opt.load_state_dict(entries)
    return opt


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_state_comes_back(rng, tmp_path, case):
    opt, params = filled(make(case), case, rng), rng.standard_normal(N).astype(dtype_of(case))
    opt.save(tmp_path / "run", params=params)
    found = np.empty_like(params)
    loaded, read = FusedAdam.load(tmp_path / "run", params=found), make(case)
    read.load_state_dict(checkpoint.read(tmp_path / "run"))
    assert found.tobytes() == params.tobytes()
    for each in (loaded, read):
        assert_same_state(each, opt)
        assert (each.lr, each.segments) == (opt.lr, opt.segments)


RUNS = {
    "plain": {**CASES[0], "params": "float32", "state_dtype": "float32", "master_params": None},
    "float64": {
        **CASES[0],
        "params": "float64",
        "state_dtype": "float32",
        "master_params": None,
        "lr": SCHEDULE,
    },
    "stored": {
        "params": "bfloat16",
        "state_dtype": ("8bit", "bfloat16"),
        "master_params": "split",
        "ema_decay": 0.9,
        "amsgrad": True,
        "segments": True,
        "lr": SCHEDULE,
        "accumulated": 2,
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_bit_for_bit(rng, tmp_path, name):
    case = RUNS[name]
    whole, params = make(case), rng.standard_normal(N).astype(dtype_of(case))
    gradients = rng.standard_normal((6, N)).astype(params.dtype)

    def second_half(opt, params):
        if case["accumulated"]:
            opt.step(params)
        for grads in gradients[3:]:
            opt.step(params, grads)

    for grads in gradients[:3]:
        whole.step(params, grads)
    for grads in gradients[: case["accumulated"]]:
        whole.accumulate(grads)
    whole.save(tmp_path / "run", params=params)
    second = np.empty_like(params)
    resumed = FusedAdam.load(tmp_path / "run", params=second)
    second_half(whole, params)
    second_half(resumed, second)
    assert_same_bits(second.view(f"u{second.itemsize}"), params.view(f"u{params.itemsize}"))
    assert_same_state(resumed, whole)


def test_cases_have_what_matters():
    assert {case["state_dtype"] for case in CASES} == set(FACTORS["state_dtype"])
    assert {case["master_params"] for case in CASES} == set(FACTORS["master_params"])
    assert {case["params"] for case in CASES} == set(FACTORS["params"])


def test_all_hyperparameters_come_back(tmp_path):
    options = {
        "betas": (0.8, 0.99),
        "eps": 1e-7,
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
        "maximize": True,
        "max_grad_norm": 0.1 + 0.2,
        "max_grad_value": 3.0,
        "skip_nonfinite": True,
        "zero_grads": True,
        "telemetry": True,
        "rounding": "nearest",
        "seed": 2**53 - 1,
        "offset": 5,
    }
    opt = FusedAdam(1 / 3, **options)
    opt.save(tmp_path / "run")
    found = FusedAdam.load(tmp_path / "run")
    assert found.state_dict() == opt.state_dict()
    assert repr(found) == repr(opt)
    assert found.state.step == 0


def test_loss_scale_extra_and_half_precision_parameters(tmp_path):
    scaler = DynamicLossScale(1024.0, hysteresis=2)
    for found_inf in (False, True, True, False):
        scaler.update(found_inf)
    params = np.array([1.5, np.inf, -0.0], np.float16)
    extra = {"epoch": 3, "best": float("inf"), "random": np.random.default_rng(1).bit_generator.state}
    FusedAdam().save(tmp_path / "run", params=params.reshape(3, 1), loss_scale=scaler, extra=extra)
    with checkpoint.Checkpoint(tmp_path / "run") as file:
        assert file.loss_scale().state_dict() == scaler.state_dict()
        assert file.extra == extra
        assert file.params().dtype == np.float16
        assert file.params().tobytes() == params.tobytes()
        assert repr(file) == "Checkpoint(step=0, size=3)"
    loaded, target = DynamicLossScale(), np.zeros(3, np.float16)
    FusedAdam.load(tmp_path / "run", params=target, loss_scale=loaded)
    assert loaded.state_dict() == scaler.state_dict()
    assert target.tobytes() == params.tobytes()


@pytest.mark.parametrize(
    "lr",
    [
        schedules.constant(0.1),
        schedules.piecewise([1.0, 0.5, 0.1], boundaries=[2, 3]),
        schedules.chain([1.0, schedules.linear(1.0, steps=4)], boundaries=[2]),
        schedules.exponential(1.0, 0.25, steps=2, staircase=True),
        SCHEDULE,
    ],
    ids=lambda lr: lr.make.__name__,
)
def test_schedules_are_kept_by_their_call(tmp_path, lr):
    FusedAdam(lr).save(tmp_path / "run")
    assert FusedAdam.load(tmp_path / "run").lr == lr
    assert FusedAdam.load(tmp_path / "run", lr=0.5).lr == 0.5


def own(step):
    return 0.1 / step


def stepped(**options):
    opt = FusedAdam(**options)
    opt.step(np.ones(3, np.float32), np.ones(3, np.float32))
    return opt


def needed(name):
    return (
        f"{name} must be given for this checkpoint; got None. It was test_checkpoint.own, which no file can"
        " hold."
    )


@pytest.mark.parametrize("lr", [own, schedules.linear_warmup(own, steps=2)], ids=["alone", "inside"])
def test_a_function_must_be_given_again(tmp_path, lr):
    opt = stepped(lr=lr)
    opt.save(tmp_path / "run")
    with pytest.raises(ValueError, match=f"^{re.escape(needed('lr'))}$"):
        FusedAdam.load(tmp_path / "run")
    assert_same_state(FusedAdam.load(tmp_path / "run", lr=lr), opt)
    assert checkpoint.read(tmp_path / "run")["lr"] == lr(1)


def test_a_function_of_a_segment_must_be_given_again(tmp_path):
    segments = [Segment(0, 1, lr=0.5), Segment(1, 2, lr=own)]
    stepped(segments=segments).save(tmp_path / "run")
    with pytest.raises(ValueError, match=f"^{re.escape(needed('segments'))}$"):
        FusedAdam.load(tmp_path / "run")
    assert FusedAdam.load(tmp_path / "run", segments=segments).segments == tuple(segments)


def test_masters_may_be_missing(tmp_path):
    """A state that was loaded without masters has them from its next step on."""
    source = stepped()
    opt = FusedAdam(master_params="float32")
    opt.load_state_dict(source.state_dict())
    opt.save(tmp_path / "run")
    found = FusedAdam.load(tmp_path / "run")
    assert found.master_params == "float32"
    assert_same_state(found, opt)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_gpu_writes_the_same_file(cupy, rng, tmp_path, capturable):
    params, grads = rng.standard_normal((2, N)).astype(np.float32)
    options = {"state_dtype": ("8bit", "bfloat16"), "ema_decay": 0.9, "skip_nonfinite": True}
    cpu, device = FusedAdam(**options), FusedAdam(capturable=capturable, **options)
    buffer, sent = cupy.asarray(params), cupy.asarray(grads)
    wrong = np.full(N, np.nan, np.float32)
    for opt, args in ((cpu, (params, grads, wrong)), (device, (buffer, sent, cupy.asarray(wrong)))):
        opt.step(*args[:2])
        opt.step(args[0], args[2])  # skipped: a GPU counts by itself
        opt.accumulate(args[1])
        opt.save(tmp_path / opt.backend)
    assert (tmp_path / "cupy").read_bytes() == (tmp_path / "cpu").read_bytes()
    loaded = FusedAdam.load(tmp_path / "cpu", capturable=capturable)
    loaded.step(buffer)
    cpu.step(params)
    assert loaded.backend == "cupy"
    assert_same_state(loaded, cpu)
    assert_same_bits(buffer.host, params)
    message = "params must be in CPU memory; got CUDA device 0. Pass a CPU copy."
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        device.save(tmp_path / "cupy", params=buffer)
