"""The benchmark of storage: contenders are checked within what they can hold; bytes are those moved."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from typer.testing import CliRunner

# Behind the installed package, which `bench` measures: the root of the tree holds a folder of its name.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import (
    contest,
    memory,
    oracle,
    phase_oracle,
    report,
    roofline,
    storage,
    storage_oracle,
    storage_peers,
    storage_report,
    storage_traffic,
    storages,
    tables,
    units,
)
from bench.environment import ROOT
from bench.oracle import BETAS, EPS, GRAD_FACTORS, LR, Contender, WrongUpdateError
from bench.storage_oracle import Precision
from bench.storage_peers import Stored
from bench.storages import STORAGES, Storage
from fastadam import FusedAdam
from fastadam.kernels import cpu, threads

pytest.importorskip("ml_dtypes")

Array = oracle.Array
AVAILABLE = {name: found for name, found in STORAGES.items() if found.refused() is None}
CONTENDERS = {
    f"{title}, {name}": peer
    for title, peers in (("states", storage_peers.STATES), ("params", storage_peers.PARAMS))
    for name, peer in peers.items()
    if isinstance(peer, Stored) and peer.missing("float32") is None
}


# --- Right and wrong contenders -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 1000, cpu.PARALLEL_FROM + 1])
@pytest.mark.parametrize("peer", CONTENDERS.values(), ids=CONTENDERS.keys())
def test_right_contenders_pass(peer: Stored, size: int) -> None:
    params, grads = oracle.inputs(size, np.float32)
    contender = peer.start(params.copy(), grads.copy())
    if peer.is_adam:  # others have checked themselves
        storage_oracle.check_update(Precision.of(peer.storage), "it", contender, params, grads)


WRONG: dict[str, dict[str, Any]] = {
    "too large": {"lr": 1.02 * LR},
    "ascends": {"maximize": True},
    "beta1": {"betas": (0.8, BETAS[1])},
    "eps": {"eps": 10 * EPS},
}
"""What is found whatever has 16 bits; in bfloat16 parameters it is but the mean that shows it."""


@pytest.mark.parametrize("name", [name for name in AVAILABLE if "bfloat16" in name])
@pytest.mark.parametrize("mistake", WRONG.values(), ids=WRONG.keys())
def test_wrong_contenders_are_refused(
    mistake: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(lr: float, betas: tuple[float, float], eps: float, **options: Any) -> FusedAdam:
        return FusedAdam(**{"lr": lr, "betas": betas, "eps": eps, **options, **mistake})

    monkeypatch.setattr(storages, "FusedAdam", mistaken)
    params, grads = oracle.inputs(2**16, np.float32)
    contender = storages.start(params.copy(), grads.copy(), storage=STORAGES[name])
    with pytest.raises(WrongUpdateError, match=r"^it must take the steps of Adam; got "):
        storage_oracle.check_update(Precision.of(STORAGES[name]), "it", contender, params, grads)


def rounded(values: Array, spacing: float, how: str, random: np.random.Generator) -> Array:
    """Round to a float format with ``log2(1 / spacing)`` bits of mantissa."""
    mantissa, exponent = np.frexp(values)
    scaled = mantissa * 2 / spacing
    steps = np.rint(scaled) if how == "nearest" else np.floor(scaled + random.random(values.shape))
    return np.ldexp(steps * spacing / 2, exponent)


def simulated(
    params: Array, grads: Array, spacing: float, how: str, *, lr: float = LR, one_off: float = 1.0
) -> Contender:
    """Adam whose moments have few bits, in float64 otherwise."""
    random = np.random.default_rng(0)
    exp_avg, exp_avg_sq = np.zeros(params.size), np.zeros(params.size)
    taken = 0

    def step() -> None:
        nonlocal taken
        taken += 1
        grad = grads.astype(np.float64)
        m = BETAS[0] * exp_avg + (1 - BETAS[0]) * grad
        v = BETAS[1] * exp_avg_sq + (1 - BETAS[1]) * grad**2
        update = lr * m / (1 - BETAS[0] ** taken) / (np.sqrt(v / (1 - BETAS[1] ** taken)) + EPS)
        update[-1] *= one_off
        params[...] -= update.astype(np.float32)
        exp_avg[...], exp_avg_sq[...] = rounded(m, spacing, how, random), rounded(v, spacing, how, random)

    return Contender(step, lambda: params, lambda new: np.copyto(grads, new))


def check_simulated(spacing: float, how: str, claimed: float, **mistake: float) -> None:
    params, grads = oracle.inputs(2**16, np.float32)
    contender = simulated(params.copy(), grads.copy(), spacing, how, **mistake)
    storage_oracle.check_update(Precision(claimed, claimed), "it", contender, params, grads)


@pytest.mark.parametrize("how", ["nearest", "stochastic"])
@pytest.mark.parametrize("bits", [3, 4, 7])
def test_honest_rounding_passes_and_worse_does_not(bits: int, how: str) -> None:
    check_simulated(2.0**-bits, how, claimed=2.0**-bits)
    coarse = 4 if how == "nearest" else 2  # to the nearest errs by half of it
    with pytest.raises(WrongUpdateError, match=r"^it must take the steps of Adam; got an update of "):
        check_simulated(coarse * 2.0**-bits, how, claimed=2.0**-bits / 2)


@pytest.mark.parametrize("how", ["nearest", "stochastic"])
def test_the_mean_finds_what_an_element_of_8_bits_hides(how: str) -> None:
    for factor in (0.98, 1.02):
        with pytest.raises(
            WrongUpdateError, match=r"^it must .* off by -?3\.[\d]*e-05 on average, in the dir"
        ):
            check_simulated(2**-3, how, claimed=2**-3, lr=factor * LR)


def test_one_wrong_element_of_8_bits_is_found() -> None:
    for factor in (0.5, 1.5, float("nan")):
        with pytest.raises(WrongUpdateError, match=r"^it must .* got an update of .* at 65535 of 65536 elem"):
            check_simulated(2**-3, "stochastic", claimed=2**-3, one_off=factor)


@pytest.mark.parametrize("spacing", [2**-3, 2**-7])
def test_the_bound_on_elements_is_near_what_happens(spacing: float) -> None:
    """Of a million trials with errors at both ends, the worst comes near to it, and none beyond."""
    random, bound = np.random.default_rng(0), storage_oracle.state_error(spacing, spacing)
    m, v, total = np.zeros((3, 10**6))  # the first trial has no errors
    for t, factor in enumerate(GRAD_FACTORS, start=1):
        m = BETAS[0] * m + (1 - BETAS[0]) * factor
        v = BETAS[1] * v + (1 - BETAS[1]) * factor**2
        total = total + (1 - BETAS[1] ** t) ** 0.5 / (1 - BETAS[0] ** t) * m / np.sqrt(v)
        errors = spacing * random.choice([-1.0, 1.0], (2, total.size))
        errors[:, 0] = 0
        m, v = m * (1 + errors[0]), v * (1 + errors[1])
    worst = float(np.max(np.abs(total - total[0])))
    assert bound / 3 < worst <= bound
    assert storage_oracle.state_error(0, 0) == 0


# --- Storages -----------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_documentation() -> None:
    moved = {name: found.bytes_moved for name, found in STORAGES.items()}
    assert moved == {
        "float32": 28,
        "bfloat16": 20,
        "bfloat16, 8bit": 18.0625,
        "8bit": 16.125,
        "bfloat16, float32 master": 22,
        "bfloat16, split master": 18,
        "bfloat16, no master": 14,
        "8bit, split master": 14.125,
    }
    assert moved["float32"] * 1000 == roofline.bytes_moved(1000, np.float32)
    assert STORAGES["8bit"].bytes_kept == 2.0625
    assert STORAGES["8bit"].most_bytes_kept == 2.1


@pytest.mark.parametrize("name", [name for name in AVAILABLE if "32 master" in name or "split" in name])
def test_masters_are_read_exactly(name: str) -> None:
    """Beside what a run with float32 parameters has, and the same before the first step."""
    params, grads = (
        storages.stored(x, "bfloat16").astype(np.float32) for x in oracle.inputs(1000, np.float32)
    )
    masters = storages.start(params.copy(), grads.copy(), storage=STORAGES[name])
    wide = Storage(grads="bfloat16", state=STORAGES[name].state)
    plain = storages.start(params.copy(), grads.copy(), storage=wide)
    for _ in range(3):
        np.testing.assert_array_equal(masters.read_params(), plain.read_params())
        masters.step()
        plain.step()
    assert not np.array_equal(plain.read_params(), params)


def test_storage_that_is_not_there_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    unheard = Stored("7bit", storage_peers.STATES["8bit"].start, storage=Storage(state=("7bit", "7bit")))
    monkeypatch.setitem(storage_peers.STATES, "8bit", unheard)
    skipped = storage.skipped_of(storage.WORKS["float32 parameters and gradients"])
    assert skipped["8bit"].endswith("; got '7bit'.")
    assert not {"float32", "bfloat16", "traffic 28", "traffic 20"} & set(skipped)


def test_traffic_that_nobody_causes_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bfloat16", "bfloat16 nearest"):
        absent = replace(storage_peers.STATES[name], packages=("no_such_package",))
        monkeypatch.setitem(storage_peers.STATES, name, absent)
    skipped = storage.skipped_of(storage.WORKS["float32 parameters and gradients"])
    assert skipped["bfloat16"] == "not installed: no_such_package"
    assert skipped["traffic 20"] == "nobody moves as many bytes"


# --- Traffic ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", [1, 1000, 2049, cpu.PARALLEL_FROM + 1, 2**18])
@pytest.mark.parametrize("found", STORAGES.values(), ids=STORAGES.keys())
def test_traffic_moves_all_bytes(
    found: Storage, size: int, safe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not safe:
        monkeypatch.setattr(threads, "numba_is_safe", lambda: False)
    traffic = storage_traffic.Traffic(found, size)
    held = traffic.grads.nbytes + 2 * sum(array.nbytes for array in (*traffic.written, traffic.scales))
    assert 0 <= held - size * found.bytes_moved <= 2 * 2 * 4  # scales of a block that is not full
    storage_traffic.check(traffic)


def test_traffic_checks_itself() -> None:
    traffic = storage_traffic.Traffic(STORAGES["bfloat16"], 10_000)
    traffic.written[-1][-1] = 1
    with pytest.raises(WrongUpdateError, match=r"^the kernel must add one to all that is written\.$"):
        storage_traffic.check(traffic)


# --- 8-bit Adams of others, and the copy --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["bitsandbytes", "torchao"])
def test_8bit_peers_are_adam_within_their_format(name: str) -> None:
    peer = storage_peers.EIGHT_BIT[name]
    reason = peer.missing("float32")
    if reason is not None:
        pytest.skip(reason)
    contest.start_all(storage.WORKS["8-bit moments"].contest, [name], 2**14, "float32", seed=0)


def test_a_compiler_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = replace(storage_peers.EIGHT_BIT["torchao"], packages=())
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert compiled.missing("float32") == "no C++ compiler"
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert compiled.missing("float32") is None


@pytest.mark.parametrize("name", storage_peers.COPY)
def test_phases_with_a_copy_pass(name: str) -> None:
    if storage_peers.COPY[name].missing("float32"):
        pytest.skip("not installed")
    for size in (1, 1000, cpu.PARALLEL_FROM + 1):
        contest.start_all(storage.WORKS["whole phase with a copy"].contest, [name], size, "float32", seed=0)


@pytest.mark.parametrize(
    "spoiled",
    [
        lambda params: (params.view(np.uint32) >> 16).astype(np.uint16),  # truncated
        lambda params: np.zeros(params.size, np.uint16),
    ],
    ids=["truncated", "nothing"],
)
def test_wrong_copies_are_refused(spoiled: Callable[[Array], Array]) -> None:
    params, grads = oracle.inputs(1000, np.float32)
    own = params.copy()
    contender = storage_peers.start_fastadam_copy(own, grads.copy())
    wrong = contender._replace(read_copy=lambda: spoiled(own))
    with pytest.raises(
        WrongUpdateError, match=r"^it must copy the new parameters to bfloat16, to the nearest"
    ):
        phase_oracle.check_phase_with_copy("it", wrong, params, grads)


# --- Program, memory and report -----------------------------------------------------------------------------


@pytest.fixture
def without_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take minutes, and warn."""
    for name in ("torchao", "bitsandbytes"):
        absent = replace(storage_peers.EIGHT_BIT[name], packages=("no_such_package",))
        monkeypatch.setitem(storage_peers.EIGHT_BIT, name, absent)


