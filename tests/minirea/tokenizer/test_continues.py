"""Text in several calls: what `encode(..., continues=True)` appends to ids that are already there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizer_kinds import HARD_TEXTS, JSON_KINDS, SENTENCEPIECE_KINDS, train_sentencepiece
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors

from minirea.tokenizer import Tokenizer, load_tokenizer

PARTS = ("The old house by the sea", " was empty.", "\n\nQuestion: Where?", "the answer", "  two spaces ", "é日本🙂")


@pytest.fixture(
    scope="module",
    params=[*(("json", kind) for kind in JSON_KINDS), *(("sentencepiece", kind) for kind in SENTENCEPIECE_KINDS)],
)
def tokenizer(request: Any, tmp_path_factory: Any) -> Tokenizer:
    library, kind = request.param
    directory = tmp_path_factory.mktemp(kind)
    if library == "sentencepiece":
        train_sentencepiece(directory / "tokenizer.model", **SENTENCEPIECE_KINDS[kind])
        return load_tokenizer(directory)
    built = JSON_KINDS[kind]()
    built.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    built.save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory)


def ids_of(tokenizer: Tokenizer, *parts: str) -> list[int]:
    first, *others = parts
    ids = tokenizer.encode(first, add_special_tokens=False)
    for part in others:
        ids += tokenizer.encode(part, continues=True)
    return ids


def test_nothing_goes_around_a_continuation(tokenizer: Tokenizer) -> None:
    for text in HARD_TEXTS:
        ids = tokenizer.encode(text, continues=True)
        assert not {1, 2} & set(ids)
        assert ids == tokenizer.encode(text, add_special_tokens=False, continues=True)
    assert tokenizer.encode("", continues=True) == []


def test_a_text_cut_where_a_token_ends_has_the_ids_of_the_whole(tokenizer: Tokenizer) -> None:
    whole = "nobody knew which was which. The quick brown fox jumps over the lazy dog, and then the other foxes"
    ids = tokenizer.encode(whole, add_special_tokens=False)
    cuts = []
    for count in range(1, len(ids)):
        rest = tokenizer.stream(continues=True)
        before, after = tokenizer.decode(ids[:count]), "".join(map(rest.put, ids[count:])) + rest.flush()
        # Left out: an empty part, which is no text to continue, and white space that a model drops at the end of one.
        if before and before + after == whole and not before.endswith(" "):
            cuts.append(len(before))
    assert len(cuts) > 3
    for cut in cuts:
        assert ids_of(tokenizer, whole[:cut], whole[cut:]) == ids
    assert ids_of(tokenizer, *(whole[i:j] for i, j in zip([0, *cuts], [*cuts, None], strict=True))) == ids


def test_a_text_in_parts_decodes_to_the_parts(tokenizer: Tokenizer, request: Any) -> None:
    _, kind = request.node.callspec.params["tokenizer"]
    if kind in ("word_level", "unigram", "unigram_trainer_defaults"):
        pytest.skip("these do not keep every character of a text")
    for first in PARTS:
        for second in HARD_TEXTS:
            assert (
                tokenizer.decode(ids_of(tokenizer, first, second, first))
                == tokenizer.decode(tokenizer.encode(first, add_special_tokens=False))
                + second.replace("▁", " " if "byte_level" not in kind else "▁")
                + first
            )


def test_special_tokens_in_a_continuation(tokenizer: Tokenizer) -> None:
    """What follows one of them is encoded as it would be anywhere else in a text."""
    for more in ("</s>the fox", "the</s>the fox</s> the", "</s>"):
        expected = tokenizer.encode("<s>" + more, add_special_tokens=False)[1:]
        ids = tokenizer.encode(more, continues=True)
        assert ids[ids.index(2) :] == expected[expected.index(2) :]
        assert ids.count(2) == more.count("</s>")


PREFIXES = {
    "prepend": {"normalizer": normalizers.Prepend("▁")},
    "prepend in a sequence": {"normalizer": normalizers.Sequence([normalizers.Prepend("▁")])},
    "metaspace first": {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first")},
    "metaspace always": {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="always")},
    "metaspace in a sequence": {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Metaspace()])},
    "byte level": {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
}


@pytest.mark.parametrize("name", PREFIXES)
def test_every_way_to_put_a_prefix(tmp_path: Path, name: str) -> None:
    vocab = {token: i for i, token in enumerate(["<unk>", "▁", "Ġ", "a", "b"])}
    built = LibraryTokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    for part, step in PREFIXES[name].items():
        setattr(built, part, step)
    built.add_special_tokens(["<s>"])
    built.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    prefix = 2 if name == "byte level" else 1
    assert tokenizer.encode("a") == [prefix, 3]
    assert tokenizer.encode("a", continues=True) == [3]
    always = "first" not in name
    assert tokenizer.encode("a<s>b", continues=True) == [3, 5, *[prefix] * always, 4]
