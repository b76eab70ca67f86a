"""The benchmark of the family: every rule is in it, wrong contenders are refused, and its table shows all."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_cases import shipped_rules
from typer.testing import CliRunner

# Behind the installed package, which `bench` measures: the root of the tree holds a folder of its name.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import fastadam
from bench import family, family_peers, oracle, report, tables
from bench.environment import ROOT
from bench.family_peers import FAMILY, Relative
from bench.oracle import Contender, WrongUpdateError
from fastadam.kernels import cpu

SIZE = cpu.PARALLEL_FROM + 1


def contender(name: str, peer: str) -> tuple[Contender, Any, Any]:
    params, grads = oracle.inputs(SIZE, np.float32)
    return family_peers.contest(FAMILY[name]).peers[peer].start(params.copy(), grads.copy()), params, grads


def test_every_rule_takes_part() -> None:
    hyperparameters = [
        getattr(fastadam, f"Fused{one.kind}")(**one.flags)._hyperparameters for one in FAMILY.values()
    ]
    assert {h.rule.coefficients for h in hyperparameters} == shipped_rules().keys()
    for h, one in zip(hyperparameters, FAMILY.values(), strict=True):
        assert h.rule.states == one.states


@pytest.mark.parametrize("name", FAMILY)
def test_contenders_take_the_steps_of_the_rule(name: str) -> None:
    pytest.importorskip("torch")
    for peer in family_peers.contest(FAMILY[name]).peers:
        started, params, grads = contender(name, peer)
        if peer != "traffic":
            family_peers.check(FAMILY[name], peer, started, params, grads)


@pytest.mark.parametrize("name", FAMILY)
def test_wrong_steps_are_refused(name: str) -> None:
    """Steps that are 1 % too long."""
    pytest.importorskip("torch")
    started, params, grads = contender(name, "fastadam")

    def step() -> None:
        before = started.read_params().copy()
        started.step()
        after = started.read_params()
        after += np.float32(0.01) * (after - before)

    wrong = started._replace(step=step)
    message = r"^it must take the steps of \w+ to .*; element \d+ is at .*\.$"
    with pytest.raises(WrongUpdateError, match=message):
        family_peers.check(FAMILY[name], "it", wrong, params, grads)


@pytest.mark.parametrize("name", [name for name, one in FAMILY.items() if one.stored])
def test_wrong_steps_of_stored_states_are_refused(name: str) -> None:
    """Steps that are 1 % too long, of Lion's signs 10 %: no element shows it."""
    pytest.importorskip("torch")
    started, params, grads = contender(name, "8bit")
    more = np.float32(0.1 if name == "Lion" else 0.01)

    def step() -> None:
        before = started.read_params().copy()
        started.step()
        after = started.read_params()
        after += more * (after - before)

    message = r"^8bit must take the steps of \w+ to 5.0%, and to .*% all in all; they are off by .*%\.$"
    with pytest.raises(WrongUpdateError, match=message):
        family_peers.check(FAMILY[name], "8bit", started._replace(step=step), params, grads)


def test_traffic_is_that_of_the_rule() -> None:
    moved = {name: one.bytes_moved(10, "float32") for name, one in FAMILY.items()}
    assert (moved["SGD"], moved["Lion"], moved["Adam"], moved["AMSGrad"]) == (120, 200, 280, 360)
    for name in ("SGD", "Lion", "Adam", "AMSGrad"):
        started, params, grads = contender(name, "traffic")
        started.step()
        np.testing.assert_array_equal(started.read_params(), params + grads)


def test_a_traffic_kernel_that_does_less_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for loops in ("_SERIAL", "_PARALLEL"):
        monkeypatch.setattr(family_peers, loops, [lambda *_: None] * 4)
    with pytest.raises(WrongUpdateError, match=r"^the traffic kernel must add the gradient to all arrays"):
        contender("Adam", "traffic")


