"""What the documentation shows is executed."""

from __future__ import annotations

import doctest
import importlib
import inspect
import linecache
import pkgutil
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import fastadam

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def modules():
    packages = pkgutil.walk_packages(fastadam.__path__, "fastadam.")
    kernels = pkgutil.iter_modules(importlib.import_module("fastadam.kernels").__path__, "fastadam.kernels.")
    return sorted({"fastadam"} | {m.name for m in (*packages, *kernels)} - {"fastadam.__main__"})


NEEDS = {
    "cuda_cupy": "cupy",
    "cuda_exact": "numba.cuda",
    "cuda_loop": "numba.cuda",
    "cuda_numba": "numba_cuda",
    "numba_cuda": "numba.cuda",
    "thinc": "thinc",
}
"""Module -> the optional package that it imports."""


@pytest.mark.parametrize("name", modules())
def test_doctests(name):
    package = NEEDS.get(name.rpartition(".")[2])
    if package is not None:
        pytest.importorskip(package)
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_there_are_doctests():
    assert doctest.testmod(importlib.import_module("fastadam.optimizer")).attempted > 5


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def execute(code, name, names):
    """Run a block, with its source where Python finds it: rules are read."""
    linecache.cache[name] = len(code), None, code.splitlines(keepends=True), name
    exec(compile(code, name, "exec"), names)


@pytest.mark.parametrize("code", blocks("python"))
def test_readme_python_runs(code, request):
    if "import cupy" in code:
        request.getfixturevalue("cupy")  # its stand-in
    execute(code, "<README.md>", {"__name__": "readme"})


PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_a_page_runs(page, request):
    """All blocks of a page, one after the other: they share their names."""
    code = blocks("python", page.read_text(encoding="utf-8"))
    assert code
    if any("import cupy" in block for block in code):
        request.getfixturevalue("cupy")  # its stand-in
    names = {"__name__": page.stem}
    for number, block in enumerate(code):
        if "fastadam.numba_cuda" not in block or find_spec("numba_cuda") is not None:
            execute(block, f"<{page.name}, block {number}>", names)


def test_phase_page_tells_all_hyperparameters():
    page = (ROOT / "docs" / "phase.md").read_text(encoding="utf-8")
    names = inspect.signature(fastadam.FusedAdam).parameters.keys() - {"backend", "capturable"}
    assert {name for name in {*names, "grad_scale"} if f"`{name}" not in page} == set()
    opt = fastadam.FusedAdam()
    opt.step(np.zeros(1), np.zeros(1))
    told = [name for name in dir(opt.last_step) if not name.startswith("_")]
    assert "grad_norm" in told
    assert [name for name in told if f"`{name}`" not in page] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_public_name_is_in_the_reference():
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    names = {name for name in fastadam.__all__ if not name.startswith("_")}
    assert len(names) > 4
    named = set(re.findall(r"auto(?:class|function|module):: (?:fastadam\.)?([\w.]+)", pages))
    homes = {name: getattr(getattr(fastadam, name), "__module__", "") for name in names}
    assert {name for name in names if not named & {name, homes[name].removeprefix("fastadam.")}} == set()


def test_readme_has_the_quickstart_and_the_two_commands():
    assert any("opt.step(flat_params, flat_grads)" in code for code in blocks("python"))
    commands = "".join(blocks("sh")).splitlines()
    assert 'pip install ".[demo]" && fastadam demo' in commands
    assert 'pip install -e ".[test]" && pytest -n auto --dist worksteal' in commands


def test_readme_names_only_files_that_exist():
    paths = re.findall(r"`((?:fastadam|kernels|tests|bench|ci)/[\w./]+)`", README)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_changelog_has_this_version():
    assert f"## {fastadam.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
