"""A small character-level transformer in NumPy, all of its parameters in one flat buffer.

A layer is a function that returns its output and a second function, which takes the gradient with respect to
the output, writes those of the parameters, and returns that with respect to the input. Between layers stands
one row of numbers for each character, shape (texts * characters, width).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Back: TypeAlias = Callable[[Array], Array]
Layer: TypeAlias = Callable[[Array], tuple[Array, Back]]
Views: TypeAlias = tuple[Array, Array]
"""A parameter and its gradient."""

CONTEXT = 32
"""Characters that are seen at once."""

_WIDTH, _HEADS, _BLOCKS = 48, 4, 2
_EPS = 1e-5
"""Added to variances, as in PyTorch."""


class Transformer:
    r"""Predicts each character of a text from those before it.

    Blocks of causal attention and of a layer of ReLU, each behind a layer norm and beside an identity (as in
    Radford et al. 2019), then softmax and cross-entropy.

    Parameters
    ----------
    alphabet : int
        How many characters there are.
    rng : Generator
        Draws the weights, :math:`N(0, 1 / \text{inputs})`, smaller by the root of the number of additions to
        the identity where they end in one; embeddings are :math:`N(0, 0.1^2)`, gains 1 and biases 0.
    dtype : dtype, default float32
        Of parameters and computation.

    Attributes
    ----------
    flat_params, flat_grads : ndarray, shape (n,)
        What an optimizer steps with.
    """

    def __init__(self, alphabet: int, rng: np.random.Generator, dtype: Any = np.float32) -> None:
        def weight(inputs: int, outputs: int, scale: float = 1.0) -> Array:
            drawn: Array = rng.standard_normal((inputs, outputs)) * (scale * inputs**-0.5)
            return drawn

        width, last = _WIDTH, (2 * _BLOCKS) ** -0.5
        norm = np.stack([np.ones(width), np.zeros(width)])
        drawn = [0.1 * rng.standard_normal((alphabet, width)), 0.1 * rng.standard_normal((CONTEXT, width))]
        for _ in range(_BLOCKS):
            drawn += [norm, weight(width, 3 * width), weight(width, width, last)]
            drawn += [norm, weight(width, 4 * width), weight(4 * width, width, last)]
        drawn += [norm, weight(width, alphabet)]

        self.flat_params: Array = np.concatenate([one.ravel() for one in drawn]).astype(dtype)
        self.flat_grads: Array = np.zeros_like(self.flat_params)
        views = zip(_views(self.flat_params, drawn), _views(self.flat_grads, drawn), strict=True)
        layers = [_embedding(next(views), next(views))]
        for _ in range(_BLOCKS):
            layers += [
                _beside_identity(_norm(next(views)), _linear(next(views)), _attention, _linear(next(views))),
                _beside_identity(_norm(next(views)), _linear(next(views)), _relu, _linear(next(views))),
            ]
        self._network = _chain(*layers, _norm(next(views)), _linear(next(views)))

    def loss_and_grads(self, text: Array) -> float:
        """Return the mean cross-entropy in nats per character, and write its gradient to ``flat_grads``.

        Parameters
        ----------
        text : ndarray of int, shape (texts, CONTEXT + 1)
            Numbers of characters; the first of each text is not predicted.
        """
        logits, back = self._network(text[:, :-1])
        loss, delta = _cross_entropy(logits, text[:, 1:].ravel())
        back(delta)
        return loss

    def loss_and_accuracy(self, text: Array) -> tuple[float, float]:
        """Return the mean cross-entropy, and the share of characters that are the most likely ones."""
        logits, _ = self._network(text[:, :-1])
        following = text[:, 1:].ravel()
        return _cross_entropy(logits, following)[0], float((logits.argmax(axis=1) == following).mean())


def _views(buffer: Array, like: list[Array]) -> list[Array]:
    ends = np.cumsum([one.size for one in like])
    parts = np.split(buffer, ends[:-1])
    return [part.reshape(one.shape) for part, one in zip(parts, like, strict=True)]


def _chain(*layers: Layer) -> Layer:
    def forward(x: Array) -> tuple[Array, Back]:
        backs = []
        for layer in layers:
            x, back = layer(x)
            backs.append(back)

        def backward(delta: Array) -> Array:
            for back in reversed(backs):
                delta = back(delta)
            return delta

        return x, backward

    return forward


def _beside_identity(*layers: Layer) -> Layer:
    inner = _chain(*layers)

    def forward(x: Array) -> tuple[Array, Back]:
        y, back = inner(x)
        return x + y, lambda delta: delta + back(delta)

    return forward


def _embedding(characters: Views, places: Views) -> Layer:
    def forward(text: Array) -> tuple[Array, Back]:
        def backward(delta: Array) -> Array:
            characters[1][...] = 0
            np.add.at(characters[1], text.ravel(), delta)
            np.sum(delta.reshape(*text.shape, -1), axis=0, out=places[1])
            return delta

        return (characters[0][text] + places[0]).reshape(text.size, -1), backward

    return forward


def _linear(weight: Views) -> Layer:
    def forward(x: Array) -> tuple[Array, Back]:
        def backward(delta: Array) -> Array:
            np.matmul(x.T, delta, out=weight[1])
            return delta @ weight[0].T

        return x @ weight[0], backward

    return forward


def _norm(gain_and_bias: Views) -> Layer:
    def forward(x: Array) -> tuple[Array, Back]:
        (gain, bias), (gain_grad, bias_grad) = gain_and_bias
        centred = x - x.mean(axis=1, keepdims=True)
        inverse = 1 / np.sqrt((centred * centred).mean(axis=1, keepdims=True) + _EPS)
        y = centred * inverse

        def backward(delta: Array) -> Array:
            np.sum(delta * y, axis=0, out=gain_grad)
            np.sum(delta, axis=0, out=bias_grad)
            inner = delta * gain
            along = (inner * y).mean(axis=1, keepdims=True)
            before: Array = (inner - inner.mean(axis=1, keepdims=True) - y * along) * inverse
            return before

        return y * gain + bias, backward

    return forward


def _relu(x: Array) -> tuple[Array, Back]:
    return np.maximum(x, 0), lambda delta: delta * (x > 0)


def _attention(x: Array) -> tuple[Array, Back]:
    """Each character takes a mean of values, its own and earlier ones, by how well keys fit to its query."""
    parts = x.reshape(-1, CONTEXT, 3, _HEADS, _WIDTH // _HEADS)
    query, key, value = np.moveaxis(parts, 2, 0).swapaxes(2, 3)  # texts, heads, characters, numbers
    scale = x.dtype.type((_WIDTH // _HEADS) ** -0.5)
    scores = query @ key.swapaxes(2, 3) * scale
    scores[..., np.triu(np.ones((CONTEXT, CONTEXT), bool), 1)] = -np.inf
    weights = _softmax(scores)

    def backward(delta: Array) -> Array:
        delta = delta.reshape(-1, CONTEXT, _HEADS, _WIDTH // _HEADS).swapaxes(1, 2)
        of_weights = delta @ value.swapaxes(2, 3)
        of_scores = weights * (of_weights - (of_weights * weights).sum(axis=-1, keepdims=True)) * scale
        parts = (of_scores @ key, of_scores.swapaxes(2, 3) @ query, weights.swapaxes(2, 3) @ delta)
        return np.moveaxis(np.stack(parts, axis=1), 3, 1).reshape(x.shape)

    return (weights @ value).swapaxes(1, 2).reshape(len(x), _WIDTH), backward


def _softmax(x: Array) -> Array:
    exp: Array = np.exp(x - x.max(axis=-1, keepdims=True))
    exp /= exp.sum(axis=-1, keepdims=True)
    return exp


def _cross_entropy(logits: Array, following: Array) -> tuple[float, Array]:
    """Return the mean loss, and its gradient."""
    delta = _softmax(logits)
    rows = np.arange(len(following))
    loss = -float(np.log(delta[rows, following]).mean())
    delta[rows, following] -= 1
    delta /= len(following)
    return loss, delta
