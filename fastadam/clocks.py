"""The clock of an optimizer that counts and decides in GPU memory: what it is made of, and until when."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, TypeVar, cast

import numpy as np

from fastadam import streams
from fastadam.coefficients import Coefficients
from fastadam.hyperparameters import Hyperparameters
from fastadam.kernels import rules
from fastadam.kernels.cuda import Cuda, DeviceBuffer, KernelTypes
from fastadam.kernels.cuda_clock import REPORTS, Clock
from fastadam.kernels.cuda_units import DeviceUnits
from fastadam.kernels.device_storage import StoredTypes
from fastadam.last_step import Done
from fastadam.precision import IN_BLOCKS
from fastadam.rows import Rows
from fastadam.rule import Constant, Sequence, unsettled
from fastadam.segments import Segments

LARGEST_BETA = 1 - 2.0**-18
"""Its table of bias corrections has 10 million entries, 78 MB; they grow as 1 / (1 - beta)."""

_LRS = 256
"""Steps for which a schedule is asked at once."""

Rates = TypeVar("Rates")


class MadeFor(NamedTuple):
    """What a clock was made for, besides the types of its kernels."""

    hyperparameters: Hyperparameters
    segments: Segments | None
    rows: Rows | None  # where there are segments or telemetry


def require_possible(hyperparameters: Hyperparameters, segments: Segments | None) -> None:
    """Raise ValueError if what all steps are formed from does not fit the GPU's memory."""
    if callable(hyperparameters.lr):
        raise ValueError(  # noqa: TRY004 - of its type it may be
            "lr must be a number with capturable=True: a replayed step calls no schedule."
            " Set opt.lr between replays."
        )
    for _, of_schedule in () if segments is None else segments.schedules:
        raise ValueError(
            f"segments[{of_schedule[0]}].lr must be a number with capturable=True: a replayed step calls no"
            " schedule. Without one, it follows opt.lr."
        )
    require_tables(hyperparameters, segments)


def require_tables(hyperparameters: Hyperparameters, segments: Segments | None) -> None:
    """Raise ValueError if what coefficients are formed from in all steps does not fit the GPU's memory."""
    rule, numbers = hyperparameters.rule, hyperparameters.numbers()
    formed = [(k, column) for k, column in enumerate(rule.columns) if not isinstance(column, Constant)]
    betas = {f"beta{k + 1}": k for k in range(2)}
    used = {name: k for name, k in betas.items() if any(name in column.names for _, column in formed)}
    found = {f"betas[{k}]": numbers[name] for name, k in used.items()}
    if segments is not None:
        places = list(used.values())
        of_segments = segments.fields[:, _BETAS][:, places]
        for row, k in np.argwhere(of_segments > LARGEST_BETA)[:1].tolist():
            found[f"segments[{row}].betas[{places[k]}]"] = of_segments[row, k]
    for name, beta in found.items():
        if beta > LARGEST_BETA:
            raise ValueError(
                f"{name} must be at most {LARGEST_BETA:.9g} where steps are counted on the GPU, which"
                f" keeps the bias corrections of all of them; got {beta:.17g}."
            )
    for k, column in formed:
        if not _settles(column.of(*(numbers[name] for name in column.names))):
            raise unsettled(rule, k, numbers)


@lru_cache(maxsize=64)
def _settles(sequence: Sequence) -> bool:
    """Return whether the numbers of a sequence stay from some step on."""
    return sequence.table() is not None


_BETAS = slice(2, 4)
"""Of the fields of segments."""


def fits(clock: Clock | None, types: KernelTypes, h: Hyperparameters, segments: Segments | None) -> bool:
    """Return whether a clock serves for these: a copy of the optimizer may share it, and have others."""
    if clock is None:
        return False
    made_for = cast("MadeFor", clock.made_for)
    if made_for.segments is not segments or (
        made_for.hyperparameters is not h and made_for.hyperparameters != h
    ):
        return False
    if clock.units is not None:  # made for the decay that any segment has
        types = types._replace(decay=clock.types.decay)
    return clock.types == types


def stores(clock: Clock | None, stored: StoredTypes | None) -> bool:
    """Return whether a clock has seen a step of a storage: what it needs is compiled and loaded."""
    return clock is not None and stored in clock.stored


