#!/usr/bin/env bash
# Environment, linters, types, tests. Usage: bash tools/test.sh [--gpu] [--here] [pytest arguments]
#   --gpu   also the tests that need a CUDA device
#   --here  use the Python on PATH as it is, without making .venv (minirea and its test extra must be installed there)
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/env.sh

marks="not gpu" here=
while [ $# -gt 0 ]; do
  case $1 in
    --gpu) marks="gpu or not gpu" ;;
    --here) here=1 ;;
    *) break ;;
  esac
  shift
done

[ -n "$here" ] || make_env "[test]"
if [ -z "$here" ]; then
  ruff check .
  ruff format --check .
  bash tools/types.sh
fi
if [ "$marks" = "not gpu" ]; then
  # As many processes as cores, with one thread each: two threads that wait for each other on a busy core take far longer.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  set -- -n auto --maxprocesses 4 --dist worksteal "$@"
fi
python3 -m pytest -m "$marks" "$@"
