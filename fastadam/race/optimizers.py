"""Who takes part in a race, with which arguments, and which learning rates are tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import fastadam
from fastadam.race.problem import Vector


class Stepper(Protocol):
    """What a race asks of an optimizer."""

    def step(self, flat_params: Vector, flat_grads: Vector, /) -> None:
        """Advance the parameters by one step, in place."""


@dataclass(frozen=True)
class Entrant:
    """An optimizer by name.

    Parameters
    ----------
    name : str
        What a user types.
    title : str
        What a picture says.
    rule : str
        Its class in :mod:`fastadam`; empty for L-BFGS, which is SciPy's.
    default_lr : float
        PyTorch's, or the paper's.
    lowest_lr, highest_lr : float
        Between which learning rates are tried.
    arguments : mapping
        What else the class is given.
    """

    name: str
    title: str
    rule: str
    default_lr: float = 1.0
    lowest_lr: float = 1e-4
    highest_lr: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_tuned(self) -> bool:
        """Whether it has a learning rate."""
        return bool(self.rule)

    def make(self, lr: float, arguments: Mapping[str, Any]) -> Stepper:
        """Return an optimizer, with the arguments of a problem above its own."""
        rule = getattr(fastadam, self.rule)
        made: Stepper = rule(lr=lr, **{**self.arguments, **arguments})
        return made


LBFGS = Entrant("lbfgs", "L-BFGS (full batch)", "")

_ALL = (
    Entrant("sgd", "SGD", "FusedSGD", 1e-3),
    Entrant("sgd-momentum", "SGD, momentum 0.9", "FusedSGD", 1e-3, arguments={"momentum": 0.9}),
    Entrant("nesterov", "SGD, Nesterov 0.9", "FusedSGD", 1e-3, arguments={"momentum": 0.9, "nesterov": True}),
    Entrant("adagrad", "AdaGrad", "FusedAdagrad", 1e-2, 1e-3, 10.0),
    Entrant("rmsprop", "RMSprop", "FusedRMSprop", 1e-2),
    Entrant("adadelta", "Adadelta", "FusedAdadelta", 1.0, 1e-2, 100.0),
    Entrant("adam", "Adam", "FusedAdam", 1e-3),
    Entrant(
        "adamw",
        "AdamW, decay 0.01",
        "FusedAdamW",
        1e-3,
    ),
    Entrant("amsgrad", "AMSGrad", "FusedAdam", 1e-3, arguments={"amsgrad": True}),
    Entrant("nadam", "NAdam", "FusedNAdam", 2e-3),
    Entrant("radam", "RAdam", "FusedRAdam", 1e-3),
    Entrant("adamax", "Adamax", "FusedAdamax", 2e-3),
    Entrant("lion", "Lion", "FusedLion", 1e-4, 1e-5, 0.1),
    LBFGS,
)


OPTIMIZERS: dict[str, Entrant] = {entrant.name: entrant for entrant in _ALL}
