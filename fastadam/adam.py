"""Adam, AdamW and AMSGrad."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, SupportsIndex, Unpack

from fastadam.arrays import BackendName, MasterFormat, Number, Rounding, StateFormat
from fastadam.hyperparameters import Hyperparameters, Schedule
from fastadam.kernels import rules
from fastadam.optimizer import FusedOptimizer, Options
from fastadam.rule import (
    LARGEST_STEP_SIZE,
    LR_OVER_BIAS_CORRECTION1,
    InverseBiasCorrection,
    PerStep,
    Rule,
    in_range,
    number,
    one_minus,
)
from fastadam.segments import Segment
from fastadam.tunables import HasBetas, HasDecoupled, HasEps

AVERAGING = (number("beta1"), one_minus("beta1"), number("beta2"), one_minus("beta2"))
"""The columns of two averages."""

_COLUMNS = (
    LR_OVER_BIAS_CORRECTION1,
    *AVERAGING,
    PerStep(InverseBiasCorrection, ("beta2",)),
    number("eps"),
)
_RANGES = (LARGEST_STEP_SIZE, in_range("eps", "eps"))

ADAM = Rule(rules.Adam, ("exp_avg", "exp_avg_sq"), _COLUMNS, _RANGES)
AMSGRAD = Rule(rules.AMSGrad, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), _COLUMNS, _RANGES)


@dataclass(frozen=True)
class AdamHyperparameters(Hyperparameters):
    """The hyperparameters of Adam, with PyTorch's names, meanings and defaults: see :class:`FusedAdam`."""

    KIND = "adam"
    OWN = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "amsgrad", "maximize")

    lr: Any = 1e-3
    betas: Any = (0.9, 0.999)
    eps: Any = 1e-8
    amsgrad: bool = False

    @property
    def rule(self) -> Rule:
        """Adam or AMSGrad."""
        return AMSGRAD if self.amsgrad else ADAM


