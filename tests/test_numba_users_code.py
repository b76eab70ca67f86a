"""The machine code of users' functions that take steps, and Numba's disk cache of it, in other processes."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import pytest

import fastadam
from fastadam import compiled_state, kernels
from fastadam.kernels import rules

USER = """
import json, sys
import numpy as np
from numba import njit
from fastadam import FusedAdam
from fastadam.numba import compiled, step, step_parallel

@njit(cache=True, fastmath=True, nogil=True)
def train(params, grads, adam, steps):
    for _ in range(steps):
        step(params, grads, adam)

@njit(cache=True, fastmath=True)
def train_parallel(params, grads, adam, steps):
    for _ in range(steps):
        step_parallel(params, grads, adam)

def told():
    rng, size = np.random.default_rng(0), int(sys.argv[1])
    params, grads = rng.standard_normal((2, size)).astype(np.float32)
    function, opt = train if size < 2**14 else train_parallel, FusedAdam(lr=0.5, max_grad_norm=1.0)
    with compiled(opt, params) as adam:
        function(params, grads, adam, 3)
    (assembly,) = function.inspect_asm().values() or [""]
    return {"bits": params[:5].view(np.int32).tolist(), "hits": sum(function.stats.cache_hits.values()),
            "assembly": assembly}
"""

SIZES = pytest.mark.parametrize("size", [100, 2**18], ids=["serial", "parallel"])


@pytest.fixture
def copied(tmp_path):
    """A copy of the package and a user's module, in a folder of their own, without any cache."""
    ignore = shutil.ignore_patterns("__pycache__")
    package = tmp_path / "fastadam"
    shutil.copytree(Path(fastadam.__file__).parent, package, ignore=ignore)
    shutil.copytree(Path(kernels.__file__).parent, package / "kernels", ignore=ignore, dirs_exist_ok=True)
    (tmp_path / "user.py").write_text(USER)
    return tmp_path


def run(root, size):
    # -S keeps an editable install's import hook from finding the original.
    paths = [str(root), *(path for path in sys.path if path.endswith("site-packages"))]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.run(
        [sys.executable, "-S", "-c", "import json, user; print(json.dumps(user.told()))", str(size)],
        env={**os.environ, **environment},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout)


def bits(size):
    """What the optimizer itself makes of it."""
    import numpy as np

    params, grads = np.random.default_rng(0).standard_normal((2, size)).astype(np.float32)
    opt = fastadam.FusedAdam(lr=0.5, max_grad_norm=1.0)
    for _ in range(3):
        opt.step(params, grads)
    return params[:5].view(np.int32).tolist()


@SIZES
def test_code_and_cache(copied, size):
    """Compiled by nobody before, in a function with fastmath: none of it reaches the step."""
    first = run(copied, size)
    assert first["bits"] == bits(size)
    assert first["hits"] == 0
    if platform.machine().lower() in {"x86_64", "amd64"}:
        ops = re.findall(r"^\s+(v?[a-z][a-z0-9]+)\s", first["assembly"], re.MULTILINE)
        assert any(op in {"vsqrtps", "sqrtps"} for op in ops), "no packed root"
        assert any(op in {"vdivps", "divps"} for op in ops), "no packed quotient"
        assert not [op for op in ops if re.match(r"v?fn?m(add|sub)\w+(ps|ss)$", op)], "fused multiply-add"
        assert not [op for op in ops if re.match(r"v?r(sqrt|cp)", op)], "approximate reciprocal"
        if llvm.get_host_cpu_features().get("avx2"):
            assert "%ymm" in first["assembly"]

    then = run(copied, size)
    assert (then["hits"], then["bits"]) == (1, first["bits"])


def test_names_in_users_caches():
    """Numba cannot read the cache of a user's function if a class that it names has gone: none may move."""
    found = (
        compiled_state.CompiledAdam,
        compiled_state.Last,
        compiled_state.Numbers,
        compiled_state.Corrections,
    )
    of_rules = (rules.Update, rules.Clear, rules.Adam, rules.AMSGrad, rules.Average, rules.Maximize)
    more = (rules.Clipping, rules.Conditioning, rules.L2Decay, rules.DecoupledDecay)
    assert {(kind.__module__, kind.__qualname__) for kind in (*found, *of_rules, *more)} == {
        *(("fastadam.compiled_state", name) for name in ("CompiledAdam", "Last", "Numbers", "Corrections")),
        *(("fastadam.kernels.rules", name) for name in ("Update", "Clear", "Adam", "AMSGrad", "Average")),
        *(("fastadam.kernels.rules", name) for name in ("Maximize", "Clipping", "Conditioning")),
        *(("fastadam.kernels.rules", name) for name in ("L2Decay", "DecoupledDecay")),
    }


EDITS = [
    ("bias_correction.py", "= difference + (", "= difference * 2 + ("),
    ("compiled_steps.py", "step[0] += 1", "step[0] += 2"),
    ("kernels/rules.py", "return param - c.step_size", "return param + c.step_size"),
]


def test_a_users_function_follows_an_upgrade(copied):
    """Numba's cache knows nothing of what a cached function calls; the types of its arguments do."""
    seen = [run(copied, 100)["bits"]]
    for file, old, new in EDITS:
        source = copied / "fastadam" / file
        text = source.read_text(encoding="utf-8")
        assert old in text
        source.write_text(text.replace(old, new), encoding="utf-8")
        after = run(copied, 100)
        assert after["hits"] == 0
        assert after["bits"] not in seen
        seen.append(after["bits"])
