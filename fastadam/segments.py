"""Segments: parts of the flat buffer with hyperparameters of their own, all in one pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

import numpy as np

from fastadam.arrays import Number
from fastadam.checks import count, require_flag
from fastadam.hyperparameters import CHECKS, Schedule
from fastadam.kernels.run_chunks import RunChunks
from fastadam.kernels.units import Units

Numbers: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

_OWN = ("lr", "weight_decay", "betas", "eps")

COLUMNS = ("start", "stop", "lr", "weight_decay", "betas[0]", "betas[1]", "eps", "frozen")
"""Of the array that stands for segments in a state dict, float64; NaN is what a segment did not set."""

_FIELDS = slice(2, 7)
"""What the optimizer has, too."""


@dataclass(frozen=True)
class Segment:
    """A part of the flat buffer with hyperparameters of its own.

    Parameters
    ----------
    start, stop : int
        The elements ``start`` up to, without, ``stop`` of the flat buffer; ``start < stop``.
    lr : float or callable, optional
        Learning rate, at least 0, or a function of the step number, counted from 1. It is the optimizer's own
        if it is not given, as are the next three.
    weight_decay : float, optional
        Weight decay, at least 0.
    betas : tuple of float, optional
        Decay rates of the first and the second moment, each in [0, 1).
    eps : float, optional
        Added to the root of the second moment; at least 0.
    frozen : bool, default False
        Leave the parameters, their moments, their average and their gradients as they are. They cost nothing:
        they are not read, do not count in the global norm, and may be inf or NaN; ``zero_grads`` does not set
        their gradients to zero.

    Raises
    ------
    TypeError
        If a value is not of its type.
    ValueError
        If a value is out of its range.

    Notes
    -----
    All optimizers take ``lr``, ``weight_decay`` and ``frozen``. ``betas`` are for those that have them: Adam,
    NAdam, RAdam, Adamax and Lion; ``eps`` for all but Lion and SGD. For another optimizer they are an error.
    Momenta, ``alpha`` and ``rho`` are those of the whole buffer.

    The bits are those of one optimizer for each segment, stepped on its slice of the buffers; where the
    gradient is clipped by its global norm, that is of the whole buffer. All segments share the step number:
    one that was frozen goes on with the bias corrections of the steps taken meanwhile. The global norm is the
    root of a float64 sum: where nothing is frozen the sum of the whole buffer, else the sums of the stretches
    between frozen segments, summed likewise.

    On a GPU one kernel steps all segments, and a callable ``lr`` is asked for 256 steps ahead.

    Examples
    --------
    Half the learning rate for the first layer, no weight decay for the biases:

    >>> import numpy as np
    >>> from fastadam import FusedAdam, Segment
    >>> params, grads = np.ones(8, np.float32), np.full(8, 0.5, np.float32)
    >>> segments = [Segment(0, 3, lr=0.05), Segment(5, 7, weight_decay=0.0), Segment(7, 8, frozen=True)]
    >>> opt = FusedAdam(lr=0.1, weight_decay=1.0, decoupled_weight_decay=True, segments=segments)
    >>> opt.step(params, grads)
    >>> params.round(4).tolist() == np.array([0.9] * 3 + [0.8] * 2 + [0.9] * 2 + [1.0], np.float32).tolist()
    True
    """

    start: int
    stop: int
    lr: float | Schedule | None = None
    weight_decay: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    frozen: bool = False

    if TYPE_CHECKING:  # numbers of NumPy too, which become plain ones

        def __init__(
            self,
            start: SupportsIndex,
            stop: SupportsIndex,
            lr: Number | Schedule | None = None,
            weight_decay: Number | None = None,
            betas: tuple[Number, Number] | list[float] | None = None,
            eps: Number | None = None,
            frozen: bool = False,
        ) -> None: ...

    def __post_init__(self) -> None:
        start, stop = count("start", self.start, least=0), count("stop", self.stop)
        if start >= stop:
            raise ValueError(f"stop must be greater than start ({start}); got {stop}.")
        values = {name: getattr(self, name) for name in _OWN}
        checked = {name: CHECKS[name](name, value) for name, value in values.items() if value is not None}
        frozen = require_flag("frozen", self.frozen)
        for name, value in {"start": start, "stop": stop, **checked, "frozen": frozen}.items():
            object.__setattr__(self, name, value)


class Segments:
    """All segments of an optimizer, in the order in which they were given.

    Parameters
    ----------
    segments : iterable of Segment

    Attributes
    ----------
    given : tuple of Segment
    fields : ndarray of float64, shape (n, 5)
        What each segment sets: lr, weight_decay, betas[0], betas[1], eps; NaN for what it does not, for a
        callable, and in frozen segments.
    schedules : list of (Schedule, list of int)
        The callables, each once, and the segments of each.

    Raises
    ------
    TypeError
        If it is no iterable of segments.
    ValueError
        If two segments overlap.
    """

    def __init__(self, segments: Iterable[Segment]) -> None:
        self.given = _require_segments(segments)
        table = self.to_array(step=None)
        bounds = table[:, :2].astype(np.int64)
        self._thawed = table[:, -1] == 0
        self._order = np.argsort(bounds[:, 0], kind="stable")
        self._bounds = bounds[self._order]
        self._require_disjoint()
        self.fields = np.where(self._thawed[:, None], table[:, _FIELDS], np.nan)
        schedules: dict[int, tuple[Schedule, list[int]]] = {}
        for k, segment in enumerate(self.given):
            if callable(segment.lr) and not segment.frozen:
                schedules.setdefault(id(segment.lr), (segment.lr, []))[1].append(k)
        self.schedules = list(schedules.values())
        self._units = -1, Units(np.empty((0, 3), np.int64))
        self._chunks: tuple[Units, RunChunks] | None = None

    def _require_disjoint(self) -> None:
        overlap = self._bounds[1:, 0] < self._bounds[:-1, 1]
        if overlap.any():
            k = int(np.argmax(overlap))
            i, j = sorted(self._order[k : k + 2].tolist())
            one, other = self.given[i], self.given[j]
            raise ValueError(
                f"segments[{j}] must not overlap segments[{i}]; got elements {other.start} to {other.stop}"
                f" and {one.start} to {one.stop}."
            )

    def units(self, size: int) -> Units:
        """Return what is stepped of a buffer: row 0 where no segment is, row ``k + 1`` for segment ``k``.

        Raises
        ------
        ValueError
            If a segment ends behind the buffer.
        """
        formed = self._units
        if size != formed[0]:
            starts, stops = self._bounds.T
            if stops.size and stops[-1] > size:
                raise ValueError(
                    f"segments[{self._order[-1]}].stop must be at most the size of flat_params ({size});"
                    f" got {stops[-1]}."
                )
            gaps = np.stack([np.append(0, stops), np.append(starts, size), np.zeros(len(starts) + 1, int)], 1)
            gaps = gaps[gaps[:, 0] < gaps[:, 1]]
            segments = np.column_stack([self._bounds, self._order + 1])[self._thawed[self._order]]
            units = np.concatenate([gaps, segments])
            # One object: a copy of the optimizer in another thread may form another one meanwhile.
            formed = self._units = size, Units(units[np.argsort(units[:, 0])])
        return formed[1]

    def chunks(self, units: Units) -> RunChunks:
        """Return the chunks of units that :meth:`units` has returned."""
        formed = self._chunks
        if formed is None or formed[0] is not units:
            formed = self._chunks = units, RunChunks(units)
        return formed[1]

    def to_array(self, step: int | None) -> Numbers:
        """Return what a state dict holds, shape (n, 8), with callables at ``step``; see ``COLUMNS``."""
        rows = [
            (s.start, s.stop, _at(s.lr, step), s.weight_decay, *(s.betas or (None, None)), s.eps, s.frozen)
            for s in self.given
        ]
        return np.array(rows, np.float64).reshape(-1, len(COLUMNS))  # None is NaN

    @classmethod
    def from_array(cls, array: object, current: tuple[Segment, ...]) -> Segments:
        """Undo :meth:`to_array`: a callable stays where ``current`` has one for the same elements.

        Raises
        ------
        TypeError, ValueError
            If it is not such an array.
        """
        rows = _require_table("state_dict['segments']", array)
        schedules = {(s.start, s.stop): s.lr for s in current if callable(s.lr)}
        segments = []
        for start, stop, *fields, frozen in rows.tolist():
            lr, weight_decay, beta1, beta2, eps = (None if value != value else value for value in fields)
            betas: Any = None if beta1 is None and beta2 is None else (beta1, beta2)
            rate = None if lr is None else schedules.get((start, stop), lr)
            segments.append(Segment(int(start), int(stop), rate, weight_decay, betas, eps, bool(frozen)))
        return cls(segments)

    def __reduce__(self) -> tuple[Any, ...]:
        return Segments, (self.given,)


def _at(lr: float | Schedule | None, step: int | None) -> float | None:
    if not callable(lr):
        return lr
    return None if step is None else float(lr(step))


def _require_segments(segments: object) -> tuple[Segment, ...]:
    if not isinstance(segments, Iterable) or isinstance(segments, str):
        raise TypeError(f"segments must be a sequence of Segment; got {type(segments).__name__}.")
    given = tuple(segments)
    for k, segment in enumerate(given):
        if not isinstance(segment, Segment):
            raise TypeError(f"segments[{k}] must be a Segment; got {type(segment).__name__}.")
    return given


def _require_table(name: str, array: object) -> Numbers:
    """Return what :meth:`Segments.to_array` may have given."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float64:
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"{name} must be a float64 array; got {kind}.")
    if array.ndim != 2 or array.shape[1] != len(COLUMNS):
        raise ValueError(f"{name} must have shape (n, {len(COLUMNS)}); got {array.shape}.")
    for k, bound, kind in ((0, 2.0**53, "integers"), (1, 2.0**53, "integers"), (7, 2.0, "0 or 1")):
        column = array[:, k]
        wrong = ~((column >= 0) & (column < bound) & (column == np.floor(column)))
        if wrong.any():
            raise ValueError(f"{name}[:, {k}] must be {kind}; got {column[wrong][0]}.")
    return array
