"""The benchmarks: clocks count what they should, wrong contenders are refused, the README follows."""

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
    compare,
    contest,
    harness,
    memory,
    oracle,
    peers,
    report,
    roofline,
    scaling,
    startup,
    threshold,
    units,
)
from bench.environment import ROOT, Result
from fastadam.kernels import cpu, threads

Array = oracle.Array


# --- Harness ------------------------------------------------------------------------------------------------


class FakeMachine:
    """A clock that only calls advance, and calls that take a given time."""

    def __init__(self) -> None:
        self.now = 0
        self.calls: list[str] = []
        self.busy_until = 0

    def clock(self) -> int:
        return self.now

    def call(self, name: str, nanoseconds: int, *, spins: int = 0) -> Callable[[], None]:
        """Return a call that leaves threads spinning, and that spinning threads of another slow down."""

        def run() -> None:
            disturbed = self.now < self.busy_until and self.calls and self.calls[-1] != name
            if disturbed:
                self.now += 100 * nanoseconds
            else:
                self.calls.append(name)
                self.now += nanoseconds
            self.busy_until = max(self.busy_until, self.now + spins)

        return run


def test_harness_reports_medians_and_ratios() -> None:
    machine = FakeMachine()
    tasks = {
        "one": harness.Task(machine.call("one", 1_000)),
        "three": harness.Task(machine.call("three", 3_000)),
    }
    measured = harness.interleave(tasks, rounds=5, clock=machine.clock)
    assert measured.median("one") == pytest.approx(1e-6)
    assert measured.ratio("three", over="one") == pytest.approx((3, 3, 3))
    assert [len(rounds) for rounds in measured.seconds.values()] == [5, 5]


def test_ratios_are_formed_within_rounds() -> None:
    measured = harness.Measurement({"a": [1.0, 10.0, 100.0], "b": [2.0, 40.0, 110.0]})
    assert measured.ratio("a", over="b").median == 0.5  # the ratio of the medians is 0.25


def test_pooled_measurements_keep_their_pairs() -> None:
    parts = [harness.Measurement({"a": [1.0], "b": [2.0]}), harness.Measurement({"b": [8.0], "a": [2.0]})]
    assert harness.Measurement.pooled(parts).seconds == {"a": [1.0, 2.0], "b": [2.0, 8.0]}


def test_harness_shuffles_each_round_reproducibly() -> None:
    def rounds_with(seed: int) -> list[tuple[str, ...]]:
        machine = FakeMachine()
        tasks = {name: harness.Task(machine.call(name, 1_000)) for name in "abc"}
        blocks = harness.Blocks(0, 0, min_warm_calls=0, min_timed_calls=1)
        harness.interleave(tasks, rounds=12, blocks=blocks, seed=seed, clock=machine.clock)
        return [tuple(machine.calls[i : i + 3]) for i in range(0, 36, 3)]

    rounds = rounds_with(seed=1)
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 3
    assert rounds == rounds_with(seed=1)
    assert rounds != rounds_with(seed=2)


@pytest.mark.parametrize(("warm_seconds", "is_clean"), [(0.0, False), (0.010, True)])
def test_spinning_threads_of_the_previous_contender_are_waited_for(
    warm_seconds: float, is_clean: bool
) -> None:
    machine = FakeMachine()
    tasks = {
        "spinning": harness.Task(machine.call("spinning", 1_000, spins=5_000_000)),
        "other": harness.Task(machine.call("other", 1_000)),
    }
    blocks = harness.Blocks(warm_seconds, 0.001)
    measured = harness.interleave(tasks, rounds=7, blocks=blocks, clock=machine.clock)
    assert (measured.ratio("other", over="spinning").high == pytest.approx(1)) is is_clean


def test_what_runs_before_a_call_is_not_timed() -> None:
    machine = FakeMachine()
    task = harness.Task(machine.call("step", 1_000), before=machine.call("before", 500_000))
    measured = harness.interleave({"step": task}, rounds=3, clock=machine.clock)
    assert measured.median("step") == pytest.approx(1e-6)
    assert machine.calls.count("before") == machine.calls.count("step")


# --- Oracle -------------------------------------------------------------------------------------------------


