"""Segments of every kind, and steps with them on the CPU and on the stand-in for CuPy together."""

from __future__ import annotations

from cuda_steps import assert_same
from segment_steps import FEATURES
from tolerances import assert_same_bits

from fastadam import FusedAdam, Segment

KINDS = {
    **FEATURES,
    "whole": {**FEATURES["all"], "lr": 0.01, "skip_nonfinite": True, "weight_decay": 0.1},
}
"""Combinations of features: those of segments on the CPU, and one that may be captured."""


def parts(size):
    """Segments with every hyperparameter, touching, of one element, frozen."""
    return [
        Segment(0, 3, lr=0.05),
        Segment(3, 4, weight_decay=0.0),
        Segment(5, size // 3, weight_decay=0.3, betas=(0.8, 0.5)),
        Segment(size // 3, size // 3 + 2, frozen=True),
        Segment(size // 2, size - 3, lr=0.0, eps=1e-3, betas=(0.3, 0.999)),
        Segment(size - 1, size, lr=0.01, weight_decay=0.2),
    ]


class Pair:
    """An optimizer on the CPU and one on the device, with the same parameters."""

    def __init__(self, cupy, params, *, capturable=False, **options):
        self.cupy = cupy
        self.cpu, self.params = FusedAdam(backend="cpu", **options), params.copy()
        self.device, self.buffer = FusedAdam(capturable=capturable, **options), cupy.asarray(params)

    @property
    def both(self):
        return self.cpu, self.device

    def step(self, grads, scale=None):
        sent, left = self.cupy.asarray(grads), grads.copy()
        self.cpu.step(self.params, left, grad_scale=scale)
        self.device.step(self.buffer, sent, grad_scale=scale)
        assert_same_bits(sent.host, left, "gradients")
        self.compare()

    def compare(self):
        assert_same((self.device, self.buffer), (self.cpu, self.params))
        assert repr(self.device.last_step) == repr(self.cpu.last_step)  # NaN is NaN


def take(pair, gradients, scales=None):
    for grads, scale in zip(gradients, scales or [None] * len(gradients), strict=True):
        pair.step(grads, scale)
    return pair
