"""How tensors lie in memory: what can be stepped in place, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastadam.formats import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, math_of

DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: FLOAT32,
    torch.float64: FLOAT64,
    torch.float16: FLOAT16,
    torch.bfloat16: BFLOAT16,
    torch.complex64: FLOAT32,
    torch.complex128: FLOAT64,
}
"""What is stored in a tensor: complex numbers are two real ones each, as in ``torch.view_as_real``."""


def elements(tensor: Tensor) -> int:
    """Return how many real numbers a tensor holds."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor fills its memory from the first element to the last, in any order."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def lies_like(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of one shape have their elements in the same order in memory."""
    pairs = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    return tensor.numel() == 0 or all(n == 1 or a == b for n, a, b in pairs)


def goes_with(tensor: Tensor, param: Tensor) -> bool:
    """Return whether a rule can take a gradient or a state beside a parameter, by their dtypes."""
    if tensor.dtype not in DTYPES or tensor.is_complex() != param.is_complex():
        return False
    return math_of(DTYPES[tensor.dtype]) == math_of(DTYPES[param.dtype])


def require_steppable(param: Tensor, name: str) -> None:
    """Raise unless a parameter can be stepped where it lies.

    Raises
    ------
    NotImplementedError
        If it is neither in CPU memory nor on a CUDA device.
    TypeError, ValueError
        If it is of another dtype, sparse, or has gaps.
    """
    if param.device.type not in {"cpu", "cuda"}:
        raise NotImplementedError(
            f"{name} must be in CPU memory or on a CUDA device; got {param.device}. Move the model, or take"
            " torch.optim.Adam."
        )
    if param.layout is not torch.strided:
        raise TypeError(f"{name} must be strided; got {param.layout}.")
    if param.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16, bfloat16 or complex; got {param.dtype}.")
    if param.numel() and not is_dense(param):
        raise ValueError(
            f"{name} must fill its memory without gaps; got shape {tuple(param.shape)} with strides"
            f" {param.stride()}. Clone it."
        )
    if param.numel() and param.data_ptr() == 0:
        raise TypeError(f"{name} must have memory of its own; got {type(param).__name__}.")


def require_fits(grad: Tensor, param: Tensor, name: str) -> None:
    """Raise unless a gradient can be used.

    Raises
    ------
    RuntimeError
        If it is sparse, as ``torch.optim.Adam`` does.
    TypeError, ValueError
        If its dtype, shape or place does not fit its parameter.
    """
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"{name}.grad must be dense; got {grad.layout}. Use torch.optim.SparseAdam for this parameter."
        )
    if grad.device != param.device:
        raise TypeError(f"{name}.grad must be on {param.device}; got {grad.device}.")
    if not goes_with(grad, param):
        raise TypeError(f"{name}.grad must have a dtype that goes with {param.dtype}; got {grad.dtype}.")
    if grad.shape != param.shape:
        raise ValueError(
            f"{name}.grad must have the shape of its parameter {tuple(param.shape)}; got {tuple(grad.shape)}."
        )


def in_order_of(tensor: Tensor, param: Tensor) -> Tensor:
    """Return a copy of a tensor whose elements lie in memory as those of a parameter."""
    return torch.empty_like(param, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what is computed with, where parameters of a dtype are stepped."""
    return torch.float32 if dtype in {torch.float16, torch.bfloat16} else dtype


def like(dtype: torch.dtype) -> np.ndarray[Any, np.dtype[Any]]:
    """Return an array of no elements of what is stored in tensors of a dtype."""
    return np.empty(0, DTYPES[dtype])
