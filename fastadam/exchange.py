"""Optimizer state from and for other libraries: PyTorch, optax, Keras and thinc.

Each ``from_`` loads into a :class:`fastadam.FusedAdam`, or raises and changes nothing. Each ``to_`` returns
what that library takes, and changes nothing.
"""

from fastadam.exchange_hat import eps_of_hat, from_keras, from_thinc, hat_of_eps, to_keras, to_thinc
from fastadam.exchange_optax import from_optax, to_optax
from fastadam.exchange_torch import from_torch, to_torch

__all__ = [
    "eps_of_hat",
    "from_keras",
    "from_optax",
    "from_thinc",
    "from_torch",
    "hat_of_eps",
    "to_keras",
    "to_optax",
    "to_thinc",
    "to_torch",
]
