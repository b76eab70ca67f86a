"""Which learning rates are tried."""

from __future__ import annotations

from math import log10
from zlib import crc32

import numpy as np

from fastadam.race.optimizers import Entrant
from fastadam.race.problem import Problem
from fastadam.race.settings import Settings, Tune


def learning_rates(entrant: Entrant, problem: type[Problem], settings: Settings) -> list[float]:
    """Return the learning rates of an optimizer on a problem, lowest first, to three digits.

    Random ones depend on the seed and on the name of the optimizer, not on who else takes part.
    """
    if not entrant.is_tuned or settings.tune is Tune.NONE:
        return [entrant.default_lr]
    lowest, highest = (log10(lr) for lr in problem.lr_range or (entrant.lowest_lr, entrant.highest_lr))
    if settings.tune is Tune.RANDOM:
        rng = np.random.default_rng([settings.seed, crc32(entrant.name.encode())])
        powers = np.sort(rng.uniform(lowest, highest, settings.trials))
    elif settings.trials > 1:
        powers = np.linspace(lowest, highest, settings.trials)
    else:
        powers = np.array([(lowest + highest) / 2])
    return [float(f"{10.0**power:.3g}") for power in powers.tolist()]
