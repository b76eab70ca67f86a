"""The page on schedules: it names them all, its examples run, its plots are those of the present code."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from fastadam import schedules

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "schedules.md").read_text(encoding="utf-8")


def load_script():
    spec = importlib.util.spec_from_file_location("plot_schedules", DOCS / "plot_schedules.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()
EXAMPLES = script.examples()


def recorded(svg):
    """The numbers that a plot was drawn from."""
    (description,) = ET.parse(svg).iter("{http://purl.org/dc/elements/1.1/}description")
    return np.array(json.loads(description.text))


def drawn(svg):
    """The points of the curve, in the coordinates of the plot."""
    (group,) = (g for g in ET.parse(svg).iter("{http://www.w3.org/2000/svg}g") if g.get("id") == "schedule")
    (path,) = group
    return np.array(re.findall(r"[ML] (\S+) (\S+)", path.get("d")), float)


def assert_is_plot_of(schedule, svg):
    values = np.array([schedule(step) for step in script.STEPS])
    # Six digits are recorded: half a unit of the last is at most 5e-6.
    np.testing.assert_allclose(recorded(svg), values, rtol=1e-5)
    x, y = drawn(svg).T
    for coordinate, numbers in ((x, np.array(script.STEPS)), (y, -values)):
        # Axes are linear: a least-squares line through (number, coordinate) meets every point.
        slope, offset = (
            np.polyfit(numbers, coordinate, 1) if np.ptp(numbers) else (1.0, coordinate[0] - numbers[0])
        )
        np.testing.assert_allclose(coordinate, slope * numbers + offset, atol=1e-2)
        assert slope > 0


@pytest.mark.parametrize("name", EXAMPLES)
def test_committed_plots_are_those_of_the_present_code(name):
    assert_is_plot_of(EXAMPLES[name], DOCS / "images" / f"{name}.svg")


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_check_of_plots_bites(name):
    other = EXAMPLES[name]
    for changed in (lambda step: other(step) * 1.0001, lambda step: other(step) + 1e-7 * (step == 17)):
        with pytest.raises(AssertionError):
            assert_is_plot_of(changed, DOCS / "images" / f"{name}.svg")


def test_script_draws_the_committed_files_and_always_the_same(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    script.main(first)
    script.main(second)
    names = sorted(f"{name}.svg" for name in EXAMPLES)
    assert sorted(path.name for path in first.iterdir()) == names
    assert sorted(path.name for path in (DOCS / "images").iterdir()) == names
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
        assert_is_plot_of(EXAMPLES[name.removesuffix(".svg")], first / name)


def test_plots_are_small():
    assert max(path.stat().st_size for path in (DOCS / "images").iterdir()) < 30_000


def test_page_has_every_schedule_with_a_plot():
    functions = set(schedules.__all__) - {"Schedule"}
    assert set(re.findall(r"^## (\w+)$", PAGE, re.MULTILINE)) == functions
    assert {schedule.make.__name__ for schedule in EXAMPLES.values()} == functions
    assert len(re.findall(r"!\[", PAGE)) == len(EXAMPLES)


def test_page_translates_to_names_that_exist():
    table = PAGE.partition("## From other libraries")[2]
    names = re.findall(r"\| `(\w+)\(", table) + re.findall(r", `(\w+)\([^`]*` \|", table)
    assert len(names) > 10
    assert set(names) - {"exponential_decay", "ExponentialDecay"} <= set(schedules.__all__)
