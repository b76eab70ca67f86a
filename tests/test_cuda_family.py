"""Every rule of the family in GPU memory without a GPU, behind the stand-in for CuPy: the bits of the CPU."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_family import CASES, FAMILY, IN_8_BITS, Pair, case_id, problem, some_cases, step_in_8_bits
from cuda_steps import assert_refused, ones

import fastadam
from fastadam import Segment
from fastadam.kernels.relatives import FORESEEN
from fastadam.kernels.tree import CHUNK

PLAIN = {"units": "", "storage": "float32", "capturable": False, "decides": False, "ema_decay": None}


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_bits_of_the_cpu(cupy, rng, case):
    size = CHUNK + 70 if case["units"] == "telemetry" and not case["decides"] else 75
    params, gradients = problem(rng, case, size)
    pair = Pair(case, params, cupy.asarray)
    for k, grads in enumerate(gradients):
        scale = {"grad_scale": 3.0} if case["decides"] and k else {}
        pair.step(grads, **scale)
    assert pair.cpu.state.step == 4 - case["decides"]


def test_cases_have_every_rule_as_it_is_written():
    assert {case["rule"] for case in CASES} == set(FAMILY)
    rules = {member()._hyperparameters.rule.coefficients for member in FAMILY.values()}
    assert len(rules) == len(FAMILY)


def test_some_cases_have_every_level():
    """Those that are interpreted, and run on a GPU."""
    for first in range(3):
        for name in CASES[0]:
            assert {case[name] for case in some_cases(first)} == {case[name] for case in CASES}


@pytest.mark.parametrize("rule", ["nadam", "radam", "momentum", "adamax"])
def test_many_steps(cupy, rng, rule):
    """Beyond the tables of bias corrections, rectified and not."""
    params, gradients = problem(rng, PLAIN, 20, steps=12)
    case = {**PLAIN, "rule": rule, "capturable": True}
    pair = Pair(case, params, cupy.asarray)
    for grads in gradients:
        pair.step(grads)
    betas = {"betas": (0.1, 0.2)} if rule != "momentum" else {"momentum": 0.5}
    cpu, device = FAMILY[rule].kind(**betas), FAMILY[rule].kind(**betas, capturable=True)
    expected, buffer = params.copy(), cupy.asarray(params)
    for k in range(80):
        cpu.step(expected, gradients[k % 12])
        device.step(buffer, cupy.asarray(gradients[k % 12]))
    np.testing.assert_array_equal(buffer.host, expected)


def test_a_schedule_and_changes_between_steps(cupy, rng):
    params, gradients = problem(rng, {**PLAIN, "decides": True}, 33, steps=6)
    cpu, device = (
        fastadam.FusedAdagrad(lr=lambda step: 0.5 / step, skip_nonfinite=True, backend=name)
        for name in ("cpu", None)
    )
    expected, buffer = params.copy(), cupy.asarray(params)
    for k, grads in enumerate(gradients):
        if k == 4:
            cpu.eps = device.eps = 0.1
        cpu.step(expected, grads)
        device.step(buffer, cupy.asarray(grads))
        assert repr(device.last_step) == repr(cpu.last_step)
    np.testing.assert_array_equal(buffer.host, expected)


@pytest.mark.parametrize("rule", ["nadam", "radam"])
@pytest.mark.parametrize(
    "flags", [{}, {"telemetry": True}, {"capturable": True}], ids=["", "told", "captured"]
)
def test_moments_in_8_bits(cupy, rng, rule, flags):
    params, gradients = problem(rng, PLAIN, 300)
    cpu = FAMILY[rule](state_dtype="8bit", backend="cpu", **{**flags, "capturable": False})
    device, expected, buffer = FAMILY[rule](state_dtype="8bit", **flags), params.copy(), cupy.asarray(params)
    for grads in gradients:
        cpu.step(expected, grads)
        device.step(buffer, cupy.asarray(grads))
        np.testing.assert_array_equal(buffer.host, expected)
        for name, moment in cpu.state.moments.items():
            np.testing.assert_array_equal(device.state.moments[name], moment)
        assert repr(device.last_step) == repr(cpu.last_step)


@pytest.mark.parametrize("case", IN_8_BITS, ids=case_id)
def test_states_in_8_bits(cupy, rng, case):
    step_in_8_bits(rng, case, cupy.asarray)


def test_without_a_state_nothing_is_in_blocks(cupy, rng):
    step_in_8_bits(rng, {**IN_8_BITS[0], "rule": "sgd", "units": ""}, cupy.asarray)
    assert "step" in {entry[0] for entry in cupy.log}


def test_cases_have_every_other_rule_in_8_bits():
    """Of which bounds are not known before."""
    rules = {member()._hyperparameters.rule for member in FAMILY.values()}
    others = {rule.coefficients for rule in rules if set(rule.states) - rule.exact} - FORESEEN
    of_family = [case["rule"] for case in IN_8_BITS if case["rule"] in FAMILY]
    assert {FAMILY[name]()._hyperparameters.rule.coefficients for name in of_family} == others


def test_not_a_number_stays_one(cupy):
    """Of Adamax a maximum, that compilers have an instruction for which forgets NaN; all others with it."""
    for name, member in FAMILY.items():
        cpu, device, params = member(backend="cpu"), member(), np.ones(8, np.float32)
        buffer = cupy.asarray(params)
        for value in (np.nan, 1.0, np.inf, -np.inf, 0.0, -0.0):
            grads = np.full(8, 0.5, np.float32)
            grads[3] = value
            with np.errstate(all="ignore"):
                cpu.step(params, grads)
            device.step(buffer, cupy.asarray(grads))
        np.testing.assert_array_equal(buffer.host, params, name)
        assert np.isnan(params[3]), name


# --- What cannot be counted on the device -------------------------------------------------------------------

UNSETTLED = [
    (
        lambda **flags: fastadam.FusedAdagrad(lr_decay=0.1, **flags),
        "lr_decay must let step_size settle where steps are counted on the GPU, which keeps a table of it;"
        " got 0.1.",
    ),
    (
        lambda **flags: fastadam.FusedNAdam(momentum_decay=1e-9, **flags),
        "betas[0] and momentum_decay must let step_size settle where steps are counted on the GPU, which"
        " keeps a table of it; got 0.9 and 1e-09.",
    ),
    (
        lambda **flags: fastadam.FusedAdamax(betas=(1 - 2.0**-19, 0.9), **flags),
        "betas[0] must be at most 0.999996185 where steps are counted on the GPU, which keeps the bias"
        " corrections of all of them; got 0.99999809265136719.",
    ),
]


@pytest.mark.parametrize(("make", "message"), UNSETTLED, ids=["adagrad", "nadam", "adamax"])
def test_what_never_settles_is_refused(cupy, make, message):
    assert_refused(make(skip_nonfinite=True), ones(cupy), ones(cupy), ValueError, message)
    with pytest.raises(ValueError, match="where steps are counted") as caught:
        make(capturable=True)
    assert str(caught.value) == message
    make().step(ones(cupy), ones(cupy))  # counted on the host


def test_a_segment_that_never_settles_is_refused(cupy):
    segments = [Segment(0, 2, lr=0.1), Segment(3, 4, betas=(0.5, 0.9))]
    opt = fastadam.FusedNAdam(betas=(0.0, 0.9), momentum_decay=1e-9, segments=segments)
    message = (
        "segments[1].betas[0] and momentum_decay must let step_size settle where steps are counted on the"
        " GPU, which keeps a table of it; got 0.5 and 1e-09."
    )
    assert_refused(opt, ones(cupy), ones(cupy), ValueError, message)


def test_betas_without_tables_are_free(cupy):
    opt = fastadam.FusedLion(betas=(1 - 2.0**-19, 1 - 2.0**-19), capturable=True)
    opt.step(ones(cupy), ones(cupy))
    opt = fastadam.FusedAdamax(betas=(0.5, 1 - 2.0**-19), capturable=True, segments=[Segment(0, 2, lr=0.1)])
    opt.step(ones(cupy), ones(cupy))


# --- Around a step ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capturable", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("rule", ["sgd", "adagrad", "momentum"])
def test_a_checkpoint_goes_on(cupy, rng, rule, capturable):
    params, gradients = problem(rng, PLAIN, 33)
    cpu, device = FAMILY[rule](backend="cpu"), FAMILY[rule](capturable=capturable)
    expected, buffer = params.copy(), cupy.asarray(params)
    device.step(buffer, cupy.asarray(gradients[0]))
    cpu.step(expected, gradients[0])
    again = FAMILY[rule](capturable=capturable)
    again.load_state_dict(device.state_dict())
    for grads in gradients[1:]:
        again.step(buffer, cupy.asarray(grads))
        cpu.step(expected, grads)
    np.testing.assert_array_equal(buffer.host, expected)
    assert again.state.step == cpu.state.step


def test_accumulated_gradients(cupy, rng):
    params, gradients = problem(rng, PLAIN, 33)
    cpu, device = FAMILY["sgd"](backend="cpu"), FAMILY["sgd"]()
    expected, buffer = params.copy(), cupy.asarray(params)
    for grads in gradients:
        cpu.accumulate(grads)
        device.accumulate(cupy.asarray(grads))
    cpu.step(expected)
    device.step(buffer)
    np.testing.assert_array_equal(buffer.host, expected)


@pytest.mark.parametrize("capturable", [False, True], ids=["eager", "captured"])
def test_after_a_warmup_nothing_is_compiled(cupy, monkeypatch, capturable):
    flags = {"momentum": 0.5, "capturable": capturable}
    fastadam.warmup(optimizer=fastadam.FusedSGD, backend="cupy", **flags)
    monkeypatch.setattr(cupy, "RawModule", None)
    fastadam.FusedSGD(**flags).step(ones(cupy), ones(cupy))


def test_a_warmup_of_no_optimizer():
    with pytest.raises(TypeError, match="optimizer") as caught:
        fastadam.warmup(optimizer="sgd")
    assert str(caught.value) == "optimizer must be a class such as FusedAdam; got 'sgd'."
