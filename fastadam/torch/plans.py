"""What an optimizer steps, found once: kept until parameters, states or which gradients there are change."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastadam.checks import COUNTS
from fastadam.torch.bundles import Bundle
from fastadam.torch.device_bundles import DeviceBundle
from fastadam.torch.options import FLAGS, Options
from fastadam.torch.options import number as number_of
from fastadam.torch.tensors import goes_with, in_order_of, lies_like, require_fits, require_steppable

Groups = list[dict[str, Any]]
States = dict[Tensor, dict[str, Any]]
Grads = list[Tensor | None]


def names_of(group: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the states of a group."""
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]


def _flags(groups: Groups) -> list[Any]:
    return [group[name] for group in groups for name in FLAGS]


def _same(found: Any, known: list[Any]) -> bool:
    return len(found) == len(known) and all(map(is_, found, known))


class _Part:
    """A bundle, and where it finds what it steps."""

    def __init__(self, names: tuple[str, ...], grad_dtype: torch.dtype) -> None:
        self.names, self.grad_dtype = names, grad_dtype
        self.places: list[int] = []  # in the list of all parameters
        self.groups: list[int] = []
        self.params: list[Tensor] = []
        self.states: list[dict[str, Any]] = []  # of the optimizer, once the first step was taken

    def close(self, counters: Tensor, first: int) -> None:
        """Form the bundle; the steps of its states become views of counters, from ``first`` on."""
        self.counters = slice(first, first + len(self.params))
        for k, state in enumerate(self.states):
            state["step"] = counters[first + k]
        columns = [[state[name] for state in self.states] for name in self.names]
        kind = Bundle if self.params[0].device.type == "cpu" else DeviceBundle
        self.bundle = kind(self.params, self.grad_dtype, columns, self.groups)
        self._get = itemgetter("step", *self.names)
        self._known = list(chain.from_iterable(map(self._get, self.states)))

    def holds(self) -> bool:
        """Return whether the states are still those of the bundle."""
        try:
            return all(map(is_, chain.from_iterable(map(self._get, self.states)), self._known))
        except KeyError:
            return False


