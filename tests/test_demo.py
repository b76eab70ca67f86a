"""The demo: its network against finite differences, its training, its plot, its errors."""

from __future__ import annotations

import importlib
import struct
import subprocess
import sys
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import walled_numpy
from tolerances import assert_same_bits

import fastadam
from fastadam import schedules

pytest.importorskip("sklearn")
image = pytest.importorskip("matplotlib.image")

from fastadam import demo, demo_plot, devices  # noqa: E402
from fastadam.demo import Digits, Epoch, Result, Settings, load_digits, train  # noqa: E402
from fastadam.demo_model import MLP  # noqa: E402

FEW = Settings(epochs=2)
STEPS_PER_EPOCH = 45  # 1437 training digits in batches of 32

RESULT = Result(
    epochs=tuple(Epoch(1 / epoch, 1 - 0.4 / epoch, 1 - 0.3 / epoch) for epoch in range(1, 31)),
    params=np.zeros(3, np.float32),
    steps=90,
    lr=schedules.constant(0.1),
    train_seconds=3.0,
    step_seconds=0.75,
)


@pytest.fixture(scope="module")
def digits():
    return load_digits(seed=0)


# --- The network --------------------------------------------------------------------------------------------


def test_gradient_is_that_of_finite_differences(rng):
    model = MLP((5, 7, 6, 4), rng, np.float64)
    model.flat_params += 0.1 * rng.standard_normal(model.flat_params.size)  # biases too
    inputs, labels = rng.standard_normal((9, 5)), rng.integers(4, size=9)
    model.loss_and_grads(inputs, labels)
    grads = model.flat_grads.copy()

    # Central differences err by h^2 times the third derivative and by eps / h: both near 1e-10.
    h = 1e-5
    expected = np.empty_like(grads)
    for i, param in enumerate(model.flat_params.copy()):
        losses = []
        for shifted in (param + h, param - h):
            model.flat_params[i] = shifted
            losses.append(model.loss_and_grads(inputs, labels))
        model.flat_params[i] = param
        expected[i] = (losses[0] - losses[1]) / (2 * h)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(grads, expected, rtol=0, atol=1e-9)


def test_loss_is_the_mean_cross_entropy_and_does_not_overflow():
    model = MLP((2, 2), np.random.default_rng(0), np.float64)
    model.layers[0].weight[...] = np.eye(2)
    loss = model.loss_and_grads(np.array([[0.0, np.log(3)], [1000.0, 0.0]]), np.array([1, 1]))
    assert loss == pytest.approx((np.log(4 / 3) + 1000) / 2, rel=1e-14)


def test_layers_are_views_that_cover_the_buffers(rng):
    model = MLP((4, 3, 2), rng)
    assert model.flat_params.size == 4 * 3 + 3 + 3 * 2 + 2
    for buffer, layers in ((model.flat_params, model.layers), (model.flat_grads, model.grads)):
        assert [(weight.shape, bias.shape) for weight, bias in layers] == [((4, 3), (3,)), ((3, 2), (2,))]
        buffer[...] = 0
        for view in chain(*layers):
            np.add(view, 1, out=view)
        assert np.all(buffer == 1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_computes_in_its_dtype(rng, dtype):
    model = MLP((64, 20, 10), rng, dtype)
    outputs = model._forward(rng.standard_normal((3, 64)).astype(dtype))[1]
    assert model.flat_params.dtype == model.flat_grads.dtype == outputs.dtype == dtype


def test_weights_start_by_he_and_biases_at_zero(rng):
    model = MLP((200, 300, 10), rng)
    assert np.std(model.layers[0].weight) == pytest.approx(np.sqrt(2 / 200), rel=0.02)
    assert not model.layers[0].bias.any()


# --- The data -----------------------------------------------------------------------------------------------


def test_digits_are_split_by_class_and_seed(digits):
    assert digits.train_images.shape == (1437, 64)
    assert digits.test_images.shape == (360, 64)
    assert digits.train_images.dtype == np.float32
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 1)
    shares = [np.bincount(y) / len(y) for y in (digits.train_labels, digits.test_labels)]
    np.testing.assert_allclose(*shares, atol=1 / 360)

    assert all(np.array_equal(a, b) for a, b in zip(digits, load_digits(seed=0), strict=True))
    assert not np.array_equal(digits.test_images, load_digits(seed=1).test_images)


