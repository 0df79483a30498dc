"""Trains the demo model: a 5M-parameter LLaMA that retrieves a number hidden in its context.

    python tools/train_demo.py --text BOOKS --out DIR              # the whole recipe, one GPU
    python tools/train_demo.py --text BOOKS --out DIR --stop-after 540    # ... in pieces: run it again with --resume
    python tools/train_demo.py --tiny --out DIR                    # a minute on a CPU, to see that it works

DIR becomes a Hugging Face checkpoint directory; DIR/state holds what --resume needs. Nothing here is about ReAttention:
it is an ordinary causal language model with ordinary RoPE, trained on at most 2,048 tokens of context. The model and
its training forward pass are transformers' own; minirea only runs what comes out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from demo_data import ANSWER, BOS, EOS, TEXT, Batches, Samples, train_tokenizer, training_texts
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from minirea.errors import InputError, MinireaError, MissingFileError

STATE_FOLDER: Final = "state"
SHARD_BYTES: Final = 15 * 2**20  # small files: they survive transfers that limit the size of one
SAVE_SECONDS: Final = 60.0
LOG_STEPS: Final = 100


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes the result. Lengths are tokens; `stages` are (up to this fraction of the run, context).

    Retrieval forms within the first 1,000 steps. The rest is chosen for the running text: longer training, or a usual
    weight decay of 0.1, learns the few books by heart, and continuations of anything else turn into nonsense.
    """

    hidden_size: int = 256
    mlp_size: int = 688
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    vocab_size: int = 2048
    context: int = 2048
    rope_theta: float = 500_000.0
    stages: tuple[tuple[float, int], ...] = ((0.3, 256), (0.45, 512), (0.65, 1024), (1.0, 2048))
    batch_tokens: int = 32_768
    steps: int = 3_500
    warmup_steps: int = 200
    decay_from: float = 0.4
    learning_rate: float = 3e-3
    weight_decay: float = 1.5
    text_weight: float = 0.3
    text_noise: float = 0.1
    generated_chars: int = 600_000
    seed: int = 0

    def contexts(self) -> list[int]:
        """The context length of every step. Retrieval does not form when training starts with long contexts."""
        return [next(c for upto, c in self.stages if step < upto * self.steps) for step in range(self.steps)]

    def rate(self, step: int) -> float:
        """Learning rate of a step: warm-up, then constant, then linear to zero from `decay_from` of the run on."""
        decay = (1.0 - step / self.steps) / (1.0 - self.decay_from)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps, decay)


TINY: Final = Recipe(
    hidden_size=64, mlp_size=128, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, vocab_size=512, context=256,
    stages=((0.5, 128), (1.0, 256)), batch_tokens=2048, steps=300, warmup_steps=20, generated_chars=60_000,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------
def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """A fresh model. Projections that write to the residual stream start smaller, by how many of them add up."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.mlp_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.context,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.mul_((2 * recipe.num_layers) ** -0.5)
    return model


def token_losses(hidden_BTE: Tensor, head_VE: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy of every token, float32 [B, T]."""
    logits_BTV = F.linear(hidden_BTE, head_VE).float()
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)


class Trainer:
    """One model, its optimizers and the step they are at."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.step = 0
        self.seconds = 0.0
        on_gpu = device.type == "cuda"
        if on_gpu:
            # Not the default stream: CUDA graphs cannot be captured on it, nor use gradients that were made on it.
            torch.cuda.set_stream(torch.cuda.Stream())
        self.model = build_model(recipe).to(device)
        self._rate = torch.zeros((), device=device)
        self.optimizers = build_optimizers(self.model, self._rate, recipe.weight_decay)
        self._token_losses: Callable[..., Tensor] = token_losses
        self._update: Callable[[Tensor, Tensor], Tensor] = self._eager_update
        if on_gpu:
            # Layer by layer: all layers share one compiled graph per context length.
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
            self._token_losses = torch.compile(token_losses, dynamic=False)
            self._update = GraphedUpdate(self._eager_update)

    def losses(self, ids: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss over running text and over answers; ids and classes are [B, T + 1], on the device."""
        ids, targets_BT, classes = ids[:, :-1].int(), ids[:, 1:].long(), classes[:, 1:]
        inner = self.model.model
        positions = torch.arange(ids.shape[1], device=self.device)[None]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False):
            hidden_BTE = inner.embed_tokens(ids)
            rope = inner.rotary_emb(hidden_BTE, positions)
            for layer in inner.layers:
                hidden_BTE = layer(hidden_BTE, position_embeddings=rope)
            losses_BT = self._token_losses(inner.norm(hidden_BTE), self.model.lm_head.weight, targets_BT)
        return _mean_where(losses_BT, classes == TEXT), _mean_where(losses_BT, classes == ANSWER)

    def train_step(self, ids: Tensor, classes: Tensor) -> Tensor:
        """One update; returns the two losses of `losses` as a tensor [2], still on the device."""
        self._rate.fill_(self.recipe.rate(self.step))
        self.step += 1
        return self._update(ids.to(self.device), classes.to(self.device))

    def _eager_update(self, ids: Tensor, classes: Tensor) -> Tensor:
        text_loss, answer_loss = self.losses(ids, classes)
        (self.recipe.text_weight * text_loss + answer_loss).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return torch.stack([text_loss, answer_loss]).detach()


