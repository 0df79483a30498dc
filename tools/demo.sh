#!/usr/bin/env bash
# From a fresh clone to the demo's answer: a number hidden 16,000 tokens back, read by a model trained on 2,048.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/env.sh
make_env ""
minirea generate --model weights/demo --prompt weights/demo/prompts/needle-16k.txt --max-tokens 16 --stop .
