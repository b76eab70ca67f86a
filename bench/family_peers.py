"""The contenders of each rule of the family: ours, PyTorch's best, and a kernel with the traffic of the rule.

A contender is timed when its updates are those of the rule in float64: PyTorch's loop over tensors, or, for
Lion, NumPy after the paper. Ours takes part with states in 16 and 8 bits, too, within what these can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numba
import numpy as np

import fastadam
from bench.contest import Contest
from bench.oracle import GRAD_FACTORS, Array, Contender, WrongUpdateError
from bench.peers import Peer
from bench.storages import BYTES
from fastadam.kernels import threads
from fastadam.kernels.cpu import PARALLEL_FROM
from fastadam.state import State

_SAMPLE = 2**14
_STEPS = 9
"""Of a check: from the sixth on RAdam has a variance."""

TRAFFIC, TORCH = 1.05, 1.0
"""At most this much of the time of the kernel, and of PyTorch's, is ours at 32 Mi elements."""
LARGE = 2**25

STORED = {"bfloat16": "states in bfloat16", "8bit": "states in 8 bits"}
"""Contenders, by ``state_dtype``, beside ours in float32."""
_OFF, _OFF_AT_ALL, _OF_SIGNS = 0.05, 0.005, 0.05
"""How far the way of one of them may be from that of the rule: of elements on average, and all in all, where
Lion's are shorter, for the signs of noisy numbers sometimes turn."""


@dataclass(frozen=True)
class Relative:
    """A rule of the family.

    Parameters
    ----------
    kind : str
        The class is ``Fused`` and this; PyTorch's has this name.
    flags : dict
        The arguments of both. Learning rates are such that an update is larger than rounding is.
    states : tuple of str
        What is kept of each element.
    fused : bool
        Whether PyTorch has a fused implementation for CPUs.
    """

    kind: str
    flags: dict[str, Any] = field(default_factory=dict)
    states: tuple[str, ...] = ()
    fused: bool = False

    @property
    def in_torch(self) -> bool:
        """Whether PyTorch has the rule."""
        return self.kind != "Lion"

    @property
    def stored(self) -> bool:
        """Whether states can all be kept in less than 32 bits."""
        return bool(self.states) and "centered" not in self.flags

    def bytes_moved(self, size: int, dtype: Any) -> int:
        """Return what a step must read and write: all is read, and all but the gradient written."""
        return size * (3 + 2 * len(self.states)) * int(np.dtype(dtype).itemsize)

    def bytes_per_element(self, peer: str) -> float:
        """Return what a contender reads and writes for an element, of float32 but for its states."""
        return 12 + 2 * len(self.states) * BYTES[peer if peer in STORED else "float32"]


_ADAM = ("exp_avg", "exp_avg_sq")

FAMILY = {
    "Adam": Relative("Adam", {}, _ADAM, fused=True),
    "AdamW": Relative("AdamW", {}, _ADAM, fused=True),
    "AMSGrad": Relative("Adam", {"amsgrad": True}, (*_ADAM, "max_exp_avg_sq"), fused=True),
    "NAdam": Relative("NAdam", {}, _ADAM),
    "RAdam": Relative("RAdam", {"betas": (0.9, 0.99)}, _ADAM),
    "Adamax": Relative("Adamax", {}, ("exp_avg", "exp_inf")),
    "Lion": Relative("Lion", {"lr": 1e-3}, ("exp_avg",)),
    "SGD": Relative("SGD", {"lr": 100.0}, (), fused=True),
    "SGD, momentum": Relative("SGD", {"lr": 100.0, "momentum": 0.9}, ("momentum_buffer",), fused=True),
    "SGD, Nesterov": Relative(
        "SGD", {"lr": 100.0, "momentum": 0.9, "nesterov": True}, ("momentum_buffer",), fused=True
    ),
    "AdaGrad": Relative("Adagrad", {}, ("sum",), fused=True),
    "RMSprop": Relative("RMSprop", {}, ("square_avg",)),
    "RMSprop, centered": Relative("RMSprop", {"centered": True}, ("square_avg", "grad_avg")),
    "RMSprop, momentum": Relative("RMSprop", {"momentum": 0.9}, ("square_avg", "momentum_buffer")),
    "RMSprop, centered, momentum": Relative(
        "RMSprop", {"centered": True, "momentum": 0.9}, ("square_avg", "momentum_buffer", "grad_avg")
    ),
    "Adadelta": Relative("Adadelta", {"lr": 100.0}, ("square_avg", "acc_delta")),
}
"""Every rule, by what tables call it."""


