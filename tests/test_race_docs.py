"""The page on the race, and the script that draws the pictures of the documentation."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from race_cases import QUICK

pytest.importorskip("scipy")
pytest.importorskip("threadpoolctl")
pytest.importorskip("matplotlib")

from fastadam.race import OPTIMIZERS, PROBLEMS
from fastadam.race.settings import Tune

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "race.md").read_text(encoding="utf-8")


def load_script():
    spec = importlib.util.spec_from_file_location("plot_race", DOCS / "plot_race.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def test_page_tells_every_problem_and_option():
    assert re.findall(r"^\*\*`(\w+)`\*\*", PAGE, re.MULTILINE) == list(PROBLEMS)
    row = re.search(r"^\| `--problem` \| (.*?);", PAGE, re.MULTILINE)[1]
    assert re.findall(r"`(\w+)`", row) == list(PROBLEMS)
    assert all(f"`{kind}`" in PAGE for kind in Tune)


def test_script_draws_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "BETA1", (0.0, 0.9))
    monkeypatch.setattr(script, "BETA2", (0.9, 0.999))
    monkeypatch.setattr(script, "EPS", (1e-8, 1.0))
    few = replace(QUICK, problems=("noisy", "reddi"), seeds=1)
    files = script.main(tmp_path / "race", few)
    names = ["first-steps", "hyperparameters", "noisy-seeds", "noisy-learning-rates", "reddi-paths"]
    assert [path.name for path in files] == [f"{name}.png" for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


def test_script_names_what_there_is():
    assert set(script.SHOWN) <= set(PROBLEMS)
    assert all(problem in PROBLEMS for problem in script.SWEPT)
    assert "adam" in OPTIMIZERS


def test_first_updates_are_as_large_as_the_others_only_with_the_corrections():
    sizes = script.first_steps(100)
    corrected, raw = sizes["with both corrections"], sizes["without"]
    assert corrected[0] == pytest.approx(1, rel=1e-3)
    assert np.all((corrected > 0.6) & (corrected < 1.01))
    # Step 1 without: (1 - beta1) g / sqrt((1 - beta2) g^2), 3.16 of the learning rate; then it grows.
    assert raw[0] == pytest.approx(0.1 / np.sqrt(0.001), rel=1e-3)  # but for eps
    assert raw.max() > 3 * corrected.max()


def test_sweep_is_of_what_it_says():
    ((name, finals),) = script.sweep("noisy", 1, eps=(1e-8, 1e3))
    assert name == "eps"
    assert finals[0] < 0.5 < finals[1]  # divided by a thousand, nothing moves
