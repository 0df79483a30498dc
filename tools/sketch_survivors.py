"""How many keys survive by their sketches in a model's own decode steps, and whether each selection is the exact one.

    python tools/sketch_survivors.py --model weights/demo
    python tools/sketch_survivors.py --model DIR --text BOOK --tokens 16k --prompts 50

Every prompt is a part of the text. Its last tokens are read one by one, each voting alone, and every layer selects
twice: with sketches and without. Ends with status 1 if a selection or an output differs. Survivors are counted by the
bounds of the torch path, in as many slices of the middle as an H100 has for one key/value head.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
from bench_machine import build, device_name, tokens

import minirea
from minirea import attention
from minirea.config import DEVICES, ReAttentionConfig
from minirea.errors import MinireaError, MinireaWarning
from minirea.evaluation.text.diary import generate_text
from minirea.kernels import Sketch, reattention, reference
from minirea.kernels.fused.plan import sketch_tiles

PROCESSORS: Final = 132  # of an H100


class Comparison:
    """In place of the attention's call: selects with sketches and without, and counts.

    Attributes:
        layers: of each layer with sketches, shares of rows' keys that survive, and survivors of slices.
        steps: selections that were compared.
        wrong: those that differ, or whose outputs do.
    """

    def __init__(self) -> None:
        self.steps = self.wrong = 0
        self.layers: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = defaultdict(lambda: ([], []))
        self.keys: list[torch.Tensor] = []  # of the cache that is compared, by layer
        self.exact = reattention

    def __call__(
        self, q_THD: Any, k_GND: Any, v_GND: Any, n: Any, cos: Any, sin: Any, config: Any, *options: Any
    ) -> Any:
        impl, _, chunk_size, gather, sketch, *others = options
        tensors = q_THD, k_GND, v_GND, n, cos, sin, config, impl, True, chunk_size, gather
        out_THD, selection = self.exact(*tensors, sketch, *others)
        if sketch is not None:
            plain_THD, plain = self.exact(*tensors, None, *others)
            self.steps += 1
            self.wrong += not (_equal(selection, plain) and torch.equal(out_THD, plain_THD))
            layer = next(index for index, keys in enumerate(self.keys) if keys is k_GND)
            for counts, new in zip(self.layers[layer], survivors_of(q_THD, sketch, int(n), config), strict=True):
                counts.append(new)
        return out_THD


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, list):
        return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    return torch.equal(ours, theirs)


def survivors_of(
    q_1HD: torch.Tensor, sketch: Sketch, seq_len: int, config: ReAttentionConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row the share of its keys whose upper bound reaches the K-th largest lower bound, and how many there are
    of all rows of a head in each slice.
    """
    G, lo, hi = len(sketch.codes), config.global_size, seq_len - config.local_size
    queries = reference.quantize_queries(q_1HD.view(G, -1, q_1HD.shape[-1]))
    lower_GRN, upper_GRN = reference.score_bounds(*queries, sketch, lo, hi)
    survives_GRN = upper_GRN >= lower_GRN.topk(min(config.span_top_k, hi - lo)).values[..., -1:]
    slices = max(1, (PROCESSORS - 1) // G)
    per_slice = [part.sum((1, 2)) for part in survives_GRN.split(math.ceil((hi - lo) / slices), 2)]
    return survives_GRN.float().mean(2).flatten(), torch.cat(per_slice)


def compare(llm: minirea.LLM, text: str, num_tokens: int, prompts: int, steps: int) -> Comparison:
    """Read `prompts` parts of the text, of so many tokens each, the last `steps` of them one by one."""
    ids, model = llm.encode(text), llm.model
    if len(ids) < num_tokens + prompts:
        raise SystemExit(f"the text has {len(ids):,} tokens, expected at least {num_tokens + prompts:,}")
    comparison = Comparison()
    for number in range(prompts):
        start = number * (len(ids) - num_tokens) // prompts
        part, session = ids[start : start + num_tokens], llm.session(num_tokens)
        session.prefill(part[:-steps])
        comparison.keys = session.cache.k
        with mock.patch.object(attention, "reattention", comparison), torch.inference_mode():
            for token_id in part[-steps:]:
                model.attention.sketch_keys(session.cache)
                model.forward(torch.tensor([token_id], device=model.device), session.cache)
    return comparison


def spread(values: torch.Tensor, digits: int) -> str:
    """Median, 95 % and largest."""
    numbers = values.double().quantile(torch.tensor([0.5, 0.95, 1.0], dtype=torch.float64, device=values.device))
    return ", ".join(f"{number:.{digits}f}" for number in numbers.tolist())


def print_table(comparison: Comparison, room: int) -> None:
    """`room` is for the survivors of a slice; with more of them its keys are all scored."""
    print("| layer | of a row's keys, %: median, 95 %, most | of a slice | slices of which all keys are scored |")
    print("|---|---|---|---|")
    for layer, (shares, survivors) in sorted(comparison.layers.items()):
        row, of_slices = 100 * torch.cat(shares), torch.cat(survivors)
        full = int((of_slices > room).sum())
        print(f"| {layer} | {spread(row, 3)} | {spread(of_slices, 0)} | {full} of {len(of_slices):,} |")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True, metavar="DIR", help="a model directory")
    made.add_argument("--text", type=Path, metavar="FILE", help="what prompts are parts of (default: generated)")
    made.add_argument("--tokens", type=tokens, default=4096, metavar="N", help="of a prompt (default: 4k)")
    made.add_argument("--prompts", type=int, default=50, metavar="N", help="parts of the text (default: 50)")
    made.add_argument("--steps", type=int, default=4, metavar="N", help="tokens read one by one (default: 4)")
    made.add_argument("--device", choices=DEVICES, default="auto", help="default: the GPU if there is one")
    return made


def main() -> None:
    arguments = parser().parse_args()
    try:
        sys.exit(run(arguments))
    except (MinireaError, OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"sketch_survivors.py: error: {error}") from None


def run(arguments: argparse.Namespace) -> int:
    """Print what is found. Returns the exit status: 1 if a selection is not the exact one."""
    length = 8 * (arguments.tokens + 100 * arguments.prompts)  # characters; a token has fewer
    text = generate_text(0, length) if arguments.text is None else arguments.text.read_text()
    alone: dict[str, Any] = {"vote_window": 1, "carry_votes": False, "sketch": "int8"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MinireaWarning)  # sketches save nothing on a CPU
        llm = minirea.load(arguments.model, device=arguments.device, **alone)
    print(f"build {build()}; {device_name(llm.model.device.type)}; torch {torch.__version__}; {llm!r}")
    comparison = compare(llm, text, arguments.tokens, arguments.prompts, arguments.steps)
    if not comparison.steps:
        dense = llm.model.attention.dense_size
        raise SystemExit(f"nothing was selected: --tokens is {arguments.tokens:,}, expected more than {dense:,}")
    print_table(comparison, sketch_tiles(llm.config.head_dim).SURVIVORS)
    print(f"{comparison.steps - comparison.wrong:,} of {comparison.steps:,} selections and outputs are the exact ones")
    return int(comparison.wrong > 0)


if __name__ == "__main__":
    main()
