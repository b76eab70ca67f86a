"""Schedules given by one formula: constant, and those that fall from the first step on."""

from __future__ import annotations

import math

from fastadam import bias_correction
from fastadam.checks import at_least_zero, count, real, require_flag
from fastadam.schedule import Schedule, schedule


def constant(lr: float) -> Schedule:
    r"""Return the learning rate ``lr`` for every step.

    .. math:: \text{lr}(t) = \text{lr}

    Parameters
    ----------
    lr : float
        Learning rate, at least 0.

    Examples
    --------
    >>> constant(1e-3)(10**6)
    0.001
    """
    lr = at_least_zero("lr", lr)
    return schedule(constant, lambda _: lr, lr=lr)


def linear(lr: float, steps: int, final_lr: float = 0.0) -> Schedule:
    r"""Return a straight line from ``lr`` to ``final_lr``, constant afterwards.

    .. math:: \text{lr}(t) = \text{lr} + (\text{final\_lr} - \text{lr}) \frac{t - 1}{\text{steps}}
        \qquad (t \le \text{steps} + 1)

    Parameters
    ----------
    lr, final_lr : float
        Learning rates of step 1 and of all steps after ``steps``, at least 0.
    steps : int
        Steps on the way.

    Notes
    -----
    PyTorch's ``LinearLR`` and ``PolynomialLR(power=1)``, Optax's ``linear_schedule``.

    Examples
    --------
    >>> lr = linear(1.0, steps=4)
    >>> [lr(step) for step in (1, 2, 3, 4, 5, 6)]
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    lr, steps, final_lr = at_least_zero("lr", lr), count("steps", steps), at_least_zero("final_lr", final_lr)

    def formula(step: int) -> float:
        return _blend(lr, final_lr, _left(step, steps))

    return schedule(linear, formula, lr=lr, steps=steps, final_lr=final_lr)


def cosine(lr: float, steps: int, final_lr: float = 0.0) -> Schedule:
    r"""Return half a period of a cosine from ``lr`` to ``final_lr``, constant afterwards.

    .. math:: \text{lr}(t) = \text{final\_lr} + \frac{\text{lr} - \text{final\_lr}}{2}
        \Big(1 + \cos \frac{\pi (t - 1)}{\text{steps}}\Big) \qquad (t \le \text{steps} + 1)

    Parameters
    ----------
    lr, final_lr : float
        Learning rates of step 1 and of all steps after ``steps``, at least 0.
    steps : int
        Steps on the way.

    Notes
    -----
    PyTorch's ``CosineAnnealingLR(T_max=steps, eta_min=final_lr)`` up to its minimum, from where that one
    rises again; Optax's ``cosine_decay_schedule`` with ``alpha=final_lr / lr``. Formed as the squared sine
    of half the angle that is left, which keeps all digits near the end. The sine is the C library's: its
    last bit differs between machines.

    References
    ----------
    Loshchilov & Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, equation 5.

    Examples
    --------
    >>> lr = cosine(1.0, steps=100, final_lr=0.1)
    >>> lr(1), round(lr(51), 12), lr(101)
    (1.0, 0.55, 0.1)
    """
    lr, steps, final_lr = at_least_zero("lr", lr), count("steps", steps), at_least_zero("final_lr", final_lr)

    def formula(step: int) -> float:
        return _blend(lr, final_lr, math.sin(0.5 * math.pi * _left(step, steps)) ** 2)

    return schedule(cosine, formula, lr=lr, steps=steps, final_lr=final_lr)


def exponential(lr: float, decay_rate: float, steps: int = 1, *, staircase: bool = False) -> Schedule:
    r"""Return a decay by the factor ``decay_rate`` every ``steps`` steps, without end.

    .. math:: \text{lr}(t) = \text{lr} \cdot \text{decay\_rate}^{(t - 1) / \text{steps}}

    Parameters
    ----------
    lr : float
        Learning rate of step 1, at least 0.
    decay_rate : float
        The factor, in (0, 1].
    steps : int, default 1
        Steps in which the decay takes place once.
    staircase : bool, default False
        Decay all at once after every ``steps`` steps: the exponent is rounded down.

    Notes
    -----
    PyTorch's ``ExponentialLR(gamma=decay_rate)``, with ``staircase`` its ``StepLR``; the exponential decays
    of Optax and Keras. Whole powers are products in double-double arithmetic, the same bits on every
    machine. The rest of the exponent, where ``t - 1`` is no multiple of ``steps``, takes the C library's
    ``pow``, whose last bit differs between machines.

    Examples
    --------
    >>> lr = exponential(1.0, 0.25, steps=2)
    >>> [lr(step) for step in (1, 2, 3, 4, 5)]
    [1.0, 0.5, 0.25, 0.125, 0.0625]
    """
    lr, decay_rate, steps = at_least_zero("lr", lr), real("decay_rate", decay_rate), count("steps", steps)
    if not 0 < decay_rate <= 1:
        raise ValueError(f"decay_rate must be in (0, 1]; got {decay_rate}.")
    staircase = require_flag("staircase", staircase)

    def formula(step: int) -> float:
        whole, rest = divmod(step - 1, steps)
        factor = bias_correction.power(decay_rate, whole)
        return lr * (factor if staircase else factor * decay_rate ** (rest / steps))

    return schedule(exponential, formula, lr=lr, decay_rate=decay_rate, steps=steps, staircase=staircase)


def inverse_time(lr: float, decay: float) -> Schedule:
    r"""Return a decay with the inverse of the steps taken, without end.

    .. math:: \text{lr}(t) = \frac{\text{lr}}{1 + \text{decay} \cdot (t - 1)}

    Parameters
    ----------
    lr : float
        Learning rate of step 1, at least 0.
    decay : float
        At least 0; after ``1 / decay`` steps the learning rate is halved.

    Notes
    -----
    The ``decay`` of Keras's legacy optimizers, and its ``InverseTimeDecay`` with
    ``decay = decay_rate / decay_steps``.

    Examples
    --------
    >>> lr = inverse_time(1.0, decay=0.5)
    >>> [lr(step) for step in (1, 3, 7)]
    [1.0, 0.5, 0.25]
    """
    lr, decay = at_least_zero("lr", lr), at_least_zero("decay", decay)
    return schedule(inverse_time, lambda step: lr / (1.0 + decay * (step - 1)), lr=lr, decay=decay)


def inverse_sqrt(lr: float, steps: int, *, warmup: bool = True) -> Schedule:
    r"""Return a decay with the inverse root of the step, after a warm-up of ``steps`` steps; without end.

    .. math:: \text{lr}(t) = \text{lr} \cdot
        \min\Big(\frac{t}{\text{steps}}, \sqrt{\frac{\text{steps}}{t}}\Big)

    Parameters
    ----------
    lr : float
        The largest learning rate, that of step ``steps``; at least 0.
    steps : int
        Steps of the warm-up.
    warmup : bool, default True
        False keeps ``lr`` through these steps, instead of rising linearly.

    Notes
    -----
    The Transformer's schedule with :math:`\text{lr} = (d_\text{model} \cdot \text{steps})^{-1/2}`. T5's is
    ``inverse_sqrt(0.01, 10_000, warmup=False)``.

    References
    ----------
    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, equation 3.
    Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", JMLR
    21 (2020), section 3.1.2.

    Examples
    --------
    >>> lr = inverse_sqrt(1.0, steps=4)
    >>> [lr(step) for step in (1, 2, 4, 16, 64)]
    [0.25, 0.5, 1.0, 0.5, 0.25]
    """
    lr, steps, warmup = at_least_zero("lr", lr), count("steps", steps), require_flag("warmup", warmup)

    def formula(step: int) -> float:
        if step > steps:
            return lr * math.sqrt(steps / step)
        return lr * (step / steps) if warmup else lr

    return schedule(inverse_sqrt, formula, lr=lr, steps=steps, warmup=warmup)


def _left(step: int, steps: int) -> float:
    """Return the share of ``steps`` that is left at the beginning of a step."""
    return max(0, steps - step + 1) / steps


def _blend(lr: float, final_lr: float, share: float) -> float:
    """Return the mean of two learning rates, exact at both ends, monotonic and never outside.

    ``share``, in [0, 1], is the first one's.
    """
    # Below 1 a share takes off at least the half ulp that rounding may have added to the difference.
    return lr if share == 1 else final_lr + (lr - final_lr) * share
