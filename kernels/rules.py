"""The equations of fastadam, once: scalar Python that every backend compiles.

This is the page to read. One call of :func:`update` computes the new value of *one* element, in this order:

1. conditioning: unscale and clip the gradient, or leave it;
2. direction: turn the gradient around (``maximize``) or leave it;
3. decay: L2 or decoupled weight decay, or none;
4. rule: the moments and the parameter (:func:`adam`, :func:`amsgrad`);
5. average: follow the new parameter with a moving average, or not.

Each part is a function of scalars and of a NamedTuple of coefficients, and the *type* of the coefficients
selects the function: in plain Python by :func:`transform`, :func:`advance` and :func:`track` below, in
compiled code at compile time (:mod:`fastadam.kernels.compiling`). ``None`` in place of a part costs nothing.

What is allowed here: ``+ - * /``, ``sqrt``, comparisons, conditional expressions, calls of functions of this
page. These are correctly rounded on every machine, so every backend computes the same bits, as long as
nobody fuses, reorders or approximates them. All scalars have one dtype, float32 or float64; a float literal
would promote float32 to float64, so there is none. Coefficients are formed in float64 on the host and rounded
once (:mod:`fastadam.hyperparameters`).
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any, NamedTuple, TypeAlias

Scalar: TypeAlias = Any
"""A NumPy or compiled scalar of the math dtype."""

Transformed: TypeAlias = tuple[Scalar, Scalar]
"""``(param, grad)``."""

Advanced: TypeAlias = tuple[Scalar, tuple[Scalar, ...]]
"""``(param, state)``."""

Rule: TypeAlias = Any
"""Coefficients of a rule, a NamedTuple; the first is what an update is a multiple of."""


# --- Coefficients that change from step to step, in float64 -------------------------------------------------


def step_size(lr: Scalar, bias_correction1: Scalar) -> Scalar:
    """Learning rate over the bias correction of the first moment."""
    return lr / bias_correction1


def lr_times_weight_decay(lr: Scalar, weight_decay: Scalar) -> Scalar:
    """How much of a parameter decoupled decay takes away."""
    return lr * weight_decay


# --- Clipping by the norm, in float64 -----------------------------------------------------------------------


def grad_norm(sum_of_squares: Scalar, grad_scale: Scalar) -> Scalar:
    """Return the global norm of the unscaled gradient."""
    return sqrt(sum_of_squares) / grad_scale


def clip_factor(norm: Scalar, max_grad_norm: Scalar, eps: Scalar, most: Scalar) -> Scalar:
    """Return what takes a gradient of a norm to ``max_grad_norm``, at most ``most``; NaN for NaN."""
    factor = max_grad_norm / (norm + eps)
    return most if factor > most else factor


# --- Conditioning, direction and decay: (param, grad, c) -> (param, grad) -----------------------------------


def unchanged(param: Scalar, grad: Scalar, c: None) -> Transformed:
    """No such part: what ``None`` selects."""
    return param, grad


class Clipping(NamedTuple):
    """Limits of the gradient. One that is not asked for changes no bit."""

    clip_factor: Scalar  # from the global norm, at most 1; 1 without
    max_value: Scalar  # inf without


def clip(param: Scalar, grad: Scalar, c: Clipping) -> Transformed:
    """Clip by norm, then by value; a NaN stays one.

    Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks", Algorithm 1.
    """
    return param, clipped(grad, c.clip_factor, c.max_value)


def clipped(grad: Scalar, clip_factor: Scalar, max_value: Scalar) -> Scalar:
    """Multiply with a factor, then limit the magnitude."""
    grad = grad * clip_factor
    grad = max_value if grad > max_value else grad
    return -max_value if grad < -max_value else grad


class Conditioning(NamedTuple):
    """What makes the gradient of a loss from that of a scaled one, and limits it."""

    grad_scale: Scalar
    clip_factor: Scalar
    max_value: Scalar


def condition(param: Scalar, grad: Scalar, c: Conditioning) -> Transformed:
    """Unscale, then :func:`clip`."""
    return param, clipped(grad / c.grad_scale, c.clip_factor, c.max_value)


class Maximize(NamedTuple):
    """Ascend instead of descend."""


def maximize(param: Scalar, grad: Scalar, c: Maximize) -> Transformed:
    """Turn the gradient around: ``grad <- -grad``."""
    return param, -grad


class L2Decay(NamedTuple):
    """Weight decay as the gradient of ``weight_decay / 2 * ||param||^2``."""

    weight_decay: Scalar


def l2_decay(param: Scalar, grad: Scalar, c: L2Decay) -> Transformed:
    """Add the decay to the gradient: ``grad <- grad + weight_decay * param``."""
    return param, grad + c.weight_decay * param


class DecoupledDecay(NamedTuple):
    """Weight decay beside the gradient (AdamW), scaled by the learning rate as in PyTorch."""

    lr_times_weight_decay: Scalar


def decoupled_decay(param: Scalar, grad: Scalar, c: DecoupledDecay) -> Transformed:
    """Shrink the parameter: ``param <- param - lr * weight_decay * param``.

    Loshchilov & Hutter, "Decoupled Weight Decay Regularization", Algorithm 2, line 12. The factor
    ``1 - lr * weight_decay`` is not formed: rounded to float32 it would lose most digits of a small decay.
    """
    return param - c.lr_times_weight_decay * param, grad


# --- Rules: (param, grad, state, c) -> (param, state) -------------------------------------------------------


def moving_average(average: Scalar, value: Scalar, beta: Scalar, one_minus_beta: Scalar) -> Scalar:
    """Exponential moving average: ``beta * average + (1 - beta) * value``.

    Written as the step from the nearer end, so that the weights sum to exactly one whatever rounding did to
    ``beta`` (0.999 and 0.001 rounded to float32 sum to 1 + 1.3e-8, a bias of 1.3e-5 in a second moment), and
    so that ``beta = 0`` returns ``value``. What is chosen, alike for all elements, are numbers, not formulas:
    compilers make a loop for each outcome of one or two such choices, but with the average of the parameters
    for a third they branch in the loop (1.3x slower).
    """
    from_average = one_minus_beta < beta
    near = average if from_average else value
    far = value if from_average else average
    weight = one_minus_beta if from_average else beta
    return near + weight * (far - near)


class Adam(NamedTuple):
    """Coefficients of one step of :func:`adam`."""

    step_size: Scalar  # lr / (1 - beta1 ** step), from the function of that name
    beta1: Scalar
    one_minus_beta1: Scalar
    beta2: Scalar
    one_minus_beta2: Scalar
    inv_bias_correction2: Scalar  # 1 / (1 - beta2 ** step)
    eps: Scalar


def adam(param: Scalar, grad: Scalar, state: tuple[Scalar, ...], c: Adam) -> Advanced:
    """Adam, with ``state = (exp_avg, exp_avg_sq)``.

    Kingma & Ba, "Adam: A Method for Stochastic Optimization", Algorithm 1; the bias correction of the first
    moment is part of ``step_size``.
    """
    exp_avg, exp_avg_sq = state
    exp_avg = moving_average(exp_avg, grad, c.beta1, c.one_minus_beta1)
    exp_avg_sq = moving_average(exp_avg_sq, grad * grad, c.beta2, c.one_minus_beta2)
    denom = sqrt(exp_avg_sq * c.inv_bias_correction2) + c.eps
    return param - c.step_size * (exp_avg / denom), (exp_avg, exp_avg_sq)


class AMSGrad(Adam):
    """Coefficients of one step of :func:`amsgrad`: those of :class:`Adam`."""

    __slots__ = ()


def amsgrad(param: Scalar, grad: Scalar, state: tuple[Scalar, ...], c: AMSGrad) -> Advanced:
    """AMSGrad, with ``state = (exp_avg, exp_avg_sq, max_exp_avg_sq)``.

    Reddi, Kale & Kumar, "On the Convergence of Adam and Beyond", Algorithm 2, with the bias corrections of
    Adam as in PyTorch: the maximum is taken over the undebiased second moments. NaN is kept.
    """
    exp_avg, exp_avg_sq, max_exp_avg_sq = state
    exp_avg = moving_average(exp_avg, grad, c.beta1, c.one_minus_beta1)
    exp_avg_sq = moving_average(exp_avg_sq, grad * grad, c.beta2, c.one_minus_beta2)
    max_exp_avg_sq = max_exp_avg_sq if max_exp_avg_sq > exp_avg_sq else exp_avg_sq
    denom = sqrt(max_exp_avg_sq * c.inv_bias_correction2) + c.eps
    return param - c.step_size * (exp_avg / denom), (exp_avg, exp_avg_sq, max_exp_avg_sq)


# --- Average of the parameter: (param, average, c) -> average -----------------------------------------------


def untracked(param: Scalar, average: None, c: None) -> None:
    """No average: what ``None`` selects."""
    return average


class Average(NamedTuple):
    """An exponential moving average of the parameter."""

    ema_decay: Scalar
    one_minus_ema_decay: Scalar


def exponential_average(param: Scalar, average: Scalar, c: Average) -> Scalar:
    """Follow the parameter: ``ema_decay * average + (1 - ema_decay) * param``.

    Polyak & Juditsky, "Acceleration of stochastic approximation by averaging", with exponential weights.
    """
    return moving_average(average, param, c.ema_decay, c.one_minus_ema_decay)


# --- What became of it --------------------------------------------------------------------------------------


def vanishes(before: Scalar, after: Scalar, moved_by: Scalar, step_size: Scalar) -> bool:
    """Whether there is an update, but so small a one that it rounds to nothing."""
    return after == before if moved_by != 0 and step_size != 0 else False


# --- One element --------------------------------------------------------------------------------------------

TRANSFORMS: dict[type, Callable[..., Transformed]] = {
    type(None): unchanged,
    Clipping: clip,
    Conditioning: condition,
    Maximize: maximize,
    L2Decay: l2_decay,
    DecoupledDecay: decoupled_decay,
}
"""Coefficients type -> conditioning, direction or decay."""

RULES: dict[type, Callable[..., Advanced]] = {Adam: adam, AMSGrad: amsgrad}
"""Coefficients type -> rule. :mod:`fastadam.kernels.relatives` adds its own, and users theirs."""

CALLED: dict[type, tuple[Callable[..., Any], ...]] = {}
"""Coefficients type of a user's rule -> the functions that it calls."""

