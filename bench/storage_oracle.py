"""What contenders must compute whose state is rounded: Algorithm 1, within what their formats can hold.

Beside :mod:`bench.oracle`, whose inputs, steps and equation these are. One element may be off by 10 % where
moments have 8 bits, which would hide a wrong equation. The mean over the elements hides nothing: rounding,
at random or to the nearest, cancels in it to first order. So both are looked at.
"""

from __future__ import annotations

from math import log, sqrt
from typing import NamedTuple

import numpy as np

from bench import oracle
from bench.oracle import BETAS, GRAD_FACTORS, LR, Array, Contender, WrongUpdateError
from bench.storages import SPACING, Storage, numpy_dtype

_CHANCE = 1e-9
"""That the mean of honestly rounded elements is refused."""


class Precision(NamedTuple):
    """What a contender's formats can hold."""

    exp_avg: float = 0.0
    exp_avg_sq: float = 0.0
    """Distance of neighbours, relative to the number: a store errs by less than that."""
    params: float = 0.0
    """The same, of parameters without a master."""
    grads: str = "float32"
    """What its gradients are rounded to before all else."""

    @classmethod
    def of(cls, storage: Storage) -> Precision:
        """Return that of a storage."""
        first, second = (SPACING[kind] for kind in storage.state)
        return cls(first, second, 0.0 if storage.master else SPACING[storage.params], storage.grads)


def state_error(exp_avg: float, exp_avg_sq: float) -> float:
    """Return by how much the updates of the check may be off together, relative to ``lr``.

    Interval arithmetic over the steps of :data:`bench.oracle.GRAD_FACTORS`, where every store of a moment
    errs by the given part of it; a step uses its moments before they are rounded. ``eps`` makes it only less.
    """
    beta1, beta2 = BETAS
    m = v = m_error = v_error = total = 0.0
    for t, factor in enumerate(GRAD_FACTORS, start=1):
        m, m_error = beta1 * m + (1 - beta1) * factor, beta1 * m_error
        v, v_error = beta2 * v + (1 - beta2) * factor**2, beta2 * v_error
        corrected = sqrt(1 - beta2**t) / (1 - beta1**t)
        ends = [(m + i * m_error) / sqrt(v + j * v_error) for i in (-1, 1) for j in (-1, 1)]
        total += corrected * max(abs(end - m / sqrt(v)) for end in ends)
        m_error += exp_avg * (abs(m) + m_error)
        v_error += exp_avg_sq * (v + v_error)
    return total


def params_error(precision: Precision, before: Array) -> Array:
    """Return by how much storing each parameter may be off, once.

    They move by at most ``lr`` in a step, give or take what the moments err; twice that is allowed for.
    """
    return np.asarray(precision.params * (np.abs(before.astype(np.float64)) + 2 * len(GRAD_FACTORS) * LR))


def allowed_errors(precision: Precision, before: Array) -> Array:
    """Return how far each element may be off: that of float32, of the moments, of rounded parameters."""
    moments = LR * state_error(precision.exp_avg, precision.exp_avg_sq)
    stores = len(GRAD_FACTORS) * params_error(precision, before)
    return np.asarray(oracle.tolerance(np.float32) + moments + stores)


def allowed_mean(precision: Precision, before: Array) -> float:
    """Return how far the mean of the errors, each in the direction of its gradient, may be from zero.

    - What float32 may err.
    - The mean of n independent errors that are zero on average, by Hoeffding's bound. A store errs within
      one spacing, from wherever it begins; stores of a parameter are independent.
    - What is not zero on average is of second order in the spacing s: of ``1 / sqrt(v)`` with a variance of
      ``s**2 / 4`` at most, 3/8 of that; and of rounding to the nearest, where the density of the numbers
      ends within a cell, ``s**2 / 4``. Both are less than moments that err by ``s**2 / 2``.
    """
    moments = LR * state_error(precision.exp_avg, precision.exp_avg_sq)
    widths = moments**2 + len(GRAD_FACTORS) * params_error(precision, before) ** 2
    chance = sqrt(log(2 / _CHANCE) / 2 * float(np.mean(widths)) / before.size)
    bias = LR * state_error(precision.exp_avg**2 / 2, precision.exp_avg_sq**2 / 2)
    return oracle.tolerance(np.float32) + chance + bias


def check_update(precision: Precision, name: str, contender: Contender, params: Array, grads: Array) -> None:
    """Take three steps and compare them with Algorithm 1, at up to 64 Ki elements from end to end.

    The contender must be new, on copies of ``params`` and ``grads``, rounded as it stores them. Its next
    steps run on ``grads`` again.

    Raises
    ------
    WrongUpdateError
        If an element, or the mean over the elements, is off by more than is allowed, or is not finite.
    """
    where = oracle.sample(params.size)
    before = contender.read_params()[where].copy()
    oracle.take_steps(contender, grads)
    update = contender.read_params()[where].astype(np.float64) - before
    seen = grads[where].astype(numpy_dtype(precision.grads)).astype(np.float64)
    expected = oracle.algorithm_1(before, [seen * factor for factor in GRAD_FACTORS]) - before
    allowed = allowed_errors(precision, before)
    error = update - expected
    if not np.all(np.abs(error) <= allowed):  # not where the error is NaN
        worst = int(np.argmax(np.where(np.isnan(error), np.inf, np.abs(error) / allowed)))
        raise WrongUpdateError(
            f"{name} must take the steps of Adam; got an update of {update[worst]:.9g} for"
            f" {expected[worst]:.9g} at {where[worst]} of {params.size} elements"
            f" (allowed error {allowed[worst]:.3g})."
        )
    mean, limit = float(np.mean(error * np.sign(seen))), allowed_mean(precision, before)
    if not abs(mean) <= limit:
        raise WrongUpdateError(
            f"{name} must take the steps of Adam; got updates that are off by {mean:.3g} on average, in the"
            f" direction of the gradient (allowed error {limit:.3g})."
        )
