"""The networks that are trained with every storage: the demo's digits, and a language by its characters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from bench import language
from bench.transformer import CONTEXT, Transformer
from fastadam import demo, schedules
from fastadam.demo_model import MLP

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

LR = 3e-3
"""Of both, the demo's: the highest of a short rise and a cosine."""

OPTIONS = {name: value for name, value in demo.OPTIMIZER.items() if name != "ema_decay"}
"""What the optimizer of both is asked for: decoupled decay and a norm, as in the demo."""

_CHARACTERS, _HELD_OUT = 150_000, 20_000
"""Of the text; the second number those at its end that no batch has."""
_TEXTS = 8
"""Pieces of text in a batch."""


class Scores(NamedTuple):
    """How a training ended."""

    training_loss: float
    held_out_loss: float
    held_out_accuracy: float


class Training(NamedTuple):
    """A network before its first step.

    Parameters
    ----------
    params, grads : ndarray, shape (n,)
        float32.
    batches : iterator
        With each item the gradient of one more batch is in ``grads``, for the parameters as they are then.
    lr : Schedule
        Of each step.
    scores : callable
        Scores the parameters as they are.
    """

    params: Array
    grads: Array
    batches: Iterator[object]
    lr: schedules.Schedule
    scores: Callable[[], Scores]


@dataclass(frozen=True)
class Network:
    """What is trained.

    Parameters
    ----------
    label : str
        For people.
    steps, quick_steps : int
        How long; for a smoke test.
    start : callable
        Takes the seed, of first weights and batches, and the number of steps. The data are always the same.
    packages : tuple of str
        What it needs.
    """

    label: str
    steps: int
    quick_steps: int
    start: Callable[[int, int], Training]
    packages: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """Say what is not installed, or return None."""
        absent = [name for name in self.packages if find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None


@cache
def _digits() -> demo.Digits:
    return demo.load_digits(seed=0)


def start_digits(seed: int, steps: int) -> Training:
    """Return the demo's network."""
    digits, rng = _digits(), np.random.default_rng(seed)
    model = MLP(demo.SIZES, rng)

    def batches() -> Iterator[object]:
        while True:
            order = rng.permutation(len(digits.train_labels))
            for first in range(0, len(order), demo.BATCH):
                batch = order[first : first + demo.BATCH]
                yield model.loss_and_grads(digits.train_images[batch], digits.train_labels[batch])

    def scores() -> Scores:
        return Scores(
            float(model.loss_and_grads(digits.train_images, digits.train_labels)),
            float(model.loss_and_grads(digits.test_images, digits.test_labels)),
            float(np.mean(model.predict(digits.test_images) == digits.test_labels)),
        )

    return Training(model.flat_params, model.flat_grads, islice(batches(), steps), _lr(steps), scores)


@cache
def _text() -> tuple[Array, int]:
    text, alphabet = language.encoded(language.text(_CHARACTERS))
    return text, len(alphabet)


def start_characters(seed: int, steps: int) -> Training:
    """Return the transformer, and pieces of the text that begin anywhere."""
    (text, alphabet), rng = _text(), np.random.default_rng(seed)
    known, held_out = text[:-_HELD_OUT], text[-_HELD_OUT:]
    model = Transformer(alphabet, rng)
    piece = np.arange(CONTEXT + 1)

    def batches() -> Iterator[object]:
        while True:
            first = rng.integers(len(known) - CONTEXT, size=_TEXTS)
            yield model.loss_and_grads(known[first[:, None] + piece])

    def scores() -> Scores:
        training_loss, _ = model.loss_and_accuracy(_pieces(known[:_HELD_OUT]))
        return Scores(training_loss, *model.loss_and_accuracy(_pieces(held_out)))

    return Training(model.flat_params, model.flat_grads, islice(batches(), steps), _lr(steps), scores)


def _pieces(text: Array) -> Array:
    """Return pieces of which each begins where the one before ends: all but the first is predicted once."""
    first = np.arange(0, len(text) - CONTEXT, CONTEXT)
    pieces: Array = text[first[:, None] + np.arange(CONTEXT + 1)]
    return pieces


def _lr(steps: int) -> schedules.Schedule:
    return demo.Settings(epochs=1, lr=LR).schedule(steps)


NETWORKS = {
    "digits": Network("handwritten digits, perceptron", 1350, 45, start_digits, ("sklearn",)),
    "characters": Network("characters of a language, transformer", 1500, 5, start_characters),
}
