#!/usr/bin/env bash
# From a fresh clone to the demo's answer: a number hidden 16,000 tokens back, read by a model trained on 2,048.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/env.sh
prompt=weights/demo/prompts/needle-16k.txt

say() { printf '%s\n' "$*" >&2; }

say "1. An environment in .venv: the first time this fetches torch, which takes some minutes; then a second."
make_env ""
say "2. $prompt: a diary of 16,000 tokens, for a model that was trained on 2,048. Its end:"
say "   $(tail -n 1 "$prompt")"
say "   Expected: $(grep -om 1 'copper-lantern is [0-9]*' "$prompt" | grep -o '[0-9]*')"
say "3. The model reads it (some seconds, the first time for kernels to be compiled) and answers:"
started=$SECONDS
minirea generate --model weights/demo --prompt "$prompt" --max-tokens 16 --stop .
say "Took $((SECONDS - started)) s. Now with your own text: source .venv/bin/activate; minirea generate --help"
