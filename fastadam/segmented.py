"""A step with segments: the coefficients of all of them, formed together, and the loops that take them.

What :class:`fastadam.hyperparameters.Coefficients` does for one set of hyperparameters happens here for a
column of them, by the same functions and with the same roundings: the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastadam.bias_correction import of_many
from fastadam.checks import at_least_zero
from fastadam.hyperparameters import Coefficients, Hyperparameters, outside, require_range
from fastadam.kernels import rules
from fastadam.kernels.run_chunks import RunChunks
from fastadam.kernels.units import COLUMNS
from fastadam.segments import Numbers, Segments

_STEP_SIZE, _INVERSE, _EPS = (COLUMNS.index(name) for name in ("step_size", "inv_bias_correction2", "eps"))
_AVERAGING = slice(_STEP_SIZE + 1, _STEP_SIZE + 5)


class Segmented:
    """The steps of buffers of one size and dtype, with segments: takes the place of a backend in a step.

    Parameters
    ----------
    segments : Segments
        Not empty.
    hyperparameters : Hyperparameters
        The optimizer's own: of row 0, and of what a segment does not set.
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

        h = hyperparameters
        self.c, self.size, self.step = c, size, 0
        self._loops = loops
        self._units = segments.units(size)
        self._norm: Any = None

        own = (0.0 if callable(h.lr) else h.lr, h.weight_decay, *h.betas, h.eps)
        fields = np.vstack([np.full(len(own), np.nan), segments.fields])
        lr, weight_decay, beta1, beta2, eps = np.where(np.isnan(fields), own, fields).T
        self._follows = np.isnan(fields[:, 0])  # rows of schedules of their own, too: they are set behind
        self._schedules = segments.schedules
        self._follows_a_schedule = callable(h.lr)
        self._lr, self._beta1 = lr, beta1
        self._weight_decay = np.where(weight_decay > 0, weight_decay, np.nan)
        self._decoupled = h.decoupled_weight_decay

        self._require_range("eps", eps)
        self.coefficients = np.empty((len(fields), len(COLUMNS)), c.dtype)
        self._table = loops.Table(self._units, self.coefficients)
        self.coefficients[:, _AVERAGING] = np.stack([beta1, 1 - beta1, beta2, 1 - beta2], axis=1)
        self.coefficients[:, _EPS] = eps
        self._decay: rules.L2Decay | rules.DecoupledDecay | None = None  # its type counts, not its value
        if (weight_decay > 0).any():
            self._decay = (rules.DecoupledDecay if self._decoupled else rules.L2Decay)(c.dtype.type(0))
        if not self._decoupled:
            self._require_range("weight_decay", self._weight_decay)
            self.coefficients[:, 0] = self._weight_decay
        betas1, self._of_beta1 = _each_once(beta1)
        betas2, self._of_beta2 = _each_once(beta2)
        self._corrections1, self._corrections2 = of_many(tuple(betas1)), of_many(tuple(betas2))
        self._lr_changed = True

    def _require_range(self, name: str, values: Numbers) -> None:
        wrong = outside(values, self.c.dtype)
        if wrong.any():
            row = int(np.argmax(wrong))
            name = f"segments[{row - 1}].{name}" if row else name
            require_range(name, float(values[row]), self.c.dtype)

    def _update_lr(self) -> None:
        """Ask the schedules for the learning rates of this step, and form what depends on nothing else."""
        if self._follows_a_schedule:
            self._lr[self._follows] = self.c.lr
        for schedule, of_schedule in self._schedules:
            name = f"segments[{of_schedule[0]}].lr({self.step})"
            self._lr[np.array(of_schedule) + 1] = at_least_zero(name, schedule(self.step))
        self._require_range("lr", self._lr)
        self._require_range("lr / (1 - betas[0])", self._lr / (1 - self._beta1))
        if self._decoupled:
            decay = rules.lr_times_weight_decay(self._lr, self._weight_decay)
            self._require_range("lr * weight_decay", decay)
            self.coefficients[:, 0] = decay

    def _update(self, c: rules.Update) -> rules.Update:
        """Form the coefficients of this step; return those that are the same for all units."""
        if self._lr_changed:
            self._update_lr()
            self._lr_changed = self._follows_a_schedule or bool(self._schedules)
        corrections1 = self._corrections1.at(self.step)[self._of_beta1]
        self.coefficients[:, _STEP_SIZE] = rules.step_size(self._lr, corrections1)
        self.coefficients[:, _INVERSE] = (1 / self._corrections2.at(self.step))[self._of_beta2]
        return self._with_decay(c)

    def _with_decay(self, c: rules.Update) -> rules.Update:
        # c._replace(decay=...), in a fourth of its time.
        return tuple.__new__(rules.Update, (c[0], c[1], self._decay, c[3], c[4]))

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
        self._loops.prepare(params, grads, states, self._table, self._with_decay(c), clear)

    def plan(self, params: Any, grads: Any, states: Any, c: rules.Update, clear: Any) -> Callable[[], None]:
        """Return the call that takes the step number ``step``."""
        c = self._update(c)
        return self._loops.plan(params, grads, states, self._table, c, clear)

    def warmup(self, n_states: int, c: rules.Update, clear: Any) -> None:
        """Compile, or load from the disk cache, all loops."""
        self._loops.warmup(self.c.dtype, n_states, self._with_decay(c), clear)


def _each_once(values: Numbers) -> tuple[Numbers, Any]:
    """Return the different values, and an index that makes a column of something for each one of all."""
    once, places = np.unique(values, return_inverse=True)
    return once, slice(None) if once.size == 1 else places
