"""The momentum of NAdam, step by step, as PyTorch has it, in float64.

``mu_t = beta1 * (1 - 0.96 ** (t * momentum_decay) / 2)``: it rises from about half of ``beta1`` to it. The
powers are those of :mod:`fastadam.bias_correction`, so the bits are the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Context, Decimal
from functools import lru_cache

import numpy as np

from fastadam import bias_correction
from fastadam.bias_correction import BLOCK, Corrections, DoubleDouble

_BASE = 0.96
_SETTLED = 2.0**-55
"""Of a momentum: half of this does not change 1."""
_LARGEST_TABLE = 10_000_000
"""Steps after which a momentum must have settled where a GPU counts them: 78 MB."""


@lru_cache(maxsize=16)
def _base(momentum_decay: float) -> DoubleDouble:
    """Return ``0.96 ** momentum_decay``, as a number and the rest."""
    context = Context(prec=50, traps=[])
    exact = context.power(Decimal(_BASE), Decimal(momentum_decay))
    high = float(exact)
    return high, float(context.subtract(exact, Decimal(high)))


def _momenta(beta1: float, momentum_decay: float, start: int, stop: int) -> Corrections:
    """Return ``mu`` of the steps ``start`` up to, without, ``stop``."""
    first, base = start // BLOCK, _base(momentum_decay)
    blocks = [bias_correction.powers(base, number) for number in range(first, -(-stop // BLOCK))]
    powers: Corrections = np.concatenate(blocks)[start - first * BLOCK : stop - first * BLOCK]
    momenta: Corrections = np.asarray(beta1 * (1 - 0.5 * powers), np.float64)
    return momenta


@lru_cache(maxsize=16)
def _one_minus_products(beta1: float, momentum_decay: float, blocks: int) -> Corrections:
    """Return ``1 - mu_1 ... mu_t`` of so many blocks of steps; of step 0 it is 0."""
    momenta = _momenta(beta1, momentum_decay, 0, blocks * BLOCK)
    momenta[0] = 1
    with np.errstate(under="ignore"):
        products: Corrections = 1 - np.cumprod(momenta, dtype=np.float64)
    return products


def _settles(beta1: float, momentum_decay: float) -> int | None:
    """Return a step from which neither the momentum nor the product changes; None if there is none."""
    changes = momentum_decay > 0 and beta1 > 0
    first = np.log(_SETTLED) / (np.log(_BASE) * momentum_decay) if changes else 2.0
    of_product = 37.5 / (1 - beta1)
    steps = max(first, of_product, 2.0)
    return int(steps) + 2 if steps < _LARGEST_TABLE else None


@dataclass(frozen=True)
class _Momentum:
    """What the learning rate is divided by; ``beta1`` and ``momentum_decay`` say all."""

    beta1: float
    momentum_decay: float

    def _of(self, start: int, stop: int) -> Corrections:
        raise NotImplementedError

    def block(self, number: int) -> Corrections:
        """Return those of a block."""
        return self._of(number * BLOCK, (number + 1) * BLOCK)

    def table(self) -> Corrections | None:
        """Return all that differ; None if they are too many."""
        settled = _settles(self.beta1, self.momentum_decay)
        return None if settled is None else self._of(1, settled)

    def _one_minus_product(self, start: int, stop: int) -> Corrections:
        """Return ``1 - mu_1 ... mu_t`` of the steps from ``start`` up to, without, ``stop``."""
        # From some step on it is 1: no more blocks than up to there are formed, whatever step is asked for.
        known = min(-(-stop // BLOCK), int(40 / (1 - self.beta1)) // BLOCK + 2)
        found = _one_minus_products(self.beta1, self.momentum_decay, known)[start:stop]
        return np.concatenate([found, np.ones(stop - start - found.size)])


class Gradient(_Momentum):
    """For the gradient: ``(1 - mu_1 ... mu_t) / (1 - mu_t)``."""

    def _of(self, start: int, stop: int) -> Corrections:
        momenta = _momenta(self.beta1, self.momentum_decay, start, stop)
        found: Corrections = self._one_minus_product(start, stop) / (1 - momenta)
        return found


class Average(_Momentum):
    """For the first moment: ``(1 - mu_1 ... mu_(t+1)) / mu_(t+1)``; inf where there is no momentum."""

    def _of(self, start: int, stop: int) -> Corrections:
        momenta = _momenta(self.beta1, self.momentum_decay, start + 1, stop + 1)
        with np.errstate(divide="ignore"):
            found: Corrections = self._one_minus_product(start + 1, stop + 1) / momenta
        return found