# --- Contenders ---------------------------------------------------------------------------------------------


def _writer(grads: Array) -> Callable[[Array], None]:
    def write(new: Array) -> None:
        grads[...] = new

    return write


def start_fastadam(
    relative: Relative, params: Array, grads: Array, state_dtype: str = "float32"
) -> Contender:
    """``step`` of our class."""
    kind = getattr(fastadam, f"Fused{relative.kind}")
    optimizer = kind(**relative.flags, state_dtype=state_dtype)
    return Contender(partial(optimizer.step, params, grads), lambda: params, _writer(grads))


def _torch_optimizer(relative: Relative, params: Array, grads: Array, **how: bool) -> Any:
    torch = import_module("torch")
    param = torch.nn.Parameter(torch.from_numpy(params))
    param.grad = torch.from_numpy(grads)
    return getattr(torch.optim, relative.kind)([param], **relative.flags, **how)


def start_torch(relative: Relative, params: Array, grads: Array, **how: bool) -> Contender:
    """``step`` of PyTorch's class on one parameter, by one of its implementations."""
    optimizer = _torch_optimizer(relative, params, grads, **how)
    return Contender(optimizer.step, lambda: params, _writer(grads))


def _move_0(params: Array, grads: Array) -> None:
    for i in numba.prange(params.size):
        params[i] += grads[i]


def _move_1(params: Array, grads: Array, one: Array) -> None:
    for i in numba.prange(params.size):
        one[i] += grads[i]
        params[i] += grads[i]


def _move_2(params: Array, grads: Array, one: Array, two: Array) -> None:
    for i in numba.prange(params.size):
        one[i] += grads[i]
        two[i] += grads[i]
        params[i] += grads[i]


def _move_3(params: Array, grads: Array, one: Array, two: Array, three: Array) -> None:
    for i in numba.prange(params.size):
        one[i] += grads[i]
        two[i] += grads[i]
        three[i] += grads[i]
        params[i] += grads[i]


_MOVES = (_move_0, _move_1, _move_2, _move_3)
_SERIAL = [numba.njit(move, nogil=True) for move in _MOVES]
_PARALLEL = [numba.njit(move, nogil=True, parallel=True) for move in _MOVES]


def start_traffic(relative: Relative, params: Array, grads: Array) -> Contender:
    """Start the kernel that moves the bytes of a step, with next to no arithmetic.

    It has checked itself; the states lie in memory as the optimizer's own do.
    """
    n = len(relative.states)
    loop = _PARALLEL[n] if params.size >= PARALLEL_FROM and threads.numba_is_safe() else _SERIAL[n]
    few = slice(0, _SAMPLE)
    arrays = [params[few].copy(), *(np.zeros_like(params[few]) for _ in range(n))]
    expected = [array + grads[few] for array in arrays]
    loop(arrays[0], grads[few], *arrays[1:])
    if not all(map(np.array_equal, arrays, expected)):
        raise WrongUpdateError("the traffic kernel must add the gradient to all arrays; it does not.")
    states = State(relative.states, params.size, params.dtype).arrays
    return Contender(partial(loop, params, grads, *states), lambda: params, _writer(grads))


# --- What they must compute ---------------------------------------------------------------------------------


def lion(relative: Relative, params: Array, gradients: Sequence[Array]) -> list[Array]:
    """Return the parameters after each step, in float64: Chen et al., Program 1."""
    lr, (beta1, beta2) = relative.flags["lr"], (0.9, 0.99)
    weight, momentum, found = params.astype(np.float64), np.zeros(params.size), []
    for gradient in gradients:
        weight = weight - lr * np.sign(beta1 * momentum + (1 - beta1) * gradient)
        momentum = beta2 * momentum + (1 - beta2) * gradient
        found.append(weight)
    return found


