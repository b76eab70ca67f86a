"""Schedules made of others: a warm-up before one, one after the other, constants in turn."""

from __future__ import annotations

import numbers
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

from fastadam.checks import at_least_zero, count
from fastadam.decays import constant
from fastadam.schedule import Rate, Schedule, schedule


def linear_warmup(lr: float | Rate, steps: int) -> Schedule:
    r"""Return a rise in equal parts, followed by any schedule.

    .. math:: \text{lr}(t) = \begin{cases}
        \text{then}(1) \cdot t / \text{steps} & t \le \text{steps} \\
        \text{then}(t - \text{steps}) & \text{afterwards}
        \end{cases}

    Parameters
    ----------
    lr : float or callable
        What follows, :math:`\text{then}`: a schedule, which counts its own steps from 1, or a constant, at
        least 0.
    steps : int
        Steps of the rise.

    Notes
    -----
    The first step already has one part: a first step with 0 would be wasted. Step ``steps`` has all of it.
    In PyTorch, ``LinearLR(start_factor=1 / steps, total_iters=steps - 1)``, and from milestone ``steps`` on
    what follows.

    References
    ----------
    Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017, section 2.2.

    Examples
    --------
    >>> lr = linear_warmup(1.0, steps=4)
    >>> [lr(step) for step in (1, 2, 3, 4, 5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    then, steps = _rate("lr", lr), count("steps", steps)

    def formula(step: int) -> float:
        return then(1) * (step / steps) if step <= steps else then(step - steps)

    return schedule(linear_warmup, formula, lr=then, steps=steps)


def piecewise(values: Sequence[float], boundaries: Sequence[int]) -> Schedule:
    r"""Return constants, each up to its boundary.

    .. math:: \text{lr}(t) = \text{values}_k \quad \text{with the first } k
        \text{ for which } t \le \text{boundaries}_k

    Parameters
    ----------
    values : sequence of float
        Learning rates, each at least 0.
    boundaries : sequence of int
        The last step of each value but the last value, ascending.

    Notes
    -----
    ``boundaries`` are the milestones of PyTorch's ``MultiStepLR`` and the boundaries of Optax's
    ``piecewise_constant_schedule``. ``PiecewiseConstantDecay`` of Keras keeps each value a step longer.

    Examples
    --------
    >>> lr = piecewise([1.0, 0.5, 0.1], boundaries=[2, 3])
    >>> [lr(step) for step in (1, 2, 3, 4, 5)]
    [1.0, 1.0, 0.5, 0.1, 0.1]
    """
    rates = tuple(
        at_least_zero(f"values[{k}]", value)
        for k, value in enumerate(_items("values", values, "real numbers"))
    )
    ends = _boundaries(boundaries, "values", len(rates))
    return schedule(piecewise, lambda step: rates[bisect_left(ends, step)], values=rates, boundaries=ends)


def chain(schedules: Sequence[float | Rate], boundaries: Sequence[int]) -> Schedule:
    r"""Return one schedule after the other, each counting its own steps from 1.

    .. math:: \text{lr}(t) = \text{schedules}_k(t - \text{boundaries}_{k - 1}) \quad \text{with the first } k
        \text{ for which } t \le \text{boundaries}_k

    Parameters
    ----------
    schedules : sequence of float or callable
        The schedules; a number, at least 0, is a constant.
    boundaries : sequence of int
        The last step of each schedule but the last schedule, ascending, counted from the start of the chain.

    Notes
    -----
    PyTorch's ``SequentialLR`` with ``milestones=boundaries``, Optax's ``join_schedules``.

    Examples
    --------
    >>> from fastadam.schedules import linear
    >>> lr = chain([1.0, linear(1.0, steps=4)], boundaries=[2])
    >>> [lr(step) for step in (1, 2, 3, 4, 5, 6, 7)]
    [1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    rates = tuple(
        _rate(f"schedules[{k}]", rate) for k, rate in enumerate(_items("schedules", schedules, "schedules"))
    )
    ends = _boundaries(boundaries, "schedules", len(rates))
    starts = (0, *ends)

    def formula(step: int) -> float:
        k = bisect_left(ends, step)
        return rates[k](step - starts[k])

    return schedule(chain, formula, schedules=rates, boundaries=ends)


def _rate(name: str, value: object) -> Rate:
    if callable(value):
        return value
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return constant(at_least_zero(name, value))
    raise TypeError(f"{name} must be a schedule or a real number; got {type(value).__name__}.")


def _items(name: str, values: object, of: str) -> Sequence[object]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name} must be a list or tuple of {of}; got {type(values).__name__}.")
    return values


def _boundaries(boundaries: object, of: str, pieces: int) -> tuple[int, ...]:
    if pieces == 0:
        raise ValueError(f"{of} must have at least one entry; got none.")
    items = _items("boundaries", boundaries, "integers")
    ends = tuple(count(f"boundaries[{k}]", end) for k, end in enumerate(items))
    if len(ends) != pieces - 1:
        raise ValueError(f"boundaries must have one entry fewer than {of} ({pieces}); got {len(ends)}.")
    for k, (end, following) in enumerate(pairwise(ends), start=1):
        if following <= end:
            raise ValueError(
                f"boundaries[{k}] must be greater than boundaries[{k - 1}] ({end}); got {following}."
            )
    return ends
