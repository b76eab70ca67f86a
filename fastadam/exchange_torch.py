"""State from and for ``torch.optim.Adam`` and ``AdamW``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastadam.adam import FusedAdam
from fastadam.exchanged import Layout, load, require_one_step, require_optimizer, require_size, unload
from fastadam.flat import Flat
from fastadam.segments import Segment, Segments

_OWN = ("lr", "betas", "eps", "weight_decay")
_FLAGS = ("amsgrad", "maximize", "decoupled_weight_decay")
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def from_torch(
    opt: FusedAdam,
    state_dict: Mapping[str, Any],
    *,
    order: Sequence[int] | None = None,
    flat: Flat | None = None,
) -> None:
    """Load the state of ``torch.optim.Adam`` or ``AdamW``: the next step goes on where that stopped.

    Hyperparameters are taken over, too: those of the first parameter group become the optimizer's own, and
    what differs in others becomes segments, in place of those there were. A callable ``lr`` stays, and
    whatever PyTorch's optimizer has not. A call that raises has changed nothing.

    Parameters
    ----------
    opt : FusedAdam
    state_dict : mapping
        What ``state_dict()`` of PyTorch's optimizer returned.
    order : sequence of int, optional
        The number of PyTorch's parameter for each array of the buffer. Without it they have the order of
        PyTorch's parameter groups.
    flat : Flat, optional
        What :func:`fastadam.flatten` made of the parameters; only needed where it pads them.

    Raises
    ------
    TypeError
        If a value is not of its type.
    ValueError
        If it is not such a state dict, parameters have taken different numbers of steps or none, or groups
        differ in what holds for the whole buffer.
    """
    require_optimizer(opt)
    groups, state = _require_state_dict(state_dict)
    group_of = {number: k for k, group in enumerate(groups) for number in group["params"]}
    numbers = _require_order(order, list(group_of))
    flags = {name: bool(groups[0][name]) for name in _FLAGS if name in groups[0]}
    for k, group in enumerate(groups):
        for name, value in flags.items():
            if bool(group.get(name, value)) != value:
                label = f"state_dict['param_groups'][{k}][{name!r}]"
                raise ValueError(f"{label} must be {value}, as in the first group; got {not value}.")
    names = _MOMENTS if flags.get("amsgrad") else _MOMENTS[:2]
    for number in numbers:
        missing = {"step", *names} - state.get(number, {}).keys()
        if missing:
            raise ValueError(
                f"state_dict['state'] must have {min(missing)!r} of parameter {number}; got"
                f" {sorted(state.get(number, {}))}. Leave parameters that have no gradients out of both."
            )
    step = require_one_step({f"state_dict['state'][{n}]['step']": state[n]["step"] for n in numbers})
    labels = [f"state_dict['state'][{number}]" for number in numbers]
    layout = Layout(labels, [int(np.prod(state[n]["exp_avg"].shape)) for n in numbers], flat)
    moments = {name: layout.join([state[n][name] for n in numbers]) for name in names}

    values = [_values(group) for group in groups]
    segments: list[Segment] = []
    for number, offset, size in zip(numbers, layout.offsets, layout.sizes, strict=True):
        group = values[group_of[number]]
        own = {name: group[name] for name in _OWN if group[name] != values[0][name]}
        if own and size:
            segments.append(_merged(segments, Segment(offset, offset + size, **own)))
    extra = {"segments": Segments(segments).to_array(max(step, 1))} if segments else {"segments": None}
    load(opt, step, moments, **values[0], **flags, **extra)


def to_torch(
    opt: FusedAdam, optimizer: Any, *, order: Sequence[int] | None = None, flat: Flat | None = None
) -> dict[str, Any]:
    """Return the state dict that PyTorch's ``optimizer.load_state_dict`` takes.

    Parameters
    ----------
    opt : FusedAdam
        Which has taken a step; nothing of it changes.
    optimizer : torch.optim.Adam or torch.optim.AdamW
        With the parameters of the buffer; it is only read.
    order, flat : optional
        As for :func:`from_torch`.

    Returns
    -------
    dict
        With hyperparameters of ``opt`` in the parameter groups, and what else these have; moments in the
        dtype of the arithmetic, which PyTorch converts to that of its parameters.

    Raises
    ------
    TypeError
        If a value is not of its type.
    ValueError
        If the parameters are not those of the buffer, hyperparameters differ inside of a group, something is
        frozen, or decay is L2 for one of both and AdamW for the other.
    """
    import torch

    entries = unload(opt)
    groups, found = optimizer.state_dict()["param_groups"], optimizer.param_groups
    params = [p for group in found for p in group["params"]]
    numbers = _require_order(order, list(range(len(params))))
    labels = [f"parameter {number} of optimizer" for number in numbers]
    layout = Layout(labels, [params[n].numel() for n in numbers], flat)
    require_size("optimizer", layout, entries)
    place = dict(zip(numbers, zip(layout.offsets, layout.sizes, strict=True), strict=True))
    for k, group in enumerate(groups):
        is_adamw = group.get("decoupled_weight_decay", type(optimizer).__name__ == "AdamW")
        values = {repr(v): v for v in (_at(opt, entries, *place[n]) for n in group["params"] if place[n][1])}
        if len(values) > 1:
            one, other = list(values)[:2]
            raise ValueError(
                f"opt must have one set of hyperparameters for optimizer.param_groups[{k}]; got {one} and"
                f" {other}."
            )
        for value in values.values():
            if value["weight_decay"] and bool(is_adamw) != opt.decoupled_weight_decay:
                wanted = "AdamW" if opt.decoupled_weight_decay else "Adam"
                raise ValueError(f"optimizer must be torch.optim.{wanted}, as opt is; got another decay.")
            group.update(value)
        group.update({name: entries[name] for name in ("amsgrad", "maximize")})
    state: dict[int, dict[str, Any]] = {n: {"step": torch.tensor(float(entries["step"]))} for n in numbers}
    for name in _MOMENTS if opt.amsgrad else _MOMENTS[:2]:
        for number, array in zip(numbers, layout.split(entries[name]), strict=True):
            state[number][name] = torch.from_numpy(array).reshape(params[number].shape)
    return {"state": dict(sorted(state.items())), "param_groups": groups}


def _require_state_dict(state_dict: object) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping; got {type(state_dict).__name__}.")
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"state_dict must have the key {key!r}; got {list(state_dict)}.")
    groups = list(state_dict["param_groups"])
    if not any(group["params"] for group in groups):
        raise ValueError("state_dict['param_groups'] must have parameters; got none.")
    for k, group in enumerate(groups):
        for name in (*_OWN, "amsgrad", "maximize"):
            if name not in group:
                raise ValueError(
                    f"state_dict['param_groups'][{k}] must have {name!r}, as Adam and AdamW have; got"
                    f" {sorted(group)}."
                )
    return groups, dict(state_dict["state"])


def _require_order(order: Sequence[int] | None, numbers: list[int]) -> list[int]:
    chosen = numbers if order is None else list(order)
    if sorted(chosen) != sorted(numbers):
        raise ValueError(f"order must have each of {len(numbers)} parameters once; got {chosen}.")
    return chosen


def _values(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters of a group that may be tensors, as numbers."""
    beta1, beta2 = map(float, group["betas"])
    return {"betas": (beta1, beta2), **{name: float(group[name]) for name in _OWN if name != "betas"}}


