"""Tensors of PyTorch, as :mod:`accepted`."""

from __future__ import annotations

import torch

from fastadam import FusedAdam


def tensors() -> None:
    model = torch.nn.Linear(3, 1, bias=False)
    params = model.weight.detach()
    opt = FusedAdam(ema_decay=0.9)
    opt.step(params, torch.ones(1, 3), grad_scale=torch.tensor(2.0), out=torch.empty(3, dtype=torch.bfloat16))
    opt.accumulate(torch.ones(3))
    opt.step(params)
    opt.swap_ema(params)


def streams(stream: torch.cuda.Stream, params: torch.Tensor) -> None:
    """Checked only: there is no GPU."""
    opt = FusedAdam(capturable=True)
    opt.step(params, torch.ones_like(params), stream=stream)
    opt.accumulate(params, stream=stream.cuda_stream)
    opt.swap_ema(params, stream=stream)
