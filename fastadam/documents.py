"""What is kept as text: schedules by the call that made them, and what users add."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fastadam import schedules


def of_schedule(lr: Callable[[int], float]) -> dict[str, Any]:
    """Return what JSON can hold of a callable learning rate: the call that made it, or only what it is.

    A schedule of :mod:`fastadam.schedules` is kept by that call, unless it has a function of the user's
    inside.
    """
    written, foreign = _written(lr), _foreign(lr)
    return written if foreign is None else {"callable": foreign}


def _written(value: Any) -> Any:
    if isinstance(value, schedules.Schedule):
        arguments = {name: _written(argument) for name, argument in value.arguments}
        return {"schedule": value.make.__name__, "arguments": arguments}
    return [_written(item) for item in value] if isinstance(value, tuple) else value


def _foreign(value: Any) -> str | None:
    """Return the name of the first callable that is none of :mod:`fastadam.schedules`."""
    if isinstance(value, schedules.Schedule):
        value = tuple(argument for _, argument in value.arguments)
    if isinstance(value, tuple):
        return next((found for item in value if (found := _foreign(item)) is not None), None)
    if not callable(value):
        return None
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def to_schedule(written: Any) -> Any:
    """Undo :func:`of_schedule`, for one that has no function of the user's inside.

    Raises
    ------
    KeyError, TypeError, ValueError
        If it is nothing that this can have written.
    """
    if isinstance(written, list):
        return tuple(map(to_schedule, written))
    if not isinstance(written, dict):
        return written
    name = written["schedule"]
    if name not in schedules.__all__ or name == "Schedule":
        raise ValueError(f"{name!r} is no schedule")
    arguments = {key: to_schedule(value) for key, value in written["arguments"].items()}
    return getattr(schedules, name)(**arguments)


def of_extra(extra: object) -> str:
    """Return what users add, as JSON, or raise TypeError if JSON has no such thing."""
    _require_plain("extra", extra)
    return json.dumps(extra)


def _require_plain(label: str, value: object) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"{label} must have keys of str; got {key!r}. JSON has no others.")
            _require_plain(f"{label}[{key!r}]", item)
    elif isinstance(value, (list, tuple)):
        for k, item in enumerate(value):
            _require_plain(f"{label}[{k}]", item)
    elif value is not None and type(value) not in {bool, int, float, str}:
        raise TypeError(
            f"{label} must be None, a bool, int, float, str, list or dict; got {type(value).__name__}."
            " Convert it: x.tolist() of an array or a NumPy number."
        )