def _merged(segments: list[Segment], new: Segment) -> Segment:
    """Return a segment with the last one before it, taken from the list, if it goes on with the same."""
    last = segments[-1] if segments else None
    if (
        last is not None
        and last.stop == new.start
        and vars(last) == {**vars(new), "start": last.start, "stop": last.stop}
    ):
        segments.pop()
        return Segment(last.start, new.stop, new.lr, new.weight_decay, new.betas, new.eps)
    return new


def _at(opt: FusedAdam, entries: Mapping[str, Any], start: int, size: int) -> dict[str, Any]:
    """Return the hyperparameters of some elements of the buffer."""
    stop, found = start + size, {name: entries[name] for name in _OWN}
    for k, segment in enumerate(opt.segments):
        if segment.stop <= start or segment.start >= stop:
            continue
        if segment.frozen:
            raise ValueError(f"opt.segments[{k}] must not be frozen; got True. Leave it out of PyTorch's.")
        if segment.start > start or segment.stop < stop:
            raise ValueError(
                f"opt.segments[{k}] must hold whole parameters; got a part of elements {start} to {stop}."
            )
        rate = segment.lr(max(entries["step"], 1)) if callable(segment.lr) else segment.lr
        own = {"lr": rate, "betas": segment.betas, "eps": segment.eps, "weight_decay": segment.weight_decay}
        found.update({name: value for name, value in own.items() if value is not None})
    return found
