"""A step with segments or telemetry on the CPU: coefficients, and the loops that take them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import sqrt
from typing import Any

from fastadam.coefficients import Coefficients
from fastadam.hyperparameters import Hyperparameters
from fastadam.kernels import rules
from fastadam.kernels.rounding import PLAIN, Storage
from fastadam.last_step import Done, LastStep
from fastadam.rows import Rows
from fastadam.segments import Segments


class Segmented:
    """The steps of buffers of one size and dtype, with segments: takes the place of a backend in a step.

    Parameters
    ----------
    segments : Segments
        There may be none.
    hyperparameters : Hyperparameters
        The optimizer's own.
    c : Coefficients
        Made of them.
    size : int
        Elements of the buffers.

    Raises
    ------
    ValueError
        If a segment ends behind the buffer, or a coefficient overflows or becomes zero in the dtype.
    """

    def __init__(
        self, segments: Segments, hyperparameters: Hyperparameters, c: Coefficients, size: int
    ) -> None:
        from fastadam.kernels import segments as loops  # imports Numba

        self.c, self.size, self.step = c, size, 0
        self.storage: Storage = PLAIN
        self.kinds: tuple[object, ...] = ()  # what a loop is compiled for because of it
        self._cuts: tuple[Any, Any] | None = None
        self._loops = loops
        self._units = segments.units(size)
        self._chunks = partial(segments.chunks, self._units)
        self._rows = Rows(segments, hyperparameters, c)
        self._has_segments = len(self._rows.coefficients) > 1
        self._table = loops.Table(self._units, self._rows.coefficients)
        self._norm: Any = None
        self._telemetry: Any = None
        self._observes: Any = None  # the same in other than plain arrays
        if hyperparameters.telemetry:
            from fastadam.kernels.telemetry import Telemetry

            self._telemetry = Telemetry(self._chunks())

    @property
    def is_whole(self) -> bool:
        """Whether nothing is frozen."""
        return self._units.total == self.size

    @property
    def runs(self) -> list[list[int]]:
        """Start and stop of each longest stretch without a frozen element."""
        runs: list[list[int]] = self._units.runs.tolist()
        return runs

    @property
    def stretches(self) -> Any:
        """What is stepped: ``(start, stop, row of coefficients)`` each, in order."""
        return self._units.whole

    def formed(self, c: rules.Update) -> tuple[Any, rules.Update]:
        """Return the rows of coefficients of the step number ``step``, and what is the same for all."""
        if self._has_segments:
            self._rows.form(self.step)
        else:
            self._rows.take(c)
        return self._rows.coefficients, self._rows.with_decay(c)

    # --- As a backend has them ------------------------------------------------------------------------------

    def scratch_size(self, _: int) -> int:
        """Return the elements of ``scratch`` that :meth:`measure` needs."""
        if self._norm is None:
            from fastadam.kernels.segment_norms import RunNorm

            self._norm = RunNorm(self._chunks())
        return int(self._norm.scratch_size)

    def measure(self, grads: Any, scratch: Any) -> tuple[float, int]:
        """Return the sum of squares of the gradients that count, and how many are infinite or NaN."""
        return self._norm.measure(grads, scratch)  # type: ignore[no-any-return]

    def prepare(self, params: Any, grads: Any, states: Any, c: rules.Update, clear: Any) -> None:
        """Compile, or load from the disk cache, the loop for these arguments; write nothing."""
        c = self._rows.with_decay(c)
        if self.storage is not PLAIN and self._telemetry is not None:
            self._stored_telemetry().prepare(params, grads, states, c, clear, self.storage)
        elif self.storage is not PLAIN:
            loops, cuts = self._stored()
            loops.prepare(params, grads, states, cuts, c, clear, self.storage)
        elif self._telemetry is None:
            self._loops.prepare(params, grads, states, self._table, c, clear)
        else:
            self._telemetry.prepare(params, grads, states, c, clear)

    def plan(self, params: Any, grads: Any, states: Any, c: rules.Update, clear: Any) -> Callable[[], None]:
        """Return the call that takes the step number ``step``."""
        coefficients, c = self.formed(c)
        take: Callable[[], None]
        if self.storage is not PLAIN and self._telemetry is not None:
            arguments = (coefficients, self._scratch, c, clear, self.storage)
            take = self._stored_telemetry().plan(params, grads, states, *arguments)
        elif self.storage is not PLAIN:
            loops, cuts = self._stored()
            take = loops.plan(params, grads, states, cuts, coefficients, c, clear, self.storage)
        elif self._telemetry is None:
            take = self._loops.plan(params, grads, states, self._table, c, clear)
        else:
            take = self._telemetry.plan(params, grads, states, self._table, self._scratch, c, clear)
        return take

    def _stored(self) -> tuple[Any, Any]:
        """Return the loops for other than plain arrays, and where they cut the buffers."""
        if self._cuts is None:
            from fastadam.kernels import stored
            from fastadam.kernels.groups import Cuts

            self._cuts = stored, Cuts(self._units, self.size)
        return self._cuts

    def _stored_telemetry(self) -> Any:
        """Return the same, looked at."""
        if self._observes is None:
            from fastadam.kernels.stored_telemetry import StoredTelemetry

            self._observes = StoredTelemetry(self._chunks(), self._units, self.size)
        return self._observes

    def warmup(self, n_states: int, c: rules.Update, clear: Any) -> None:
        """Compile, or load from the disk cache, all loops."""
        loops = self._loops
        if self._telemetry is not None:
            from fastadam.kernels import telemetry as loops
        loops.warmup(self.c.dtype, n_states, self._rows.with_decay(c), clear)
        if self.c.reads_gradients_first:
            from fastadam.kernels import segment_norms

            segment_norms.prepare(self.c.dtype)

    def warmup_stored(self, params: Any, states: Any, c: rules.Update, clear: Any, storage: Storage) -> None:
        """Compile, or load from the disk cache, all loops for arrays without elements in any storage."""
        loops, _ = self._stored()
        if self._telemetry is not None:
            from fastadam.kernels import stored_telemetry as loops
        loops.warmup(params, states, self._rows.with_decay(c), clear, storage)

    # --- And what they have not -----------------------------------------------------------------------------

    def watch(self, done: Done, grad_scale: float | None) -> Done | LastStep:
        """Return what the step that is planned next will have done: to be read when it was taken.

        Parameters
        ----------
        done : Done
            All but the telemetry.
        grad_scale : float or None
            What its gradients are divided by.
        """
        if self._telemetry is None:
            return done
        # Of this step alone: what was told of one stays, whatever the next ones do.
        self._scratch = self._telemetry.scratch()
        return LastStep(partial(_read, self._telemetry, self._scratch, done, grad_scale))


def _read(telemetry: Any, scratch: Any, done: Done, grad_scale: float | None) -> Done:
    observed = telemetry.read(scratch)
    return done._replace(
        grad_norm=rules.grad_norm(observed.squares, 1.0 if grad_scale is None else grad_scale),
        nonfinite=observed.nonfinite,
        update_norm=sqrt(observed.update_squares),
        param_norm=sqrt(observed.param_squares),
        vanished=observed.vanished,
    )
