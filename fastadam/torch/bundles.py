"""Tensors that one call of the kernel steps: those of a model, of whichever groups, of one dtype each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastadam.coefficients import divisor
from fastadam.formats import math_of
from fastadam.kernels import rules, tensors, threads
from fastadam.kernels.tensors import FIRST, GRADS, PARAMS, ROW, STATES
from fastadam.kernels.units import row_of
from fastadam.torch.options import Options
from fastadam.torch.tensors import elements, in_order_of, lies_like, like

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Numbers: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_pointer = Tensor.data_ptr


class Bundle:
    """Parameters and states in CPU memory, and the call that steps them with gradients in CPU memory.

    Knows nothing of an optimizer: whoever has tensors that lie in CPU memory can step them. Those on a CUDA
    device are a :class:`fastadam.torch.device_bundles.DeviceBundle`.

    Parameters
    ----------
    params : list of Tensor
        Each without gaps, all of one dtype.
    grad_dtype : dtype
        Of the gradients.
    states : list of list of Tensor
        ``exp_avg`` of each parameter, ``exp_avg_sq`` of each, ``max_exp_avg_sq`` of each with AMSGrad. In the
        order in memory of their parameters; of one dtype each, computed with as the parameters are.
    groups : list of int
        Whose options hold for each parameter.
    out : list of Tensor, optional
        Get a copy of each parameter with each step: of one dtype, in the order in memory of the parameters.

    Raises
    ------
    ValueError
        If parameters or states share memory.
    """

    def __init__(
        self,
        params: list[Tensor],
        grad_dtype: torch.dtype,
        states: list[list[Tensor]],
        groups: Sequence[int],
        out: list[Tensor] | None = None,
    ) -> None:
        self.params, self.states = params, states
        self._all_written = [params, *states] if out is None else [params, *states, out]
        self._grad_dtypes = [grad_dtype] * len(params)
        self._counts = [param.numel() for param in params]
        self._strides = [param.stride() for param in params]
        self._may_be_views = [k for k, param in enumerate(params) if param.is_complex() or param.ndim == 0]
        self._each_group, of_param = np.unique(np.asarray(groups, np.int64), return_inverse=True)
        self._group = of_param.astype(np.int64)
        sizes = np.array([elements(param) for param in params], np.int64)
        first, self._units = tensors.layout(sizes)
        self._like = like(params[0].dtype), like(grad_dtype), tuple(like(s[0].dtype) for s in states)
        self._dtype = math_of(self._like[0].dtype)
        self._grad_bytes = sizes * self._like[1].itemsize
        self._out = None if out is None else like(out[0].dtype)
        self._written = self._addresses(*self._all_written)
        itemsizes = [like(each[0].dtype).itemsize for each in self._all_written]
        self._ends = self._written + sizes * np.array(itemsizes)[:, None]
        self._require_disjoint()
        self._places = np.empty((len(params), STATES + len(self._all_written) - 1), np.int64)
        self._places[:, FIRST], self._places[:, ROW] = first, self._group
        self._places[:, PARAMS], self._places[:, STATES:] = self._written[0], self._written[1:].T
        self._compiled_for: tuple[object, ...] = ()

    # --- Where everything lies ------------------------------------------------------------------------------

    def ready(self, grads: list[Tensor]) -> list[Tensor] | None:
        """Return gradients that can be stepped with: copies of those whose elements lie in another order.

        None where their dtype is not that of the bundle, one has another size than its parameter, or what is
        to be stepped was moved. This is what a step of many small tensors costs: only what one call each
        tells.
        """
        try:
            if (
                [param.stride() for param in self.params] != self._strides
                or (self._addresses(*self._all_written) != self._written).any()
                or [grad.dtype for grad in grads] != self._grad_dtypes
                or [grad.numel() for grad in grads] != self._counts
            ):
                return None
            strides = [grad.stride() for grad in grads]
            self._begins = self._addresses(grads)[0]
        except RuntimeError:  # what is sparse has no address
            return None
        # A view that is negated when it is read (the imaginary part of a conjugate) has other strides, unless
        # it has none.
        looked_at = self._may_be_views
        if strides != self._strides:
            changed = [k for k, stride in enumerate(strides) if stride != self._strides[k]]
            looked_at = [*looked_at, *changed]
        copied = grads
        meet = (self._begins < self._ends) & (self._written < self._begins + self._grad_bytes)
        if meet.any():
            looked_at = [*looked_at, *np.flatnonzero(meet.any(axis=0)).tolist()]
        for k in looked_at:
            grad, param = grads[k], self.params[k]
            if meet[:, k].any() or grad.is_neg() or grad.is_conj() or not lies_like(grad, param):
                copied = list(grads) if copied is grads else copied
                copied[k] = in_order_of(grad, param)
                self._begins[k] = copied[k].data_ptr()
        return copied

    def _addresses(self, *arrays: list[Tensor]) -> Integers:
        """Return the addresses of tensors, a row for each list."""
        shape = len(arrays), len(arrays[0])
        found = np.fromiter(map(_pointer, chain.from_iterable(arrays)), np.int64, shape[0] * shape[1])
        return found.reshape(shape)

    def _require_disjoint(self) -> None:
        starts, ends = self._written.reshape(-1), self._ends.reshape(-1)
        order = np.argsort(starts, kind="stable")
        order = order[(ends > starts)[order]]  # what is empty meets nothing
        meet = ends[order][:-1] > starts[order][1:]
        if meet.any():
            k = int(np.argmax(meet))
            one, other = (tuple(self.params[at % len(self.params)].shape) for at in order[k : k + 2].tolist())
            raise ValueError(
                f"params must not share memory, nor their states; got it between those of shapes"
                f" {one} and {other}."
            )

    # --- A step ---------------------------------------------------------------------------------------------

    def _rows(
        self, options: Sequence[Options], steps: Integers, scale: float | None
    ) -> tuple[Numbers, rules.Update]:
        """Form the coefficients of each group and step number, and what is the same for all."""
        if (steps == steps[0]).all():
            pairs = [(group, int(steps[0])) for group in self._each_group.tolist()]
            self._places[:, ROW] = self._group
        else:
            both = np.stack([self._each_group[self._group], steps], axis=1)
            once, rows = np.unique(both, axis=0, return_inverse=True)
            pairs = [tuple(pair) for pair in once.tolist()]
            self._places[:, ROW] = rows.reshape(-1)
        rows_of_step, decay, update = [], None, None
        for group, step in pairs:
            update = options[group].coefficients(self._dtype).update(step, scale)
            rows_of_step.append(row_of(update))
            decay = decay or update.decay
        assert update is not None
        return np.array(rows_of_step, self._dtype), update._replace(decay=decay)

    def plan(
        self,
        grads: list[Tensor],
        options: Sequence[Options],
        steps: Integers,
        grad_scale: object = None,
    ) -> Callable[[], None]:
        """Return the call that steps everything in place. All that could fail is done here.

        Parameters
        ----------
        grads : list of Tensor
            What :meth:`ready` returned.
        options : sequence of Options
            Of each group.
        steps : ndarray of int64
            The number of this step of each parameter, counted from 1.
        grad_scale : optional
            What the gradients are divided by.

        Raises
        ------
        TypeError, ValueError
            If an option or the scale is out of the range of the dtype.
        """
        work, update = self._work(options, steps, grad_scale)
        compiled_for = (*map(type, update), threads.numba_is_safe())
        if compiled_for != self._compiled_for:
            tensors.prepare(work, update)
            self._compiled_for = compiled_for
        take = tensors.plan(work, update)

        def call() -> None:
            take()
            grads.clear()  # copies live until they were used

        return call

    def _work(
        self, options: Sequence[Options], steps: Integers, grad_scale: object
    ) -> tuple[tensors.Tensors, rules.Update]:
        """Return what is to be stepped with the gradients that :meth:`ready` saw last, and by what."""
        scale = divisor(grad_scale, 0, self._dtype)
        table, update = self._rows(options, steps, None if scale == 1 else scale)
        self._places[:, GRADS] = self._begins
        params, of_grads, states = self._like
        return tensors.Tensors(params, of_grads, states, self._units, self._places, table, self._out), update