class GraphedUpdate:
    """Replays an update as a CUDA graph, one for every shape of the batch.

    A step of this model is hundreds of short kernels; launched one by one they leave the GPU idle half of the time. The
    first calls of a shape run as they are, which compiles kernels and creates optimizer state; then one is captured.
    """

    WARMUP_CALLS: Final = 3

    def __init__(self, update: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._eager = update
        self._calls: dict[torch.Size, int] = {}
        self._pool = torch.cuda.graph_pool_handle()  # the graphs run one at a time, so they may share memory
        self._captured: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}

    def __call__(self, ids: Tensor, classes: Tensor) -> Tensor:
        """The losses [2] of this update; the next call of the same shape overwrites them."""
        calls = self._calls[ids.shape] = self._calls.get(ids.shape, 0) + 1
        if calls <= self.WARMUP_CALLS:
            return self._eager(ids, classes)
        if ids.shape not in self._captured:
            graph = torch.cuda.CUDAGraph()
            static_ids, static_classes = ids.clone(), classes.clone()
            with torch.cuda.graph(graph, pool=self._pool, stream=torch.cuda.current_stream()):
                losses = self._eager(static_ids, static_classes)
            self._captured[ids.shape] = (graph, static_ids, static_classes, losses)
        graph, static_ids, static_classes, losses = self._captured[ids.shape]
        static_ids.copy_(ids)
        static_classes.copy_(classes)
        graph.replay()
        return losses


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------
# Optimizers
# ---------------------------------------------------------------------------------------------------------------
class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024, "Muon"), for the weight matrices.

    All matrices of one shape are handled as one batch: for a model this small, launching kernels matrix by matrix would
    cost more than the forward pass. The update's root mean square is 0.2, about that of AdamW, so that both take the
    same learning rate (Liu et al. 2025, arXiv 2502.16982).
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: Tensor, weight_decay: float) -> None:
        """`lr` is a tensor, read at every step, so that a captured step follows the schedule."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002  the base class has it
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for param in group["params"]:
                by_shape.setdefault(param.shape, []).append(param)
            for params in by_shape.values():
                self._update(params, group["lr"], group["weight_decay"], group["momentum"])

    def _update(self, params: list[Tensor], lr: Tensor, weight_decay: float, momentum: float) -> None:
        grads = [param.grad for param in params if param.grad is not None]
        for param in params:
            if "momentum" not in self.state[param]:
                self.state[param]["momentum"] = torch.zeros_like(param)
        buffers = [self.state[param]["momentum"] for param in params]
        torch._foreach_lerp_(buffers, grads, 1.0 - momentum)
        nesterov = torch._foreach_lerp(grads, buffers, momentum)
        updates = orthogonalize(torch.stack(list(nesterov))).to(params[0].dtype)
        scale = 0.2 * max(params[0].shape) ** 0.5
        torch._foreach_mul_(params, 1.0 - lr * weight_decay)
        torch._foreach_sub_(params, list((updates * (lr * scale)).unbind()))


def orthogonalize(matrices_NRC: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: singular values end between 0.7 and 1.2.

    Five steps of the quintic Newton-Schulz iteration x <- a x + b (x x^T) x + c (x x^T)^2 x, in bfloat16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x = matrices_NRC.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if tall else x


def build_optimizers(model: LlamaForCausalLM, rate: Tensor, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms; `rate` is their learning rate.

    The norms do not decay: they set how peaked attention and predictions may get.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    groups = [
        {"params": [model.model.embed_tokens.weight], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    on_gpu = rate.is_cuda
    adamw = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=on_gpu, capturable=on_gpu)
    return [adamw, Muon(matrices, lr=rate, weight_decay=weight_decay)]


# ---------------------------------------------------------------------------------------------------------------
# State on disk
# ---------------------------------------------------------------------------------------------------------------
def save_state(trainer: Trainer, folder: Path) -> None:
    """Writes everything that --resume needs into `folder`, which is replaced in one move once it is complete."""
    names = {id(param): name for name, param in trainer.model.named_parameters()}
    tensors = {f"weight/{name}": param.detach() for name, param in trainer.model.named_parameters()}
    for optimizer in trainer.optimizers:
        for param, values in optimizer.state.items():
            tensors |= {f"{key}/{names[id(param)]}": value for key, value in values.items()}
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, shard in enumerate(_shards(tensors)):
        save_file({name: tensor.contiguous() for name, tensor in shard.items()}, partial / f"{number}.safetensors")
    meta = {"step": trainer.step, "seconds": trainer.seconds, "recipe": dataclasses.asdict(trainer.recipe)}
    (partial / "state.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def load_state(trainer: Trainer, folder: Path) -> None:
    """Restores what save_state wrote; the recipe has to be the same, as the rest of the schedule depends on it."""
    path = folder / "state.json"
    if not path.is_file():
        raise MissingFileError(f"--resume: no {path}, expected the state of an earlier run")
    meta = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(dataclasses.asdict(trainer.recipe)))
    for key, value in wanted.items():
        if meta["recipe"].get(key) != value:
            raise InputError(f"{path}: {key} is {meta['recipe'].get(key)}, expected {value} as in this run's recipe")
    params = dict(trainer.model.named_parameters())
    owner = {id(p): optimizer for optimizer in trainer.optimizers for g in optimizer.param_groups for p in g["params"]}
    for shard in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            kind, param = name.split("/")[0], params[name.split("/")[1]]
            if kind == "weight":
                param.data.copy_(tensor)
            else:
                owner[id(param)].state[param][kind] = tensor.to(param.device)
    trainer.step, trainer.seconds = meta["step"], meta["seconds"]


def export(trainer: Trainer, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the Hugging Face directory: config, bfloat16 weights, tokenizer, generation config."""
    weights = {name: p.detach().to(torch.bfloat16).cpu() for name, p in trainer.model.named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = trainer.model.config.to_diff_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    ids = {"bos_token_id": tokenizer.token_to_id(BOS), "eos_token_id": tokenizer.token_to_id(EOS)}
    _write_json(folder / "config.json", config | ids)
    _write_json(folder / "generation_config.json", {**ids, "do_sample": False})
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "model_max_length": trainer.recipe.context,
            "clean_up_tokenization_spaces": False,
        },
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------
def train(trainer: Trainer, samples: Samples, out: Path, workers: int, stop_after: float) -> list[dict[str, float]]:
    """Trains from the trainer's step to the end of the recipe or `stop_after` seconds; returns the logged losses."""
    recipe = trainer.recipe
    loader = torch.utils.data.DataLoader(
        Batches(samples, recipe.batch_tokens, recipe.contexts()),
        sampler=range(trainer.step, recipe.steps),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=8 if workers else None,
    )
    history: list[dict[str, float]] = []
    started, saved, before = time.monotonic(), time.monotonic(), trainer.seconds
    bar = tqdm(total=recipe.steps, initial=trainer.step, unit="step", mininterval=5.0, dynamic_ncols=True)
    for ids, classes in loader:
        losses = trainer.train_step(ids, classes)
        bar.update()
        now = time.monotonic()
        trainer.seconds = before + now - started
        stop = now - started > stop_after
        if trainer.step % LOG_STEPS == 0 or trainer.step == recipe.steps or stop:
            text, answer = losses.tolist()  # waits for the device
            history.append({"step": trainer.step, "text": text, "answer": answer})
            bar.write(
                f"step {trainer.step}  context {ids.shape[1] - 1}  text {text:.3f}  answer {answer:.4f}  "
                f"{trainer.seconds:.0f} s",
                file=sys.stderr,
            )
        if stop:
            break
        if now - saved > SAVE_SECONDS:
            save_state(trainer, out / STATE_FOLDER)
            saved = now
    bar.close()
    return history


