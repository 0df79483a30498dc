"""What tests share: tiny random checkpoints made on the fly, and the oracle that reads them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from minirea.compact import CompactMatrix, most_apart
from minirea.config import ModelConfig, RopeConfig

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(seed: int = 0, mistral: bool = False, family: str = "Llama", **fields: Any) -> Any:
    """A random transformers model whose every parameter matters: norms and biases are not left at 1 and 0."""
    import transformers

    torch.manual_seed(seed)
    values = TINY | fields
    family = "Mistral" if mistral else family
    if family == "Llama":
        values.pop("sliding_window", None)
    config = getattr(transformers, f"{family}Config")(**values)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.2 if parameter.dim() == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.normal_(1.0 if "norm" in name else 0.0, spread)
    return model


def tiny_config(num_layers: int = 2, mlp_size: int = 112, **fields: Any) -> ModelConfig:
    """Of 4 query heads and 2 key/value heads."""
    sizes = {"hidden_size": 64, "head_dim": 16, "vocab_size": 97, "max_position_embeddings": 256} | fields
    heads = {"num_heads": 4, "num_kv_heads": 2, "norm_eps": 1e-5, "rope": RopeConfig()}
    return ModelConfig(num_layers=num_layers, mlp_size=mlp_size, **sizes, **heads)


def write_checkpoint(
    directory: Path, model: Any, dtype: torch.dtype = torch.float32, shard_size: str = "5GB", **config_edits: Any
) -> Path:
    """Save `model` as a Hugging Face directory; a config edit of None removes the key."""
    model.to(dtype).save_pretrained(directory, max_shard_size=shard_size)
    if config_edits:
        edit_json(directory / "config.json", **config_edits)
    model.float()
    return directory


def edit_json(path: Path, **edits: Any) -> None:
    """Set keys of a JSON object in a file; None removes one."""
    values = json.loads(path.read_text()) | edits
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def random_ids(num_tokens: int, vocab_size: int = TINY["vocab_size"], seed: int = 0) -> list[int]:
    """Token ids that avoid the special ones."""
    return torch.randint(3, vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def planned_beyond(model: Any) -> int:
    """Bytes of a plan for weights of compact matrices that could be apart, and are not."""
    matrices = [model.head, *(matrix for layer in model.layers for matrix in layer)]
    compact = [matrix for matrix in matrices if isinstance(matrix, CompactMatrix)]
    return sum(8 * (most_apart(*matrix.shape) - len(matrix.column)) for matrix in compact)


def oracle(directory: Path) -> Any:
    """The transformers model of a directory, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def oracle_logits(directory: Path, ids: list[int]) -> torch.Tensor:
    """float32 [T, V] of one ordinary forward pass."""
    return oracle(directory)(torch.tensor([ids])).logits[0].float()


@torch.no_grad()
def oracle_greedy(directory: Path, ids: list[int], num_tokens: int) -> list[int]:
    """The next `num_tokens` greedy tokens of transformers, end-of-text ignored."""
    model = oracle(directory)
    model.generation_config.eos_token_id = None
    out = model.generate(torch.tensor([ids]), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    return out[0, len(ids) :].tolist()


def write_tokenizer(directory: Path, vocab_size: int = TINY["vocab_size"], **config: Any) -> Path:
    """A tokenizer.json whose tokens are single printable ASCII characters, after <unk>, <s> and </s>."""
    from tokenizers import Tokenizer, models

    characters = [chr(code) for code in range(32, 127)][: vocab_size - 3]
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    return directory


def in_threads(work: Callable[[Any], None], each: Iterable[Any]) -> None:
    """work(x) for each x, all at the same time."""
    threads = [threading.Thread(target=work, args=(x,)) for x in each]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


MISTRAL_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
}


def to_mistral(tensors: dict[str, torch.Tensor], head_dim: int) -> dict[str, torch.Tensor]:
    """The same model in Mistral's own format: other names, and RoPE pairs in neighbouring rows of wq and wk."""
    result = {}
    for name, tensor in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            heads = tensor.view(-1, 2, head_dim // 2, *tensor.shape[1:])
            tensor = heads.transpose(1, 2).reshape(tensor.shape)
        name = name.removeprefix("model.")
        for theirs, mistral in MISTRAL_NAMES.items():
            name = name.replace(theirs, mistral)
        result[name] = tensor.contiguous()
    return result


def write_mistral(directory: Path, model: Any) -> Path:
    """The same weights in Mistral's own format."""
    from safetensors.torch import save_file

    c = model.config
    directory.mkdir(parents=True, exist_ok=True)
    tensors = to_mistral(model.state_dict(), c.head_dim)
    save_file(tensors, directory / "consolidated.safetensors")
    params = {
        "dim": c.hidden_size,
        "n_layers": c.num_hidden_layers,
        "head_dim": c.head_dim,
        "hidden_dim": c.intermediate_size,
        "n_heads": c.num_attention_heads,
        "n_kv_heads": c.num_key_value_heads,
        "norm_eps": c.rms_norm_eps,
        "vocab_size": c.vocab_size,
        "rope_theta": c.rope_parameters["rope_theta"],
        "max_position_embeddings": c.max_position_embeddings,
    }
    (directory / "params.json").write_text(json.dumps(params))
    return directory


def part_of(weights: dict[str, torch.Tensor], config: ModelConfig, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """The part of whole weights that a rank should have, cut by torch."""

    def cut(tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return tensor.chunk(ranks, dim)[rank]

    D, H, G = config.head_dim, config.num_heads, config.num_kv_heads
    found = {}
    for name, tensor in weights.items():
        kind, last = name.split(".")[-2:]
        if kind == "qkv":
            found[name] = torch.cat([cut(part) for part in tensor.split([H * D, G * D, G * D])])
        elif kind == "gate_up":
            found[name] = torch.cat([cut(part) for part in tensor.chunk(2)])
        elif kind in ("o", "down"):
            if last == "weight":
                found[name] = cut(tensor, 1)
            elif rank == 0:
                found[name] = tensor
        else:
            found[name] = cut(tensor) if kind == "head" else tensor
    return found
