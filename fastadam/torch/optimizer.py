"""Adam and AdamW of PyTorch, with all tensors of a model in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastadam.checks import require_flag
from fastadam.torch import options
from fastadam.torch.backward import StepInBackward
from fastadam.torch.plans import Plan

_MOST_PLANS = 1000
"""Kept of one optimizer; there are more only where each backward gives gradients in another order."""


class FusedAdam(torch.optim.Optimizer):
    """Adam, AdamW and AMSGrad for many tensors: ``torch.optim.Adam`` in one pass over all of them.

    The equations, options, state and state dicts are those of :class:`torch.optim.Adam`; a run goes on with
    either from what the other has saved. The bits are those of :class:`fastadam.FusedAdam` on each tensor.

    Tensors on CUDA devices are stepped there, by CuPy, one launch for all of a device, dtype and equation.

    Parameters
    ----------
    params : iterable
        Parameters, ``(name, parameter)`` pairs or groups, as for any optimizer of PyTorch; float32, float64,
        float16, bfloat16 or complex, in any dense memory format; in CPU memory or on CUDA devices.
    lr : float or Tensor
        Learning rate, at least 0.
    betas : pair of float
        Decay rates of the first and second moment, each in [0, 1).
    eps : float
        Added to the root of the debiased second moment, at least 0.
    weight_decay : float
        Weight decay, at least 0.
    amsgrad : bool
        Divide by the maximum of the second moments so far.
    maximize : bool
        Ascend.
    decoupled_weight_decay : bool
        False: L2, added to the gradient. True: AdamW, scaled by ``lr``.
    foreach, fused
        As ``torch.optim.Adam`` takes them; without effect, a step is always fused.
    capturable, differentiable : bool
        Only False.
    step_in_backward : bool
        Step parameters during ``backward``, as their gradients come, and drop these, so that they never exist
        all at once; :meth:`step`, called after each ``backward``, steps what is left. The same bits. Options
        count as they are during ``backward``. Neither clipping nor accumulating gradients nor a
        ``GradScaler`` goes with it.

    Raises
    ------
    TypeError, ValueError
        If an argument is of a wrong type or out of its range.

    Notes
    -----
    Other than with PyTorch's fused Adam, a step of a ``GradScaler`` leaves the gradients scaled: they are
    divided in the pass, and not written. On a CUDA device a step is queued on the current stream, and the
    host waits only for what a ``GradScaler`` found; a state's ``"step"`` is in CPU memory.
    """

    _step_supports_amp_scaling = True
    """Tells ``GradScaler`` to leave its scale in ``grad_scale`` and what it found in ``found_inf``."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        step_in_backward: bool = False,
    ) -> None:
        self._in_backward = None
        self._forget()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        options.require_valid(defaults)
        is_in_backward = require_flag("step_in_backward", step_in_backward)
        super().__init__(params, defaults)
        if is_in_backward:
            self._in_backward = StepInBackward(self)
            self._in_backward.watch()

    _in_backward: StepInBackward | None = None  # a copy has none: it steps when step is called

    def _forget(self) -> None:
        """Find everything anew with the next step."""
        self._plans: dict[tuple[int, ...], Plan] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as in PyTorch.

        Raises
        ------
        TypeError, ValueError
            If an option is of a wrong type or out of its range: there is no such group then.
        """
        super().add_param_group(param_group)
        try:
            options.require_valid(self.param_groups[-1])
        except Exception:
            del self.param_groups[-1]
            raise
        self._forget()
        if self._in_backward is not None:
            self._in_backward.watch()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in options.ADDED_LATER.items():
                group.setdefault(name, value)
        for kept in self.state.values():
            if isinstance(kept, dict) and "step" in kept and not torch.is_tensor(kept["step"]):
                kept["step"] = torch.tensor(float(kept["step"]), dtype=torch.float32)
        self._forget()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with the gradients that there are.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model again and returns the loss.

        Returns
        -------
        float or None
            What the closure returned.

        Raises
        ------
        RuntimeError
            If a gradient is sparse. With ``step_in_backward``, if a ``GradScaler`` calls it or a gradient was
            written after ``backward``. On a CUDA device, in the capture of a graph.
        NotImplementedError
            If a parameter is neither in CPU memory nor on a CUDA device.
        ImportError
            If one is on a CUDA device, and CuPy is missing.
        TypeError, ValueError
            If an option is out of its range, or a tensor cannot be stepped. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()
            torch.compiler.disable(self._step)()  # type: ignore[no-untyped-call]
        else:
            self._step()
        return loss

    @torch.no_grad()
    def _step(self) -> None:
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if self._in_backward is not None:
            if found_inf is not None or grad_scale is not None:
                raise RuntimeError(
                    "step_in_backward must be False for a GradScaler; got True. Parameters were stepped with"
                    " scaled gradients: leave it out, or train in bfloat16 without a scaler."
                )
            self._in_backward.finish()
            return
        if found_inf is not None and float(found_inf) != 0:
            return
        self._advance([param.grad for group in self.param_groups for param in group["params"]])

    def _advance(self, grads: list[Tensor | None], key: tuple[int, ...] = ()) -> None:
        """Step the parameters that have a gradient here; the plan is kept for the next call with the key."""
        groups, states, plan = self.param_groups, self.state, self._plans.pop(key, None)
        ready = None if plan is None else plan.ready(groups, states, grads)
        if plan is None or ready is None:
            plan = Plan(groups, states, grads)
            ready = plan.ready(groups, states, grads)
            assert ready is not None
        plan.step(groups, states, ready, getattr(self, "grad_scale", None))
        if len(self._plans) >= _MOST_PLANS:
            self._plans.clear()
        self._plans[key] = plan


class FusedAdamW(FusedAdam):
    """:class:`FusedAdam` with the defaults of ``torch.optim.AdamW``: decoupled weight decay, of 0.01."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        step_in_backward: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            step_in_backward=step_in_backward,
        )
