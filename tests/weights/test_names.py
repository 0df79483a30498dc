"""The table of names by itself; that it is right is shown with whole checkpoints in test_loader.py."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from testing import tiny_config

from minirea.errors import InputError
from minirea.weights.names import NameTable, Place, is_ignored

CONFIG = tiny_config(12, 20, hidden_size=16, head_dim=6, vocab_size=11)


def whole(name: str, first_row: int, shape: tuple[int, ...], interleaved: int = 0) -> Place:
    return Place(name, first_row, shape, tuple(map(range, shape)), interleaved)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.11.self_attn.k_proj.weight", whole("layers.11.qkv.weight", 24, (12, 16))),
        ("layers.11.self_attn.k_proj.weight", whole("layers.11.qkv.weight", 24, (12, 16))),
        ("layers.11.attention.wk.weight", whole("layers.11.qkv.weight", 24, (12, 16), 6)),
        ("layers.3.attention.wv.weight", whole("layers.3.qkv.weight", 36, (12, 16))),
        ("layers.3.feed_forward.w3.weight", whole("layers.3.gate_up.weight", 20, (20, 16))),
        ("norm.weight", whole("norm.weight", 0, (16,))),
        ("output.weight", whole("head.weight", 0, (11, 16))),
    ],
)
def test_places(name: str, place: Place) -> None:
    assert NameTable(CONFIG).find(name) == place


@pytest.mark.parametrize(
    "name",
    [
        "",
        "model.norm",
        "model.layers.12.self_attn.k_proj.weight",
        "model.layers.-1.self_attn.k_proj.weight",
        "model.layers.01.self_attn.k_proj.weight",
        "model.layers.٣.self_attn.k_proj.weight",
        "model.layers." + "9" * 5000 + ".self_attn.k_proj.weight",
        "model.layers.*.self_attn.k_proj.weight",
        "layers.*.attention.wk.weight",
        "model.layers.1.layers.2.self_attn.k_proj.weight",
        "model.layers.1.self_attn.k_proj.bias",
    ],
)
def test_names_without_a_place(name: str) -> None:
    assert NameTable(CONFIG).find(name) is None


def test_expected_is_complete_and_each_name_is_found_in_its_place() -> None:
    table = NameTable(CONFIG)
    for names in (["model.norm.weight"], ["layers.0.attention.wq.weight"]):
        expected = dict(table.expected(names))
        assert len(expected) == table.count() == 3 + 9 * 12
        assert names[0] in expected
        assert {name: table.find(name) for name in expected} == expected
        assert len({place.slot for place in expected.values()}) == len(expected)


def test_stacked_parts_tile_our_tensors() -> None:
    table = NameTable(CONFIG)
    rows: dict[str, int] = {}
    for _, place in table.expected([]):
        assert place.first_row == rows.get(place.name, 0)
        rows[place.name] = place.first_row + place.shape[0]
    assert len(rows) == 3 + 6 * 12
    for name, count in rows.items():
        pattern = "layers.*." + name.split(".", 2)[2] if name.startswith("layers.") else name
        assert table.shapes[pattern][0] == count


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_hold_all_of_every_matrix_once(ranks: int) -> None:
    """Each element of a matrix is held by one rank, but for embedding and norms, which all hold; a bias of what is
    summed over ranks is the first one's."""
    config = dataclasses.replace(CONFIG, num_kv_heads=4, num_heads=8, qkv_bias=True, o_bias=True, mlp_bias=True)
    tables = [NameTable(config.of_rank(rank, ranks)) for rank in range(ranks)]
    for name, place in NameTable(config).expected([]):
        found = [table.find(name) for table in tables]
        held = [part for part in found if part is not None and part.kept[0]]
        assert all(part.shape == place.shape for part in held)
        rows, columns = ([dict.fromkeys(part.kept[d]) for part in held if len(part.kept) > d] for d in (0, 1))
        module = name.rsplit(".", 2)[-2]
        if "norm" in module or "embed" in module:
            assert [list(r) for r in rows] == [list(range(place.shape[0]))] * ranks
        elif module in ("o_proj", "down_proj") and name.endswith("weight"):
            assert [list(r) for r in rows] == [list(range(place.shape[0]))] * ranks
            assert [c for part in columns for c in part] == list(range(place.shape[1]))
        else:
            assert [r for part in rows for r in part] == list(range(place.shape[0]))


@pytest.mark.parametrize(("ranks", "found"), [(3, "gpus is 3, expected a divisor of the model's 2"), (0, "0")])
def test_ranks_divide_the_key_value_heads(ranks: int, found: str) -> None:
    with pytest.raises(InputError, match=found):
        CONFIG.of_rank(0, ranks)


def test_expected_starts_at_once_however_many_layers_there_are() -> None:
    table = NameTable(dataclasses.replace(CONFIG, num_layers=2**31 - 1))
    assert [name for name, _ in itertools.islice(table.expected([]), 4)][-1] == "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("model.layers.7.self_attn.rotary_emb.inv_freq", True),
        ("rotary_emb.cos_cached", True),
        ("rope.freqs", True),
        ("model.xrotary_emb.inv_freq", False),
        ("model.rotary_emb.inv_freq.scale", False),
        ("model.norm.weight", False),
    ],
)
def test_ignored_buffers(name: str, ignored: bool) -> None:
    assert is_ignored(name) is ignored
