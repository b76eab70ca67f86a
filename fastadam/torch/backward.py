"""Steps during backward: a parameter is stepped once its gradient is there, and the gradient dropped."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastadam.torch import queues

TOGETHER = 2**20
"""Gradients wait until there are so many elements of them: a call for each small one would cost more."""


class Steps(Protocol):
    """What an optimizer is here."""

    param_groups: list[dict[str, Any]]

    def _advance(self, grads: list[Tensor | None], key: tuple[int, ...] = ()) -> None: ...


class StepInBackward:
    """Gradients on their way into the parameters of an optimizer.

    PyTorch has a thread for each device in ``backward``, and on a device a stream for each part of it: one
    thread at a time is here, and steps what came on its own device.

    Parameters
    ----------
    optimizer : Steps
        Owns this object: hooks of parameters hold neither of them alive.
    """

    def __init__(self, optimizer: Steps) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._watched: dict[int, Tensor] = {}
        self._arrived: set[int] = set()  # since the last call of finish
        self._waiting: dict[torch.device, dict[int, Any]] = {}  # the stream that each came on
        self._elements: dict[torch.device, int] = {}
        self._lock = threading.RLock()

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
        with self._lock:
            waiting = {key for of_device in self._waiting.values() for key in of_device}
            rest = [param for param in self._params() if param.grad is not None]
            for param in rest:
                if id(param) in self._arrived - waiting:
                    raise RuntimeError(
                        f"{self._name(param)}.grad must be None after a step in backward; got a tensor. Set"
                        " it before backward."
                    )
            for param in rest:
                if id(param) not in waiting:
                    self._wait(param)
            self._step(list(self._waiting))
            self._arrived.clear()
            self.watch()

    def _take(self, param: Tensor) -> None:
        with self._lock:
            if id(param) in self._arrived:
                raise RuntimeError(
                    f"step must follow each backward with step_in_backward=True; got {self._name(param)} a"
                    " second gradient. Call step after backward; to accumulate gradients, leave"
                    " step_in_backward out."
                )
            self._arrived.add(id(param))
            self._wait(param)
            if self._elements[param.device] >= TOGETHER:
                self._step([param.device])

    def _wait(self, param: Tensor) -> None:
        device = param.device
        stream = queues.queue_for(device).mark() if device.type == "cuda" else None
        self._waiting.setdefault(device, {})[id(param)] = stream
        self._elements[device] = self._elements.get(device, 0) + param.numel()

    @torch.no_grad()
    def _step(self, devices: Sequence[torch.device]) -> None:
        waiting = {key: stream for device in devices for key, stream in self._waiting[device].items()}
        params = self._params()
        grads = [param.grad if id(param) in waiting else None for param in params]
        key = tuple(k for k, grad in enumerate(grads) if grad is not None)
        optimizer = self._optimizer()
        if key and optimizer is not None:
            for device in devices:
                if device.type == "cuda":
                    here = [k for k in key if params[k].device == device]
                    marked = [(waiting[id(params[k])], grads[k]) for k in here]
                    queues.queue_for(device).join(marked)  # type: ignore[arg-type]
            optimizer._advance(grads, key)
            for k in key:
                params[k].grad = None
        for device in devices:
            del self._waiting[device], self._elements[device]

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
