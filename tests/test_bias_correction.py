"""``1 - beta ** step`` is correctly rounded: exact rational numbers and 80 digits say so."""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest

from fastadam import bias_correction
from fastadam.bias_correction import BLOCK, block, table

BETAS = [0.0, 1e-3, 0.1, 0.3, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999, 0.99999]


def correction(beta, step):
    number, place = divmod(step, BLOCK)
    return block(beta, number)[place]


@pytest.mark.parametrize("beta", BETAS)
def test_exact(beta):
    for step in [*range(1, 40), BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 5000]:
        assert correction(beta, step) == float(1 - Fraction(beta) ** step), step


@pytest.mark.parametrize("beta", [0.9999, 0.99999, 0.999999, 1 - 2**-40])
@pytest.mark.parametrize("step", [123_456, 10**6, 7_654_321, 10**9, 2**52])
def test_late_steps(beta, step):
    with localcontext() as context:
        context.prec = 80
        assert correction(beta, step) == float(1 - Decimal(beta) ** step)


@pytest.mark.parametrize("beta", BETAS)
def test_table(beta):
    corrections = table(beta)
    assert corrections[-1] == 1
    assert (corrections[:-1] < 1).all()
    assert (np.diff(corrections) >= 0).all()
    for step in {1, 2, 3, corrections.size // 2, corrections.size} - {0}:
        assert corrections[min(step, corrections.size) - 1] == correction(beta, step)
    assert correction(beta, corrections.size + 1) == correction(beta, 10**6 * corrections.size) == 1


def test_plain_powers_would_not_do(monkeypatch):
    """Without the low halves, powers are off: the tests above can fail."""
    right = block.__wrapped__(0.999, 1)
    with monkeypatch.context() as patch:
        patch.setattr(bias_correction, "_multiply", lambda a, b: (a[0] * b[0], a[1] * b[1]))
        bias_correction._first_powers.cache_clear()
        wrong = block.__wrapped__(0.999, 1)
    bias_correction._first_powers.cache_clear()
    assert (wrong != right).sum() > 100


@pytest.mark.parametrize("count", [1, 3, 100, 3000])
def test_many_betas_have_the_bits_of_one(count):
    """In blocks of 1024 steps and of fewer."""
    betas = np.unique(np.append(np.linspace(0, 0.99999, count), 0.9))
    many = bias_correction.of_many(tuple(betas))
    for step in [1, 2, 15, 16, 17, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 333, 10**9 + 7]:
        corrections = many.at(step)
        for k in {0, betas.size // 2, betas.size - 1}:
            assert corrections[k] == correction(float(betas[k]), step)