def run(recipe: Recipe, args: argparse.Namespace) -> list[dict[str, float]]:
    """Data, model, training and export, as the command line asks; returns the logged losses."""
    texts = training_texts(args.text, args.hold_out, recipe.generated_chars, recipe.seed + 1000)
    tokenizer = train_tokenizer(texts, recipe.vocab_size)
    samples = Samples(tokenizer, texts, recipe.text_noise, recipe.seed)
    trainer = Trainer(recipe, torch.device(args.device))
    if args.resume:
        load_state(trainer, args.out / STATE_FOLDER)
    history = train(trainer, samples, args.out, args.workers, args.stop_after)
    save_state(trainer, args.out / STATE_FOLDER)
    export(trainer, tokenizer, args.out)
    return history


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model.", allow_abbrev=False)
    parser.add_argument("--text", type=Path, help="folder of .txt files; needed unless --tiny")
    parser.add_argument("--hold-out", default="moby_dick*", help="files to leave out of training (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="directory to write the model to")
    parser.add_argument("--steps", type=int, help="length of the schedule in steps (default: the recipe's)")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state")
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="seconds to train for in this call")
    parser.add_argument("--tiny", action="store_true", help="a model and a run small enough for a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, help="processes that make samples (default: cores - 2; 0 for --tiny)")
    args = parser.parse_args(argv)
    if args.workers is None:
        args.workers = 0 if args.tiny else max(1, (os.cpu_count() or 1) - 2)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    recipe = TINY if args.tiny else Recipe()
    if args.steps is not None:
        recipe = dataclasses.replace(recipe, steps=args.steps)
    try:
        if args.text is None and not args.tiny:
            raise InputError("--text: not given, expected a folder of .txt files to train on (only --tiny needs none)")
        run(recipe, args)
    except MinireaError as error:
        print(f"train_demo: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