def variant_of_adam(
    params: Array,
    grads: Array,
    *,
    sign: float = 1.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    eps_hat: bool = False,
    corrects: tuple[bool, bool] = (True, True),
) -> oracle.Contender:
    """Adam in the dtype of the parameters, right by default."""
    exp_avg, exp_avg_sq = np.zeros_like(params), np.zeros_like(params)
    taken = 0

    def step() -> None:
        nonlocal taken
        taken += 1
        exp_avg[...] = beta1 * exp_avg + (1 - beta1) * grads
        exp_avg_sq[...] = beta2 * exp_avg_sq + (1 - beta2) * grads * grads
        correction1 = 1 - beta1**taken if corrects[0] else 1
        correction2 = 1 - beta2**taken if corrects[1] else 1
        scaled_eps = eps / correction2**0.5 if eps_hat else eps
        params[...] -= sign * 1e-3 / correction1 * exp_avg / (np.sqrt(exp_avg_sq / correction2) + scaled_eps)

    return oracle.Contender(step, lambda: params, lambda new: np.copyto(grads, new))


def check(contender: Callable[..., oracle.Contender], dtype: Any = np.float32, size: int = 1000) -> None:
    params, grads = oracle.inputs(size, dtype)
    oracle.check_update("it", contender(params.copy(), grads.copy()), params, grads)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 1000, cpu.PARALLEL_FROM + 1, 100_000])
@pytest.mark.parametrize("start", [peers.start_fastadam, peers.start_numpy, variant_of_adam])
def test_right_contenders_pass(start: Callable[..., oracle.Contender], size: int, dtype: Any) -> None:
    check(start, dtype, size)