def exact(relative: Relative, params: Array, gradients: Sequence[Array]) -> list[Array]:
    """Return the parameters after each step, in float64."""
    wide = [grads.astype(np.float64) for grads in gradients]
    if not relative.in_torch:
        return lion(relative, params, wide)
    now, grads = params.astype(np.float64), np.empty(params.size)
    optimizer, found = _torch_optimizer(relative, now, grads, foreach=False), []
    for gradient in wide:
        grads[...] = gradient
        optimizer.step()
        found.append(now.copy())
    return found


def check(relative: Relative, name: str, contender: Contender, params: Array, grads: Array) -> None:
    """Take some steps and compare them with :func:`exact`, at up to 16 Ki elements from end to end.

    The same errors as of Adam are allowed, which :func:`bench.oracle.tolerance` derives: below 1600 half ulps
    of the largest update of any step, and one of the largest parameter, in each step. With states in less
    than 32 bits, elements may be off by some share of their way, and the sum of all ways by a smaller one: a
    wrong equation does not hide in noise without a mean.

    Raises
    ------
    WrongUpdateError
        If an element ends elsewhere.
    """
    places = np.unique(np.linspace(0, params.size - 1, min(params.size, _SAMPLE)).astype(np.int64))
    factors = [GRAD_FACTORS[k % len(GRAD_FACTORS)] for k in range(_STEPS)]
    before = params[places]
    for factor in factors:
        contender.write_grads(grads * grads.dtype.type(factor))
        contender.step()
    found = contender.read_params()[places].astype(np.float64)
    contender.write_grads(grads)
    way = np.array([before, *exact(relative, before, [grads[places] * f for f in factors])])
    if name in STORED:
        return _check_stored(relative, name, found - way[0], way[-1] - way[0])
    u = float(np.finfo(params.dtype).eps) / 2
    largest = float(np.abs(np.diff(way, axis=0)).max())
    tolerance = _STEPS * (1600 * u * largest + 2 * u * float(np.abs(way).max()))
    wrong = np.abs(found - way[-1]) > tolerance
    if not np.isfinite(found).all() or wrong.any() or largest < 100 * tolerance / _STEPS:
        i = int(np.argmax(np.abs(found - way[-1])))
        raise WrongUpdateError(
            f"{name} must take the steps of {relative.kind} to {tolerance:.2g}; element {places[i]} is at"
            f" {found[i]:.9g} instead of {way[-1][i]:.9g}."
        )
    return None


def _check_stored(relative: Relative, name: str, found: Array, wanted: Array) -> None:
    """Compare the ways of elements."""
    off = float(np.abs(found - wanted).sum() / np.abs(wanted).sum())
    at_all = float(found @ wanted / (wanted @ wanted)) - 1
    most = _OF_SIGNS if relative.kind == "Lion" else _OFF_AT_ALL
    if not (off <= _OFF and abs(at_all) <= most):
        raise WrongUpdateError(
            f"{name} must take the steps of {relative.kind} to {_OFF:.1%}, and to {most:.1%} all in all; they"
            f" are off by {off:.1%}, and by {at_all:.1%}."
        )


def contest(relative: Relative) -> Contest:
    """Return the comparison of a rule."""
    peers = {
        "fastadam": Peer("fastadam", partial(start_fastadam, relative), ()),
        "traffic": Peer("same traffic", partial(start_traffic, relative), (), is_adam=False),
    }
    if relative.stored:
        for kind, label in STORED.items():
            packages = ("ml_dtypes",) if kind == "bfloat16" else ()
            peers[kind] = Peer(label, partial(start_fastadam, relative, state_dtype=kind), packages)
    promises = {("traffic", LARGE): TRAFFIC}
    if relative.in_torch:
        ways: dict[str, dict[str, Any]] = {"foreach": {"foreach": True}, "for-loop": {"foreach": False}}
        if relative.fused:
            ways = {"fused": {"fused": True}}
        for way, how in ways.items():
            start = partial(start_torch, relative, **how)
            peers[f"torch {way}"] = Peer(f"torch, {way}", start, ("torch",))
            promises[f"torch {way}", LARGE] = TORCH
    return Contest(peers, partial(check, relative), relative.bytes_moved, promises)


def missing(relative: Relative) -> str | None:
    """Return why a rule cannot be checked here, or None."""
    return "not installed: torch" if relative.in_torch and find_spec("torch") is None else None