AVERAGES: dict[type, Callable[..., Scalar]] = {type(None): untracked, Average: exponential_average}
"""Coefficients type -> average."""


class Clear(NamedTuple):
    """Set the gradient to zero when it was used; not part of the equation."""


CLIP_EPS = 1e-6
"""Added to a norm before it divides, as in PyTorch."""


class Update(NamedTuple):
    """The coefficients of all that is done to one element, in the order in which it is done."""

    conditioning: Clipping | Conditioning | None
    direction: Maximize | None
    decay: L2Decay | DecoupledDecay | None
    rule: Rule
    average: Average | None


def transform(
    param: Scalar, grad: Scalar, c: Clipping | Conditioning | Maximize | L2Decay | DecoupledDecay | None
) -> Transformed:
    """Apply the conditioning, direction or decay that the type of ``c`` selects."""
    return TRANSFORMS[type(c)](param, grad, c)


def advance(param: Scalar, grad: Scalar, state: tuple[Scalar, ...], c: Rule) -> Advanced:
    """Apply the rule that the type of ``c`` selects."""
    return RULES[type(c)](param, grad, state, c)


def track(param: Scalar, average: Scalar | None, c: Average | None) -> Scalar | None:
    """Apply the average that the type of ``c`` selects."""
    return AVERAGES[type(c)](param, average, c)


def split(state: tuple[Scalar, ...], c: Average | None) -> tuple[tuple[Scalar, ...], Scalar | None]:
    """Return the moments and the average, which is the last of the state where there is one."""
    return (state, None) if c is None else (state[:-1], state[-1])


def join(moments: tuple[Scalar, ...], average: Scalar | None) -> tuple[Scalar, ...]:
    """Undo :func:`split`."""
    return moments if average is None else (*moments, average)


def prepared(param: Scalar, grad: Scalar, c: Update) -> Transformed:
    """Return the parameter and the gradient as a rule gets them."""
    param, grad = transform(param, grad, c.conditioning)
    param, grad = transform(param, grad, c.direction)
    return transform(param, grad, c.decay)


def update(param: Scalar, grad: Scalar, state: tuple[Scalar, ...], c: Update) -> Advanced:
    """Compute the new parameter and state of one element."""
    moments, average = split(state, c.average)
    param, grad = prepared(param, grad, c)
    param, moments = advance(param, grad, moments, c.rule)
    return param, join(moments, track(param, average, c.average))
