"""What the last step did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LastStep:
    """What the last call of ``step`` did.

    Attributes
    ----------
    step : int
        Steps taken so far.
    lr : float
        Learning rate.
    grad_norm : float or None
        Global norm of the gradient, unscaled, before clipping; None where nothing asked for it.
    clip_factor : float
        What the gradient was multiplied with, at most 1.
    skipped : bool
        Whether no step was taken, for an element of the gradient was inf or NaN.
    """

    step: int
    lr: float
    grad_norm: float | None = None
    clip_factor: float = 1.0
    skipped: bool = False
