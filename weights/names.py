"""One table of names: how a checkpoint spells each tensor, and which rows of which of our tensors it fills."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Final, NamedTuple

from minirea.config import ModelConfig

# A "*" stands for the layer. Rows of the table that share our name are stacked in this order into one tensor, so that
# q, k and v are one matrix product, and gate and up another. Letters of the shapes are the project's key
# (HD = num_heads * head_dim). The last column says which config flag gives the module a bias.
# fmt: off
_TABLE: Final = (
    # Hugging Face                              Mistral's own               ours                  shape   bias
    ("model.embed_tokens",                      "tok_embeddings",           "embed",              "V E",  None),
    ("model.layers.*.input_layernorm",          "layers.*.attention_norm",  "layers.*.attn_norm", "E",    None),
    ("model.layers.*.self_attn.q_proj",         "layers.*.attention.wq",    "layers.*.qkv",       "HD E", "qkv"),
    ("model.layers.*.self_attn.k_proj",         "layers.*.attention.wk",    "layers.*.qkv",       "GD E", "qkv"),
    ("model.layers.*.self_attn.v_proj",         "layers.*.attention.wv",    "layers.*.qkv",       "GD E", "qkv"),
    ("model.layers.*.self_attn.o_proj",         "layers.*.attention.wo",    "layers.*.o",         "E HD", "o"),
    ("model.layers.*.post_attention_layernorm", "layers.*.ffn_norm",        "layers.*.mlp_norm",  "E",    None),
    ("model.layers.*.mlp.gate_proj",            "layers.*.feed_forward.w1", "layers.*.gate_up",   "F E",  "mlp"),
    ("model.layers.*.mlp.up_proj",              "layers.*.feed_forward.w3", "layers.*.gate_up",   "F E",  "mlp"),
    ("model.layers.*.mlp.down_proj",            "layers.*.feed_forward.w2", "layers.*.down",      "E F",  "mlp"),
    ("model.norm",                              "norm",                     "norm",               "E",    None),
    ("lm_head",                                 "output",                   "head",               "V E",  None),
)
# fmt: on

# Mistral's own RoPE rotates neighbouring rows (2i, 2i + 1) of a head, ours rows (i, i + D/2).
_INTERLEAVED: Final = ("layers.*.attention.wq", "layers.*.attention.wk")

# Buffers that older exports saved with the weights, which follow from the config, and scales for quantizing activations
# or the cache, which stay as precise as they are.
_IGNORED: Final = re.compile(
    r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|rope\.freqs|(input|output|q|k|v)_scale|input_scale_ub)"
)
_LAYER: Final = re.compile(r"((?:model\.)?layers\.)(0|[1-9][0-9]{0,8})\.")
_IN_A_LAYER: Final = re.compile(r"(model\.)?layers\.")


class Place(NamedTuple):
    """Where a checkpoint tensor of `shape` goes: the part `kept` of it to our tensor `name`, from row first_row on.

    `kept` has a range for each dimension: all of it, unless this is one of several ranks. Nothing is kept of what
    another rank holds alone. `interleaved` is the head dim D where RoPE pairs are neighbouring rows and have to be
    split into halves, else 0.
    """

    name: str
    first_row: int
    shape: tuple[int, ...]
    kept: tuple[range, ...]
    interleaved: int = 0

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + len(self.kept[0]))

    @property
    def slot(self) -> tuple[str, int]:
        """What no two tensors of a checkpoint may share."""
        return self.name, self.first_row


def _ranges(config: ModelConfig) -> dict[str, range]:
    """What is kept of a dimension, by the letters of the table."""
    part = config.part
    rank = part.rank if part else 0
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "E": range(config.hidden_size),
        "F": part.features if part else range(config.mlp_size),
        "V": range(config.vocab_size),
        "HD": range(heads * rank, heads * (rank + 1)),
        "GD": range(kv_heads * rank, kv_heads * (rank + 1)),
    }


class NameTable:
    """The table for one config. `shapes` maps our names ("*" for the layer) to shapes, a tied head left out.

    With a config of one rank's part, places keep what the rank holds: rows of the matrices that end in heads, features
    or logits, columns of those that begin with them. What is added after such a matrix, the first rank adds.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.num_layers = config.num_layers
        self.quantized, self.packed = config.quantized, config.packing is not None
        self.tied = config.tie_word_embeddings
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._hugging_face: dict[str, Place] = {}
        self._mistral: dict[str, Place] = {}
        biases = {"qkv": config.qkv_bias, "o": config.o_bias, "mlp": config.mlp_bias, None: False}
        held, whole = _ranges(config), _ranges(config.part.whole if config.part else config)
        for hugging_face, mistral, ours, letters, bias in _TABLE:
            dimensions = letters.split()
            shape = tuple(len(whole[letter]) for letter in dimensions)
            kept = tuple(held[letter] for letter in dimensions)
            if ours == "head":
                kept = (config.head_rows, *kept[1:])
            split_columns = len(kept) > 1 and len(kept[1]) < shape[1]
            for kind, dims in (("weight", 2), ("bias", 1)):
                if kind == "bias" and not biases[bias]:
                    continue
                name, part = f"{ours}.{kind}", kept[:dims]
                if kind == "bias" and split_columns and config.part and config.part.rank:
                    part = (range(0),)
                first_row = self.shapes[name][0] if name in self.shapes else 0
                if len(part[0]):
                    self.shapes[name] = (first_row + len(part[0]), *map(len, part[1:]))
                place = Place(name, first_row, shape[:dims], part)
                interleaved = config.head_dim if mistral in _INTERLEAVED else 0
                self._hugging_face[f"{hugging_face}.{kind}"] = place
                self._mistral[f"{mistral}.{kind}"] = place._replace(interleaved=interleaved)
        if self.tied:
            del self.shapes["head.weight"]

    def find(self, checkpoint_name: str) -> Place | None:
        """The place of a checkpoint's tensor, None if the config has none for it.

        Hugging Face's base-model checkpoints leave "model." out, so it may be absent.
        """
        pattern, layer = _split(checkpoint_name)
        place = self._find_pattern(pattern)
        if place is None or layer >= self.num_layers:
            return None
        return place._replace(name=place.name.replace("*", str(layer)))

    def changes_the_model(self, checkpoint_name: str) -> bool:
        """Whether a tensor without a place belongs to a layer, or to a module of the table: a bias, say.

        The checkpoint's model is then another than the config's. Other tensors, such as a value head, do not count.
        """
        module = checkpoint_name.rpartition(".")[0]
        return bool(_IN_A_LAYER.match(checkpoint_name)) or self._find_pattern(f"{module}.weight") is not None

    def _find_pattern(self, pattern: str) -> Place | None:
        hugging_face, mistral = self._hugging_face, self._mistral
        return hugging_face.get(pattern) or mistral.get(pattern) or hugging_face.get(f"model.{pattern}")

    def is_redundant(self, place: Place) -> bool:
        """Whether the place is the head's although the embedding is the head."""
        return place.name == "head.weight" and self.tied

    def count(self) -> int:
        """How many tensors a complete checkpoint holds."""
        return sum(self.num_layers if "*" in pattern else 1 for pattern in self._required(self._hugging_face))

    def expected(self, checkpoint_names: Collection[str]) -> Iterator[tuple[str, Place]]:
        """Every tensor that a complete checkpoint holds, in the spelling that most of the given names are in.

        A generator, because a hostile config can ask for more layers than memory holds names.
        """
        patterns = [_split(name)[0] for name in checkpoint_names]
        votes = [
            sum(pattern in places or f"model.{pattern}" in places for pattern in patterns)
            for places in (self._hugging_face, self._mistral)
        ]
        spelling = self._required(self._mistral if votes[1] > votes[0] else self._hugging_face)
        yield from ((pattern, place) for pattern, place in spelling.items() if "*" not in pattern)
        for layer in map(str, range(self.num_layers)):
            for pattern, place in spelling.items():
                if "*" in pattern:
                    yield pattern.replace("*", layer), place._replace(name=place.name.replace("*", layer))

    def _required(self, places: dict[str, Place]) -> dict[str, Place]:
        return {pattern: place for pattern, place in places.items() if not self.is_redundant(place)}


def is_ignored(checkpoint_name: str) -> bool:
    """Whether a tensor is a buffer that carries nothing the config does not say."""
    return _IGNORED.fullmatch(checkpoint_name) is not None


def _split(checkpoint_name: str) -> tuple[str, int]:
    """A name's pattern and layer; layer 0 where it has none. A literal "*" in a name must match no pattern."""
    match = _LAYER.match(checkpoint_name)
    if match is None:
        return checkpoint_name.replace("*", "?"), 0
    return f"{match[1]}*.{checkpoint_name[match.end() :]}", int(match[2])
