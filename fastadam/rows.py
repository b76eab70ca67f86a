"""Coefficients of all segments, formed together: a row for each.

What :class:`fastadam.hyperparameters.Coefficients` does for one set of hyperparameters happens here for a
column of them, by the same functions and with the same roundings: the bits are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastadam.bias_correction import of_many, table
from fastadam.checks import at_least_zero
from fastadam.hyperparameters import Coefficients, Hyperparameters, outside, require_range
from fastadam.kernels import rules
from fastadam.kernels.units import COLUMNS, Integers, RowTables, row_of
from fastadam.segments import Numbers, Segments

_STEP_SIZE, _INVERSE, _EPS = (COLUMNS.index(name) for name in ("step_size", "inv_bias_correction2", "eps"))
_AVERAGING = slice(_STEP_SIZE + 1, _STEP_SIZE + 5)


class Rows:
    """The coefficients of every step in one dtype: row 0 is the optimizer's own, ``k + 1`` segment ``k``'s.

    Parameters
    ----------
    segments : Segments
        There may be none.
    hyperparameters : Hyperparameters
        The optimizer's own: of row 0, and of what a segment does not set.
    c : Coefficients
        Made of them.

    Attributes
    ----------
    coefficients : ndarray, shape (rows, len(COLUMNS))
        Of the dtype; those of the step that was formed last.
    decay : L2Decay, DecoupledDecay or None
        What any row has; its type counts, not its value.

    Raises
    ------
    ValueError
        If a coefficient overflows or becomes zero in the dtype.
    """

    def __init__(self, segments: Segments, hyperparameters: Hyperparameters, c: Coefficients) -> None:
        h = hyperparameters
        self._c = c
        own = (0.0 if callable(h.lr) else h.lr, h.weight_decay, *h.betas, h.eps)
        fields = np.vstack([np.full(len(own), np.nan), segments.fields])
        lr, weight_decay, beta1, beta2, eps = np.where(np.isnan(fields), own, fields).T
        self._follows = np.isnan(fields[:, 0])  # rows of schedules of their own, too: they are set behind
        self._schedules = segments.schedules
        self._follows_a_schedule = callable(h.lr)
        self._lr, self._beta1, self._beta2 = lr, beta1, beta2
        self._weight_decay = np.where(weight_decay > 0, weight_decay, np.nan)
        self._decoupled = h.decoupled_weight_decay

        self._source = self._sources(fields[:, 0])
        self._require_range("eps", eps)
        self.coefficients = np.empty((len(fields), len(COLUMNS)), c.dtype)
        self.coefficients[:, _AVERAGING] = np.stack([beta1, 1 - beta1, beta2, 1 - beta2], axis=1)
        self.coefficients[:, _EPS] = eps
        self.decay: rules.L2Decay | rules.DecoupledDecay | None = None
        if (weight_decay > 0).any():
            self.decay = (rules.DecoupledDecay if self._decoupled else rules.L2Decay)(c.dtype.type(0))
        if not self._decoupled:
            self._require_range("weight_decay", self._weight_decay)
            self.coefficients[:, 0] = self._weight_decay
        betas1, self._of_beta1 = _each_once(beta1)
        betas2, self._of_beta2 = _each_once(beta2)
        self._corrections1, self._corrections2 = of_many(tuple(betas1)), of_many(tuple(betas2))
        self._lr_changed, self._known_lr = True, c.lr

    def _require_range(self, name: str, values: Numbers) -> None:
        wrong = outside(values, self._c.dtype)
        if wrong.any():
            row = int(np.argmax(wrong))
            name = f"segments[{row - 1}].{name}" if row else name
            require_range(name, float(values[row]), self._c.dtype)

    def _sources(self, own: Numbers) -> Integers:
        """Return where the learning rate of each row comes from.

        0 is the optimizer's own, others are constants and schedules, each once.
        """
        sources = np.zeros(own.size, np.int64)
        constants, of_row = np.unique(own[~self._follows], return_inverse=True)
        sources[~self._follows] = 1 + of_row
        for k, (_, of_schedule) in enumerate(self._schedules, start=1 + constants.size):
            sources[np.array(of_schedule) + 1] = k
        return sources

    def _update_lr(self, step: int, own: float) -> None:
        """Ask the schedules for the learning rates of a step, and form what depends on nothing else."""
        self._lr[self._follows] = own
        for schedule, of_schedule in self._schedules:
            name = f"segments[{of_schedule[0]}].lr({step})"
            self._lr[np.array(of_schedule) + 1] = at_least_zero(name, schedule(step))
        self._require_lr(self._lr)
        if self._decoupled:
            self.coefficients[:, 0] = rules.lr_times_weight_decay(self._lr, self._weight_decay)

    def _require_lr(self, lr: Numbers) -> None:
        self._require_range("lr", lr)
        self._require_range("lr / (1 - betas[0])", lr / (1 - self._beta1))
        if self._decoupled:
            self._require_range("lr * weight_decay", rules.lr_times_weight_decay(lr, self._weight_decay))

    def form(self, step: int) -> None:
        """Form the coefficients of a step, counted from 1; the optimizer's own were asked for before."""
        if self._lr_changed or self._c.lr != self._known_lr:
            self._lr_changed = True
            self._update_lr(step, self._c.lr)
            self._lr_changed, self._known_lr = bool(self._schedules), self._c.lr
        corrections1 = self._corrections1.at(step)[self._of_beta1]
        self.coefficients[:, _STEP_SIZE] = rules.step_size(self._lr, corrections1)
        self.coefficients[:, _INVERSE] = (1 / self._corrections2.at(step))[self._of_beta2]

    def take(self, c: rules.Update) -> None:
        """Take the coefficients of a step from the optimizer's own, where there are no others: 2 us less."""
        self.coefficients[0] = row_of(c)

    # --- Where they are formed in GPU memory ----------------------------------------------------------------

    @property
    def follow_schedules(self) -> bool:
        """Whether the learning rate of any row changes from step to step."""
        return self._follows_a_schedule or bool(self._schedules)

    def lrs(self, step: int) -> Numbers:
        """Return the learning rates of a step, in the order of their sources."""
        self._update_lr(step, self._c.lr_of(step))
        _, first = np.unique(self._source, return_index=True)
        lrs: Numbers = self._lr[first]
        return lrs

    def set_lr(self, lr: float) -> None:
        """Check another learning rate of the optimizer's own, where none follows a schedule."""
        changed = np.where(self._follows, lr, self._lr)
        self._require_lr(changed)
        self._lr = changed

    def tables(self) -> RowTables:
        """Return what a GPU forms the coefficients from."""
        tables, places = [], [self._source]
        at = 0
        for betas, make in ((self._beta1, table), (self._beta2, lambda beta: 1 / table(beta))):
            once, of_row = np.unique(betas, return_inverse=True)
            made = [make(beta) for beta in once.tolist()]
            counts = np.array([corrections.size for corrections in made])
            places += [(at + np.cumsum(counts) - counts)[of_row], counts[of_row]]
            tables += made
            at += int(counts.sum())
        return RowTables(
            self.coefficients,
            np.stack(places, axis=1),
            self._weight_decay,
            np.concatenate(tables),
            self._decoupled,
        )

    def with_decay(self, c: rules.Update) -> rules.Update:
        """Return the coefficients that are the same for all units, with the decay that any of them has."""
        # c._replace(decay=...), in a fourth of its time.
        return tuple.__new__(rules.Update, (c[0], c[1], self.decay, c[3], c[4]))


def _each_once(values: Numbers) -> tuple[Numbers, Any]:
    """Return the different values, and an index that makes a column of something for each one of all."""
    once, places = np.unique(values, return_inverse=True)
    return once, slice(None) if once.size == 1 else places