class FusedAdam(HasBetas, HasEps, HasDecoupled, FusedOptimizer):
    r"""Adam, in one fused pass over flat buffers, in place.

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1}
            - \text{lr} \cdot \frac{m_t}{1 - \beta_1^t}
            \Big/ \Big( \sqrt{\frac{v_t}{1 - \beta_2^t}} + \text{eps} \Big)

    The moments are allocated on the first step: 8 bytes per float32 parameter, 4 more with AMSGrad and 4 with
    the average of the parameters, on their device. Segments and telemetry keep tables beside them, some 0.05
    bytes per parameter. One optimizer may not step
    in two threads at once; different optimizers may.

    Parameters
    ----------
    lr : float or callable, default 1e-3
        Learning rate, at least 0, or a function of the step number, counted from 1, such as those of
        :mod:`fastadam.schedules`.
    betas : tuple of float, default (0.9, 0.999)
        Decay rates of the first and the second moment, each in [0, 1).
    eps : float, default 1e-8
        Added to the root of the second moment, after its bias correction; at least 0.
    weight_decay : float, default 0.0
        Weight decay, at least 0.
    decoupled_weight_decay : bool, default False
        False adds ``weight_decay * param`` to the gradient (L2). True is AdamW: it subtracts
        ``lr * weight_decay * param`` from the parameter, before the update.
    amsgrad : bool, default False
        Divide by the root of the maximum of all second moments so far.
    maximize : bool, default False
        Ascend: the gradient is negated, before any weight decay.
    max_grad_norm : float, optional
        Clip the gradient to this global norm, greater than 0; the meaning is that of
        ``torch.nn.utils.clip_grad_norm_``.
    max_grad_value : float, optional
        Clip each element of the gradient to this magnitude, greater than 0.
    skip_nonfinite : bool, default False
        Take no step where an element of the gradient is inf or NaN: nothing is written and nothing counted.
    ema_decay : float, optional
        Keep an exponential moving average of the parameters, ``state.param_ema``, with this decay, in [0, 1).
        It starts with the parameters before the first step. See :meth:`swap_ema`.
    zero_grads : bool, default False
        Set the gradients to zero when a step has used them, or skipped them.
    telemetry : bool, default False
        Report of each step the norms of the gradient, of the update and of the parameters, how many elements
        of the gradient were inf or NaN and how many updates rounded to nothing (:attr:`last_step`). They are
        formed in the same pass, and change no bit of it.
    state_dtype : {"float32", "bfloat16", "8bit"} or a pair of them, default "float32"
        How the states are stored; a pair is for those with a sign, such as ``exp_avg``, and for others. In 8
        bits, blocks of 128 elements share a scale. With float64 parameters only the default, which is float64
        then. This and what follows: ``docs/storage.md``.
    master_params : {None, "float32", "split"}, default None
        Keep 16-bit parameters exactly, in the state: as float32, or as what is missing of bfloat16 parameters
        to it, 2 bytes.
    rounding : {"stochastic", "nearest"}, default "stochastic"
        Of what is stored in 16 or 8 bits: moments, and parameters without a master. To the nearest, averages
        stop following: their steps are smaller than half a unit in the last place.
    seed : int, default 0
        Of stochastic rounding, in [0, 2**53). There is no generator: (seed, step, element) give the bits.
    offset : int, default 0
        Index of the buffer's first element in the whole buffer of which it is a shard, in [0, 2**53). With
        moments in 8 bits shards have the bits of the whole where it is a multiple of 128.
    segments : iterable of Segment, default ()
        Parts of the buffer with hyperparameters of their own, which do not overlap: see
        :class:`fastadam.Segment`. What they do not set, and what lies in none, follows the optimizer's own.
    backend : {None, "cpu", "cupy", "numba-cuda"}, default None
        What runs the steps. None chooses by the buffers of the first step: for arrays in GPU memory CuPy, or
        numba-cuda where CuPy is not installed.
    capturable : bool, default False
        Keep the step counter and the learning rate in GPU memory, so that a step captured in a CUDA graph
        counts on, and follows :attr:`lr`, with every replay. The bits are the same. Betas, those of segments
        too, must be at most 1 - 2**-18, and no ``lr`` a function.

    Raises
    ------
    TypeError
        If a hyperparameter is not of its type.
    ValueError
        If a hyperparameter is not finite or out of its range, segments overlap, there is no such backend, or
        a schedule is to be captured.
    ImportError
        If the package that the backend needs is not installed.

    Notes
    -----
    Names, meanings and defaults are those of ``torch.optim.Adam``; ``decoupled_weight_decay=True`` makes it
    ``torch.optim.AdamW``, whose default ``weight_decay`` is 0.01. The arithmetic is that of the parameters'
    dtype, and every operation rounds once: the same inputs give the same bits with any number of threads, any
    split of the buffer, and on GPUs. See :mod:`fastadam.kernels.rules`.

    A gradient with inf or NaN is not an error: it reaches the parameter and the moments of its element only.
    So does one whose square overflows: its element becomes NaN with the next step.

    References
    ----------
    Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, Algorithm 1.
    Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, Algorithm 2.
    Reddi, Kale & Kumar, "On the Convergence of Adam and Beyond", ICLR 2018, Algorithm 2.

    Examples
    --------
    >>> import numpy as np
    >>> from fastadam import FusedAdam
    >>> params = np.array([1.0, -2.0], dtype=np.float32)
    >>> opt = FusedAdam(lr=0.1)
    >>> for _ in range(300):
    ...     opt.step(params, 2 * params)  # the gradient of params ** 2
    >>> bool(np.all(np.abs(params) < 1e-2))
    True
    >>> opt.state.step
    300
    """

    HYPERPARAMETERS: ClassVar[type[Hyperparameters]] = AdamHyperparameters

    def __init__(
        self,
        lr: Number | Schedule = 1e-3,
        betas: tuple[Number, Number] | list[float] = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        amsgrad: bool = False,
        maximize: bool = False,
        max_grad_norm: Number | None = None,
        max_grad_value: Number | None = None,
        skip_nonfinite: bool = False,
        ema_decay: Number | None = None,
        zero_grads: bool = False,
        telemetry: bool = False,
        state_dtype: StateFormat | tuple[StateFormat, StateFormat] = "float32",
        master_params: MasterFormat | None = None,
        rounding: Rounding = "stochastic",
        seed: SupportsIndex = 0,
        offset: SupportsIndex = 0,
        segments: Iterable[Segment] = (),
        backend: BackendName | None = None,
        capturable: bool = False,
    ) -> None:
        hyperparameters = AdamHyperparameters(  # numbers of NumPy, too, become plain ones
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            max_grad_norm=max_grad_norm,
            max_grad_value=max_grad_value,
            skip_nonfinite=skip_nonfinite,
            ema_decay=ema_decay,
            zero_grads=zero_grads,
            telemetry=telemetry,
            state_dtype=state_dtype,
            master_params=master_params,
            rounding=rounding,
            seed=seed,
            offset=offset,
        )
        super().__init__(hyperparameters, segments=segments, backend=backend, capturable=capturable)

    @property
    def amsgrad(self) -> bool:
        """Whether the maximum of the second moments is kept and used."""
        value: bool = self._hyperparameters.amsgrad
        return value


class FusedAdamW(FusedAdam):
    """Adam with decoupled weight decay: :class:`FusedAdam` with the defaults of ``torch.optim.AdamW``.

    Parameters
    ----------
    lr, betas, eps, amsgrad, maximize
        As for :class:`FusedAdam`.
    weight_decay : float, default 0.01
        ``lr * weight_decay * param`` is subtracted from the parameter, before the update.
    **options
        All others of :class:`FusedAdam`.

    References
    ----------
    Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, Algorithm 2.
    """

    _IMPLIED: ClassVar = {"decoupled_weight_decay": True}

    def __init__(
        self,
        lr: Number | Schedule = 1e-3,
        betas: tuple[Number, Number] | list[float] = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 0.01,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            lr,
            betas,
            eps,
            weight_decay,
            decoupled_weight_decay=True,
            amsgrad=amsgrad,
            maximize=maximize,
            **options,
        )