class Plan:
    """The bundles of all parameters that have a gradient, the counters of their steps, and states to be kept.

    Parameters
    ----------
    groups : list of dict
        Of the optimizer.
    states : dict
        Of the optimizer; nothing is changed in it before the first step.
    grads : list of Tensor or None
        Of all parameters of all groups.

    Raises
    ------
    NotImplementedError, RuntimeError, TypeError, ValueError
        If a tensor cannot be stepped.
    """

    def __init__(self, groups: Groups, states: States, grads: Grads) -> None:
        self._params = [param for group in groups for param in group["params"]]
        self._has_grad = [grad is not None for grad in grads]
        self._flags = _flags(groups)
        self._options = [Options() for _ in groups]
        self._known_states: list[Any] | None = None
        parts: dict[Any, _Part] = {}
        steps: dict[Any, list[float]] = defaultdict(list)
        place = 0
        for number, group in enumerate(groups):
            flags = tuple(group[name] for name in FLAGS)
            for k, param in enumerate(group["params"]):
                grad = grads[place]
                if grad is not None:
                    name = f"param_groups[{number}]['params'][{k}]"
                    require_steppable(param, name)
                    require_fits(grad, param, name)
                    state = _state_of(param, states.get(param) or {}, names_of(group), f"state of {name}")
                    kinds = tuple(state[each].dtype for each in names_of(group))
                    key = (param.device, param.dtype, grad.dtype, kinds, flags)
                    part = parts.setdefault(key, _Part(names_of(group), grad.dtype))
                    part.places.append(place)
                    part.groups.append(number)
                    part.params.append(param)
                    part.states.append(state)
                    steps[key].append(state["step"])
                place += 1
        # A device steps while the host does, which waits for itself: so it is asked first.
        order = sorted(parts, key=lambda key: key[0].type == "cpu")
        self._parts = [parts[key] for key in order]
        counted = [step for key in order for step in steps[key]]
        counters = torch.tensor(counted, dtype=torch.float32)
        self._counters = counters.numpy()
        first = 0
        self._written = [counters]
        for part in self._parts:
            part.close(counters, first)
            first += len(part.params)
            # Not the states, which no graph needs: to tell of two for each of 1,000 small parameters takes a
            # seventh of a step.
            self._written += part.params

    def ready(self, groups: Groups, states: States, grads: Grads) -> list[list[Tensor]] | None:
        """Return the gradients of each bundle, or None where this plan does not hold any more."""
        params = [param for group in groups for param in group["params"]]
        if not _same(params, self._params) or self._has_grad != [grad is not None for grad in grads]:
            return None
        if self._flags != _flags(groups):
            return None
        if self._known_states is not None:
            if not _same(states.values(), self._known_states):
                return None
            if not all(part.holds() for part in self._parts):
                return None
        found: list[list[Tensor]] = []
        for part in self._parts:
            fitting = part.bundle.ready([grads[place] for place in part.places])  # type: ignore[misc]
            if fitting is None:
                return None
            found.append(fitting)
        return found

    def step(self, groups: Groups, states: States, grads: list[list[Tensor]], grad_scale: object) -> None:
        """Take a step with gradients that :meth:`ready` returned.

        Raises
        ------
        TypeError, ValueError
            If an option is out of its range; nothing has changed then.
        """
        for options, group in zip(self._options, groups, strict=True):
            options.look(group)
        if isinstance(grad_scale, Tensor):  # read once: on a device, the host waits for it
            grad_scale = number_of("grad_scale", grad_scale)
        calls = []
        for part, of_part in zip(self._parts, grads, strict=True):
            steps = self._counters[part.counters].astype(np.int64) + 1
            calls.append(part.bundle.plan(of_part, self._options, steps, grad_scale))
        if self._known_states is None:
            self._keep(states)
        # They run to their end whatever a signal handler raises meanwhile (Ctrl-C): they are counted before.
        self._counters += 1
        torch.autograd.graph.increment_version(self._written)
        interrupt: BaseException | None = None
        for call in calls:
            try:
                call()
            except BaseException as caught:  # raised when all were stepped
                interrupt = caught
        if interrupt is not None:
            raise interrupt

    def _keep(self, states: States) -> None:
        """Put the states and the counters of this plan into those of the optimizer."""
        for part in self._parts:
            for k, param in enumerate(part.params):
                kept = states[param]
                kept.update(part.states[k])
                part.states[k] = kept
        self._known_states = list(states.values())


def _state_of(param: Tensor, state: dict[str, Any], names: tuple[str, ...], label: str) -> dict[str, Any]:
    """Return the state of a parameter from what is kept of it; what is missing is zero.

    Raises
    ------
    TypeError, ValueError
        If it does not fit.
    """
    found: dict[str, Any] = {"step": counted(state.get("step", 0.0), label)}
    for name in names:
        kept = state.get(name)
        if kept is None:
            found[name] = torch.zeros_like(param, memory_format=torch.preserve_format, requires_grad=False)
            continue
        if not isinstance(kept, Tensor) or kept.layout is not torch.strided or kept.device != param.device:
            got = f"{kept.layout} on {kept.device}" if isinstance(kept, Tensor) else type(kept).__name__
            raise TypeError(f"{label}['{name}'] must be a dense tensor on {param.device}; got {got}.")
        if kept.shape != param.shape:
            raise ValueError(
                f"{label}['{name}'] must have the shape of its parameter {tuple(param.shape)};"
                f" got {tuple(kept.shape)}."
            )
        if not goes_with(kept, param):
            raise TypeError(
                f"{label}['{name}'] must have a dtype that goes with {param.dtype}; got {kept.dtype}."
            )
        is_plain = lies_like(kept, param) and not kept.is_neg() and not kept.is_conj()
        found[name] = kept if is_plain else in_order_of(kept, param)
    return found


def counted(step: Any, label: str) -> float:
    """Return how many steps were taken, as a state has it; raise ValueError if it is no such number."""
    number = float(step)
    if not (0 <= number < COUNTS and number.is_integer()):
        raise ValueError(f"{label}['step'] must be a count of steps; got {number}.")
    return number