# --- The training -------------------------------------------------------------------------------------------


def test_recognises_97_percent_of_unseen_digits(digits):
    result = train(Settings(), digits)
    assert result.accuracy >= 0.97
    assert result.averaged_accuracy >= 0.97
    assert result.epochs[-1].loss < 0.01 * result.epochs[0].loss


def test_other_seeds_are_as_good():
    """On average: the bits of a training are those of a BLAS, and one digit is 0.3 % of the test."""
    results = [train(Settings(seed=seed), load_digits(seed)) for seed in range(1, 5)]
    accuracies = [result.accuracy for result in results]
    assert np.mean(accuracies) >= 0.97
    assert min(accuracies) >= 0.96
    assert np.mean([result.averaged_accuracy for result in results]) >= 0.97
    assert all(result.epochs[-1].loss < 0.01 * result.epochs[0].loss for result in results)


def test_same_seed_same_bits(digits):
    first, second = (train(FEW, digits) for _ in range(2))
    assert_same_bits(first.params, second.params)
    assert first.epochs == second.epochs
    assert train(replace(FEW, seed=1), digits).epochs != first.epochs


def test_learning_rate_zero_learns_nothing(digits):
    result = train(replace(FEW, lr=0.0), digits)
    assert_same_bits(result.params, MLP(demo.SIZES, np.random.default_rng(0)).flat_params)


def test_nothing_is_learned_from_the_test_digits(digits):
    noise = Digits(digits.train_images, digits.test_images[::-1], digits.train_labels, 9 - digits.test_labels)
    result, expected = train(FEW, noise), train(FEW, digits)
    assert_same_bits(result.params, expected.params)
    assert result.accuracy != expected.accuracy
    assert result.averaged_accuracy != expected.averaged_accuracy


def test_reports_each_epoch_and_counts_steps(digits):
    seen = []
    result = train(FEW, digits, on_epoch=seen.append)
    assert tuple(seen) == result.epochs
    assert len(seen) == FEW.epochs
    assert result.steps == FEW.epochs * STEPS_PER_EPOCH
    assert 0 < result.step_seconds < result.train_seconds


def test_steps_by_adamw_compiled_before_the_clock_starts(digits, monkeypatch):
    calls = []

    class Spy(fastadam.FusedAdam):
        def step(self, flat_params, flat_grads):
            calls.append(repr(self))
            super().step(flat_params, flat_grads)

    monkeypatch.setattr(demo, "FusedAdam", Spy)
    monkeypatch.setattr(demo, "warmup", lambda **kwargs: calls.append(kwargs))
    train(replace(FEW, lr=0.25), digits)
    warmed, *steps = calls
    assert warmed == {
        "weight_decay": 0.01,
        "decoupled_weight_decay": True,
        "max_grad_norm": 1.0,
        "ema_decay": 0.99,
    }
    schedule = replace(FEW, lr=0.25).schedule(STEPS_PER_EPOCH)
    assert set(steps) == {repr(Spy(lr=schedule, **warmed))}


def test_learning_rate_rises_and_falls_within_the_training():
    lr = Settings(epochs=10, lr=0.5).schedule(steps_per_epoch=100)
    rates = np.array([lr(step) for step in range(1, 1001)])
    assert rates[:3].tolist() == pytest.approx([0.01, 0.02, 0.03])
    assert rates.argmax() == 49
    assert rates.max() == 0.5
    assert np.all(np.diff(rates[:50]) > 0)
    assert np.all(np.diff(rates[50:]) < 0)
    assert 0.005 < rates[-1] < 0.0051
    assert Settings(epochs=1).schedule(steps_per_epoch=1)(1) == Settings().lr


