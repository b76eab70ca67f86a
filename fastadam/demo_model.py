"""The network of the demo: a multilayer perceptron, all of its parameters in one flat buffer.

Written once for NumPy and CuPy. CuPy never converts between the memories by itself: every function comes from
the library of the arrays, and a number stays on the GPU until somebody asks for it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from fastadam.buffers import Array


class Layer(NamedTuple):
    """Two views of a flat buffer."""

    weight: Array
    bias: Array


class MLP:
    r"""A classifier: linear layers with ReLU between them, softmax and cross-entropy at the end.

    Parameters
    ----------
    sizes : tuple of int
        The widths of the input, of each hidden layer and of the output.
    rng : Generator
        Draws the weights, :math:`N(0, 2 / \text{inputs})` (He et al. 2015); the biases are zero.
    dtype : dtype, default float32
        Of the parameters and of the computation.
    xp : module, default numpy
        NumPy or CuPy: the library of the parameters and of all arrays given to the methods. The weights are
        drawn by NumPy, so they are the same in both.

    Attributes
    ----------
    flat_params, flat_grads : ndarray of xp, shape (n,)
        What an optimizer steps with.
    layers, grads : tuple of Layer
        Views of them, layer by layer.
    """

    def __init__(
        self, sizes: tuple[int, ...], rng: np.random.Generator, dtype: Any = np.float32, xp: Any = np
    ) -> None:
        self._xp = xp
        total = sum((inputs + 1) * outputs for inputs, outputs in pairwise(sizes))
        self.flat_params: Array = xp.zeros(total, dtype)
        self.flat_grads: Array = xp.zeros(total, dtype)
        self.layers = _views(self.flat_params, sizes)
        self.grads = _views(self.flat_grads, sizes)
        for weight, _ in self.layers:
            drawn = rng.standard_normal(weight.shape) * np.sqrt(2 / len(weight))
            weight[...] = xp.asarray(drawn.astype(dtype))

    def loss_and_grads(self, inputs: Array, labels: Array) -> Any:
        """Return the mean cross-entropy of a batch, and write its gradient to ``flat_grads``.

        Parameters
        ----------
        inputs : ndarray, shape (batch, sizes[0])
            Of the dtype of the parameters.
        labels : ndarray of int, shape (batch,)
            The right class of each.

        Returns
        -------
        ndarray, shape (), or scalar of NumPy
            Of the dtype of the parameters. Reading it waits for the GPU, so that is left to the caller.
        """
        xp = self._xp
        activations, logits = self._forward(inputs)
        batch = xp.arange(len(labels))
        logits = logits - logits.max(axis=1, keepdims=True)  # exp must not overflow
        exp = xp.exp(logits)
        total = exp.sum(axis=1, keepdims=True)
        loss = xp.mean(xp.log(total[:, 0]) - logits[batch, labels])

        # The gradient with respect to the output of each layer, from the last to the first.
        delta = exp / total
        delta[batch, labels] -= 1
        delta /= len(labels)
        for layer, grad, activation in zip(
            reversed(self.layers), reversed(self.grads), reversed(activations), strict=True
        ):
            xp.matmul(activation.T, delta, out=grad.weight)
            delta.sum(axis=0, out=grad.bias)
            delta = (delta @ layer.weight.T) * (activation > 0)
        return loss

    def predict(self, inputs: Array) -> Array:
        """Return the most likely class of each input, shape (batch,)."""
        classes: Array = self._forward(inputs)[1].argmax(axis=1)
        return classes

    def _forward(self, inputs: Array) -> tuple[list[Array], Array]:
        """Return the input of each layer, and the output of the last."""
        activations = [inputs]
        *hidden, last = self.layers
        for weight, bias in hidden:
            activations.append(self._xp.maximum(activations[-1] @ weight + bias, 0))
        return activations, activations[-1] @ last.weight + last.bias


def _views(buffer: Array, sizes: tuple[int, ...]) -> tuple[Layer, ...]:
    layers = []
    start = 0
    for inputs, outputs in pairwise(sizes):
        weight_end = start + inputs * outputs
        weight = buffer[start:weight_end].reshape(inputs, outputs)
        start = weight_end + outputs
        layers.append(Layer(weight, buffer[weight_end:start]))
    return tuple(layers)
