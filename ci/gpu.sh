#!/usr/bin/env bash
# Everything that needs a GPU, in about nine minutes, on a machine that has one and nothing to download from.
#
#   OUT=results bash ci/gpu.sh        PYTHON=python3.12 FASTADAM_COMMIT=... bash ci/gpu.sh
#   bash ci/gpu.sh --dry-run          without a GPU: does it import, are tests and benchmarks found, do they skip?
#
# Runs from the source tree: with numpy, numba, pytest, pytest-benchmark, and cupy, numba-cuda, torch, typer and
# rich where they are there. Writes at most 8 files into OUT (bench/results). Fails if a GPU test does.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dry_run=0
if [ "${1:-}" = "--dry-run" ]; then dry_run=1; fi
python=${PYTHON:-python3}
out=${OUT:-bench/results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
log="$out/gpu-log.txt"
total=${FASTADAM_GPU_SECONDS:-540}

# `kernels/` installs as `fastadam.kernels`. An install would have to download setuptools, so make the installed
# tree by hand. PYTHONSAFEPATH keeps ./fastadam, which lacks the kernels, from being found first; `bench` is a
# link, so that it still knows the root and its commit.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/tree"
cp -r fastadam "$work/tree/fastadam"
cp -r kernels "$work/tree/fastadam/kernels"
find "$work/tree" -name __pycache__ -type d -prune -exec rm -rf {} +
ln -s "$PWD/bench" "$work/tree/bench"
export PYTHONPATH="$work/tree" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export FASTADAM_TREE="$work/tree"
if [ "$dry_run" = 1 ]; then export CUDA_VISIBLE_DEVICES=; fi

: >"$log"
touch "$work/start"
table=""
failed=0
code=0

stage() { # name, seconds, command...
  local name=$1 seconds=$2 began=$SECONDS result
  shift 2
  if ((total - SECONDS < seconds)); then seconds=$((total - SECONDS)); fi
  printf '\n=== %s: %s\n' "$name" "$*" >>"$log"
  if ((seconds < 5)); then
    code=125 result="left out: no time"
  else
    timeout -k 5 "$seconds" "$@" >"$work/stage.txt" 2>&1
    code=$?
    cat "$work/stage.txt" >>"$log"
    case $code in
      0) result=ok ;;
      124 | 137) result="stopped after $seconds s" ;;
      *) result="failed ($code)" ;;
    esac
    if [ "$code" != 0 ]; then tail -n 25 "$work/stage.txt"; fi
  fi
  printf '=== %s: %s (%ss)\n' "$name" "$result" "$((SECONDS - began))"
  table+=$(printf '%-24s %-24s %5ss' "$name" "$result" "$((SECONDS - began))")$'\n'
}

importing='
import os, fastadam, fastadam.kernels.cpu
from bench import environment
tree = os.environ["FASTADAM_TREE"]
assert all(m.__file__.startswith(tree) for m in (fastadam, fastadam.kernels)), fastadam.__file__
print("fastadam and its kernels come from the tree, bench from", environment.ROOT)
'
stage "import" 60 "$python" -c "$importing"
if [ "$code" != 0 ]; then exit 1; fi

# Files are named because others may import what is not there. `bench` is a package: the default import mode
# would put its parent, the root, before the tree.
mapfile -t gpu_tests < <(grep -lE 'mark\.gpu' tests/test_*.py)
if [ "${#gpu_tests[@]}" = 0 ]; then echo "no test is marked gpu" && exit 1; fi
pytest_quiet=("$python" -m pytest -q -p no:cacheprovider --durations=5)
if [ "$dry_run" = 1 ]; then
  stage "GPU tests skip" 60 "${pytest_quiet[@]}" -m gpu "${gpu_tests[@]}"
  if [ "$code" != 0 ] || ! grep -qE '[0-9]+ skipped' "$work/stage.txt"; then failed=1; fi
  if grep -qE '[0-9]+ passed' "$work/stage.txt"; then failed=1; fi
  stage "GPU benchmarks skip" 60 "${pytest_quiet[@]}" --import-mode=importlib bench/test_gpu_step.py
  if [ "$code" != 0 ] || ! grep -qE '[0-9]+ skipped' "$work/stage.txt"; then failed=1; fi
  for program in gpu_compare gpu_phase gpu_launch gpu_torch; do
    says='"$0" -m bench.$1 && exit 1; [ $? = 2 ]' # as where there is nothing to measure
    stage "bench.$program skips" 60 bash -c "$says" "$python" "$program"
    if [ "$code" != 0 ] || ! grep -q '^nothing to measure: ' "$work/stage.txt"; then failed=1; fi
  done
  printf '\n%s' "$table"
  exit "$failed"
fi

nvidia-smi >>"$log" 2>&1
facts='
import json, sys
from bench import gpu, gpu_program
reason = gpu.missing()
if reason: sys.exit(reason)
print(json.dumps(gpu_program.facts(gpu.open_device()), indent=2))
'
stage "environment" 60 "$python" -c "$facts"

stage "GPU tests" 150 "${pytest_quiet[@]}" -m gpu "${gpu_tests[@]}"
if [ "$code" != 0 ] || ! grep -qE '[0-9]+ passed' "$work/stage.txt"; then failed=1; fi # all skipped is no success
tests_line=$(tail -n 1 "$work/stage.txt")

stage "GPU comparison" 150 "$python" -m bench.gpu_compare --budget-seconds 110 --output "$out"
stage "GPU phase" 85 "$python" -m bench.gpu_phase --budget-seconds 55 --output "$out"
stage "GPU tensors" 45 "$python" -m bench.gpu_torch --output "$out"
stage "GPU launches" 45 "$python" -m bench.gpu_launch --output "$out"
FASTADAM_GPU_SIZES="${FASTADAM_GPU_SIZES:-1Ki 1Mi 64Mi}" stage "GPU pytest-benchmark" 60 \
  "${pytest_quiet[@]}" --import-mode=importlib bench/test_gpu_step.py \
  --benchmark-json="$work/gpu-pytest-benchmark.json" # the sizes of the comparison again: its table is in the log

# The CPU of the same machine. Other libraries would take the GPU: hide it.
export CUDA_VISIBLE_DEVICES= JAX_PLATFORMS=cpu
stage "CPU comparison" 90 "$python" -m bench.compare --starts 3 --rounds 3 --output "$out"
stage "CPU scaling" 60 "$python" -m bench.scaling --rounds 11 --output "$out"

mapfile -t results < <(find "$out" -maxdepth 1 -name '*.json' -newer "$work/start" | sort)
{
  printf '# Results of %s\n\nGPU tests: %s\n\n```\n%s```\n\n' "$(date -u +%F)" "$tests_line" "$table"
  "$python" -m bench.gpu_report "${results[@]}"
} >"$out/gpu-summary.md" 2>>"$log"

if [ "$(wc -c <"$log")" -gt 8000000 ]; then # a failing test can print arrays
  tail -c 8000000 "$log" >"$work/log.txt" && mv "$work/log.txt" "$log"
fi
cat "$out/gpu-summary.md"
printf '\n%sGPU tests: %s\n' "$table" "$tests_line"
exit "$failed"
