"""What a user may choose of a race."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec

from fastadam.race.optimizers import LBFGS, OPTIMIZERS, Entrant
from fastadam.race.problems import PROBLEMS

ALL = "all"

_EXTRA = 'pip install "fastadam[race]"'


class Tune(StrEnum):
    """How learning rates are chosen."""

    GRID = "grid"
    RANDOM = "random"
    NONE = "none"


@dataclass(frozen=True)
class Settings:
    """What is raced.

    Parameters
    ----------
    problems, optimizers : tuple of str
        Names; ``"all"``, the default, stands for all of them.
    steps : int or None
        Of every run, at least 1; None: what each problem recommends.
    seeds : int, default 3
        Starts, noises and batches, at least 1.
    seed : int, default 0
        The first of them: all are in [0, 2**32).
    tune : {"grid", "random", "none"}
        Learning rates of each optimizer: evenly spaced in their logarithm, drawn so, or its default only.
    trials : int, default 9
        How many learning rates of each are tried, at least 1.

    Raises
    ------
    ValueError
        If one is out of its range.
    """

    problems: tuple[str, ...] = (ALL,)
    optimizers: tuple[str, ...] = (ALL,)
    steps: int | None = None
    seeds: int = 3
    seed: int = 0
    tune: Tune = Tune.GRID
    trials: int = 9

    def __post_init__(self) -> None:
        object.__setattr__(self, "problems", _chosen("problem", self.problems, list(PROBLEMS)))
        object.__setattr__(self, "optimizers", _chosen("optimizer", self.optimizers, list(OPTIMIZERS)))
        if self.tune not in list(Tune):
            raise ValueError(f"tune must be one of {', '.join(Tune)}; got {self.tune}.")
        object.__setattr__(self, "tune", Tune(self.tune))
        for name, value in (("steps", self.steps), ("seeds", self.seeds), ("trials", self.trials)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        if not 0 <= self.seed <= 2**32 - self.seeds:
            raise ValueError(f"seed must be in [0, 2**32 - seeds]; got {self.seed} with {self.seeds} seeds.")

    @property
    def all_seeds(self) -> range:
        """Every seed."""
        return range(self.seed, self.seed + self.seeds)

    def steps_of(self, problem: str) -> int:
        """Return the steps of a run."""
        return PROBLEMS[problem].steps if self.steps is None else self.steps

    def require_packages(self) -> None:
        """Raise ImportError unless what was chosen can run here."""
        if "digits" in self.problems and find_spec("sklearn") is None:
            raise ImportError(f"problem digits needs scikit-learn. {_EXTRA}")
        if LBFGS.name in self.optimizers and find_spec("scipy") is None:
            raise ImportError(f"optimizer {LBFGS.name} needs SciPy. {_EXTRA}")
        if find_spec("threadpoolctl") is None:
            raise ImportError(f"the race needs threadpoolctl. {_EXTRA}")


def _chosen(kind: str, wanted: tuple[str, ...], known: list[str]) -> tuple[str, ...]:
    """Return names in the order of those that are known, each once."""
    for name in wanted:
        if name not in {ALL, *known}:
            raise ValueError(f"{kind} must be one of {', '.join([*known, ALL])}; got {name}.")
    return tuple(name for name in known if ALL in wanted or name in wanted)


def entrants(settings: Settings) -> list[Entrant]:
    """Return the optimizers of a race."""
    return [OPTIMIZERS[name] for name in settings.optimizers]
