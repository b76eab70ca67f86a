"""Coefficients of all segments, formed together: a row for each.

What :class:`fastadam.hyperparameters.Coefficients` does for one set of hyperparameters happens here for a
column of them, by the same functions and with the same roundings: the bits are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import numpy as np

from fastadam.bias_correction import BLOCK
from fastadam.checks import at_least_zero
from fastadam.coefficients import Coefficients
from fastadam.hyperparameters import Hyperparameters, outside, require_range
from fastadam.kernels import rules
from fastadam.kernels.columns import Formed, laid_out
from fastadam.kernels.units import Integers, RowTables, row_of
from fastadam.rule import Constant, LrOver, PerStep, Sequence, unsettled
from fastadam.segments import Numbers, Segments

_OF_SEGMENTS = ("lr", "weight_decay", "beta1", "beta2", "eps")
"""The fields of a segment, as rules know them."""


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
    coefficients : ndarray, shape (rows, 1 + coefficients of the rule)
        Of the dtype; those of the step that was formed last, the weight decay's first.
    decay : L2Decay, DecoupledDecay or None
        What any row has; its type counts, not its value.

    Raises
    ------
    ValueError
        If a coefficient overflows or becomes zero in the dtype.
    """

    def __init__(self, segments: Segments, hyperparameters: Hyperparameters, c: Coefficients) -> None:
        h, rule = hyperparameters, hyperparameters.rule
        self._c, self._rule = c, rule
        fields = np.vstack([np.full(len(_OF_SEGMENTS), np.nan), segments.fields])
        own = {"lr": 0.0 if callable(h.lr) else h.lr, "weight_decay": h.weight_decay, **h.numbers()}
        numbers = {name: np.full(len(fields), value) for name, value in own.items()}
        for name, column in zip(_OF_SEGMENTS, fields.T, strict=True):
            if name in own:
                numbers[name] = np.where(np.isnan(column), own[name], column)
        self._follows = np.isnan(fields[:, 0])  # rows of schedules of their own, too: they are set behind
        self._schedules = segments.schedules
        self._follows_a_schedule = callable(h.lr)
        self._numbers, self._lr = numbers, numbers["lr"]
        weight_decay = numbers["weight_decay"]
        self._weight_decay = np.where(weight_decay > 0, weight_decay, np.nan)
        self._decoupled = h.decoupled_weight_decay

        self._source = self._sources(fields[:, 0])
        for label, of, names in rule.ranges:
            if "lr" not in names:
                self._require_range(label, of(*(numbers[name] for name in names)))
        self.coefficients = np.empty((len(fields), 1 + len(rule.columns)), c.dtype)
        self.decay: rules.L2Decay | rules.DecoupledDecay | None = None
        if (weight_decay > 0).any():
            self.decay = (rules.DecoupledDecay if self._decoupled else rules.L2Decay)(c.dtype.type(0))
        if not self._decoupled:
            self._require_range("weight_decay", self._weight_decay)
            self.coefficients[:, 0] = self._weight_decay
        self._formed: list[_Formed] = []
        for k, column in enumerate(rule.columns, start=1):
            if isinstance(column, Constant):
                self.coefficients[:, k] = column.of(*(numbers[name] for name in column.names))
            else:
                self._formed.append(_formed(k, column, numbers, len(fields)))
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
        for label, of, names in self._rule.ranges:
            if "lr" in names:
                self._require_range(
                    label, of(*(lr if name == "lr" else self._numbers[name] for name in names))
                )
        if self._decoupled:
            self._require_range("lr * weight_decay", rules.lr_times_weight_decay(lr, self._weight_decay))

    def form(self, step: int) -> None:
        """Form the coefficients of a step, counted from 1; the optimizer's own were asked for before."""
        if self._lr_changed or self._c.lr != self._known_lr:
            self._lr_changed = True
            self._update_lr(step, self._c.lr)
            self._lr_changed, self._known_lr = bool(self._schedules), self._c.lr
        number, place = divmod(step, BLOCK)
        for k, is_over_lr, sequences in self._formed:
            found = sequences.at(number, place)
            self.coefficients[:, k] = rules.step_size(self._lr, found) if is_over_lr else found

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
        """Return what a GPU forms the coefficients from.

        Raises
        ------
        ValueError
            If one of them never stays as it is.
        """
        return RowTables(
            self.coefficients,
            self._source,
            self._weight_decay,
            laid_out([self._table(*formed) for formed in self._formed], len(self._source)),
            self._decoupled,
        )

    def _table(self, k: int, is_over_lr: bool, sequences: _Sequences) -> Formed:
        tables, of_row = sequences.tables()
        for which, table in enumerate(tables):
            if table is None:
                row = int(np.argmax(of_row == which))
                numbers = {name: float(values[row]) for name, values in self._numbers.items()}
                raise unsettled(self._rule, k - 1, numbers, f"segments[{row - 1}]." if row else "")
        return Formed(k, is_over_lr, cast("list[Numbers]", tables), of_row)

    def with_decay(self, c: rules.Update) -> rules.Update:
        """Return the coefficients that are the same for all units, with the decay that any of them has."""
        # c._replace(decay=...), in a fourth of its time.
        return tuple.__new__(rules.Update, (c[0], c[1], self.decay, c[3], c[4]))


def require_fields(segments: Segments, hyperparameters: Hyperparameters) -> None:
    """Raise ValueError if a segment sets what the optimizer does not have."""
    own = {"lr", "weight_decay", *hyperparameters.numbers()}
    for name, column in zip(_OF_SEGMENTS, segments.fields.T, strict=True):
        found = ~np.isnan(column)
        if name not in own and found.any():
            k, label = int(np.argmax(found)), "betas" if name.startswith("beta") else name
            raise ValueError(
                f"segments[{k}].{label} must be None, as {hyperparameters.KIND} has no {label}; got a value."
            )


class _Sequences:
    """Sequences of many rows, each once: the blocks of the steps that are asked for are kept."""

    def __init__(self, sequences: list[Sequence], of_row: Any) -> None:
        self._sequences, self._of_row = sequences, of_row
        self._block: tuple[int, Numbers] = (-1, np.empty((0, 0)))  # one object: threads may share a copy

    def at(self, number: int, place: int) -> Any:
        """Return the number of a step for each row."""
        formed, block = self._block
        if number != formed:
            block = np.stack([sequence.block(number) for sequence in self._sequences], axis=1)
            self._block = number, block
        return block[place][self._of_row]

    def tables(self) -> tuple[list[Numbers | None], Integers]:
        """Return the tables of all sequences, and which one each row has."""
        return [sequence.table() for sequence in self._sequences], self._of_row


class _Formed(NamedTuple):
    """A column that is formed for each step."""

    column: int
    is_over_lr: bool
    sequences: _Sequences


def _formed(k: int, column: LrOver | PerStep, numbers: Mapping[str, Numbers], rows: int) -> _Formed:
    given = [numbers[name] for name in column.names] or [np.zeros(rows)]
    once, places = np.unique(np.stack(given, axis=1), axis=0, return_inverse=True)
    made = [column.of(*row[: len(column.names)]) for row in once.tolist()]
    places = places.reshape(rows)  # of NumPy 2.0 it has another shape
    return _Formed(k, isinstance(column, LrOver), _Sequences(made, places))
