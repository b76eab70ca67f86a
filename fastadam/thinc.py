"""thinc's optimizer, with a fused step for each of its arrays.

``thinc.api.Adam`` takes a pass for each of: the norm of the gradient, the clipping, the moments, the update,
the clearing, the decay, the average. This takes two.
"""

from __future__ import annotations

import math
from typing import Any

try:
    from thinc.optimizers import ADAM_DEFAULTS, KeyT, Optimizer, ScheduleT
except ImportError:
    raise ImportError("fastadam.thinc needs thinc. pip install thinc") from None

from fastadam import adam
from fastadam.hyperparameters import CHECKS

_LARGEST_DECAY = 0.9999
"""Of the averages, which is ``(1 + t) / (10 + t)`` before: thinc's."""


class FusedAdam(Optimizer):
    r"""A drop-in for ``thinc.api.Adam``: the same arguments, defaults, schedules, averages and keys.

    thinc adds ``eps`` to the root of the second moment before its bias correction, so step :math:`t` is taken
    with :math:`\text{eps} / \sqrt{1 - \beta_2^t}`.

    Parameters
    ----------
    learn_rate : float, list, generator or Schedule, default 1e-3
        As all others that thinc takes as schedules: ``L2``, ``beta1``, ``beta2``, ``eps`` and ``grad_clip``.
    L2 : float, default 1e-6
        Weight decay.
    beta1, beta2 : float, default 0.9 and 0.999
        Decay rates of the moments.
    eps : float, default 1e-8
        Added to the root of the second moment.
    grad_clip : float, default 1.0
        Norm to which the gradient of each array is clipped; 0 clips none.
    L2_is_weight_decay : bool, default True
        Decoupled weight decay; else ``L2`` times the parameters is added to the gradient, before clipping.
    use_averages : bool, default True
        Keep an average of each array, for ``model.use_params(opt.averages)``.

    Attributes
    ----------
    mom1, mom2, averages : dict of key -> array
        Views of what the steps work on.

    Raises
    ------
    ImportError
        When it is imported without thinc.
    TypeError, ValueError
        By a call, as by :meth:`fastadam.FusedAdam.step`: weights must be contiguous, gradients writable.

    Notes
    -----
    It rounds elsewhere than thinc's, and differs in this: decoupled decay comes before the update, as in
    AdamW, so that the update itself is not decayed; the norm is the root of a float64 sum, with 1e-6 added to
    it; and with ``beta1=0`` it is still Adam, where thinc's takes plain gradient descent. thinc's forms
    ``1 - beta2`` in float32: with 0.999 its second moments are 5e-5 too large.

    Examples
    --------
    >>> import numpy as np
    >>> from fastadam.thinc import FusedAdam
    >>> opt = FusedAdam(0.1)
    >>> weights, gradient = np.ones(3, np.float32), np.ones(3, np.float32)
    >>> weights, gradient = opt((0, "W"), weights, gradient)
    >>> weights.round(3).tolist() == np.full(3, 0.9, np.float32).tolist(), gradient.any().item()
    (True, False)
    """

    def __init__(
        self,
        learn_rate: ScheduleT = ADAM_DEFAULTS["learn_rate"],
        *,
        L2: ScheduleT = ADAM_DEFAULTS["L2"],  # noqa: N803
        beta1: ScheduleT = ADAM_DEFAULTS["beta1"],
        beta2: ScheduleT = ADAM_DEFAULTS["beta2"],
        eps: ScheduleT = ADAM_DEFAULTS["eps"],
        grad_clip: ScheduleT = ADAM_DEFAULTS["grad_clip"],
        L2_is_weight_decay: bool = True,  # noqa: N803
        use_averages: bool = True,
    ) -> None:
        super().__init__(
            learn_rate,
            L2=L2,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            grad_clip=grad_clip,
            L2_is_weight_decay=L2_is_weight_decay,
            use_averages=use_averages,
        )
        self._fused: dict[KeyT, adam.FusedAdam] = {}

    def __call__(self, key: KeyT, weights: Any, gradient: Any, *, lr_scale: float = 1.0) -> tuple[Any, Any]:
        """Take a step with one array.

        Parameters
        ----------
        key : tuple
            Which array it is: the id of its node, and its name.
        weights : ndarray of float32
            Read and written; NumPy's, or CuPy's in GPU memory.
        gradient : ndarray of float32
            Read, and set to zero.
        lr_scale : float, default 1.0
            A factor of the learning rate.

        Returns
        -------
        weights, gradient
            The two arrays.
        """
        if len(gradient) < 1:
            return weights, gradient
        now = {"key": key, "last_score": self.last_score}
        learn_rate, beta1, beta2, eps, decay, clip = (
            float(schedule(self.step, **now))
            for schedule in (self.learn_rate, self.b1, self.b2, self.eps, self.L2, self.grad_clip)
        )
        beta1, beta2 = CHECKS["betas"]("betas", (beta1, beta2))
        t = self.nr_update[key] + 1
        if decay and clip and not self.L2_is_weight_decay:
            gradient += decay * weights
            decay = 0.0
        values: dict[str, Any] = {
            "lr": lr_scale * learn_rate,
            "betas": (beta1, beta2),
            "eps": eps / math.sqrt(1 - beta2**t),
            "weight_decay": decay,
            "max_grad_norm": clip or None,
        }
        if self.averages is not None:
            values["ema_decay"] = min((1 + t) / (10 + t), _LARGEST_DECAY)
        fused = self._fused.get(key)
        if fused is None:
            decoupled = self.L2_is_weight_decay
            fused = adam.FusedAdam(**values, decoupled_weight_decay=decoupled, zero_grads=True)
        else:
            fused._change(**{name: value for name, value in values.items() if getattr(fused, name) != value})
        fused.step(weights, gradient)
        self.nr_update[key] = t
        if key not in self._fused:
            self._fused[key] = fused
            if self.averages is not None:  # they start with zeros in thinc
                fused.state.param_ema[:] = (1 - values["ema_decay"]) * weights.reshape(-1)
            self._show(key, weights.shape)
        return weights, gradient

    def _show(self, key: KeyT, shape: tuple[int, ...]) -> None:
        """Have thinc's dicts lead to the state of an array."""
        state = self._fused[key].state
        self.mom1[key], self.mom2[key] = state.exp_avg, state.exp_avg_sq
        if self.averages is not None:
            self.averages[key] = state.param_ema.reshape(shape)

    def __setstate__(self, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
        """Undo a copy or a pickle, in which what were views of the states are arrays."""
        for part in state:
            for name, value in part.items():
                setattr(self, name, value)
        for key in self._fused:
            self._show(key, () if self.averages is None else self.averages[key].shape)
