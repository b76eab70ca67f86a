"""The benchmark of embedded steps: its check of who takes part, its table."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

# Behind the installed package, which `bench` measures: the root of the tree holds a folder of its name.
sys.path.append(str(Path(__file__).parents[1]))

from bench import embedding, harness, report
from bench.oracle import WrongUpdateError


def test_who_takes_another_step_does_not_take_part(rng, monkeypatch):
    params, grads = rng.standard_normal((2, 5)).astype(np.float32)
    monkeypatch.setattr(embedding, "FusedAdam", lambda lr: embedding.fastadam.FusedAdam(2 * lr))
    for start in (embedding.start_calls, embedding.start_compiled):
        with pytest.raises(WrongUpdateError, match="must take Adam's first step"):
            start(params, grads)


def test_a_ratio_is_of_one_step():
    """Of contenders whose calls take one step, and of those whose calls take many."""
    measured = harness.Measurement({"fastadam": [2.0, 4.0], "calls": [1.0, 2.0]})
    contenders = {"fastadam": ("", embedding.start_jax), "calls": ("", embedding.start_calls)}
    assert embedding.steps_of(1024) == 1000
    assert embedding._scaled(measured, "calls", contenders, 1024)["median"] == 2000
    both = {"fastadam": ("", embedding.start_compiled), "calls": ("", embedding.start_calls)}
    assert embedding._scaled(measured, "calls", both, 1024)["median"] == 2


def test_rows_are_shown():
    rows = embedding.measure("numba", 100, starts=1, rounds=2, blocks=harness.QUICK)
    assert [row["peer"] for row in rows] == ["fastadam", "calls"]
    rows[1]["fastadam_over_peer"] = {"low": 0.2, "median": 0.25, "high": 0.6}
    shown = report.RENDERERS["embedding"]({"rows": rows})
    assert "| numba | 100 | FusedAdam.step |" in shown
    assert "| 0.250 (0.200 to 0.600) |" in shown
