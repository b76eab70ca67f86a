"""Steps during backward: a parameter is stepped once its gradient is there, and the gradient dropped."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

TOGETHER = 2**20
"""Gradients wait until there are so many elements of them: a call for each small one would cost more."""


class Steps(Protocol):
    """What an optimizer is here."""

    param_groups: list[dict[str, Any]]

    def _advance(self, grads: list[Tensor | None], key: tuple[int, ...] = ()) -> None: ...


class StepInBackward:
    """Gradients on their way into the parameters of an optimizer.

    Parameters
    ----------
    optimizer : Steps
        Owns this object: hooks of parameters hold neither of them alive.
    """

    def __init__(self, optimizer: Steps) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._watched: dict[int, Tensor] = {}
        self._arrived: set[int] = set()  # since the last call of finish
        self._waiting: set[int] = set()
        self._elements = 0

    def watch(self) -> None:
        """Take the gradients of all parameters that require one, also of new ones."""
        this = weakref.ref(self)

        def hook(param: Tensor) -> None:
            found = this()
            if found is not None:
                found._take(param)

        for param in self._params():
            if param.requires_grad and id(param) not in self._watched:
                param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                self._watched[id(param)] = param

    def finish(self) -> None:
        """Step what waits, and what has a gradient that came another way.

        Raises
        ------
        RuntimeError
            If a parameter has a gradient again that was stepped already.
        """
        stepped = self._arrived - self._waiting
        rest = [param for param in self._params() if param.grad is not None]
        for param in rest:
            if id(param) in stepped:
                raise RuntimeError(
                    f"{self._name(param)}.grad must be None after a step in backward; got a tensor. Set it"
                    " before backward."
                )
        self._waiting |= set(map(id, rest))
        self._step()
        self._arrived.clear()
        self.watch()

    def _take(self, param: Tensor) -> None:
        if id(param) in self._arrived:
            raise RuntimeError(
                f"step must follow each backward with step_in_backward=True; got {self._name(param)} a second"
                " gradient. Call step after backward; to accumulate gradients, leave step_in_backward out."
            )
        self._arrived.add(id(param))
        self._waiting.add(id(param))
        self._elements += param.numel()
        if self._elements >= TOGETHER:
            self._step()

    @torch.no_grad()
    def _step(self) -> None:
        params = self._params()
        grads = [param.grad if id(param) in self._waiting else None for param in params]
        key = tuple(k for k, grad in enumerate(grads) if grad is not None)
        optimizer = self._optimizer()
        if key and optimizer is not None:
            optimizer._advance(grads, key)
            for k in key:
                params[k].grad = None
        self._waiting.clear()
        self._elements = 0

    def _params(self) -> list[Tensor]:
        optimizer = self._optimizer()
        return [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]

    def _name(self, param: Tensor) -> str:
        optimizer = self._optimizer()
        for number, group in enumerate(optimizer.param_groups if optimizer is not None else ()):
            for k, each in enumerate(group["params"]):
                if each is param:
                    return f"param_groups[{number}]['params'][{k}]"
        return "a parameter"