def test_gradients_are_clipped_in_the_beginning_only(digits, monkeypatch):
    factors = []

    class Spy(fastadam.FusedAdam):
        def step(self, flat_params, flat_grads):
            super().step(flat_params, flat_grads)
            factors.append(self.last_step.clip_factor)

    monkeypatch.setattr(demo, "FusedAdam", Spy)
    train(Settings(epochs=20), digits)
    assert max(factors[:10]) < 1
    assert min(factors[-100:]) == 1


def test_averaged_weights_are_tested_and_put_back(digits, monkeypatch):
    optimizers, seen = [], []

    class Spy(fastadam.FusedAdam):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            optimizers.append(self)

    monkeypatch.setattr(demo, "FusedAdam", Spy)
    accuracy = demo._accuracy

    def spy(model, *others):
        seen.append((model.flat_params.copy(), optimizers[0].state.param_ema.copy()))
        return accuracy(model, *others)

    monkeypatch.setattr(demo, "_accuracy", spy)
    result = train(FEW, digits)
    assert len(seen) == 2 * FEW.epochs
    for (weights, average), (swapped, kept) in zip(seen[::2], seen[1::2], strict=True):
        assert_same_bits(swapped, average)
        assert_same_bits(kept, weights)
        assert not np.array_equal(weights, average)
    assert_same_bits(result.params, seen[-2][0])
    assert [epoch.accuracy for epoch in result.epochs] != [e.averaged_accuracy for e in result.epochs]


def test_a_diverging_learning_rate_is_no_error(digits, tmp_path):
    result = train(replace(FEW, lr=1e30), digits)
    assert np.isnan(result.epochs[-1].loss)
    demo_plot.save(result, tmp_path / "plot.png")


def test_on_a_gpu_it_is_the_same_training(digits, monkeypatch):
    """Bit for bit, as the fake computes by NumPy: the same weights, batches and operations."""
    expected = train(FEW, digits)
    fake = walled_numpy.install(monkeypatch, demo)
    seen = []
    result = train(FEW, digits, on_epoch=seen.append, device=devices.cuda())
    assert_same_bits(result.params.host, expected.params)
    assert tuple(seen) == result.epochs == expected.epochs
    assert result.steps == expected.steps
    assert 0 < result.step_seconds < result.train_seconds
    # Loss and two accuracies of each epoch, and the loss of the rehearsal.
    assert fake.reads == 3 * FEW.epochs + 1


def test_a_gpu_rehearses_all_before_the_clock_starts(digits, monkeypatch):
    fake = walled_numpy.install(monkeypatch, demo)
    device = devices.cuda()
    epochs = []
    original = demo._train_epoch

    def train_epoch(model, optimizer, *others):
        before = len(fake.functions)
        seconds = original(model, optimizer, *others)
        epochs.append((model, optimizer, len(fake.functions) - before))
        return seconds

    monkeypatch.setattr(demo, "_train_epoch", train_epoch)
    result = train(FEW, digits, device=device)
    (rehearsal, its_optimizer, new), *others = epochs
    assert new > 0
    assert its_optimizer.state.step == STEPS_PER_EPOCH
    assert all(new == 0 and model is not rehearsal for model, _, new in others)
    assert all(model.flat_params is result.params for model, *_ in others)
    assert {optimizer.state.step for _, optimizer, _ in others} == {result.steps}


def test_cupy_has_all_that_training_uses(digits, monkeypatch):
    cupy = pytest.importorskip("cupy")
    fake = walled_numpy.install(monkeypatch, demo)
    train(FEW, digits, device=devices.cuda())
    assert {"asarray", "matmul", "stack"} < fake.functions
    assert {"T", "reshape", "sum"} < fake.attributes
    assert [name for name in fake.functions if not hasattr(cupy, name)] == []
    assert [name for name in fake.attributes if not hasattr(cupy.ndarray, name)] == []


