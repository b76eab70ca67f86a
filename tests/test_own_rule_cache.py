"""The disk caches and rules that are none of ours: nothing stale runs, and nothing of ours is lost."""

from __future__ import annotations

import subprocess
import sys

import pytest
from test_cache import copied, copy_to, files, run

__all__ = ["copied", "copy_to"]

RULE = """
from typing import NamedTuple
from fastadam import own_rule

class Scaled(NamedTuple):
    step_size: float
    factor: float

def helper(grad, factor):
    return grad * factor

def scaled(param, grad, state, c):
    (last,) = state
    return param - c.step_size * helper(grad, c.factor), (grad,)

FusedScaled = own_rule.define("FusedScaled", scaled, Scaled, states=["last"], formulas={"factor": 3})
"""

STEP = """
import sys
sys.path.insert(0, ".")
import numpy as np, fastadam
from fastadam.kernels import cpu
make = fastadam.FusedAdam
if "OWN" == "own":
    from a_rule import FusedScaled as make
params = np.zeros(SIZE, "DTYPE")
make(lr=0.5).step(params, np.ones(SIZE, "DTYPE"))
kernel = cpu.parallel if SIZE >= cpu.PARALLEL_FROM else cpu.serial
print(float(params[0]), sum(kernel.stats.cache_hits.values()), kernel.stats.cache_path)
"""
OWN, ADAM = STEP.replace("OWN", "own"), STEP.replace("OWN", "adam")


@pytest.mark.parametrize("size", [100, 40_000], ids=["serial", "parallel"])
def test_an_edited_rule(copied, size):
    assert run(copied, size, script=ADAM)[:2] == (-0.5, 0)
    kept = files(copied, "nbc")
    rule = copied / "a_rule.py"
    for old, new, expected in (
        ("", "", -1.5),
        ("grad * factor", "grad + factor", -2.0),
        ("param - c.step_size", "param + c.step_size", 1.5),
    ):
        rule.write_text(RULE.replace(old, new) if old else RULE)
        assert run(copied, size, script=OWN)[:2] == (expected, 0)
        assert files(copied, "nbc") == kept
        assert run(copied, size, script=ADAM)[:2] == (-0.5, 1)
    rule.unlink()
    assert run(copied, size, script=ADAM)[:2] == (-0.5, 1)


NAMES = """
import sys
sys.path.insert(0, ".")
from a_rule import FusedScaled
from fastadam.coefficients import Coefficients
import numpy as np
print(Coefficients(FusedScaled(**FLAGS)._hyperparameters, np.dtype("float32")).types)
"""


def test_a_kernel_of_an_edited_rule_has_another_key(tmp_path):
    """Kernels of GPUs are kept on disk under what they are compiled for, written out."""

    def key(rule, flags="{}"):
        (tmp_path / "a_rule.py").write_text(rule)
        code = NAMES.replace("FLAGS", flags)
        process = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return process.stdout

    first = key(RULE)
    assert "a_rule.Scaled_" in first
    assert key(RULE, "{'lr': 2.0}") == first
    assert key(RULE.replace("grad * factor", "grad + factor")) != first
    assert key(RULE) == first
