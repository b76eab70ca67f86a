"""What every contender of the optimizer phase must compute: clip, AdamW, average, clear; in float64.

Beside :mod:`bench.oracle`, whose inputs, steps and equation these are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bench import oracle
from bench.oracle import Array, Contender, WrongUpdateError

WEIGHT_DECAY = 0.01
"""PyTorch's default of AdamW."""

EMA_DECAY = 0.99
"""With more nines, three steps would move an average by less than float32 shows of it."""

CLIPPED_TO = 0.75
"""Share of the norm that is left. Of the steps of the check, two are clipped and one is not."""

NORM_ERROR = 1e-2
"""How far off, relative, the norm of a peer may be.

PyTorch adds squares in float32, in as many accumulators as its vectors have lanes: once a sum is 2**20
times as large as a square, each addition rounds by up to 6 % of the square. Seen are 1e-3 at 2**25 elements
and 4e-3 at 2**26. That is no mistake, so what else a contender computes is judged by the norm that its step
returns.
"""

OWN_NORM_ERROR = 1e-12
"""The same for fastadam: half of some 100 roundings to float64, down the tree of ``kernels/norms.py``."""


def global_norm(grads: Array) -> float:
    """Return the square root of the sum of squares, in float64."""
    return float(np.linalg.norm(grads.astype(np.float64)))


def max_norm(grads: Array) -> float:
    """Return what the gradients of a comparison are clipped to."""
    return CLIPPED_TO * global_norm(grads)


def tolerance(dtype: Any) -> float:
    """Return how far a parameter may be off after the steps of the check.

    More than :func:`bench.oracle.tolerance`, as decoupled decay rounds the parameter twice more, below 2**-4.
    """
    u = float(np.finfo(dtype).eps) / 2
    return oracle.tolerance(dtype) + len(oracle.GRAD_FACTORS) * 2 * 2**-4 * u


def average_tolerance(dtype: Any) -> float:
    """Return how far an average of the parameters may be off then.

    It takes ``1 - EMA_DECAY`` of the parameter's error in each step, and rounds itself, below 2**-4, twice.
    """
    u = float(np.finfo(dtype).eps) / 2
    return len(oracle.GRAD_FACTORS) * ((1 - EMA_DECAY) * tolerance(dtype) + 2 * 2**-4 * u)


def check_phase(
    name: str, contender: Contender, params: Array, grads: Array, whole: float | None = None
) -> None:
    """Take three steps; compare parameters and average, at up to 64 Ki elements, and look at all gradients.

    The contender must be new, on copies of ``params`` and ``grads``. Its next steps run on ``grads`` again.
    Where these are but a part, ``whole`` is the norm of all gradients.

    Raises
    ------
    WrongUpdateError
        If an element is off by more than is allowed, or not finite, or a gradient is not zero;
        or a norm that a step returned is not that of the gradients.
    """
    assert contender.read_average is not None
    assert contender.read_grads is not None
    returned = oracle.take_steps(contender, grads)
    left = int(np.count_nonzero(contender.read_grads()))
    if left:
        raise WrongUpdateError(f"{name} must set all gradients to zero; got {left} that are not.")

    where = oracle.sample(params.size)
    whole = global_norm(grads) if whole is None else whole
    clipped = []
    for factor, theirs in zip(oracle.GRAD_FACTORS, returned, strict=True):
        norm = abs(factor) * whole
        if theirs is not None:
            norm = require_norm(name, theirs, norm)
        clipped.append(
            grads[where].astype(np.float64) * factor * min(1.0, CLIPPED_TO * whole / (norm + 1e-6))
        )
    before = params[where].astype(np.float64)
    average = theta = before
    for theta in oracle.iterates(before, clipped, WEIGHT_DECAY):
        average = EMA_DECAY * average + (1 - EMA_DECAY) * theta
    for what, got, expected, allowed in (
        ("an update", contender.read_params(), theta, tolerance(params.dtype)),
        ("an average moved by", contender.read_average(), average, average_tolerance(params.dtype)),
    ):
        wrong = oracle.worst_wrong(got[where].astype(np.float64) - before, expected - before, allowed)
        if wrong is not None:
            raise WrongUpdateError(
                f"{name} must clip, step, average and clear; got {what} {wrong.got:.9g} for"
                f" {wrong.expected:.9g} at {where[wrong.place]} of {params.size} {params.dtype} elements"
                f" (allowed error {allowed:.3g})."
            )


def check_phase_with_copy(name: str, contender: Contender, params: Array, grads: Array) -> None:
    """Do what :func:`check_phase` does; compare the copy of the parameters with them, rounded to the nearest.

    Raises
    ------
    WrongUpdateError
        If an update is wrong, or an element of the copy is another one.
    """
    assert contender.read_copy is not None
    check_phase(name, contender, params, grads)
    bits = contender.read_params().view(np.uint32)
    expected = ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)  # finite, as is checked above
    wrong = np.flatnonzero(contender.read_copy().view(np.uint16) != expected)
    if wrong.size:
        raise WrongUpdateError(
            f"{name} must copy the new parameters to bfloat16, to the nearest; got another number at"
            f" {wrong[0]} of {params.size} elements."
        )


def check_norm(name: str, contender: Contender, params: Array, grads: Array) -> None:
    """Compare the norm that a contender returns with that in float64.

    Raises
    ------
    WrongUpdateError
        If it is off by more than ``NORM_ERROR`` or, for fastadam, ``OWN_NORM_ERROR``, or NaN.
    """
    require_norm(name, contender.step(), global_norm(grads))


def require_norm(name: str, norm: Any, expected: float) -> float:
    """Return a norm as a float; raise WrongUpdateError if it is off by more than is allowed."""
    got, allowed = float(norm), OWN_NORM_ERROR if name.startswith("fastadam") else NORM_ERROR
    if not abs(got - expected) <= allowed * expected:
        raise WrongUpdateError(
            f"{name} must find a norm of {expected:.9g}; got {got:.9g} (allowed error {allowed:g}, relative)."
        )
    return got
