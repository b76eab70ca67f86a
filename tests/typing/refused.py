"""What a type checker refuses, line by line; ``tests/test_typing.py`` sees that each fails when it runs, too.

An ignore that is not needed is an error (``warn_unused_ignores``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastadam import DynamicLossScale, FusedAdam, Segment, warmup

PARAMS = np.ones(3)

REFUSED: list[Callable[[], object]] = [
    lambda: FusedAdam().step([1.0], [1.0]),  # type: ignore[arg-type]
    lambda: FusedAdam().step(None, PARAMS),  # type: ignore[arg-type]
    lambda: FusedAdam().step(1.0, PARAMS),  # type: ignore[arg-type]
    lambda: FusedAdam().step("params", PARAMS),  # type: ignore[arg-type]
    lambda: FusedAdam().step({"weight": PARAMS}, PARAMS.copy()),  # type: ignore[arg-type]
    lambda: FusedAdam().step(PARAMS, PARAMS.copy(), out=[0.0]),  # type: ignore[arg-type]
    lambda: FusedAdam().step(PARAMS, PARAMS.copy(), grad_scale="2"),  # type: ignore[arg-type]
    lambda: FusedAdam().step(PARAMS, PARAMS.copy(), stream="0"),  # type: ignore[arg-type]
    lambda: FusedAdam().step(PARAMS, PARAMS.copy(), 2.0),  # type: ignore[call-arg]
    lambda: FusedAdam().accumulate(None),  # type: ignore[arg-type]
    lambda: FusedAdam(ema_decay=0.5).swap_ema([1.0]),  # type: ignore[arg-type]
    lambda: FusedAdam(lr="0.1"),  # type: ignore[arg-type]
    lambda: FusedAdam(lr=None),  # type: ignore[arg-type]
    lambda: FusedAdam(betas=0.9),  # type: ignore[arg-type]
    lambda: FusedAdam(betas=(0.9, 0.99, 0.999)),  # type: ignore[arg-type]
    lambda: FusedAdam(amsgrad=None),  # type: ignore[arg-type]
    lambda: FusedAdam(weight_decay=None),  # type: ignore[arg-type]
    lambda: FusedAdam(seed=0.5),  # type: ignore[arg-type]
    lambda: FusedAdam(state_dtype="float16"),  # type: ignore[arg-type]
    lambda: FusedAdam(state_dtype=("8bit", "4bit")),  # type: ignore[arg-type]
    lambda: FusedAdam(master_params="bfloat16"),  # type: ignore[arg-type]
    lambda: FusedAdam(rounding="up"),  # type: ignore[arg-type]
    lambda: FusedAdam(backend="cuda"),  # type: ignore[arg-type]
    lambda: FusedAdam(segments=[(0, 3)]),  # type: ignore[list-item]
    lambda: FusedAdam(learning_rate=0.1),  # type: ignore[call-arg]
    lambda: FusedAdam(1e-3, (0.9, 0.99), 1e-8, 0.0, True),  # type: ignore[call-arg]
    lambda: FusedAdam().load_state_dict([]),  # type: ignore[arg-type]
    lambda: warmup(weigth_decay=0.1),  # type: ignore[call-overload]
    lambda: warmup(amsgrad="yes"),  # type: ignore[call-overload]
    lambda: DynamicLossScale().update("inf"),  # type: ignore[arg-type]
    lambda: Segment(0.0, 3),  # type: ignore[arg-type]
    lambda: Segment(0, 3, lr="0.1"),  # type: ignore[arg-type]
]
"""Each raises TypeError or ValueError."""
