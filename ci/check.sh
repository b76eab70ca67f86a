#!/usr/bin/env bash
# Everything that must hold before a change lands; what a person runs is what CI runs.
#
#   bash ci/check.sh            PYTHON=python3.12 bash ci/check.sh
#
# Works in a virtual environment of its own and installs as the README says.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
step() { printf '\n=== %s (%ss)\n' "$*" "$SECONDS"; }

step "virtual environment"
"${PYTHON:-python3}" -m venv "$work/venv"
if [ -d "$work/venv/Scripts" ]; then bin="$work/venv/Scripts"; else bin="$work/venv/bin"; fi
export PATH="$bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1 MPLCONFIGDIR="$work/matplotlib"

step "install, as the README says"
pip install --no-compile -e ".[test]"
pip install --no-compile -e ".[lint,docs]" build
packages="$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
# pip would do it one after the other. A package may hold templates that are no Python.
python -m compileall -q -j 0 "$packages" >"$work/compiled" || true

step "lint and format"
ruff check .
ruff format --check .

step "README and committed results agree"
python -m bench.report --check

step "documentation site, beside the tests"
sphinx-build -q -W --keep-going -b html docs "$work/docs" >"$work/docs.log" 2>&1 &
documentation=$!

step "tests, as the README says"
pytest -n auto --dist worksteal

step "documentation site"
wait "$documentation" || { cat "$work/docs.log"; exit 1; }

step "benchmark smoke"
python -m bench.compare --quick --output "$work/compare.json"
python -m bench.phase --quick --output "$work/phase.json"
python -m bench.training --quick --output "$work/training.json"
python -m bench.storage --quick --output "$work/storage.json"
python -m bench.family --quick --output "$work/family.json"
python -m bench.torch_optimizer --quick --output "$work/torch_optimizer.json"
python -m bench.embedding --quick --output "$work/embedding.json"
pytest bench --benchmark-disable

step "sdist, and a wheel built from it"
python -m build --outdir "$work/dist" .
pip uninstall --yes fastadam
pip install --no-deps "$work"/dist/*.whl
(cd "$work" && python -c 'import fastadam, sysconfig; assert fastadam.__file__.startswith(sysconfig.get_path("purelib")), fastadam.__file__')

step "types of the installed wheel"
config="$PWD/pyproject.toml"
typed="$PWD/tests/typing"
(cd "$work" && mypy --config-file "$config" --cache-dir "$work/mypy" -p fastadam)
(cd "$work" && mypy --config-file "$config" --cache-dir "$work/mypy" "$typed"/*.py)

step "tests against the installed wheel: it has every file, imports and steps"
# Machine code is that of the wheel's own sources, or none: a digest of them is in its key.
installed="$packages/fastadam/kernels/__pycache__"
mkdir -p "$installed"
cp kernels/__pycache__/*.nb[ic] "$installed" 2>/dev/null || true
pytest -n auto --dist worksteal tests/test_{imports,cli,bits,cuda}.py

step "done"
