"""The clock of an optimizer that counts and decides in GPU memory: what it is made of, and until when."""

from __future__ import annotations

from fastadam import bias_correction
from fastadam.hyperparameters import Coefficients, Hyperparameters
from fastadam.kernels import rules
from fastadam.kernels.cuda import Cuda, DeviceBuffer, KernelTypes
from fastadam.kernels.cuda_clock import REPORTS, Clock
from fastadam.last_step import Done

LARGEST_BETA = 1 - 2.0**-18
"""Its table of bias corrections has 10 million entries, 78 MB; they grow as 1 / (1 - beta)."""

_LRS = 256
"""Steps for which a schedule is asked at once."""


def require_possible(hyperparameters: Hyperparameters) -> None:
    """Raise ValueError if the learning rates or bias corrections of all steps do not fit the GPU's memory."""
    if callable(hyperparameters.lr):
        raise ValueError(  # noqa: TRY004 - of its type it may be
            "lr must be a number with capturable=True: a replayed step calls no schedule."
            " Set opt.lr between replays."
        )
    require_tables(hyperparameters)


def require_tables(hyperparameters: Hyperparameters) -> None:
    """Raise ValueError if the bias corrections of all steps do not fit the GPU's memory."""
    for k, beta in enumerate(hyperparameters.betas):
        if beta > LARGEST_BETA:
            raise ValueError(
                f"betas[{k}] must be at most {LARGEST_BETA:.9g} where steps are counted on the GPU, which"
                f" keeps the bias corrections of all of them; got {beta:.17g}."
            )


def fitting(
    clock: Clock | None,
    kernels: Cuda,
    like: DeviceBuffer,
    h: Hyperparameters,
    c: Coefficients,
    types: KernelTypes,
    step: int,
) -> Clock:
    """Return a clock for kernels of some types, with learning rates for the next step.

    A clock of other types is replaced, and a schedule is asked for learning rates once in so many steps: both
    wait for the device.
    """
    stream = like.stream or 0
    if clock is not None and clock.types != types:
        step, clock = clock.step(), None
    if clock is None:
        require_tables(h)
        scaled = 1.0 if types.conditioning is rules.Conditioning else None
        return Clock(
            kernels,
            like.device,
            stream,
            types,
            step=step,
            lrs=_lrs(c, step) if callable(h.lr) else [c.lr],
            weight_decay=h.weight_decay,
            coefficients=[value for part in c.update(1, grad_scale=scaled) if part for value in part],
            corrections1=bias_correction.table(h.betas[0]),
            inverse_corrections2=1 / bias_correction.table(h.betas[1]),
        )
    if callable(h.lr) and clock.attempts >= clock.lrs_until:
        taken = clock.step()
        clock.set_lrs(_lrs(c, taken), taken, stream)
    return clock


def _lrs(c: Coefficients, taken: int) -> list[float]:
    return [c.lr_of(step) for step in range(taken + 1, taken + 1 + _LRS)]


def done(clock: Clock, attempt: int) -> Done:
    """Return what a step on a clock did, when the device has done all its work."""
    if clock.attempts - attempt > REPORTS:
        raise ValueError(f"last_step must be read within {REPORTS} steps; got one from before.")
    report, looked = clock.report(attempt), clock.looked[attempt % REPORTS]
    return Done(
        int(report.step),
        report.lr,
        report.norm if looked else None,
        report.clip_factor,
        bool(report.skipped),
        int(report.nonfinite) if looked else None,
    )
