"""The ways to store numbers that a training is tried with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from fastadam import FusedAdam


@dataclass(frozen=True)
class Storage:
    """What is asked of the optimizer, and how the parameters are kept.

    Parameters
    ----------
    label : str
        For people.
    options : mapping
        Arguments of FusedAdam.
    bfloat16 : bool
        Whether parameters and gradients are bfloat16; the network computes in float32 with those numbers.
    promised : bool
        Whether it must train as float32 does. Rounding to the nearest is there for contrast.
    """

    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    bfloat16: bool = False
    promised: bool = True

    def missing(self) -> str | None:
        """Say why it cannot be tried here, or return None."""
        if self.bfloat16 and find_spec("ml_dtypes") is None:
            return "not installed: ml_dtypes"
        try:
            FusedAdam(**self.options)
        except ValueError as error:
            return str(error)
        return None


STORAGES = {
    "float32": Storage("float32"),
    "bfloat16": Storage("bfloat16 moments", {"state_dtype": "bfloat16"}),
    "8bit": Storage("8-bit moments", {"state_dtype": "8bit"}),
    "bfloat16-8bit": Storage("bfloat16 and 8-bit moments", {"state_dtype": ("bfloat16", "8bit")}),
    "split-bfloat16": Storage(
        "bfloat16 params (split master), grads, moments",
        {"state_dtype": "bfloat16", "master_params": "split"},
        bfloat16=True,
    ),
    "split-8bit": Storage(
        "the same, 8-bit moments", {"state_dtype": "8bit", "master_params": "split"}, bfloat16=True
    ),
    "bfloat16-nearest": Storage(
        "bfloat16 moments, to the nearest",
        {"state_dtype": "bfloat16", "rounding": "nearest"},
        promised=False,
    ),
    "8bit-nearest": Storage(
        "8-bit moments, to the nearest", {"state_dtype": "8bit", "rounding": "nearest"}, promised=False
    ),
}
