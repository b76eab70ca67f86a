"""Fused Adam as an optimizer of PyTorch, in place of ``torch.optim.Adam`` and ``AdamW``."""

from fastadam.torch.offload import OffloadedAdam
from fastadam.torch.optimizer import FusedAdam, FusedAdamW

__all__ = ["FusedAdam", "FusedAdamW", "OffloadedAdam"]
