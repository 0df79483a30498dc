#!/usr/bin/env bash
# Environment, linters, types, tests; those of Triton's interpreter in a pytest of their own, at the end.
# Usage: bash tools/test.sh [--gpu] [--here] [pytest arguments]
#   --gpu   also the tests that need a CUDA device
#   --here  use the Python on PATH as it is, without making .venv (minirea and its test extra must be installed there)
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/env.sh

marks="not gpu and not interpret" here=
while [ $# -gt 0 ]; do
  case $1 in
    --gpu) marks="not interpret" ;;
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
# pytest says 5 where no test was selected: arguments may select tests of one kind only.
run() {
  local code=0
  python3 -m pytest "$@" || code=$?
  [ $code = 0 ] && ran=1 || [ $code = 5 ] || exit $code
}
ran=
# As many processes as cores, with one thread each: two threads that wait for each other on a busy core take far longer.
spread() { OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} run -n auto --maxprocesses 4 --dist worksteal "$@"; }
if [ "$marks" = "not interpret" ]; then run -m "$marks" "$@"; else spread -m "$marks" "$@"; fi
spread -m interpret "$@"
[ -n "$ran" ] || exit 5
