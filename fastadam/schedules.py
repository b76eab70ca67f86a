"""Learning rates as functions of the step: what ``lr`` of an optimizer may be instead of a number.

``lr(step)`` is the learning rate of step number ``step``, counted from 1, as a float. A schedule is pure: it
remembers nothing, so a resumed run needs no more than its step counter. It is frozen, is equal to one made by
the same call, can be pickled, and its repr is that call.

A decay over ``steps`` steps begins undecayed: step 1 is taken with ``lr``, step ``steps + 1`` and all later
ones with ``final_lr``. So do PyTorch's schedulers when they step after the optimizer, and so do Optax's and
Keras's, which count from 0. A warm-up over ``steps`` steps has its full height at step ``steps``.

Everything is float64, and the same bits on every machine, except where :func:`cosine` and :func:`exponential`
say otherwise. Any other ``lr(step) -> float`` serves as well, alone and in :func:`linear_warmup` and
:func:`chain`.

All functions raise TypeError if an argument is not of its type, and ValueError if a number is not finite or
out of its range, or a sequence has the wrong length or order.

Examples
--------
>>> from fastadam import schedules
>>> lr = schedules.linear_warmup(schedules.cosine(1e-3, steps=900), steps=100)
>>> lr(1), lr(100), lr(101), lr(1001)
(1e-05, 0.001, 0.001, 0.0)
>>> lr
linear_warmup(lr=cosine(lr=0.001, steps=900, final_lr=0.0), steps=100)
"""

from __future__ import annotations

from fastadam.compositions import chain, linear_warmup, piecewise
from fastadam.decays import constant, cosine, exponential, inverse_sqrt, inverse_time, linear
from fastadam.schedule import Schedule

__all__ = [
    "Schedule",
    "chain",
    "constant",
    "cosine",
    "exponential",
    "inverse_sqrt",
    "inverse_time",
    "linear",
    "linear_warmup",
    "piecewise",
]
