#!/usr/bin/env bash
# mypy over the package as it is installed: minirea with kernels/ and weights/ inside it. mypy cannot map folders to
# package names as setup.py does, so it is shown a tree of links.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD tree=.mypy_cache/tree
rm -rf "$tree" && mkdir -p "$tree/minirea"
ln -s "$root"/minirea/[!_]* "$root"/minirea/__*.py "$root/kernels" "$root/weights" "$tree/minirea/"
ln -s "$root"/tools/*.py "$tree/"
cd "$tree"
exec mypy --config-file "$root/.mypy.ini" --cache-dir "$root/.mypy_cache" .
