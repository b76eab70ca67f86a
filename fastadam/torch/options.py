"""The options of a parameter group, and their coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from torch import Tensor

from fastadam.adam import AdamHyperparameters
from fastadam.checks import at_least_zero, real
from fastadam.coefficients import Coefficients
from fastadam.hyperparameters import Floating, Hyperparameters

FLAGS = ("amsgrad", "maximize", "decoupled_weight_decay")
"""Options that decide for which equation a loop is compiled."""

ADDED_LATER: dict[str, Any] = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": False,
}
"""Options that groups saved by an older PyTorch may lack."""

_WITHOUT_LR = ("betas", "eps", "weight_decay", *FLAGS)

_NOTHING = 1e-40
"""A learning rate below this moves no parameter; some of it is no number in float32 any more."""


def number(name: str, value: object) -> float:
    """Return a number, or the one element of a tensor."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor of one; got {value.numel()} elements.")
        value = value.item()
    return real(name, value)


def _betas(value: Any) -> Any:
    # What is no pair is refused where ranges are checked.
    if isinstance(value, (tuple, list)):
        return tuple(
            number(f"betas[{k}]", beta) if isinstance(beta, Tensor) else beta for k, beta in enumerate(value)
        )
    return value


def require_valid(options: Mapping[str, Any]) -> None:
    """Raise unless all options of a group are in their ranges."""
    at_least_zero("lr", number("lr", options["lr"]))
    hyperparameters(options)
    for name, rule in (
        ("capturable", "steps are counted in CPU memory, and none is captured"),
        ("differentiable", "a step is no part of a graph"),
    ):
        if options[name]:
            raise ValueError(f"{name} must be False; got {options[name]!r}. Leave it out: {rule}.")


def hyperparameters(options: Mapping[str, Any]) -> Hyperparameters:
    """Return the hyperparameters of a group, but its learning rate: a scheduler may give a negative one."""
    return AdamHyperparameters(
        lr=0.0,
        betas=_betas(options["betas"]),
        eps=number("eps", options["eps"]),
        weight_decay=number("weight_decay", options["weight_decay"]),
        **{name: options[name] for name in FLAGS},
    )


class Options:
    """What the options of one group say, looked at before each step; formed again only if they changed."""

    def __init__(self) -> None:
        self._known: tuple[Any, ...] | None = None
        self._changes = False
        self._lr = 0.0
        self._of_dtype: dict[Floating, Coefficients] = {}

    def look(self, options: Mapping[str, Any]) -> None:
        """Read them.

        Raises
        ------
        TypeError, ValueError
            If one is out of its range.
        """
        lr = options["lr"]
        if type(lr) is not float or not isfinite(lr):
            lr = number("lr", lr)
        known = tuple(map(options.__getitem__, _WITHOUT_LR))
        if self._changes or known != self._known:
            self._hyperparameters, self._of_dtype = hyperparameters(options), {}
            self._known = known
            # A tensor may change, and still be the same.
            self._changes = any(isinstance(value, Tensor) for value in (*known[0], *known))
        self._lr = lr if abs(lr) >= _NOTHING else 0.0

    def coefficients(self, dtype: Floating) -> Coefficients:
        """Return the coefficients of any step, in a dtype."""
        found = self._of_dtype.get(dtype)
        if found is None:
            found = self._of_dtype[dtype] = Coefficients(self._hyperparameters, dtype)
        if found.lr != self._lr:
            found.set_lr(self._lr)
        return found