def test_family_writes_results(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    output = tmp_path / "it.json"
    arguments = ["--quick", "--size", "1Ki", "--output", str(output)]
    done = CliRunner().invoke(family.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    text = output.read_text(encoding="utf-8")
    assert str(ROOT) not in text
    result = json.loads(text)
    assert (result["kind"], result["rounds"], result["skipped"]) == ("family", 2, {})
    for name, one in FAMILY.items():
        rows = {row["peer"]: row for row in result["rows"] if row["rule"] == name}
        assert rows.keys() == family_peers.contest(one).peers.keys()
        for row in rows.values():
            moved = row["bytes_per_element"] * row["size"]
            assert row["bytes_per_element"] <= one.bytes_moved(1, "float32")
            assert row["gb_per_second"] * row["seconds"] == pytest.approx(1e-9 * moved)
            assert row["target"] is None
    assert report.render([result]).count("\n| ") == 1 + len(FAMILY)


def test_without_torch_there_is_lion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family_peers, "find_spec", lambda _: None)
    assert {name for name, one in FAMILY.items() if family_peers.missing(one) is None} == {"Lion"}


def test_unknown_rules_are_refused() -> None:
    done = CliRunner().invoke(family.app, ["--rule", "nothing"])
    assert done.exit_code == 2
    assert "--rule must be of" in done.output


def test_promises_are_at_the_size_of_the_comparison() -> None:
    for one in FAMILY.values():
        found = family_peers.contest(one)
        assert {size for _, size in found.promises} == {2**25}
        assert {peer for peer, _ in found.promises} == found.peers.keys() - {"fastadam", "bfloat16", "8bit"}
        assert found.target("traffic", 2**25, "float32") == 1.05
    assert family.SIZES == ("32Mi",)


def test_report_shows_the_best_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "origin", lambda _: "<sub>origin</sub>\n")

    def row(rule: str, peer: str, label: str, ratio: float, target: float | None) -> dict[str, Any]:
        quartiles = {"low": ratio, "median": ratio, "high": ratio}
        own = {"rule": rule, "size": 2**25, "peer": peer, "label": label, "bytes_per_element": 20}
        return {**own, "seconds": 0.02 / ratio, "fastadam_over_peer": quartiles, "target": target}

    rows = [
        row("Lion", "fastadam", "fastadam", 1, None),
        row("Lion", "traffic", "same traffic", 1.02, 1.05),
        row("Lion", "8bit", "states in 8 bits", 1.25, None),
        row("SGD", "fastadam", "fastadam", 1, None),
        row("SGD", "traffic", "same traffic", 1.1, 1.05),
        row("SGD", "torch foreach", "torch, foreach", 0.5, 1.0),
        row("SGD", "torch for-loop", "torch, for-loop", 0.25, 1.0),
    ]
    result = {"kind": "family", "dtype": "float32", "skipped": {"RAdam": "no torch"}, "rows": rows}
    assert report.render([result]) == (
        "| step of 32Mi float32 | bytes | time | over same traffic | torch | over torch's best |"
        " states in bfloat16 | in 8 bits |\n"
        "| --- | --: | --: | --: | --: | --: | --: | --: |\n"
        "| Lion | 20 | 20.0 ms | 1.020 (1.020 to 1.020) | has none |  |  | 1.25x |\n"
        "| SGD | 20 | 20.0 ms | 1.100 (1.100 to 1.100) **above 1.05** | 40.0 ms, foreach |"
        " 0.500 (0.500 to 0.500) |  |  |\n"
        "\n"
        "Not measured: RAdam (no torch).\n"
        "\n"
        "<sub>origin</sub>\n"
    )


def test_a_wrong_rule_in_float64_is_refused() -> None:
    """The oracle of Lion is the paper's, not ours."""
    params, grads = oracle.inputs(100, np.float32)
    other = Relative("Lion", {"lr": 1e-3, "betas": (0.5, 0.99)}, ("exp_avg",))
    started = family_peers.start_fastadam(other, params.copy(), grads.copy())
    # Signs differ where the gradient turned around.
    with pytest.raises(WrongUpdateError):
        partial(family_peers.check, FAMILY["Lion"])("it", started, params, grads)
