# Sourced by demo.sh and test.sh: makes .venv in the project's root and installs minirea into it, once.
# Usage: make_env EXTRAS ("" or "[test]"). PYTHON names the interpreter to start from (3.11 or newer).
make_env() {
  local extras=$1 python=${PYTHON:-python3} stamp=.venv/.installed
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: $python is older than Python 3.11; set PYTHON to a newer one" >&2; return 1; }
  # An installation links single files: new ones need a new one.
  local wanted="$extras $({ cat setup.py tools/constraints.txt; find minirea kernels weights -name '*.py' | sort; } | cksum)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    "$python" -m venv .venv
    # torch first and by its exact version: a range would let pip look at, and fetch, other builds.
    .venv/bin/python -m pip install -q --disable-pip-version-check "$(grep '^torch==' tools/constraints.txt)"
    # Strict: else `import minirea` in the clone's parent directory would find the clone's folder, which is no package.
    .venv/bin/python -m pip install -q --disable-pip-version-check -c tools/constraints.txt \
      --config-settings editable_mode=strict -e ".$extras"
    echo "$wanted" >"$stamp"
  fi
  PATH=$PWD/.venv/bin:$PATH
}
