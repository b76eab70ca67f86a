"""The clock of a capturable optimizer: its step counter, learning rate and coefficients in GPU memory."""

from __future__ import annotations

from fastadam import bias_correction
from fastadam.hyperparameters import Coefficients, Hyperparameters
from fastadam.kernels.cuda import Clock, Cuda, DeviceBuffer

LARGEST_BETA = 1 - 2.0**-18
"""Its table of bias corrections has 10 million entries, 78 MB; they grow as 1 / (1 - beta)."""


def require_possible(hyperparameters: Hyperparameters) -> None:
    """Raise ValueError if the learning rates or bias corrections of all steps do not fit the GPU's memory."""
    if callable(hyperparameters.lr):
        raise ValueError(  # noqa: TRY004 - of its type it may be
            "lr must be a number with capturable=True: a replayed step calls no schedule."
            " Set opt.lr between replays."
        )
    for k, beta in enumerate(hyperparameters.betas):
        if beta > LARGEST_BETA:
            raise ValueError(
                f"betas[{k}] must be at most {LARGEST_BETA:.9g} with capturable=True, which keeps the bias"
                f" corrections of all steps in GPU memory; got {beta:.17g}."
            )


def make(kernels: Cuda, like: DeviceBuffer, h: Hyperparameters, c: Coefficients, step: int) -> Clock:
    """Return a clock at ``step``, on the device of ``like`` and in the order of its stream."""
    return Clock(
        kernels,
        like.device,
        like.stream or 0,
        c.types,
        step=step,
        lr=c.lr,
        weight_decay=h.weight_decay,
        coefficients=[value for part in c.update(1) if part for value in part],
        corrections1=bias_correction.table(h.betas[0]),
        inverse_corrections2=1 / bias_correction.table(h.betas[1]),
    )
