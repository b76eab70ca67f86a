"""Problems of data, whose gradients are those of random batches."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fastadam.demo import load_digits
from fastadam.demo_model import MLP
from fastadam.race.problem import Draws, Problem, Vector, draws_rng, start_rng

_DATA_SEED = 0
"""The data are the same for all seeds, so that one target is."""


class Batched(Problem):
    """A mean over samples, of which a step sees :attr:`batch` random ones."""

    batch: ClassVar[int] = 32
    samples: int

    def draws(self, seed: int, steps: int) -> Draws:
        return draws_rng(seed).integers(self.samples, size=(steps, self.batch))


class Logistic(Batched):
    """Logistic regression on features of which most are nearly always 0, with a little L2."""

    name = "logistic"
    title = "Logistic regression with sparse features"
    lesson = (
        "Feature number k is there in one sample of k + 1, and the rare ones tell as much as the frequent"
        " ones. A rare feature gets few gradients: SGD has learned the frequent ones long before, while"
        " steps that are scaled by a parameter's own history, AdaGrad's above all, make the most of each."
    )
    steps = 600
    every = 10
    target = 0.2
    in_logs = False
    features: ClassVar[int] = 200
    samples = 1000
    decay: ClassVar[float] = 1e-4

    def __init__(self) -> None:
        rng = np.random.default_rng(_DATA_SEED)
        self.dims = self.features
        shares = 1 / (1 + np.arange(self.features))
        there = rng.random((self.samples, self.features)) < shares
        self._inputs = there * rng.choice([-1.0, 1.0], there.shape)
        weights = 3 * rng.standard_normal(self.features)
        noise = rng.logistic(size=self.samples)
        self._signs = np.where(self._inputs @ weights + noise > 0, 1.0, -1.0)

    def start(self, seed: int) -> Vector:
        return 0.01 * start_rng(seed).standard_normal(self.dims)

    def loss(self, params: Vector) -> float:
        margins = self._signs * (self._inputs @ params)
        return float(np.logaddexp(0, -margins).mean() + self.decay / 2 * (params @ params))

    def gradient(self, params: Vector) -> Vector:
        return self._gradient(params, self._inputs, self._signs)

    def write_grads(self, params: Vector, draw: Draws, grads: Vector) -> None:
        grads[:] = self._gradient(params, self._inputs[draw], self._signs[draw])

    def _gradient(self, params: Vector, inputs: Vector, signs: Vector) -> Vector:
        margins = signs * (inputs @ params)
        shares = -signs * np.exp(-np.logaddexp(0, margins)) / len(signs)
        gradient: Vector = shares @ inputs + self.decay * params
        return gradient


class Digits(Batched):
    """The network and the training digits of ``fastadam demo``, smaller: 64, 32, 10."""

    name = "digits"
    title = "A network that reads digits"
    lesson = (
        "The multilayer perceptron of fastadam demo, on its training digits, in batches of 32. With its"
        " learning rate tuned, nearly every rule does well: what differs is how wide the range of good"
        " learning rates is."
    )
    steps = 300
    every = 20
    target = 0.1
    floor = 1e-3
    sizes: ClassVar[tuple[int, ...]] = (64, 32, 10)

    def __init__(self) -> None:
        digits = load_digits(_DATA_SEED)
        self._images: NDArray[np.float64] = np.asarray(digits.train_images, np.float64)
        self._labels: NDArray[Any] = np.asarray(digits.train_labels)
        self.samples = len(self._labels)
        self._model = MLP(self.sizes, start_rng(_DATA_SEED), np.float64)
        self.dims = self._model.flat_params.size

    def start(self, seed: int) -> Vector:
        params: Vector = MLP(self.sizes, start_rng(seed), np.float64).flat_params
        return params

    def loss(self, params: Vector) -> float:
        return self._loss(params, self._images, self._labels)

    def gradient(self, params: Vector) -> Vector:
        return self.loss_and_gradient(params)[1]

    def loss_and_gradient(self, params: Vector) -> tuple[float, Vector]:
        loss = self.loss(params)
        grads: Vector = self._model.flat_grads.copy()
        return loss, grads

    def write_grads(self, params: Vector, draw: Draws, grads: Vector) -> None:
        self._loss(params, self._images[draw], self._labels[draw])
        grads[:] = self._model.flat_grads

    def _loss(self, params: Vector, images: Vector, labels: NDArray[Any]) -> float:
        """Return the loss of some samples; their gradient is in the model then."""
        self._model.flat_params[:] = params
        return float(self._model.loss_and_grads(images, labels))
