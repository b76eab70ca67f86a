"""Dynamic loss scaling: what keeps the gradients of half-precision models within their range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastadam import checks
from fastadam.arrays import Flag
from fastadam.state import plain, require_keys

_SMALLEST = float(np.finfo(np.float32).smallest_normal)
_LARGEST = float(np.finfo(np.float32).max)

_SETTINGS = ("growth_factor", "backoff_factor", "growth_interval", "hysteresis", "min_scale", "max_scale")
_TRACKERS = ("growth_tracker", "hysteresis_tracker")


class DynamicLossScale:
    r"""The factor of the loss, as large as the gradients allow: it grows, and backs off when they overflow.

    .. math:: s \leftarrow \begin{cases}
        \max(s \cdot \text{backoff\_factor}, \text{min\_scale})
            & \text{inf or NaN, the hysteresis used up} \\
        \min(s \cdot \text{growth\_factor}, \text{max\_scale})
            & \text{the last growth\_interval steps all finite} \\
        s & \text{otherwise}
        \end{cases}

    Multiply the loss by :attr:`scale`, divide the gradients by it, and tell :meth:`update` after every step
    whether they had an inf or NaN.

    Parameters
    ----------
    init_scale : float, default 2**16
        The first scale, in [min_scale, max_scale].
    growth_factor : float, default 2.0
        Greater than 1.
    backoff_factor : float, default 0.5
        In (0, 1).
    growth_interval : int, default 2000
        Consecutive finite steps from one growth, or the last inf or NaN, to the next growth.
    hysteresis : int, default 1
        The scale backs off from the ``hysteresis``-th non-finite step on, counted since the beginning or the
        last growth, whether or not finite steps lie between. Each restarts ``growth_interval`` all the same.
    min_scale, max_scale : float, optional
        Bounds of the scale; by default the smallest normal and the largest number of float32.

    Raises
    ------
    TypeError
        If a number is not a real number, or a count not an integer.
    ValueError
        If a number is not finite or out of its range.

    Notes
    -----
    With ``hysteresis=1`` and the default bounds the scales are those of ``torch.amp.GradScaler``, bit for
    bit: float32, rounded after each multiplication, and kept where the next would overflow. That one may
    become 0, this one stays at ``min_scale``. Hysteresis is that of Megatron-LM, and of DeepSpeed without
    ``consecutive_hysteresis``.

    References
    ----------
    Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2.

    Examples
    --------
    >>> from fastadam import DynamicLossScale
    >>> scaler = DynamicLossScale(init_scale=1024.0, growth_interval=2)
    >>> scales = []
    >>> for found_inf in (False, True, False, False):
    ...     scaler.update(found_inf)
    ...     scales.append(scaler.scale)
    >>> scales
    [1024.0, 512.0, 512.0, 1024.0]
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        hysteresis: int = 1,
        min_scale: float = _SMALLEST,
        max_scale: float = _LARGEST,
    ) -> None:
        growth_factor = checks.real("growth_factor", growth_factor)
        if not growth_factor > 1:
            raise ValueError(f"growth_factor must be greater than 1; got {growth_factor}.")
        backoff_factor = checks.real("backoff_factor", backoff_factor)
        if not 0 < backoff_factor < 1:
            raise ValueError(f"backoff_factor must be in (0, 1); got {backoff_factor}.")
        growth_interval = checks.count("growth_interval", growth_interval)
        hysteresis = checks.count("hysteresis", hysteresis)
        min_scale = _scale("min_scale", min_scale, _SMALLEST, _LARGEST)
        max_scale = _scale("max_scale", max_scale, min_scale, _LARGEST)

        self._scale = _scale("init_scale", init_scale, min_scale, max_scale)
        self._growth_factor, self._backoff_factor = growth_factor, backoff_factor
        self._growth_interval, self._hysteresis = growth_interval, hysteresis
        self._min_scale, self._max_scale = min_scale, max_scale
        self._growth_tracker = 0  # finite steps in a row
        self._hysteresis_tracker = hysteresis  # the scale backs off at 1

    @property
    def scale(self) -> float:
        """The factor of the next loss, a float32 number: a float32 loss is multiplied by exactly this."""
        return self._scale

    def update(self, found_inf: Flag) -> None:
        """Count a step, and adapt the scale for the next.

        Parameters
        ----------
        found_inf : bool
            Whether a gradient of this step had an inf or NaN.

        Raises
        ------
        TypeError
            If ``found_inf`` is not a bool.
        """
        if checks.require_flag("found_inf", found_inf):
            self._growth_tracker = 0
            if self._hysteresis_tracker > 1:
                self._hysteresis_tracker -= 1
            else:
                self._scale = max(_rounded(self._scale * self._backoff_factor), self._min_scale)
            return
        self._growth_tracker += 1
        if self._growth_tracker == self._growth_interval:
            self._growth_tracker = 0
            self._hysteresis_tracker = self._hysteresis
            grown = _rounded(self._scale * self._growth_factor)
            if grown <= _LARGEST:
                self._scale = min(grown, self._max_scale)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resume needs, as plain numbers.

        Returns
        -------
        dict
            ``"scale"``, the settings by their names, ``"growth_tracker"`` (finite steps in a row) and
            ``"hysteresis_tracker"`` (non-finite steps up to the next back-off).
            ``numpy.savez(file, **scaler.state_dict())`` stores it.
        """
        return {name: getattr(self, f"_{name}") for name in ("scale", *_SETTINGS, *_TRACKERS)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the scale, the settings and the trackers; a call that raises has changed nothing.

        Parameters
        ----------
        state_dict : mapping
            What :meth:`state_dict` returned, or ``numpy.load`` of a file made of it.

        Raises
        ------
        TypeError
            If it is not a mapping, or a value is not of its type.
        ValueError
            If a key is missing or unknown, or a value out of its range.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping; got {type(state_dict).__name__}.")
        entries = {key: plain(value) for key, value in state_dict.items()}
        require_keys(entries, ("scale", *_SETTINGS, *_TRACKERS))
        unknown = [key for key in entries if key not in {"scale", *_SETTINGS, *_TRACKERS}]
        if unknown:
            raise ValueError(f"state_dict must have no key {unknown[0]!r}.")
        scale = entries.pop("scale")
        trackers = {name: entries.pop(name) for name in _TRACKERS}
        loaded = DynamicLossScale(entries["max_scale"], **entries)  # any scale that the bounds allow, for now
        loaded._scale = _scale("state_dict['scale']", scale, loaded._min_scale, loaded._max_scale)
        ranges = {
            "growth_tracker": range(loaded._growth_interval),
            "hysteresis_tracker": range(1, loaded._hysteresis + 1),
        }
        for name, allowed in ranges.items():
            label = f"state_dict['{name}']"
            tracker = checks.count(label, trackers[name], least=allowed.start)
            if tracker not in allowed:
                raise ValueError(f"{label} must be in [{allowed.start}, {allowed.stop - 1}]; got {tracker}.")
            setattr(loaded, f"_{name}", tracker)
        self.__dict__.update(loaded.__dict__)

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self.state_dict().items())
        return f"{type(self).__name__}({values})"


def _rounded(number: float) -> float:
    """Round to float32; beyond its range to inf."""
    with np.errstate(over="ignore"):
        return float(np.float32(number))


def _scale(name: str, value: object, low: float, high: float) -> float:
    """Return a scale, rounded to float32."""
    number = checks.real(name, value)
    scale = _rounded(number)
    if not low <= scale <= high:
        raise ValueError(f"{name} must be in [{low:.7g}, {high:.7g}]; got {number:.7g}.")
    return scale
