"""What every contender must compute before it may be timed: Algorithm 1 of Kingma & Ba, in float64.

Shares no code with fastadam. Compared is the update, ``params_after - params_before``: beside the parameter
itself, an update that is wrong by 10 % is lost in a tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

LR = 1e-3
BETAS = (0.9, 0.999)
EPS = 1e-8
"""The hyperparameters of all contenders: everyone's defaults."""

GRAD_FACTORS = (1.0, -0.5, 2.0)
"""What the gradients are multiplied with in the steps of the check, exactly.

With one gradient in all steps every update would be ``lr * sign(grad)``, whatever the betas.
"""

_SAMPLE = 2**16


class WrongUpdateError(AssertionError):
    """A contender does not compute Adam: its time would mean nothing."""


class Contender(NamedTuple):
    """One optimizer on its own buffers."""

    step: Callable[[], object]
    read_params: Callable[[], Array]
    write_grads: Callable[[Array], object]
    before: Callable[[], object] | None = None
    """What a step needs and does not count to its time."""
    read_average: Callable[[], Array] | None = None
    """Of the parameters, where it keeps one."""
    read_grads: Callable[[], Array] | None = None
    """Where it clears them."""
    read_copy: Callable[[], Array] | None = None
    """Of the parameters, in bfloat16 as codes, where it writes one."""


def inputs(size: int, dtype: Any, seed: int = 0) -> tuple[Array, Array]:
    """Return random ``(params, grads)`` that are never zero and stay normal over any number of steps.

    Gradients are of magnitude 1e-6 to 2e-6: small enough that ``eps`` is up to 1 % of the root of the second
    moment, so that a contender with ``eps`` in another place (30 times as much in the first step) is found
    out, and their squares, from 1e-12, are far above the smallest normal float32, 1.2e-38. Parameters are
    below 2**-4, so that their rounding does not hide the update.
    """
    random = np.random.default_rng(seed)
    params = random.random(size, dtype)
    params -= 0.5
    params *= 2**-3
    grads = random.random(size, dtype)
    grads += 1
    grads *= 1e-6
    grads[1::2] *= -1
    return params, grads


def iterates(params: Array, grads: Sequence[Array], weight_decay: float = 0.0) -> Iterator[Array]:
    """Yield the parameters after each step, in float64: Algorithm 1 as the paper writes it.

    Weight decay is decoupled: Algorithm 2 of Loshchilov & Hutter, its schedule the learning rate.
    """
    beta_1, beta_2 = BETAS
    theta = params.astype(np.float64)
    m = np.zeros_like(theta)
    v = np.zeros_like(theta)
    for t, g in enumerate((grad.astype(np.float64) for grad in grads), start=1):
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * g**2
        m_hat = m / (1 - beta_1**t)
        v_hat = v / (1 - beta_2**t)
        theta = theta - LR * (m_hat / (np.sqrt(v_hat) + EPS) + weight_decay * theta)
        yield theta


def algorithm_1(params: Array, grads: Sequence[Array]) -> Array:
    """Return the parameters after one step for each gradient, in float64."""
    return list(iterates(params, grads))[-1]


def tolerance(dtype: Any) -> float:
    """Return how far an element may end from :func:`algorithm_1`.

    Let ``u`` be half the distance from 1 to the next float. What an honest implementation may round:

    - ``1 - beta2`` from a ``beta2`` that was rounded first: ``u / 2`` of 1e-3 (rounding errs by at most
      ``u / 2`` in [0.5, 1)), 500 u in the second moment;
    - ``1 - beta2**t`` from a rounded ``beta2``, by a power that errs by two roundings: ``(t / 2 + 2) u`` of
      ``1e-3 t``, at most 2500 u in the debiased second moment (t = 1);
    - so 3000 u in it, 1500 u in its root and in the step; the same terms for ``beta1`` are 100 times smaller;
    - some 20 more roundings: together below 1600 u, relative.

    Errors of the first moment are relative to the sum of ``|terms|``, which the root of the debiased second
    moment bounds for these gradients, so all are relative to ``lr``. Each step also rounds the parameter,
    below 2**-4, by at most ``2**-4 u``. Three steps make 3e-4 ``lr`` in float32. The nearest mistakes are a
    ``beta2`` of 0.99 (2e-3 ``lr``) and no ``eps`` (1e-2 ``lr``).
    """
    u = float(np.finfo(dtype).eps) / 2
    return len(GRAD_FACTORS) * (1600 * u * LR + 2**-4 * u)


def check_update(name: str, contender: Contender, params: Array, grads: Array) -> None:
    """Take three steps and compare them with Algorithm 1, at up to 64 Ki elements from end to end.

    The contender must be new, on copies of ``params`` and ``grads``. Its next steps run on ``grads`` again.

    Raises
    ------
    WrongUpdateError
        If an element is off by more than :func:`tolerance`, or is not finite.
    """
    take_steps(contender, grads)
    where = sample(params.size)
    before = params[where]
    update = contender.read_params()[where].astype(np.float64) - before
    expected = algorithm_1(before, [grads[where] * factor for factor in GRAD_FACTORS]) - before
    wrong = worst_wrong(update, expected, tolerance(params.dtype))
    if wrong is not None:
        raise WrongUpdateError(
            f"{name} must take the steps of Adam; got an update of {wrong.got:.9g} for"
            f" {wrong.expected:.9g} at {where[wrong.place]} of {params.size} {params.dtype} elements"
            f" (allowed error {tolerance(params.dtype):.3g})."
        )


def take_steps(contender: Contender, grads: Array) -> list[Any]:
    """Take a step with each multiple of the gradients, restore them; return what the steps returned."""
    returned = []
    for factor in GRAD_FACTORS:
        contender.write_grads(grads * grads.dtype.type(factor))
        if contender.before is not None:
            contender.before()
        returned.append(contender.step())
    contender.write_grads(grads)
    return returned


def sample(size: int) -> Array:
    """Return the places that are looked at: up to 64 Ki, from end to end."""
    return np.unique(np.linspace(0, size - 1, min(size, _SAMPLE)).astype(np.int64))


class Wrong(NamedTuple):
    """The worst of the wrong elements."""

    place: int
    got: float
    expected: float


def worst_wrong(got: Array, expected: Array, allowed: float) -> Wrong | None:
    """Return the element that errs most, if it errs by more than is allowed or is NaN."""
    error = np.abs(got - expected)
    if np.all(error <= allowed):  # not where the error is NaN
        return None
    worst = int(np.argmax(np.where(np.isnan(error), np.inf, error)))
    return Wrong(worst, float(got[worst]), float(expected[worst]))