def fitting(
    clock: Clock | None,
    kernels: Cuda,
    like: DeviceBuffer,
    h: Hyperparameters,
    c: Coefficients,
    types: KernelTypes,
    step: int,
    segments: Segments | None,
) -> Clock:
    """Return a clock for kernels of some types, with learning rates for the next step.

    One that does not fit is replaced, and schedules are asked for learning rates once in so many steps: both
    wait for the device.
    """
    stream = like.stream or 0
    if clock is not None and not fits(clock, types, h, segments):
        if clock.is_captured:
            raise ValueError(
                "flat_params must be stepped as in the CUDA graph that holds this optimizer, with grad_scale"
                " or without, and gradients accumulated or not; got another kind of step."
                " Reset it, and capture again."
            )
        step, clock = clock.step(), None
    if clock is None:
        require_tables(h, segments)
        return _make(kernels, like, h, c, types, step, segments)
    rows = cast("MadeFor", clock.made_for).rows
    if _follows(h, rows) and clock.attempts >= clock.lrs_until:
        taken = clock.step()
        clock.set_lrs(_lrs(h, c, rows, taken), taken, stream)
    return clock


def _make(
    kernels: Cuda,
    like: DeviceBuffer,
    h: Hyperparameters,
    c: Coefficients,
    types: KernelTypes,
    step: int,
    segments: Segments | None,
) -> Clock:
    stream, units, rows = like.stream or 0, None, None
    update = c.update(1, grad_scale=1.0 if types.conditioning is rules.Conditioning else None)
    if segments is not None or h.telemetry:
        given = segments or Segments(())
        covered, rows = given.units(like.size), Rows(given, h, c)
        update = rows.with_decay(update)
        types = types._replace(decay=type(update.decay))
    lrs = _lrs(h, c, rows, step)  # may raise
    if rows is not None:
        place = (kernels, like.device, stream)
        units = DeviceUnits(
            *place,
            types,
            like.size,
            covered,
            rows.tables(),
            observed=h.telemetry,
            in_blocks=not IN_BLOCKS.isdisjoint(h.formats()),
        )
    return Clock(
        kernels,
        like.device,
        stream,
        types,
        step=step,
        lrs=lrs,
        weight_decay=h.weight_decay,
        coefficients=[value for part in update if part for value in part],
        columns=c.columns(),
        units=units,
        made_for=MadeFor(h, segments, rows),
    )


def _follows(h: Hyperparameters, rows: Rows | None) -> bool:
    """Return whether any learning rate follows a schedule."""
    return callable(h.lr) if rows is None else rows.follow_schedules


def _lrs(h: Hyperparameters, c: Coefficients, rows: Rows | None, taken: int) -> object:
    """Return the learning rates of the next steps, of each source if there are rows."""
    ahead = range(taken + 1, taken + 1 + (_LRS if _follows(h, rows) else 1))
    return _ask(c.lr_of, ahead) if rows is None else np.stack(_ask(rows.lrs, ahead), axis=1)


def _ask(lr_of: Callable[[int], Rates], ahead: range) -> list[Rates]:
    """Ask for the learning rates of some steps, up to the first one that has none: it may never be taken."""
    rates: list[Rates] = []
    for step in ahead:
        try:
            rates.append(lr_of(step))
        except Exception:  # whatever a schedule raises
            if not rates:
                raise
            break
    return rates


def set_lr(clock: Clock, present: Hyperparameters, h: Hyperparameters, library: str) -> bool:
    """Queue the learning rate of ``h``, which differs from the present in nothing else.

    Returns False where that cannot be. ``library`` is that whose current stream the last step took, as
    :func:`fastadam.streams.for_lr` has it.

    Raises
    ------
    ValueError
        If a coefficient of any segment overflows or becomes zero with it.
    """
    made_for, lr = cast("MadeFor", clock.made_for), cast("float", h.lr)
    rows = made_for.rows
    if made_for.hyperparameters != present or (rows is not None and rows.follow_schedules):
        return False
    stream = streams.for_lr(clock, library)
    if rows is not None:
        rows.set_lr(lr)
    clock.set_lr(lr, stream)
    clock.made_for = made_for._replace(hyperparameters=h)
    return True


def done(clock: Clock, attempt: int) -> Done:
    """Return what a step on a clock did, when the device has done all its work."""
    if clock.attempts - attempt > REPORTS:
        raise ValueError(f"last_step must be read within {REPORTS} steps; got one from before.")
    report, observed = clock.report(attempt), clock.units is not None and clock.units.observed
    looked, seen = clock.looked[attempt % REPORTS] or observed, observed and not report.skipped
    return Done(
        int(report.step),
        report.lr,
        report.norm if looked else None,
        report.clip_factor,
        bool(report.skipped),
        int(report.nonfinite) if looked else None,
        report.update_norm if seen else None,
        report.param_norm if seen else None,
        int(report.vanished) if seen else None,
    )
