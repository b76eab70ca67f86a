"""The benchmark of the optimizer phase: wrong contenders are refused, no refill is timed, its table fits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

# Behind the installed package, which `bench` measures: the root of the tree holds a folder of its name.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import (
    contest,
    oracle,
    phase,
    phase_oracle,
    phase_peers,
    phase_roofline,
    report,
    roofline,
    segment_peers,
)
from bench.environment import ROOT
from bench.oracle import BETAS, EPS, LR, Contender, WrongUpdateError
from fastadam import FusedAdam
from fastadam.kernels import cpu, norms, threads

Array = oracle.Array
SIZES = [1, 1000, cpu.PARALLEL_FROM + 1, norms.PARALLEL_FROM + 1]


# --- Contenders ---------------------------------------------------------------------------------------------


def check(start: Callable[[Array, Array], Contender], size: int = 1000, dtype: Any = np.float32) -> Contender:
    params, grads = oracle.inputs(size, dtype)
    contender = start(params.copy(), grads.copy())
    phase_oracle.check_phase("it", contender, params, grads)
    return contender


def start_variant(params: Array, grads: Array, **changes: Any) -> Contender:
    """The contender fastadam, with other hyperparameters."""
    options: dict[str, Any] = {
        "lr": LR,
        "betas": BETAS,
        "eps": EPS,
        "weight_decay": phase_oracle.WEIGHT_DECAY,
        "decoupled_weight_decay": True,
        "max_grad_norm": phase_oracle.max_norm(grads),
        "ema_decay": phase_oracle.EMA_DECAY,
        "zero_grads": True,
    }
    optimizer = FusedAdam(**{**options, **changes})
    return phase_peers.refilled(
        lambda: optimizer.step(params, grads), params, grads, lambda: optimizer.state.param_ema
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("start", [phase_peers.start_fastadam, start_variant])
def test_right_contenders_pass(start: Callable[..., Contender], size: int, dtype: Any) -> None:
    check(start, size, dtype)


def test_torch_passes() -> None:
    pytest.importorskip("torch")
    for size in SIZES:
        check(phase_peers.start_torch, size)


WRONG = {
    "not clipped": {"max_grad_norm": None},
    "clipped to something else": {"max_grad_norm": 1.6e-5},
    "clipped by value": {"max_grad_norm": None, "max_grad_value": 1.2e-6},
    "no decay": {"weight_decay": 0.0},
    "decay of another size": {"weight_decay": 0.02},
    "L2 decay": {"decoupled_weight_decay": False},
    "lr": {"lr": 1.001 * LR},
    "ascends": {"maximize": True},
    "another average": {"ema_decay": 0.985},
    "no average": {"ema_decay": 0.0},
}


@pytest.mark.parametrize("mistake", WRONG.values(), ids=WRONG.keys())
def test_wrong_contenders_are_refused(mistake: dict[str, Any]) -> None:
    with pytest.raises(WrongUpdateError, match=r"^it must clip, step, average and clear; got an "):
        check(lambda params, grads: start_variant(params, grads, **mistake))


def test_gradients_that_are_left_are_found() -> None:
    with pytest.raises(
        WrongUpdateError, match=r"^it must set all gradients to zero; got 1000 that are not\.$"
    ):
        check(lambda params, grads: start_variant(params, grads, zero_grads=False))


def test_an_average_of_the_parameters_before_the_step_is_found() -> None:
    def lags(params: Array, grads: Array) -> Contender:
        right, average = start_variant(params, grads), params.copy()

        def step() -> None:
            average[...] += (1 - phase_oracle.EMA_DECAY) * (params - average)
            right.step()

        return right._replace(step=step, read_average=lambda: average)

    with pytest.raises(WrongUpdateError, match="got an average moved by"):
        check(lags)


def test_a_norm_that_a_step_returns_is_what_it_is_judged_by() -> None:
    def off_by(error: float) -> Callable[[Array, Array], Contender]:
        def start(params: Array, grads: Array) -> Contender:
            norms_found = [f * (1 + error) * phase_oracle.global_norm(grads) for f in (1.0, 0.5, 2.0)]
            # The norm is too large by as much as what it is compared with is too small.
            limit = phase_oracle.max_norm(grads) / (1 + error)
            contender, returned = start_variant(params, grads, max_grad_norm=limit), iter(norms_found)

            def step() -> float:
                contender.step()
                return next(returned)

            return contender._replace(step=step)

        return start

    check(off_by(5e-3))
    with pytest.raises(
        WrongUpdateError, match=r"^it must find a norm of .* \(allowed error 0\.01, relative\)"
    ):
        check(off_by(2e-2))


@pytest.mark.parametrize(("name", "error"), [("fastadam", 1e-11), ("torch", 0.02), ("torch", float("nan"))])
def test_wrong_norms_are_refused(name: str, error: float) -> None:
    params, grads = oracle.inputs(1000, np.float32)
    norm = phase_oracle.global_norm(grads)
    right = Contender(lambda: norm, lambda: params, lambda _: None)
    phase_oracle.check_norm(name, right, params, grads)
    wrong = right._replace(step=lambda: norm * (1 + error))
    with pytest.raises(WrongUpdateError, match=rf"^{name} must find a norm of .*; got "):
        phase_oracle.check_norm(name, wrong, params, grads)


@pytest.mark.parametrize("start", [peer.start for peer in phase_peers.PHASE.values()])
def test_gradients_come_back_before_each_call(start: Callable[..., Contender]) -> None:
    """All the same way: the refill is what the harness does not time."""
    if start is phase_peers.start_torch:
        pytest.importorskip("torch")
    params, grads = oracle.inputs(1000, np.float32)
    own = grads.copy()
    contender = start(params.copy(), own)
    for _ in range(2):
        assert contender.before is not None
        contender.before()
        np.testing.assert_array_equal(own, grads)
        contender.step()
        assert not own.any()


@pytest.mark.parametrize("size", SIZES)
def test_values_stay_normal_over_many_steps(size: int) -> None:
    params, grads = oracle.inputs(size, np.float32)
    for start in (phase_peers.start_fastadam, phase_peers.start_roofline):
        contender = start(params.copy(), grads.copy())
        assert contender.before is not None
        assert contender.read_average is not None
        for _ in range(500):
            contender.before()
            contender.step()
        for values in (contender.read_params(), contender.read_average()):
            magnitudes = np.abs(values)
            assert np.all(np.isfinite(magnitudes))
            assert np.all((magnitudes == 0) | (magnitudes >= np.finfo(np.float32).tiny))


# --- Roofline -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", [*SIZES, 2**20 + 3])
def test_two_passes_read_and_move_everything(size: int, safe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not safe:
        monkeypatch.setattr(threads, "numba_is_safe", lambda: False)
    params, grads = oracle.inputs(size, np.float32)
    sums = phase_roofline.new_sums(size, np.float32)
    phase_roofline.check_read(phase_roofline.read, grads, sums)
    phase_roofline.check_move(phase_roofline.move, params, grads)


def test_roofline_checks_itself() -> None:
    params, grads = oracle.inputs(2**15, np.float32)

    def reads_half(grads: Array, sums: Array) -> None:
        phase_roofline.read(grads[: grads.size // 2], sums[:1])

    def clears_nothing(params: Array, grads: Array, *states: Array) -> None:
        phase_roofline.move(params, grads.copy(), *states)

    with pytest.raises(WrongUpdateError, match=r"^the reading kernel must sum all gradients"):
        phase_roofline.check_read(reads_half, np.abs(grads), phase_roofline.new_sums(2**15, np.float32))
    with pytest.raises(WrongUpdateError, match=r"^the moving kernel must add the gradient to four arrays"):
        phase_roofline.check_move(clears_nothing, params, grads)


# --- Segments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 8, 1000, 2**16, 2**20])
def test_segments_of_the_contest_cover_the_buffer(size: int) -> None:
    edges = segment_peers.bounds(size)
    assert edges[0] == 0
    assert edges[-1] == size
    assert (np.diff(edges) > 0).all()
    assert len(edges) - 1 == max(1, min(10_000, size // 8))


@pytest.mark.parametrize("peer", segment_peers.SEGMENTS)
def test_contenders_of_segments_take_the_steps_of_adam(peer: str) -> None:
    found = segment_peers.SEGMENTS[peer]
    if found.missing("float32"):
        pytest.skip("not installed")
    params, grads = oracle.inputs(1000, np.float32)
    oracle.check_update(peer, found.start(params.copy(), grads.copy()), params, grads)


# --- Program and report -------------------------------------------------------------------------------------


def test_phase_writes_results(tmp_path: Path) -> None:
    output = tmp_path / "it.json"
    done = CliRunner().invoke(phase.app, ["--quick", "--output", str(output)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    text = output.read_text(encoding="utf-8")
    assert str(ROOT) not in text
    result = json.loads(text)
    assert result["kind"] == "phase"
    assert result["rounds"] == 2
    entries = [(work, peer) for work, contest in phase.CONTESTS.items() for peer in contest.peers]
    entries = [(work, peer) for work, peer in entries if peer not in result["skipped"]]
    rows = {(row["work"], row["peer"], row["size"]): row for row in result["rows"]}
    assert set(rows) == {(*entry, size) for entry, size in product(entries, (2**10, 2**16))}
    moved = dict.fromkeys(phase.CONTESTS, 28) | {"whole phase": 44, "norm alone": 4}
    for (work, peer, size), row in rows.items():
        assert row["gb_per_second"] * row["seconds"] == pytest.approx(moved[work] * 1e-9 * size)
        assert row["target"] is None
        if peer == "fastadam":
            assert row["fastadam_over_peer"] == {"low": 1, "median": 1, "high": 1}
    assert report.render([result]).count("| --- |") == len(moved)


def test_a_wrong_peer_stops_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(phase_peers.PHASE["fastadam"], start=lambda p, g: start_variant(p, g, maximize=True))
    monkeypatch.setitem(phase_peers.PHASE, "fastadam", wrong)
    with pytest.raises(WrongUpdateError, match=r"^fastadam must clip, step, average and clear"):
        contest.start_all(phase.CONTESTS["whole phase"], ["fastadam"], 1000, "float32", seed=0)


def test_promises_are_about_float32() -> None:
    whole = phase.CONTESTS["whole phase"]
    assert whole.target("torch", 2**25, "float32") == 0.55
    assert whole.target("torch", 2**25, "float64") is None
    assert whole.target("torch", 2**20, "float32") is None


def test_absent_torch_is_skipped_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen in phase.CONTESTS.values():
        if "torch" not in chosen.peers:
            continue
        absent = replace(chosen.peers["torch"], packages=("no_such_package",))
        monkeypatch.setitem(chosen.peers, "torch", absent)  # type: ignore[arg-type]
    output = tmp_path / "it.json"
    done = CliRunner().invoke(phase.app, ["--quick", "--size", "64", "--output", str(output)])
    assert done.exit_code == 0, done.output
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["skipped"] == {"torch": "not installed: no_such_package"}
    assert "torch" not in result["environment"]["versions"]
    assert {row["peer"] for row in result["rows"]} == {"fastadam", "plain", "roofline"}


def row(work: str, peer: str, ratio: float, target: float | None) -> dict[str, Any]:
    return {
        "work": work,
        "size": 2**25,
        "peer": peer,
        "label": f"{peer}'s",
        "seconds": 0.02 / ratio,
        "gb_per_second": 1.0,
        "fastadam_over_peer": {"low": ratio, "median": ratio, "high": ratio},
        "target": target,
    }


def test_report_shows_each_work_with_its_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.tables, "origin", lambda _: "<sub>origin</sub>\n")
    rows = [row("a", "fastadam", 1, None), row("a", "torch", 0.5, 0.55), row("b", "fastadam", 1, None)]
    assert report.render([{"kind": "phase", "dtype": "float32", "rows": rows}]) == (
        "| a, float32 | 32Mi |\n"
        "| --- | --: |\n"
        "| fastadam's | 20.0 ms |\n"
        "| torch's | 40.0 ms (2.00x) |\n"
        "\n"
        "| a, time of fastadam over | at most | measured |  |\n"
        "| --- | --: | --: | --: |\n"
        "| torch's, 32Mi | 0.55 | 0.500 (0.500 to 0.500) | met |\n"
        "\n"
        "| b, float32 | 32Mi |\n"
        "| --- | --: |\n"
        "| fastadam's | 20.0 ms |\n"
        "\n"
        "<sub>origin</sub>\n"
    )


def test_bytes_are_those_of_the_contract() -> None:
    assert phase_roofline.bytes_moved(1000, "float32") == 44_000
    assert phase_roofline.bytes_moved(1000, "float32") - roofline.bytes_moved(1000, "float32") == 4_000 * 4
    assert phase_roofline.bytes_read(1000, "float64") == 8_000
