"""The relatives of Adam, once each: scalar Python that every backend compiles.

A rule takes the place of :func:`fastadam.kernels.rules.adam` in an update, so it has weight decay, clipping,
averages, storage and all else from there. What is allowed stands there, too. Coefficients that a rule shares
with Adam have Adam's names; ``step_size`` is always the first.
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

from .rules import RULES, Adam, Advanced, AMSGrad, Scalar, moving_average

States = tuple[Scalar, ...]


def magnitude(number: Scalar) -> Scalar:
    """Return ``|number|``; NaN stays one."""
    return -number if number < 0 else number


# --- Adam's nearest -----------------------------------------------------------------------------------------


class NAdam(NamedTuple):
    """Coefficients of one step of :func:`nadam`."""

    step_size: Scalar  # of the gradient: lr (1 - mu_t) / (1 - mu_1 ... mu_t)
    step_size_of_average: Scalar  # lr mu_(t+1) / (1 - mu_1 ... mu_(t+1))
    beta1: Scalar
    one_minus_beta1: Scalar
    beta2: Scalar
    one_minus_beta2: Scalar
    inv_bias_correction2: Scalar
    eps: Scalar


def nadam(param: Scalar, grad: Scalar, state: States, c: NAdam) -> Advanced:
    """Adam with Nesterov's momentum, with ``state = (exp_avg, exp_avg_sq)``.

    Dozat, "Incorporating Nesterov Momentum into Adam", Algorithm 2, with PyTorch's schedule of the momentum,
    ``mu_t = beta1 (1 - 0.96 ** (t momentum_decay) / 2)``, which is in the two step sizes.
    """
    exp_avg, exp_avg_sq = state
    exp_avg = moving_average(exp_avg, grad, c.beta1, c.one_minus_beta1)
    exp_avg_sq = moving_average(exp_avg_sq, grad * grad, c.beta2, c.one_minus_beta2)
    denom = sqrt(exp_avg_sq * c.inv_bias_correction2) + c.eps
    param = param - c.step_size * (grad / denom)
    return param - c.step_size_of_average * (exp_avg / denom), (exp_avg, exp_avg_sq)


class RAdam(NamedTuple):
    """Coefficients of one step of :func:`radam`."""

    step_size: Scalar  # lr / (1 - beta1 ** step)
    beta1: Scalar
    one_minus_beta1: Scalar
    beta2: Scalar
    one_minus_beta2: Scalar
    rectification: Scalar  # r_t sqrt(1 - beta2 ** step), 0 while the variance is intractable
    eps: Scalar


def radam(param: Scalar, grad: Scalar, state: States, c: RAdam) -> Advanced:
    """Rectified Adam, with ``state = (exp_avg, exp_avg_sq)``.

    Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", Algorithm 2. In the first steps,
    as long as the second moment says too little, an update is the debiased first moment.
    """
    exp_avg, exp_avg_sq = state
    exp_avg = moving_average(exp_avg, grad, c.beta1, c.one_minus_beta1)
    exp_avg_sq = moving_average(exp_avg_sq, grad * grad, c.beta2, c.one_minus_beta2)
    rectified = exp_avg * (c.rectification / (sqrt(exp_avg_sq) + c.eps))
    update = rectified if c.rectification > 0 else exp_avg
    return param - c.step_size * update, (exp_avg, exp_avg_sq)


class Adamax(NamedTuple):
    """Coefficients of one step of :func:`adamax`."""

    step_size: Scalar  # lr / (1 - beta1 ** step)
    beta1: Scalar
    one_minus_beta1: Scalar
    beta2: Scalar
    eps: Scalar


def adamax(param: Scalar, grad: Scalar, state: States, c: Adamax) -> Advanced:
    """Adam with the infinity norm, with ``state = (exp_avg, exp_inf)``.

    Kingma & Ba, "Adam: A Method for Stochastic Optimization", Algorithm 2; eps is added to the magnitude of
    the gradient, as in PyTorch, so that nothing is divided by 0.
    """
    exp_avg, exp_inf = state
    exp_avg = moving_average(exp_avg, grad, c.beta1, c.one_minus_beta1)
    faded = c.beta2 * exp_inf
    present = magnitude(grad) + c.eps
    exp_inf = faded if faded > present else present
    return param - c.step_size * (exp_avg / exp_inf), (exp_avg, exp_inf)


class Lion(NamedTuple):
    """Coefficients of one step of :func:`lion`."""

    step_size: Scalar  # lr
    beta1: Scalar
    one_minus_beta1: Scalar
    beta2: Scalar
    one_minus_beta2: Scalar


def lion(param: Scalar, grad: Scalar, state: States, c: Lion) -> Advanced:
    """Evolved sign momentum, with ``state = (exp_avg,)``.

    Chen et al., "Symbolic Discovery of Optimization Algorithms", Program 1 (Algorithm 2). The sign of 0 is 0,
    that of NaN is NaN.
    """
    (exp_avg,) = state
    mixed = moving_average(exp_avg, grad, c.beta1, c.one_minus_beta1)
    falling = -c.step_size if mixed < 0 else mixed
    update = c.step_size if mixed > 0 else falling
    return param - update, (moving_average(exp_avg, grad, c.beta2, c.one_minus_beta2),)


# --- Descent with one learning rate -------------------------------------------------------------------------


class SGD(NamedTuple):
    """Coefficients of one step of :func:`sgd`."""

    step_size: Scalar  # lr


def sgd(param: Scalar, grad: Scalar, state: States, c: SGD) -> Advanced:
    """Stochastic gradient descent, with no state.

    Robbins & Monro, "A Stochastic Approximation Method".
    """
    return param - c.step_size * grad, state


class Momentum(NamedTuple):
    """Coefficients of one step of :func:`momentum`."""

    step_size: Scalar  # lr
    momentum: Scalar
    one_minus_dampening: Scalar  # 1 in the first step


def momentum(param: Scalar, grad: Scalar, state: States, c: Momentum) -> Advanced:
    """Gradient descent with momentum, with ``state = (momentum_buffer,)``.

    Polyak, "Some methods of speeding up the convergence of iteration methods", as PyTorch writes it: the
    learning rate is not in the buffer, and the first gradient is not dampened.
    """
    (buffer,) = state
    buffer = c.momentum * buffer + c.one_minus_dampening * grad
    return param - c.step_size * buffer, (buffer,)


class Nesterov(Momentum):
    """Coefficients of one step of :func:`nesterov`: those of :class:`Momentum`."""

    __slots__ = ()


def nesterov(param: Scalar, grad: Scalar, state: States, c: Nesterov) -> Advanced:
    """Gradient descent with Nesterov's momentum, with ``state = (momentum_buffer,)``.

    Sutskever et al., "On the importance of initialization and momentum in deep learning", equations 3 and 4,
    as PyTorch writes them.
    """
    (buffer,) = state
    buffer = c.momentum * buffer + c.one_minus_dampening * grad
    return param - c.step_size * (grad + c.momentum * buffer), (buffer,)


# --- Descent with a learning rate for each element ----------------------------------------------------------


class Adagrad(NamedTuple):
    """Coefficients of one step of :func:`adagrad`."""

    step_size: Scalar  # lr / (1 + (step - 1) lr_decay)
    eps: Scalar


def adagrad(param: Scalar, grad: Scalar, state: States, c: Adagrad) -> Advanced:
    """AdaGrad, with ``state = (sum,)``, the sum of squares.

    Duchi, Hazan & Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization",
    Figure 1, with diagonal matrices.
    """
    (total,) = state
    total = total + grad * grad
    return param - c.step_size * (grad / (sqrt(total) + c.eps)), (total,)


class RMSprop(NamedTuple):
    """Coefficients of one step of :func:`rmsprop`."""

    step_size: Scalar  # lr
    alpha: Scalar
    one_minus_alpha: Scalar
    eps: Scalar


class CenteredRMSprop(NamedTuple):
    """Coefficients of one step of :func:`centered_rmsprop`."""

    step_size: Scalar  # lr
    alpha: Scalar
    one_minus_alpha: Scalar
    eps: Scalar
    zero: Scalar


class MomentumRMSprop(NamedTuple):
    """Coefficients of one step of :func:`momentum_rmsprop`."""

    step_size: Scalar  # lr
    alpha: Scalar
    one_minus_alpha: Scalar
    eps: Scalar
    momentum: Scalar


class CenteredMomentumRMSprop(NamedTuple):
    """Coefficients of one step of :func:`centered_momentum_rmsprop`."""

    step_size: Scalar  # lr
    alpha: Scalar
    one_minus_alpha: Scalar
    eps: Scalar
    zero: Scalar
    momentum: Scalar


def rmsprop(param: Scalar, grad: Scalar, state: States, c: RMSprop) -> Advanced:
    """RMSprop, with ``state = (square_avg,)``.

    Hinton, "Neural Networks for Machine Learning", lecture 6e.
    """
    (square_avg,) = state
    square_avg = moving_average(square_avg, grad * grad, c.alpha, c.one_minus_alpha)
    return param - c.step_size * (grad / (sqrt(square_avg) + c.eps)), (square_avg,)


def centered_root(square_avg: Scalar, grad_avg: Scalar, zero: Scalar) -> Scalar:
    """Return the root of the variance, which rounding may make less than 0."""
    variance = square_avg - grad_avg * grad_avg
    return sqrt(zero if variance < 0 else variance)


def centered_rmsprop(param: Scalar, grad: Scalar, state: States, c: CenteredRMSprop) -> Advanced:
    """RMSprop by the variance, with ``state = (square_avg, grad_avg)``.

    Graves, "Generating Sequences With Recurrent Neural Networks", equations 38 to 40.
    """
    square_avg, grad_avg = state
    square_avg = moving_average(square_avg, grad * grad, c.alpha, c.one_minus_alpha)
    grad_avg = moving_average(grad_avg, grad, c.alpha, c.one_minus_alpha)
    update = grad / (centered_root(square_avg, grad_avg, c.zero) + c.eps)
    return param - c.step_size * update, (square_avg, grad_avg)


def momentum_rmsprop(param: Scalar, grad: Scalar, state: States, c: MomentumRMSprop) -> Advanced:
    """RMSprop with momentum, with ``state = (square_avg, momentum_buffer)``."""
    square_avg, buffer = state
    square_avg = moving_average(square_avg, grad * grad, c.alpha, c.one_minus_alpha)
    buffer = c.momentum * buffer + grad / (sqrt(square_avg) + c.eps)
    return param - c.step_size * buffer, (square_avg, buffer)


def centered_momentum_rmsprop(
    param: Scalar, grad: Scalar, state: States, c: CenteredMomentumRMSprop
) -> Advanced:
    """RMSprop by the variance with momentum, with ``state = (square_avg, momentum_buffer, grad_avg)``.

    Graves, "Generating Sequences With Recurrent Neural Networks", equations 38 to 41, as PyTorch has them.
    """
    square_avg, buffer, grad_avg = state
    square_avg = moving_average(square_avg, grad * grad, c.alpha, c.one_minus_alpha)
    grad_avg = moving_average(grad_avg, grad, c.alpha, c.one_minus_alpha)
    buffer = c.momentum * buffer + grad / (centered_root(square_avg, grad_avg, c.zero) + c.eps)
    return param - c.step_size * buffer, (square_avg, buffer, grad_avg)


class Adadelta(NamedTuple):
    """Coefficients of one step of :func:`adadelta`."""

    step_size: Scalar  # lr
    rho: Scalar
    one_minus_rho: Scalar
    eps: Scalar


def adadelta(param: Scalar, grad: Scalar, state: States, c: Adadelta) -> Advanced:
    """Adadelta, with ``state = (square_avg, acc_delta)``.

    Zeiler, "ADADELTA: An Adaptive Learning Rate Method", Algorithm 1, times a learning rate.
    """
    square_avg, acc_delta = state
    square_avg = moving_average(square_avg, grad * grad, c.rho, c.one_minus_rho)
    delta = sqrt(acc_delta + c.eps) / sqrt(square_avg + c.eps) * grad
    acc_delta = moving_average(acc_delta, delta * delta, c.rho, c.one_minus_rho)
    return param - c.step_size * delta, (square_avg, acc_delta)


RULES |= {
    NAdam: nadam,
    RAdam: radam,
    Adamax: adamax,
    Lion: lion,
    SGD: sgd,
    Momentum: momentum,
    Nesterov: nesterov,
    Adagrad: adagrad,
    RMSprop: rmsprop,
    CenteredRMSprop: centered_rmsprop,
    MomentumRMSprop: momentum_rmsprop,
    CenteredMomentumRMSprop: centered_momentum_rmsprop,
    Adadelta: adadelta,
}

FORESEEN = frozenset({Adam, AMSGrad, NAdam, RAdam})
"""The rules whose moments follow gradients and their squares, as ``beta1`` and ``beta2`` say."""