@pytest.mark.usefixtures("without_peers")
def test_storage_writes_results(tmp_path: Path) -> None:
    output = tmp_path / "it.json"
    done = CliRunner().invoke(storage.app, ["--quick", "--output", str(output)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    text = output.read_text(encoding="utf-8")
    assert str(ROOT) not in text
    result = json.loads(text)
    assert (result["kind"], result["rounds"]) == ("storage", 2)
    assert result["skipped"]["8-bit moments"]["torchao"] == "not installed: no_such_package"
    peers_of: dict[str, set[str]] = {}
    for row in result["rows"]:
        peers_of.setdefault(row["work"], set()).add(row["peer"])
        assert row["target"] is None
        if row["peer"] == "float32" and "over_reference" in row:
            assert row["over_reference"] == {"low": 1, "median": 1, "high": 1}
            assert row["threads"] == 1
            assert row["gb_per_second"] * row["seconds"] == pytest.approx(28e-9 * row["size"])
    for title, found in peers_of.items():
        left_out = set(result["skipped"].get(title, ()))
        assert found == set(storage.WORKS[title].contest.peers) - left_out
    absent = set(storage.WORKS) - set(peers_of)
    assert absent <= {"8-bit moments"}
    assert all("fastadam" in result["skipped"][title] for title in absent)
    assert report.render([result]).count("| --- |") == len(peers_of)


def test_promises_are_those_at_the_sizes_of_the_comparison() -> None:
    for work in storage.WORKS.values():
        sizes = set(map(units.parse_size, work.sizes))
        for peer, size in work.contest.promises:
            assert peer in work.contest.peers
            assert size in sizes
    of = storage.WORKS["float32 parameters and gradients"].contest
    assert of.target("8bit nearest", 2**26, "float32") == 1 / 1.6
    assert of.target("8bit", 2**18, "float32") == 1 / 0.75


def test_unknown_work_is_refused() -> None:
    done = CliRunner().invoke(storage.app, ["--work", "nothing"])
    assert done.exit_code == 2
    assert "--work must be of" in done.output


def test_threads_are_restored() -> None:
    before = numba.get_num_threads()
    with storage.on_threads(1):
        assert numba.get_num_threads() == 1
    assert numba.get_num_threads() == before


OBJECTS = 16 * 1024
"""Bytes of Python objects that an optimizer may keep, whatever the size of the buffers."""


@pytest.mark.parametrize("name", AVAILABLE)
def test_a_storage_keeps_what_it_promises(name: str) -> None:
    size = 2**18
    kept = memory.kept(size, STORAGES[name])
    assert STORAGES[name].bytes_kept * size <= kept <= STORAGES[name].most_bytes_kept * size + OBJECTS


def test_memory_has_a_row_for_each_storage() -> None:
    size = 2**16
    rows = memory.kept_rows(size)
    assert [row["name"] for row in rows] == list(AVAILABLE)
    for row in rows:
        found = STORAGES[row["name"]]
        assert row["bytes"] == pytest.approx(row["bytes_per_element"] * size)
        assert found.bytes_kept * size <= row["bytes"] <= 1.03 * found.bytes_kept * size + OBJECTS
        assert (row["target"], row["params"]) == (found.most_bytes_kept, found.params)


def test_without_ml_dtypes_there_is_no_bfloat16_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "find_spec", lambda _: None)
    assert STORAGES["bfloat16, split master"].refused() == "not installed: ml_dtypes"
    assert STORAGES["bfloat16"].refused() is None


def test_kept_bytes_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer that holds on to more than its state is found out."""
    held = []

    class Holds(FusedAdam):
        def step(self, *arguments: Any, **options: Any) -> None:
            super().step(*arguments, **options)
            held.append(np.ones(2**16))

    monkeypatch.setattr(storages, "FusedAdam", Holds)
    assert memory.kept(2**16, STORAGES["float32"]) >= 16 * 2**16


def test_report_shows_storages_with_their_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "origin", lambda _: "<sub>origin</sub>\n")

    def row(peer: str, size: int, ratio: float, target: float | None) -> dict[str, Any]:
        quartiles = {"low": ratio, "median": ratio, "high": ratio}
        return {
            "work": "a",
            "threads": 1 if size < 2**20 else 2,
            "size": size,
            "peer": peer,
            "label": f"{peer}'s",
            "seconds": 0.02 * ratio,
            "bytes_per_element": 28.0,
            "gb_per_second": 1.0,
            "over_reference": quartiles,
            "over_traffic": quartiles,
            "target": target,
        }

    rows = [row("float32", 2**18, 1, None), row("float32", 2**26, 1, None), row("8bit", 2**26, 0.5, 0.625)]
    skipped = {"a": {"pair": "no pair", "traffic 18": "nobody"}, "b": {"pair": "no pair"}}
    assert report.render([{"kind": "storage", "skipped": skipped, "rows": rows}]) == (
        "| a | bytes | 256Ki, 1 thread | 64Mi |\n"
        "| --- | --: | --: | --: |\n"
        "| float32's | 28 | 20.0 ms | 20.0 ms |\n"
        "| 8bit's | 28 |  | 10.0 ms (2.00x) |\n"
        "\n"
        "| a, time over float32's | at most | measured |  |\n"
        "| --- | --: | --: | --: |\n"
        "| 8bit's, 64Mi | 0.625 | 0.500 (0.500 to 0.500) | met |\n"
        "\n"
        "Not measured: pair (no pair).\n"
        "\n"
        "<sub>origin</sub>\n"
    )


def test_report_shows_what_storages_keep() -> None:
    row = {"name": "8bit", "params": "float32", "bytes": 2.0625, "bytes_per_element": 2.0625, "target": 2.1}
    assert storage_report.states([row]) == (
        "| state | parameters | bytes kept per parameter | at most |  |\n"
        "| --- | --: | --: | --: | --: |\n"
        "| 8bit | float32 | 2.0625 | 2.10 | met |\n"
    )
