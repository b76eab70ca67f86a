"""The benchmark of some rows of a table: it refuses a wrong step, and writes what the report reads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

# Behind the installed package, which `bench` measures: the root of the tree holds a folder of its name.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import report, rows


def test_a_wrong_step_is_refused(rng):
    before = rng.standard_normal((50, 4)).astype(np.float32)
    given, grads = np.array([3, 7, 3]), rng.standard_normal((3, 4)).astype(np.float32)
    after = before.copy()
    rows.of_fastadam(after)(given, grads)
    rows.check(before, after, given, grads)
    for row, change in ((3, 1e-5), (7, 1e-5), (20, 1e-6)):
        wrong = after.copy()
        wrong[row, 1] += np.float32(change)
        with pytest.raises(AssertionError):
            rows.check(before, wrong, given, grads)


def test_rows_writes_results(tmp_path):
    output = tmp_path / "it.json"
    done = CliRunner().invoke(rows.app, ["--quick", "--output", str(output)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(output.read_text(encoding="utf-8"))
    assert (result["kind"], result["table"]) == ("rows", [1024, 64])
    names = [name for name in ("fastadam", "torch", "all rows") if name not in result["skipped"]]
    assert [(row["rows"], row["name"]) for row in result["rows"]] == [
        (count, name) for count in (10, 100) for name in names
    ]
    assert "rows of 1Ki, 64 float32 each" in report.render([result])
