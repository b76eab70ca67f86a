"""What a race is run on: a loss, its gradient, where it starts, what is random in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Vector: TypeAlias = NDArray[np.float64]
"""Parameters or a gradient, shape (dims,)."""

Draws: TypeAlias = NDArray[Any]
"""What is random in the gradients, one row for each step."""

NOTHING: Mapping[str, Mapping[str, Any]] = MappingProxyType({})

_START, _DRAWS = 0, 1  # streams of one seed


class View(NamedTuple):
    """The window of a contour plot."""

    left: float
    right: float
    bottom: float
    top: float


class Problem(ABC):
    """A loss to be made small, by gradients that may be random.

    All is in float64, so that what differs between two optimizers is their rules and not their rounding.

    Attributes
    ----------
    name, title : str
        What a user types; what a heading says.
    lesson : str
        What can be seen here, in a sentence or two.
    dims : int
        Number of parameters.
    steps : int
        Recommended: enough for the best to arrive, few enough to tell them from the others.
    every : int
        The loss is recorded after each so many steps.
    target : float
        A loss that counts as arrived.
    in_logs : bool
        Whether losses are told apart by their order of magnitude.
    floor : float
        Losses are drawn down to here; what lies below is rounding, or no matter.
    bounds : tuple of float or None
        To which every parameter is clipped after each step.
    arguments : mapping
        What this problem prescribes to some optimizers: name -> arguments.
    lr_range : tuple of float or None
        Between which learning rates are tried here, in place of each optimizer's own range.
    view : View or None
        Where contours are drawn; only of two parameters.
    goals : tuple of tuple
        The minima, to be marked in a picture.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    lesson: ClassVar[str]
    dims: int
    steps: ClassVar[int]
    every: ClassVar[int] = 1
    target: ClassVar[float]
    in_logs: ClassVar[bool] = True
    floor: ClassVar[float] = 1e-12
    bounds: ClassVar[tuple[float, float] | None] = None
    arguments: ClassVar[Mapping[str, Mapping[str, Any]]] = NOTHING
    lr_range: ClassVar[tuple[float, float] | None] = None
    view: ClassVar[View | None] = None
    goals: ClassVar[tuple[tuple[float, ...], ...]] = ()

    @abstractmethod
    def start(self, seed: int) -> Vector:
        """Return where a seed starts: the same place for every optimizer."""

    @abstractmethod
    def loss(self, params: Vector) -> float:
        """Return the loss that is reported: without noise, of all data."""

    @abstractmethod
    def gradient(self, params: Vector) -> Vector:
        """Return the gradient of :meth:`loss`."""

    def loss_and_gradient(self, params: Vector) -> tuple[float, Vector]:
        """Return both; where one pass gives both, a problem has its own."""
        return self.loss(params), self.gradient(params)

    def draws(self, seed: int, steps: int) -> Draws:
        """Return what is random in the gradients of a seed: the same for every optimizer."""
        return np.zeros((steps, 0))

    @abstractmethod
    def write_grads(self, params: Vector, draw: Draws, grads: Vector) -> None:
        """Write the gradient of one step into ``grads``, given its row of :meth:`draws`."""


def start_rng(seed: int) -> np.random.Generator:
    """Return the generator of a seed's start."""
    return np.random.default_rng([seed, _START])


def draws_rng(seed: int) -> np.random.Generator:
    """Return the generator of a seed's noise and batches."""
    return np.random.default_rng([seed, _DRAWS])
