"""The rectification of RAdam: Liu et al., Algorithm 2, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastadam import bias_correction
from fastadam.bias_correction import BLOCK, Corrections

_TRACTABLE = 5.0
"""The length of the average from which its variance is tractable; the paper says 4, PyTorch 5."""


@dataclass(frozen=True)
class Rectification:
    """``r_t sqrt(1 - beta2 ** step)``, and 0 while the variance is intractable."""

    beta2: float

    def block(self, number: int) -> Corrections:
        """Return those of a block."""
        steps = np.arange(number * BLOCK, (number + 1) * BLOCK, dtype=np.float64)
        return self._of(steps, bias_correction.block(self.beta2, number))

    def table(self) -> Corrections:
        """Return all that differ."""
        # Two more: the correction is 1 from the last on, and 2 t (1 - correction) is 0 then, too.
        corrections = bias_correction.table(self.beta2)
        return self._of(np.arange(1, corrections.size + 1, dtype=np.float64), corrections)

    def _of(self, steps: Corrections, corrections: Corrections) -> Corrections:
        longest = 2 / (1 - self.beta2) - 1
        if longest <= _TRACTABLE:
            return np.zeros_like(corrections)
        with np.errstate(divide="ignore", invalid="ignore"):  # step 0
            length = longest - 2 * steps * (1 - corrections) / corrections
        is_tractable = length > _TRACTABLE
        length = np.where(is_tractable, length, _TRACTABLE + 1)
        variance = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        found: Corrections = np.where(is_tractable, np.sqrt(np.maximum(variance, 0) * corrections), 0.0)
        return found
