"""Adam with its state and its step in CPU memory, for parameters on a GPU."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastadam.checks import count
from fastadam.torch.chunks import Chunks, Hosted, flat
from fastadam.torch.copies import Copies, copies_for
from fastadam.torch.optimizer import FusedAdam
from fastadam.torch.options import FLAGS, Options
from fastadam.torch.plans import counted, names_of
from fastadam.torch.tensors import lies_like, math_dtype, require_fits, require_steppable

CHUNK = 2**22
"""Elements: long enough that a copy and a step do not wait for their starts, short beside a model."""

MASTER = "master_param"
"""In the state of a parameter of 16 bits: itself, exactly."""

_MOST_PLANS = 4
"""Kept, each with its pinned memory: one for each set of parameters that have gradients."""


class OffloadedAdam(FusedAdam):
    """Adam and AdamW for parameters on a CUDA device, with state, masters and the step in CPU memory.

    Gradients are copied to pinned memory in chunks, two of them at a time: while one is stepped, the next one
    comes, and the parameters of the one before go back. On the device nothing is kept beside parameters and
    gradients. In place of ``deepspeed.ops.adam.DeepSpeedCPUAdam``, with nothing to build.

    Parameters
    ----------
    params : iterable
        As for :class:`FusedAdam`; on CUDA devices, or in CPU memory.
    lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay
        Those of :class:`FusedAdam`.
    chunk : int
        Most elements of a chunk.

    Raises
    ------
    TypeError, ValueError
        If an argument is of a wrong type or out of its range.

    Notes
    -----
    Parameters in float16 and bfloat16 are stepped in float32, from masters in the state (``"master_param"``,
    beside PyTorch's names), and rounded to the nearest; moments are float32. The bits are those of
    :class:`FusedAdam` on the masters with the same gradients.

    A parameter that was changed (``load_state_dict`` of a model, ``with torch.no_grad(): ...``) is stepped
    from its new value; where it is still its master, rounded, the master counts. A change through ``.data``
    that leaves the parameter where it was is not seen.

    In CPU memory, per parameter of 16 bits: 12 bytes of state; of float32: 8, and 4 pinned. Pinned beside
    them: two chunks of gradients, and of what goes back.
    """

    _chunk = CHUNK

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        chunk: int = CHUNK,
    ) -> None:
        self._chunk = count("chunk", chunk)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            decoupled_weight_decay=decoupled_weight_decay,
        )

    def _forget(self) -> None:
        super()._forget()
        self._copies: dict[torch.device, Copies] = {}
        self._masters: dict[Tensor, Tensor] = {}
        self._seen: dict[
            Tensor, tuple[int, int]
        ] = {}  # where a parameter was when it was its master, rounded
        self._known: dict[tuple[object, ...], tuple[Chunks, list[Options]]] = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this class, ``FusedAdam`` or PyTorch's Adam has saved; state stays in CPU memory.

        Raises
        ------
        ValueError
            If groups differ in number or size.
        """
        # PyTorch would move the state to the parameters, and round it to their dtype.
        super().load_state_dict({**state_dict, "state": {}})
        places = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for place, param in zip(places, params, strict=True):
            if place in state_dict["state"]:
                self.state[param] = {
                    name: value.detach().cpu().clone() if isinstance(value, Tensor) else value
                    for name, value in state_dict["state"][place].items()
                }
        self._forget()

    def _advance(self, grads: list[Tensor | None], key: tuple[int, ...] = ()) -> None:  # noqa: ARG002
        groups = self.param_groups
        found: list[Hosted] = []
        states: list[dict[str, Any]] = []
        given: list[Tensor] = []
        place = 0
        for number, group in enumerate(groups):
            for k, param in enumerate(group["params"]):
                grad, name = grads[place], f"param_groups[{number}]['params'][{k}]"
                place += 1
                if grad is None:
                    continue
                require_steppable(param, name)
                require_fits(grad, param, name)
                state = self._state_of(param, names_of(group), f"state of {name}")
                flags = tuple(group[each] for each in FLAGS)
                moments = [flat(state[each]) for each in names_of(group)]
                kind = (param.dtype, grad.dtype, flags, param.device)
                copies = self._copies_for(param.device)
                master = flat(state[MASTER]) if MASTER in state else self._masters_of(param, copies)
                found.append(Hosted(param, grad.dtype, master, moments, number, kind, copies))
                states.append(state)
                given.append(grad)
        if not found:
            return
        signature = tuple(
            (id(h.param), h.kind, h.group, h.master.data_ptr(), *(s.data_ptr() for s in h.states))
            for h in found
        )
        chunks, options = self._known.pop(signature, (None, [Options() for _ in groups]))
        if chunks is None or not chunks.holds():
            chunks = Chunks(found, self._chunk)
        for each, group in zip(options, groups, strict=True):
            each.look(group)
        steps = [int(state["step"]) + 1 for state in states]
        scale = getattr(self, "grad_scale", None)
        scale = scale.item() if isinstance(scale, Tensor) else scale
        call = chunks.plan(given, options, steps, scale)
        # Nothing was changed until here.
        for h, state in zip(found, states, strict=True):
            self._renew(h)
            state["step"] += 1
            self.state[h.param] = state
        try:
            call()
        finally:
            for h in found:
                self._seen[h.param] = (h.param.data_ptr(), h.param._version)
            if len(self._known) >= _MOST_PLANS:
                self._known.clear()
            self._known[signature] = chunks, options

    def _copies_for(self, device: torch.device) -> Copies:
        if device not in self._copies:
            self._copies[device] = copies_for(device)
        return self._copies[device]

    def _masters_of(self, param: Tensor, copies: Copies) -> Tensor:
        """Return the host's values of a parameter that are copied to it as they are, still to be renewed."""
        master = self._masters.get(param)
        if master is None or master.numel() != param.numel() or master.dtype != param.dtype:
            master = self._masters[param] = copies.empty(param.numel(), param.dtype)
            self._seen.pop(param, None)
        return master

    def _renew(self, h: Hosted) -> None:
        """Take over what a parameter is, where it was changed since its last step."""
        if self._seen.get(h.param) == (h.param.data_ptr(), h.param._version):
            return
        param = flat(h.param).cpu()
        if h.master.dtype == param.dtype:
            h.master.copy_(param)
        else:
            h.master.copy_(torch.where(h.master.to(param.dtype) == param, h.master, param.to(h.master.dtype)))

    def _state_of(self, param: Tensor, names: tuple[str, ...], label: str) -> dict[str, Any]:
        """Return the state of a parameter, in CPU memory and of the dtype of the arithmetic.

        Raises
        ------
        TypeError, ValueError
            If what is kept of it does not fit.
        """
        kept = self.state.get(param) or {}
        dtype = math_dtype(param.dtype)
        step = kept.get("step", 0.0)
        number = counted(step, label)
        if not (isinstance(step, Tensor) and step.dtype == torch.float32):
            step = torch.tensor(number, dtype=torch.float32)
        state: dict[str, Any] = {**kept, "step": step}
        for name in (*names, MASTER) if dtype != param.dtype else names:
            state[name] = _on_host(kept.get(name), param, dtype, f"{label}['{name}']")
        if dtype != param.dtype and kept.get(MASTER) is None:
            state[MASTER].fill_(torch.nan)  # equal to no parameter, not even to zeros: to be renewed
            self._seen.pop(param, None)
        return state


def _on_host(value: Any, param: Tensor, dtype: torch.dtype, label: str) -> Tensor:
    """Return a tensor as it is if it fits; zeros for None; else a copy in the order of the parameter."""
    if value is None:
        return torch.empty_strided(param.shape, param.stride(), dtype=dtype).zero_()
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        got = value.layout if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{label} must be a dense tensor; got {got}.")
    if value.shape != param.shape:
        raise ValueError(
            f"{label} must have the shape of its parameter {tuple(param.shape)}; got {tuple(value.shape)}."
        )
    if math_dtype(value.dtype) != dtype:
        raise TypeError(f"{label} must have a dtype that goes with {param.dtype}; got {value.dtype}.")
    plain = value.device.type == "cpu" and value.dtype == dtype and lies_like(value, param)
    if plain and not value.is_neg() and not value.is_conj():
        return value
    return torch.empty_strided(param.shape, param.stride(), dtype=dtype).copy_(value)