def test_result_arithmetic():
    assert RESULT.accuracy == RESULT.epochs[-1].accuracy
    assert RESULT.averaged_accuracy == RESULT.epochs[-1].averaged_accuracy != RESULT.accuracy
    assert RESULT.step_share == 0.25
    assert RESULT.steps_per_second == 30.0


# --- The plot -----------------------------------------------------------------------------------------------


def test_plot_is_a_png_with_its_curves(tmp_path):
    path = tmp_path / "plot.png"
    demo_plot.save(RESULT, path)
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", header[16:]) == (1500, 630)

    red, green, blue = np.moveaxis(image.imread(path)[..., :3], -1, 0)
    for curve, side in ((blue > red + 0.5, np.s_[:, :750]), (red > blue + 0.5, np.s_[:, 750:])):
        assert curve[side].sum() > 1000
        assert curve.sum() == curve[side].sum()
    # The accuracy of the weights, between black and white and of no other color.
    grey = (abs(red - 156 / 255) < 0.01) & (abs(green - 163 / 255) < 0.01) & (abs(blue - 175 / 255) < 0.01)
    assert grey[:, 750:].sum() > 500
    assert grey[:, :750].sum() < 50
    assert np.mean((red == 1) & (green == 1) & (blue == 1)) > 0.8


@pytest.mark.parametrize(("suffix", "start"), [("pdf", b"%PDF-"), ("svg", b"<?xml"), ("PNG", b"\x89PNG")])
def test_plot_format_follows_the_suffix(tmp_path, suffix, start):
    path = tmp_path / f"plot.{suffix}"
    demo_plot.require_output(path)
    demo_plot.save(RESULT, path)
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize("epochs", [1, 2])
def test_plot_of_few_epochs(tmp_path, epochs):
    demo_plot.save(replace(RESULT, epochs=RESULT.epochs[:epochs]), tmp_path / "plot.png")


def test_plot_needs_no_pyplot():
    code = "import sys, fastadam.demo_plot; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- Errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "seed must be in [0, 2**32); got -1."),
        ({"seed": 2**32}, "seed must be in [0, 2**32); got 4294967296."),
        ({"epochs": 0}, "epochs must be at least 1; got 0."),
        ({"lr": -0.5}, "lr must be at least 0; got -0.5."),
        ({"lr": float("nan")}, "lr must be finite; got nan."),
        ({"lr": 1e-31}, "lr must be 0 or at least 1e-30; got 1e-31."),
        ({"lr": 1e39}, "lr must be at most 3.402823e+38 for float32 buffers; got 1e+39."),
    ],
    ids=str,
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Settings(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plot.jpg", "output must end in .png, .pdf or .svg; got {}."),
        ("plot", "output must end in .png, .pdf or .svg; got {}."),
        ("missing/plot.png", "output must be in a folder that exists; got {}."),
        ("folder.png", "output must be a file that can be written; got {}."),
    ],
)
def test_output_that_cannot_be(tmp_path, name, message):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        demo_plot.require_output(tmp_path / name)
    assert str(caught.value) == message.format(tmp_path / name)


def test_output_that_may_not_be_written(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(demo_plot.os, "access", lambda path, _: asked.append(path))
    path = tmp_path / "plot.png"
    for expected in (tmp_path, path):  # the folder, and then the file, which exists
        with pytest.raises(ValueError, match="output must be a file that can be written"):
            demo_plot.require_output(path)
        assert asked.pop() == expected
        path.touch()


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError) as caught:
        load_digits(seed=0)
    assert str(caught.value) == 'the demo needs scikit-learn. pip install "fastadam[demo]"'


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "fastadam.demo_plot")
    with pytest.raises(ImportError) as caught:
        importlib.import_module("fastadam.demo_plot")
    assert str(caught.value) == 'the plot of the demo needs matplotlib. pip install "fastadam[demo]"'
