"""What the last step did."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple


class Done(NamedTuple):
    """The fields of :class:`LastStep`."""

    step: int
    lr: float
    grad_norm: float | None = None
    clip_factor: float = 1.0
    skipped: bool = False
    nonfinite: int | None = None
    update_norm: float | None = None
    param_norm: float | None = None
    vanished: int | None = None


class LastStep:
    """What the last call of ``step`` did.

    What was decided on a GPU is read when it is asked for, and that waits for the device.

    Parameters
    ----------
    read : callable
        Returns the fields; called at most once.
    """

    def __init__(self, read: Callable[[], Done]) -> None:
        self._read = read

    @cached_property
    def _done(self) -> Done:
        done = self._read()
        del self._read  # and what it reads from
        return done

    @property
    def step(self) -> int:
        """Steps taken until then, with this one if it was taken."""
        return self._done.step

    @property
    def lr(self) -> float:
        """Learning rate."""
        return self._done.lr

    @property
    def grad_norm(self) -> float | None:
        """Global norm of the gradient, unscaled, before clipping; None where nothing asked for it.

        Clipping, ``skip_nonfinite`` and ``telemetry`` do.
        """
        return self._done.grad_norm

    @property
    def clip_factor(self) -> float:
        """What the gradient was multiplied with to clip its norm, at most 1."""
        return self._done.clip_factor

    @property
    def skipped(self) -> bool:
        """Whether no step was taken, for an element of the gradient was inf or NaN."""
        return self._done.skipped

    @property
    def nonfinite(self) -> int | None:
        """Elements of the gradient as given that were inf or NaN; None where nothing asked for it."""
        return self._done.nonfinite

    @property
    def update_norm(self) -> float | None:
        """Norm of the difference that the step made to the parameters; None without telemetry, or skipped.

        Each difference of two stored values is formed, squared and added in float64. Where 16-bit parameters
        have a master, that is what was stored.
        """
        return self._done.update_norm

    @property
    def param_norm(self) -> float | None:
        """Norm of the parameters after the step; None without telemetry, or skipped."""
        return self._done.param_norm

    @property
    def vanished(self) -> int | None:
        """Elements that have a first moment but kept their value: their update rounded to nothing.

        None without telemetry, or skipped. Elements with a learning rate of 0 do not count.
        """
        return self._done.vanished

    def __eq__(self, other: object) -> bool:
        return self._done == other._done if isinstance(other, LastStep) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (self._done,)

    def __repr__(self) -> str:
        return f"LastStep{repr(self._done).removeprefix('Done')}"


def _restore(done: Done) -> LastStep:
    return LastStep(lambda: done)
