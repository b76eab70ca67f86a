"""The relatives of Adam, and L-BFGS as a reference, compared on small problems: ``fastadam race``."""

from fastadam.race.optimizers import OPTIMIZERS
from fastadam.race.problems import PROBLEMS
from fastadam.race.racing import race
from fastadam.race.settings import Settings, Tune

__all__ = ["OPTIMIZERS", "PROBLEMS", "Settings", "Tune", "race"]
