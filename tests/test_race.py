"""The race: its runs, its tuning, its numbers; the same losses for the same seed; runs that diverge."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf, nan

import numpy as np
import pytest
import race_cases
from race_cases import QUICK, losses, quick
from tolerances import assert_same_bits

pytest.importorskip("scipy")
pytest.importorskip("threadpoolctl")

import fastadam
from fastadam.race import lbfgs, race, record, runs, settings, tables, tuning
from fastadam.race.optimizers import LBFGS, OPTIMIZERS, Entrant
from fastadam.race.problems import PROBLEMS
from fastadam.race.racing import count
from fastadam.race.results import Entry, Run, Standing, Trial, median
from fastadam.race.settings import Settings

# --- Runs ---------------------------------------------------------------------------------------------------


def test_a_run_is_its_loop():
    problem = PROBLEMS["noisy"]()
    draws = problem.draws(5, 40)
    run = runs.run(problem, OPTIMIZERS["adam"], 0.05, 5, draws)
    params, opt = problem.start(5), fastadam.FusedAdam(lr=0.05)
    places = [params.copy()]
    for draw in draws:
        opt.step(params, problem.gradient(params) + draw)
        places.append(params.copy())
    assert run.seed == 5
    assert run.steps.tolist() == [0, 10, 20, 30, 40]
    assert_same_bits(run.path, np.array(places[::10]))
    assert_same_bits(run.losses, np.array([problem.loss(place) for place in places[::10]]))
    assert run.diverged_at is None
    assert 0 < run.seconds < 1


def test_the_last_step_is_recorded_too():
    problem = PROBLEMS["noisy"]()
    run = runs.run(problem, OPTIMIZERS["adam"], 0.05, 0, problem.draws(0, 23))
    assert run.steps.tolist() == [0, 10, 20, 23]
    assert np.isfinite(run.losses).all()
    assert np.isnan(runs.run(problem, OPTIMIZERS["adam"], 0.05, 0, problem.draws(0, 1)).seconds)


def test_parameters_are_projected_after_each_step():
    problem = PROBLEMS["reddi"]()
    run = runs.run(problem, OPTIMIZERS["adam"], 0.7, 0, problem.draws(0, 300))
    assert np.abs(run.path).max() == 1


@pytest.mark.parametrize(
    ("name", "arrives"),
    [("adam", False), ("adamw", False), ("amsgrad", True)],
    ids=["adam", "adamw", "amsgrad"],
)
@pytest.mark.parametrize("lr", [0.01, 0.1])
def test_adam_goes_the_wrong_way_in_the_counterexample_and_amsgrad_does_not(name, arrives, lr):
    problem = PROBLEMS["reddi"]()
    run = runs.run(problem, OPTIMIZERS[name], lr, 0, problem.draws(0, problem.steps))
    assert abs(run.path[-1, 0] - (-1 if arrives else 1)) < 0.15


def test_lbfgs_finds_the_minimum_and_stands_still():
    problem = PROBLEMS["rosenbrock"]()
    run = lbfgs.run(problem, 0, 200)
    np.testing.assert_allclose(run.path[-1], (1, 1), atol=1e-9)
    assert run.steps_to(problem.target) < 60
    assert run.losses[-1] == run.losses[-2] < 1e-15
    assert run.diverged_at is None
    assert 0 < run.seconds < 1
    assert lbfgs.run(problem, 0, 3).steps.tolist() == [0, 1, 2, 3]
    assert lbfgs.run(PROBLEMS["reddi"](), 0, 9).path[-1] == -1  # within its bounds


def test_lbfgs_from_the_minimum(monkeypatch):
    problem = PROBLEMS["quadratic"]()
    monkeypatch.setattr(problem, "start", lambda _: np.zeros(2))
    run = lbfgs.run(problem, 0, 5)
    assert run.losses.tolist() == [0] * 6
    assert np.isnan(run.seconds)


def test_lbfgs_that_meets_a_loss_that_is_not_finite(monkeypatch):
    problem = PROBLEMS["quadratic"]()
    start = problem.start(0)
    for value in (inf, nan):
        monkeypatch.setattr(
            problem, "value", lambda x, y, value=value: 1.0 if (x, y) == tuple(start) else value
        )
        with np.errstate(all="ignore"):
            run = lbfgs.run(problem, 0, 5)
        assert run.losses[0] == 1
        assert run.final in {1, inf}
        assert (run.diverged_at is not None) == (run.final == inf) == bool(np.isnan(run.losses[-1]))


# --- Divergence ---------------------------------------------------------------------------------------------


@pytest.fixture
def with_sgd(monkeypatch):
    """A race in which SGD takes part; on steep problems its high learning rates diverge."""
    monkeypatch.setattr(fastadam, "FusedSGD", race_cases.PlainSGD, raising=False)
    sgd = Entrant("sgd", "SGD", "FusedSGD", 1e-3)
    monkeypatch.setitem(settings.OPTIMIZERS, "sgd", sgd)
    return replace(QUICK, problems=("rosenbrock", "quadratic"), optimizers=("sgd", "adam"), steps=400)


def test_runs_that_diverge_end_and_are_shown_as_such(with_sgd):
    result = race(with_sgd)
    standing = result.standings[0]
    sgd = next(entry for entry in standing.entries if entry.entrant.name == "sgd")
    low, _, high = sgd.trials
    assert (low.diverged, high.diverged) == (0, 2)
    assert high.final == inf
    assert sgd.chosen is not high
    run = high.runs[0]
    assert 0 < run.diverged_at < 400
    assert np.isfinite(run.losses[: run.diverged_at]).all()
    assert np.isnan(run.losses[run.diverged_at :]).all()
    row = next(row for row in tables.rows(standing) if row[0] == "sgd")
    assert row[-1] == f"{sgd.diverged} of 6"
    assert sgd.diverged >= 2


def test_nobody_arrives(with_sgd, monkeypatch):
    entrant = replace(settings.OPTIMIZERS["sgd"], lowest_lr=1e3, highest_lr=1e7)
    monkeypatch.setitem(settings.OPTIMIZERS, "sgd", entrant)
    result = race(replace(with_sgd, optimizers=("sgd",)))
    for standing in result.standings:
        (row,) = tables.rows(standing)
        assert row[:2] == ("sgd", "1000")
        assert row[3:6] == ("diverged", "diverged to diverged", "never")
        assert row[7] == "6 of 6"


# --- The same again -----------------------------------------------------------------------------------------


def without_times(result):
    """The record of a race but for its times."""

    def strip(value):
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key != "seconds_per_step"}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return strip(record.of(result))


def table(result):
    return [
        [cell for k, cell in enumerate(row) if k != tables.TIME]
        for standing in result.standings
        for row in tables.rows(standing)
    ]


@pytest.mark.parametrize("tune", ["grid", "random"])
def test_the_same_settings_give_the_same_bits_and_the_same_table(tune):
    first, second = quick(tune=tune), race(replace(QUICK, tune=tune))
    assert losses(first) == losses(second)
    assert table(first) == table(second)
    assert json.dumps(without_times(first)) == json.dumps(without_times(second))


def test_another_seed_is_another_race():
    other = losses(quick(seed=7))
    assert other.keys().isdisjoint(losses(quick()))
    assert set(other.values()).isdisjoint(losses(quick()).values())


def test_a_seed_means_the_same_whoever_takes_part():
    """Seed 1 of two seeds from 0 on is that of one seed from 1 on; the other optimizers change nothing."""
    alone = losses(race(replace(QUICK, problems=("noisy",), optimizers=("amsgrad",), seed=1, seeds=1)))
    together = losses(quick())
    assert len(alone) == 3
    assert alone.items() <= together.items()


@pytest.mark.parametrize("name", ["digits"])
def test_digits_have_the_same_bits(name):
    pytest.importorskip("sklearn")
    few = Settings((name,), ("adam", "lbfgs"), steps=20, seeds=1, trials=2)
    first = race(few)
    assert losses(first) == losses(race(few))
    assert first.standings[0].ranked[0].chosen.final < 1


# --- Tuning -------------------------------------------------------------------------------------------------


def rates(name="adam", problem="rosenbrock", **changes):
    return tuning.learning_rates(OPTIMIZERS[name], PROBLEMS[problem], replace(Settings(), **changes))


def test_grid():
    assert rates() == [0.0001, 0.000316, 0.001, 0.00316, 0.01, 0.0316, 0.1, 0.316, 1]
    assert rates(trials=2) == [0.0001, 1]
    assert rates(trials=1) == [0.01]
    assert rates(problem="reddi", trials=3) == [0.01, 0.1, 1]


def test_random():
    drawn = rates(tune="random", trials=400)
    assert drawn == sorted(drawn)
    assert 1e-4 <= drawn[0] < 2e-4
    assert 0.5 < drawn[-1] <= 1
    # Uniform in the logarithm: a quarter of them in each decade, with a standard deviation of 2.2 %.
    shares = np.histogram(np.log10(drawn), bins=[-4, -3, -2, -1, 0])[0] / 400
    np.testing.assert_allclose(shares, 0.25, atol=0.09)
    assert rates(tune="random", trials=400) == drawn
    assert rates(tune="random", trials=400, seed=1) != drawn
    assert rates("amsgrad", tune="random", trials=400) != drawn


def test_none_and_lbfgs_have_one_learning_rate():
    assert rates(tune="none") == [1e-3]
    assert rates("lbfgs") == rates("lbfgs", tune="random") == [LBFGS.default_lr]


def test_every_run_is_reported_and_counted():
    seen = []
    few = replace(QUICK, problems=("rosenbrock",))
    result = race(few, on_run=lambda *what: seen.append(what))
    assert len(seen) == count(few) == (3 + 3 + 1) * 2
    assert [(problem.name, entrant.name, run.seed) for problem, entrant, run in seen[-2:]] == [
        ("rosenbrock", "lbfgs", 0),
        ("rosenbrock", "lbfgs", 1),
    ]
    assert sum(entry.runs for entry in result.standings[0].entries) == len(seen)


# --- Numbers ------------------------------------------------------------------------------------------------


def made(values, diverged_at=None, seed=0):
    values = np.array(values, float)
    return Run(seed, np.arange(len(values)) * 2, values, None, diverged_at, 1e-6)


def test_numbers_of_a_run():
    run = made([9, 5, *[3] * 17, 1, 7])
    assert run.final == 4  # the median of the last two of the twenty after the start
    assert run.best == 1
    assert run.steps_to(5) == 2
    assert run.steps_to(1) == 38
    assert run.steps_to(0.5) == inf
    lost = made([9, 5, nan], diverged_at=4)
    assert (lost.final, lost.best, lost.steps_to(5)) == (inf, 5, 2)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3], 3), ([1, 9, 2], 2), ([1, 2, 3, 6], 2.5), ([1, inf], inf), ([1, 2, inf], 2), ([inf, inf], inf)],
    ids=str,
)
def test_median(values, expected):
    assert median(values) == expected


def test_the_lowest_final_loss_is_chosen_and_of_equals_the_lowest_learning_rate():
    trials = tuple(
        Trial(lr, tuple(made([9, final], seed=seed) for seed, final in enumerate(finals)))
        for lr, finals in ((0.1, (4, 4, 9)), (0.2, (1, 3, 3)), (0.3, (3, 3, 3)), (0.4, (0, 5, 5)))
    )
    entry = Entry(OPTIMIZERS["adam"], {}, trials)
    assert entry.chosen.lr == 0.2
    assert entry.chosen.steps_to(3) == 2
    assert (entry.runs, entry.diverged) == (12, 0)
    worse = Entry(OPTIMIZERS["amsgrad"], {}, trials[:1])
    standing = Standing(PROBLEMS["rosenbrock"](), 2, (worse, entry))
    assert standing.ranked == [entry, worse]
    best, *_ = tables.rows(standing)
    assert best == ("adam", "0.2", "3", "3", "1 to 3", "never", "1.0 us", "0 of 12")


def test_times_of_runs_that_ended_at_once_do_not_count():
    runs = tuple(replace(made([9, 1]), seconds=seconds) for seconds in (nan, 3e-6, nan, 1e-6))
    assert Entry(OPTIMIZERS["adam"], {}, (Trial(0.1, runs),)).seconds == 2e-6
    none = Entry(OPTIMIZERS["adam"], {}, (Trial(0.1, runs[:1]),))
    assert tables.rows(Standing(PROBLEMS["noisy"](), 1, (none,)))[0][tables.TIME] == "-"


def test_table_of_a_race():
    standing = quick().standings[0]
    assert tables.caption(standing) == "Rosenbrock's valley: 30 steps, target 0.001"
    rows = tables.rows(standing)
    assert {row[0] for row in rows} == {"adam", "amsgrad", "lbfgs"}
    assert all(len(row) == len(tables.COLUMNS) for row in rows)
    assert {row[1] for row in rows if row[0] == "lbfgs"} == {"-"}
    assert all(row[tables.TIME].endswith(" us") for row in rows)


# --- The record ---------------------------------------------------------------------------------------------


def test_record(tmp_path):
    result = quick()
    record.save(result, tmp_path / "race.json")
    read = json.loads((tmp_path / "race.json").read_text(encoding="utf-8"))
    assert read["versions"]["fastadam"] == fastadam.__version__
    assert read["versions"]["numpy"] == np.__version__
    assert read["arguments"] == {
        "problems": ["rosenbrock", "noisy", "logistic", "reddi"],
        "optimizers": ["adam", "amsgrad", "lbfgs"],
        "steps": 30,
        "seeds": 2,
        "seed": 0,
        "tune": "grid",
        "trials": 3,
    }
    for standing in result.standings:
        told = read["problems"][standing.problem.name]
        assert told["steps"] == 30
        for entry in standing.entries:
            written = told["optimizers"][entry.entrant.name]
            assert written["final"] == entry.chosen.final
            for run, row in zip(entry.chosen.runs, written["runs"], strict=True):
                assert len(told["recorded_after"]) == len(row["losses"])
                assert_same_bits(np.array(row["losses"]), run.losses)
    adam = read["problems"]["reddi"]["optimizers"]["adam"]
    assert adam["arguments"] == {"betas": [0, 0.1]}
    assert adam["class"] == "fastadam.FusedAdam"
    assert [trial["lr"] for trial in adam["trials"]] == [0.01, 0.1, 1]
    assert read["problems"]["reddi"]["optimizers"]["lbfgs"]["lr"] is None


def test_record_of_runs_that_diverged(with_sgd, tmp_path):
    record.save(race(with_sgd), tmp_path / "race.json")
    read = json.loads((tmp_path / "race.json").read_text(encoding="utf-8"))
    last = read["problems"]["rosenbrock"]["optimizers"]["sgd"]["trials"][-1]
    assert last["finals"] == [None, None]
    assert all(step > 0 for step in last["diverged_at"])


def test_versions_of_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(record, "_LIBRARIES", ("no-such-distribution",))
    assert record.versions()["no-such-distribution"] is None


# --- Errors -------------------------------------------------------------------------------------------------

SOME = ", ".join(OPTIMIZERS)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            {"problems": ("rosenbrok",)},
            "problem must be one of rosenbrock, quadratic, saddle, noisy, logistic, digits, reddi, all;"
            " got rosenbrok.",
        ),
        ({"optimizers": ("adam", "eve")}, f"optimizer must be one of {SOME}, all; got eve."),
        ({"steps": 0}, "steps must be at least 1; got 0."),
        ({"seeds": 0}, "seeds must be at least 1; got 0."),
        ({"trials": -1}, "trials must be at least 1; got -1."),
        ({"seed": -1}, "seed must be in [0, 2**32 - seeds]; got -1 with 3 seeds."),
        ({"seed": 2**32 - 2}, "seed must be in [0, 2**32 - seeds]; got 4294967294 with 3 seeds."),
        ({"tune": "genetic"}, "tune must be one of grid, random, none; got genetic."),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_settings_out_of_range(chosen, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Settings(**chosen)
    assert str(caught.value) == message


def test_names_are_taken_once_and_in_their_order():
    chosen = Settings(problems=("reddi", "rosenbrock", "reddi"), optimizers=("lbfgs", "adam"))
    assert chosen.problems == ("rosenbrock", "reddi")
    assert chosen.optimizers == ("adam", "lbfgs")
    assert Settings().problems == tuple(PROBLEMS)
    assert Settings(problems=("noisy", "all")).problems == tuple(PROBLEMS)
    assert (chosen.steps_of("reddi"), Settings(steps=7).steps_of("reddi")) == (900, 7)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("sklearn", "problem digits needs scikit-learn."),
        ("scipy", "optimizer lbfgs needs SciPy."),
        ("threadpoolctl", "the race needs threadpoolctl."),
    ],
    ids=["sklearn", "scipy", "threadpoolctl"],
)
def test_missing_packages_are_named_before_anything_runs(monkeypatch, module, message):
    monkeypatch.setattr(settings, "find_spec", lambda name: None if name == module else name)
    with pytest.raises(ImportError) as caught:
        race(Settings(), on_run=pytest.fail)
    assert str(caught.value) == f'{message} pip install "fastadam[race]"'
    if module != "threadpoolctl":
        Settings(problems=("noisy",), optimizers=("adam",)).require_packages()
