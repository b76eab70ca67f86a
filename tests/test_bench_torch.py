"""The benchmark of the optimizer of PyTorch: its models, its check of who takes part, its table."""

from __future__ import annotations

import sys
from math import prod
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

# Behind the installed package, which `bench` measures: the root of the tree holds a folder of its name.
sys.path.append(str(Path(__file__).parents[1]))

from fake_device import FakeDevice  # noqa: E402

from bench import gpu_torch, harness, report, torch_optimizer  # noqa: E402
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


# --- On a GPU -----------------------------------------------------------------------------------------------

SECONDS = {"fastadam": (1e-5, 5e-6), "fused": (2e-5, 2e-5), "foreach": (4e-5, 1e-5)}
"""Of a step: of the device, and of the host."""


@pytest.fixture
def device(monkeypatch):
    """One that is not there: the host steps, and the device says that it took so long."""
    fake, make = FakeDevice(), gpu_torch.optimizer_of

    def optimizer_of(name, params):
        made = make(name, params)
        step = made.step
        made.step = lambda: (step(), fake.queue(name, *SECONDS[name]))
        return made

    monkeypatch.setattr(gpu_torch, "optimizer_of", optimizer_of)
    return fake


def test_a_result_of_a_gpu_is_shown(device, capsys):
    result = gpu_torch.run(device, {"20 tensors of 100": [(100,)] * 20}, 2, "cpu")
    assert capsys.readouterr().out == "20 tensors of 100: done\n"
    fastadam, fused, foreach = result["rows"]
    assert [row["seconds"]["median"] for row in result["rows"]] == pytest.approx([1e-5, 2e-5, 4e-5])
    assert fused["fastadam_over_peer"]["median"] == pytest.approx(0.5)
    assert fastadam["gb_per_second"] == pytest.approx(28 * 2000 / 1e-5 * 1e-9)
    assert (foreach["tensors"], foreach["size"], foreach["late_share"]) == (20, 2000, 0)
    shown = report.RENDERERS["gpu_torch"](result)
    assert "| 20 tensors of 100 | torch Adam, fused | 20.0 us | 3 | 0.50 (0.50 to 0.50) |" in shown
    fused["late_share"] = 0.5
    assert "20.0 us * |" in report.RENDERERS["gpu_torch"](result)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fastadam", "fastadam.torch must have the bits of the CPU; it does not."),
        ("fused", "torch Adam, fused must take Adam's steps; it does not."),
    ],
)
def test_a_wrong_step_on_a_gpu_is_seen(monkeypatch, name, message):
    make, made = gpu_torch.optimizer_of, []

    def optimizer_of(kind, params):
        made.append(kind)
        return torch.optim.SGD(params, 1e-3) if len(made) == 1 else make(kind, params)

    monkeypatch.setattr(gpu_torch, "optimizer_of", optimizer_of)
    with pytest.raises(WrongUpdateError, match=f"^{message}$"):
        gpu_torch.start(name, [(3,), (2, 2)], "cpu")


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(gpu_torch.gpu, "missing", lambda: None)
    monkeypatch.setattr(gpu_torch, "find_spec", lambda name: None if name == "cupy" else name)
    assert gpu_torch.missing() == "not installed: cupy"
    monkeypatch.setattr(gpu_torch, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_torch.missing() == "this PyTorch sees no GPU"
