"""Haystacks: exact lengths, sentences where they should be, and stretches that do not depend on each other."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from pathlib import Path

import pytest

from minirea.errors import InputError, MissingFileError
from minirea.evaluation.text.diary import generate_text
from minirea.evaluation.text.encoder import Encoder
from minirea.evaluation.text.haystack import Haystack, Stretch, hide, read_haystack, split_sentences
from minirea.evaluation.text.values import distinct, random_value, same_size
from minirea.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).parents[4]
DEMO = ROOT / "weights" / "demo"
SENTENCEPIECE = ROOT.parent / "shared" / "tokenizers" / "mistral.model.v1"


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "byte-level":
        return load_tokenizer(DEMO)
    if not SENTENCEPIECE.exists():
        pytest.skip(f"{SENTENCEPIECE.name} is not there")
    directory = tmp_path_factory.mktemp("sentencepiece")
    shutil.copy(SENTENCEPIECE, directory / "tokenizer.model")
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def encode() -> Encoder:
    return Encoder(load_tokenizer(DEMO))


def test_pieces_encoded_apart_read_as_one_text(tokenizer: Tokenizer) -> None:
    encode = Encoder(tokenizer)
    pieces = ["Rain fell.", " The sun rose, then 123 birds sang.", "\n\nA new day", "\nQuestion: why? Answer:"]
    ids = [i for piece in pieces for i in encode(piece)]
    assert tokenizer.decode([*encode.beginning, *ids]).strip() == "".join(pieces)
    assert encode.beginning == tokenizer.encode("Rain")[: len(encode.beginning)]


def test_filling_is_empty_lines(tokenizer: Tokenizer) -> None:
    encode = Encoder(tokenizer)
    ids = [*encode("one"), *encode.filling(7), *encode("two")]
    assert len(encode.filling(7)) == 7
    assert tokenizer.decode(ids).split() == ["one", "two"]
    assert encode.filling(-1) == []


def test_sentences_join_to_the_text() -> None:
    text = 'One. "Two!" said he.\n\nThree, without an end\n\nFour? Five'
    assert list(split_sentences(text)) == [
        "One.",
        ' "Two!"',
        " said he.",
        "\n\nThree, without an end",
        "\n\nFour?",
        " Five",
    ]
    diary = generate_text(seed=5, min_chars=5000)
    assert "".join(split_sentences(diary)) == diary.rstrip()


@pytest.mark.parametrize("tokens", [1, 2, 37, 1000, 5000])
def test_a_stretch_is_as_long_as_asked_even_if_the_text_is_not(encode: Encoder, tokens: int) -> None:
    sentences = list(split_sentences(" " + generate_text(seed=5, min_chars=4000)))
    haystack = Haystack(encode, iter(sentences))
    whole = [encode(sentence) for sentence in sentences]
    lap = [i for ids in whole for i in ids]
    for seed in range(5):
        stretch = haystack.stretch(random.Random(seed), tokens)
        assert len(stretch.ids) == tokens
        begin = next(
            b for b in range(len(lap)) if stretch.ids == list(itertools.islice(itertools.cycle(lap), b, b + tokens))
        )
        boundaries = set(itertools.accumulate(map(len, whole), initial=0)) | {0}
        assert begin in boundaries
        assert {(begin + start) % len(lap) for start in stretch.starts} <= boundaries
        assert stretch.starts[0] == 0


def test_stretches_differ_and_do_not_depend_on_what_was_asked_before(encode: Encoder) -> None:
    fresh, used = read_haystack([], encode), read_haystack([], encode)
    used.stretch(random.Random(9), 20_000)
    first = fresh.stretch(random.Random(1), 500)
    assert used.stretch(random.Random(1), 500) == first
    assert used.words == fresh.words
    assert fresh.stretch(random.Random(2), 500).ids != first.ids


def test_hidden_sentences_stand_at_their_depths_between_sentences(encode: Encoder) -> None:
    sentences = [f" Sentence {number} is here." for number in range(300)]
    stretch = Stretch.of(encode, sentences, 4000)
    depths = [0.0, 0.25, 0.5, 1.0]
    ids = hide(encode, stretch, 2000, [(depth, f" NEEDLE {depth}.") for depth in depths])
    assert len(ids) == 2000
    assert ids[: len(encode.beginning)] == encode.beginning
    text = load_tokenizer(DEMO).decode(ids)
    assert text.startswith(" NEEDLE 0.0. Sentence 0 is")
    for depth in depths:
        assert text.count(f". NEEDLE {depth}. Sentence") == 1 or depth == 0
        assert abs(text.index(f" NEEDLE {depth}.") / len(text) - depth) < 0.03
    without = text
    for depth in depths:
        without = without.replace(f" NEEDLE {depth}.", "")
    assert "".join(sentences).startswith(without)


def test_no_room_for_a_haystack_is_refused(encode: Encoder) -> None:
    with pytest.raises(InputError, match=r"^lengths is too short"):
        hide(encode, Stretch.of(encode, ["A."], 9), 5, [(0.5, " A needle that is longer than that.")])


def test_values_have_their_form() -> None:
    rng = random.Random(0)
    numbers = {random_value(rng, "numbers", (), 4) for _ in range(200)}
    assert all(len(number) == 4 and number[0] != "0" for number in numbers)
    assert len(numbers) > 150
    assert random_value(rng, "words", ["red"]) == "red-red"
    assert random_value(rng, "uuids", ())[14] == "4"


def test_distinct_values_avoid_the_text_and_sizes_agree() -> None:
    rng = random.Random(0)
    assert sorted(distinct(lambda: str(rng.randrange(6)), 3, "0 4 5")) == ["1", "2", "3"]
    made = same_size(lambda: "x" * rng.randrange(1, 4) + str(rng.randrange(9)), 5, len, "")
    assert len({len(one) for one in made}) == 1
    assert len(set(made)) == 5
    with pytest.raises(InputError, match="there are not 4 different"):
        distinct(lambda: str(rng.randrange(6)), 4, "0 4 5")


def test_files_that_cannot_be_used_are_named(encode: Encoder, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"^haystack is .*nowhere.txt: no such file"):
        read_haystack([tmp_path / "nowhere.txt"], encode)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8 text: found byte 0xe9 at offset 3"):
        read_haystack([tmp_path / "latin.txt"], encode)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"^haystack is .*pipe: is a named pipe, expected a file with text"):
        read_haystack([tmp_path / "pipe"], encode)
    (tmp_path / "poor.txt").write_text("the same words again and again")
    with pytest.raises(InputError, match="found 3 different words"):
        read_haystack([tmp_path / "poor.txt"], encode)
