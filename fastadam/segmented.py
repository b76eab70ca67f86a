"""A step with segments on the CPU: their coefficients, and the loops that take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastadam.hyperparameters import Coefficients, Hyperparameters
from fastadam.kernels import rules
from fastadam.kernels.run_chunks import RunChunks
from fastadam.rows import Rows
from fastadam.segments import Segments


class Segmented:
    """The steps of buffers of one size and dtype, with segments: takes the place of a backend in a step.

    Parameters
    ----------
    segments : Segments
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
        self._loops = loops
        self._units = segments.units(size)
        self._rows = Rows(segments, hyperparameters, c)
        self._table = loops.Table(self._units, self._rows.coefficients)
        self._norm: Any = None

    @property
    def runs(self) -> list[list[int]]:
        """Start and stop of each longest stretch without a frozen element."""
        runs: list[list[int]] = self._units.runs.tolist()
        return runs

    # --- As a backend has them ------------------------------------------------------------------------------

    def scratch_size(self, _: int) -> int:
        """Return the elements of ``scratch`` that :meth:`measure` needs."""
        if self._norm is None:
            from fastadam.kernels.segment_norms import RunNorm

            self._norm = RunNorm(RunChunks(self._units))
        return int(self._norm.scratch_size)

    def measure(self, grads: Any, scratch: Any) -> tuple[float, int]:
        """Return the sum of squares of the gradients that count, and how many are infinite or NaN."""
        return self._norm.measure(grads, scratch)  # type: ignore[no-any-return]

    def prepare(self, params: Any, grads: Any, states: Any, c: rules.Update, clear: Any) -> None:
        """Compile, or load from the disk cache, the loop for these arguments; write nothing."""
        self._loops.prepare(params, grads, states, self._table, self._rows.with_decay(c), clear)

    def plan(self, params: Any, grads: Any, states: Any, c: rules.Update, clear: Any) -> Callable[[], None]:
        """Return the call that takes the step number ``step``."""
        self._rows.form(self.step)
        return self._loops.plan(params, grads, states, self._table, self._rows.with_decay(c), clear)

    def warmup(self, n_states: int, c: rules.Update, clear: Any) -> None:
        """Compile, or load from the disk cache, all loops."""
        self._loops.warmup(self.c.dtype, n_states, self._rows.with_decay(c), clear)
