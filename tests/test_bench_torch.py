"""The benchmark of the optimizer of PyTorch: its models, its check of who takes part, its table."""

from __future__ import annotations

import sys
from math import prod
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

# Behind the installed package, which `bench` measures: the root of the tree holds a folder of its name.
sys.path.append(str(Path(__file__).parents[1]))

from bench import harness, report, torch_optimizer  # noqa: E402
from bench.oracle import WrongUpdateError  # noqa: E402


def test_models_have_the_parameters_that_they_are_known_for():
    sizes = {name: sum(map(prod, shapes())) for name, shapes in torch_optimizer.MODELS.items()}
    assert sizes["ResNet-50"] == 25_557_032
    assert sizes["GPT-2 small"] == 124_439_808
    assert {model for model, _ in torch_optimizer.PROMISES} <= sizes.keys()


def test_who_takes_another_step_does_not_take_part(monkeypatch):
    monkeypatch.setitem(torch_optimizer.OPTIMIZERS, "sgd", ("SGD", torch.optim.SGD))
    with pytest.raises(WrongUpdateError, match="sgd must take Adam's first step"):
        torch_optimizer.start("sgd", [(3,), (2, 2)], 0)


def test_rows_are_shown():
    names = list(torch_optimizer.OPTIMIZERS)
    rows = torch_optimizer.measure(
        "20 tensors of 100", [(100,)] * 20, names, starts=1, rounds=2, blocks=harness.QUICK
    )
    assert [row["size"] for row in rows] == [2000] * 3
    rows[1] |= {"target": 0.5, "fastadam_over_peer": {"low": 0.2, "median": 0.25, "high": 0.6}}
    shown = report.RENDERERS["torch_optimizer"]({"rows": rows})
    assert "| step, float32 | 20 tensors of 100 |" in shown
    assert "(4.00x)" in shown
    assert "| torch Adam, fused, 20 tensors of 100 | 0.50 | 0.250 (0.200 to 0.600) | met |" in shown