WRONG = {
    "sign": {"sign": -1.0},
    "one tenth too large": {"sign": 1.1},
    "one thousandth too large": {"sign": 1.001},
    "beta1": {"beta1": 0.99},
    "beta2": {"beta2": 0.99},
    "no eps": {"eps": 0.0},
    "eps hat": {"eps_hat": True},
    "no bias correction 1": {"corrects": (False, True)},
    "no bias correction 2": {"corrects": (True, False)},
    "nan": {"sign": float("nan")},
    "no update": {"sign": 0.0},
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mistake", WRONG.values(), ids=WRONG.keys())
def test_wrong_contenders_are_refused(mistake: dict[str, Any], dtype: Any) -> None:
    with pytest.raises(oracle.WrongUpdateError, match=r"^it must take the steps of Adam; got an update of "):
        check(lambda params, grads: variant_of_adam(params, grads, **mistake), dtype)


def test_one_wrong_element_is_found() -> None:
    def last_is_wrong(params: Array, grads: Array) -> oracle.Contender:
        right = variant_of_adam(params, grads)

        def step() -> None:
            kept = params[-1]
            right.step()
            params[-1] = kept

        return right._replace(step=step)

    with pytest.raises(oracle.WrongUpdateError, match="at 99999 of 100000 float32 elements"):
        check(last_is_wrong, size=100_000)


def test_comparison_refuses_a_wrong_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(peers.NUMPY, start=lambda p, g: variant_of_adam(p, g, sign=-1.0))
    monkeypatch.setitem(peers.PEERS, "numpy", wrong)
    with pytest.raises(oracle.WrongUpdateError, match=r"^numpy must take the steps of Adam"):
        contest.start_all(compare.STEP, ["fastadam", "numpy"], 1000, "float32", seed=0)


def test_roofline_checks_itself() -> None:
    def forgets_a_moment(params: Array, grads: Array, exp_avg: Array, _: Array) -> None:
        params += grads
        exp_avg += grads

    with pytest.raises(oracle.WrongUpdateError, match=r"^the roofline kernel must add"):
        roofline._check(forgets_a_moment, *oracle.inputs(10, np.float32))


@pytest.mark.parametrize("size", [1000, cpu.PARALLEL_FROM])
def test_values_stay_normal_over_many_steps(size: int) -> None:
    params, grads = oracle.inputs(size, np.float32)
    for start in (peers.start_fastadam, roofline.start):
        contender = start(params.copy(), grads.copy())
        for _ in range(3000):
            contender.step()
        magnitudes = np.abs(contender.read_params())
        assert np.all(np.isfinite(magnitudes))
        assert np.all((magnitudes == 0) | (magnitudes >= np.finfo(np.float32).tiny))


# --- Programs -----------------------------------------------------------------------------------------------


def run(app: Any, *arguments: str) -> Result:
    """Run a program with --quick; return what it wrote."""
    output = Path(arguments[-1])
    done = CliRunner().invoke(
        app, ["--quick", *arguments[:-1], "--output", str(output)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    text = output.read_text(encoding="utf-8")
    assert str(ROOT) not in text
    result: Result = json.loads(text)
    assert result["environment"]["versions"].keys() >= {"fastadam", "numpy", "numba"}
    assert report.render([result]).startswith("| ")
    return result


def test_compare_writes_results(tmp_path: Path) -> None:
    result = run(
        compare.app, "--peers", "numpy", "--peers", "roofline", str(tmp_path / "results" / "it.json")
    )
    assert result["kind"] == "compare"
    assert result["rounds"] == 2
    rows = {(row["peer"], row["size"]): row for row in result["rows"]}
    assert set(rows) == set(product(("fastadam", "numpy", "roofline"), (2**10, 2**16)))
    for (peer, size), row in rows.items():
        assert 0 < row["seconds"] < 1
        assert row["gb_per_second"] * row["seconds"] == pytest.approx(28e-9 * size)
        if peer == "fastadam":
            assert row["fastadam_over_peer"] == {"low": 1, "median": 1, "high": 1}


def test_compare_in_float64(tmp_path: Path) -> None:
    arguments = ("--dtype", "float64", "--size", "1Ki", "--peers", "thinc", str(tmp_path / "it.json"))
    result = run(compare.app, *arguments)
    assert result["skipped"] == {"thinc": "no float64"}
    assert [row["peer"] for row in result["rows"]] == ["fastadam"]
    assert {row["target"] for row in result["rows"]} == {None}


@pytest.mark.parametrize("arguments", [("--peers", "nobody"), ("--size", "3x"), ("--dtype", "int32")])
def test_compare_refuses_unknown_arguments(arguments: tuple[str, str]) -> None:
    assert CliRunner().invoke(compare.app, arguments).exit_code == 2


def test_absent_libraries_are_skipped_with_a_reason() -> None:
    absent = replace(peers.TORCH, packages=("no_such_package",))
    assert absent.missing("float32") == "not installed: no_such_package"
    assert peers.FASTADAM.missing("float32") is None


def test_threshold_writes_results(tmp_path: Path) -> None:
    result = run(threshold.app, str(tmp_path / "it.json"))
    assert [row["size"] for row in result["rows"]] == list(threshold.QUICK_SIZES)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [([2, 1.5, 0.9, 0.5], 3), ([2, 0.9, 1.1, 0.5], 4), ([0.9, 0.8], 1), ([2, 1], None)],
)
def test_crossing(ratios: list[float], expected: int | None) -> None:
    rows = [{"size": i, "parallel_over_serial": {"median": ratio}} for i, ratio in enumerate(ratios, start=1)]
    assert threshold.crossing(rows) == expected


def test_scaling_writes_results_and_restores_the_threads(tmp_path: Path) -> None:
    before = threads.numba_is_safe, threads.count()
    result = run(scaling.app, str(tmp_path / "it.json"))
    assert (threads.numba_is_safe, threads.count()) == before
    numbas = {f"numba {threads.layer()}"} if threads.numba_is_safe() else set()
    assert {row["layer"] for row in result["rows"]} == {"own pool", *numbas}
    assert result["rows"][0]["threads"] == 1
    assert result["rows"][0]["speedup"]["median"] == 1


@pytest.mark.parametrize(
    ("available", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_thread_counts(available: int, counts: list[int]) -> None:
    assert scaling.thread_counts(available) == counts


def test_startup_uses_a_new_cache_for_each_cold_run() -> None:
    caches: dict[bool, list[str]] = {False: [], True: []}
    cases = (
        startup.Case("warm", "w", cold=False, at_most=1.0),
        startup.Case("cold", "c", cold=True, at_most=1.0),
    )

    def start(program: str, cache: str) -> float:
        caches[program == "c"].append(cache)
        return 2.0 if program == "c" else 1.0

    rows = startup.measure(3, start, cases)
    assert [row["seconds"]["median"] for row in rows] == [1, 2]
    untimed, *timed = caches[True]
    assert {untimed} == set(caches[False])  # the first run of each case makes the files warm
    assert len({*timed, untimed}) == 4


def test_startup_measures_an_import() -> None:
    assert 0 < startup.measure(1, cases=startup.CASES[:1])[0]["seconds"]["median"] < 10


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_writes_results(tmp_path: Path) -> None:
    result = run(memory.app, str(tmp_path / "it.json"))
    assert [row["name"] for row in result["rows"]] == ["first step", "second step", "temporaries of a step"]
    assert result["rows"][0]["bytes_per_element"] == pytest.approx(8, abs=1)


# --- Report -------------------------------------------------------------------------------------------------

ENVIRONMENT = {
    "machine": {"cpu": "Some CPU", "architecture": "znver9", "cores": 2, "memory_gib": 24},
    "os": "Linux 7.0",
    "python": "3.14.0",
    "versions": {"fastadam": "0.1.0", "numpy": "2.4.6"},
    "threading_layer": "tbb",
    "date": "2030-01-02 03:04 UTC",
    "commit": "0123456789ab",
}


def compare_result(seconds: float) -> Result:
    common = {"size": 2**25, "gb_per_second": 1.0}
    own = {"peer": "fastadam", "label": "fastadam", "seconds": seconds, "target": None}
    other = {"peer": "torch", "label": "torch fused", "seconds": 2 * seconds, "target": 0.4}
    same, half = {"low": 1.0, "median": 1.0, "high": 1.0}, {"low": 0.49, "median": 0.5, "high": 0.51}
    return {
        "kind": "compare",
        "environment": ENVIRONMENT,
        "dtype": "float32",
        "rounds": 25,
        "skipped": {},
        "rows": [
            {**common, **own, "fastadam_over_peer": same},
            {**common, **other, "fastadam_over_peer": half},
        ],
    }


def readme(kind: str = "compare", inside: str = "old\n") -> str:
    begin = f"<!-- results:{kind}:begin (generated by python -m bench.report) -->"
    return f"# Title\n\n{begin}\n{inside}<!-- results:{kind}:end -->\n\nmore\n"


def test_report_renders_results() -> None:
    assert report.render([compare_result(0.0162)]) == (
        "| step, float32 | 32Mi |\n"
        "| --- | --: |\n"
        "| fastadam | 16.2 ms |\n"
        "| torch fused | 32.4 ms (2.00x) |\n"
        "\n"
        "| time of fastadam over | at most | measured |  |\n"
        "| --- | --: | --: | --: |\n"
        "| torch fused, 32Mi | 0.40 | 0.500 (0.490 to 0.510) | **missed** |\n"
        "\n"
        "<sub>Some CPU (znver9), 2 cores, 24 GiB; Linux 7.0; Python 3.14.0; fastadam 0.1.0, numpy 2.4.6;"
        " threads: tbb; median of 25 rounds, with quartiles; 2030-01-02 03:04 UTC;"
        " commit 0123456789ab.</sub>\n"
    )


def test_report_replaces_sections_only() -> None:
    once = report.updated(readme(), [compare_result(0.0162)])
    assert once == readme(inside=f"\n{report.render([compare_result(0.0162)])}\n")
    assert report.updated(once, [compare_result(0.0162)]) == once
    assert report.NOT_MEASURED in report.updated(readme("memory"), [compare_result(0.0162)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (readme("nonsense"), "a section of results must be of compare, phase, .*; got nonsense"),
        ("no section\n", "sections of results must stand between markers"),
        (readme().replace(":end", ":stop"), "sections of results must stand between markers"),
    ],
)
def test_report_refuses_broken_sections(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report.updated(text, [])


def test_report_check_bites(tmp_path: Path) -> None:
    text, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    text.write_text(readme(), encoding="utf-8")
    (results / "compare-it.json").write_text(json.dumps(compare_result(0.0162)), encoding="utf-8")

    def invoke(*options: str) -> tuple[int, str]:
        done = CliRunner().invoke(report.app, [*options, "--readme", str(text), "--results", str(results)])
        return done.exit_code, done.output

    assert invoke("--check") == (1, "README.md is stale: run python -m bench.report\n")
    assert text.read_text(encoding="utf-8") == readme()
    assert invoke() == (0, "wrote the results into README.md\n")
    assert invoke("--check") == (0, "README.md shows the results\n")
    (results / "compare-it.json").write_text(json.dumps(compare_result(0.0163)), encoding="utf-8")
    assert invoke("--check")[0] == 1


# --- Units --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("1000", 1000), ("3Ki", 3072), ("32Mi", 2**25), ("1Gi", 2**30)]
)
def test_sizes_are_read_and_written(text: str, size: int) -> None:
    assert units.parse_size(text) == size
    assert units.format_size(size) == text


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5Mi", "Mi", "1M", "ki"])
def test_wrong_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^a size must be a positive integer"):
        units.parse_size(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5e-9, "2.50 ns"), (7.01e-7, "701 ns"), (9.996e-6, "10.0 us"), (0.0162, "16.2 ms"), (3.0, "3.00 s")],
)
def test_times_have_three_digits(seconds: float, text: str) -> None:
    assert units.format_time(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(811, "811 B"), (2**14, "16.0 KiB"), (257 * 2**20, "257 MiB")])
def test_bytes_have_three_digits(count: int, text: str) -> None:
    assert units.format_bytes(count) == text
