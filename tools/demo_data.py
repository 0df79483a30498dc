"""Training data of the demo model: books to tokens, and tokens to samples that hide sentences and ask for them.

A sample is `<s>`, then a slice of running text with blocks set into it: needles (" The special magic number for KEY is
123456."), questions about some of them, and answers that end in `</s>`. Every token carries a class that says how its
prediction is weighed: IGNORE (a random key or number that nothing could predict), TEXT or ANSWER.

All pieces are tokenised once. A sample is then a concatenation of arrays, which stays equal to the tokens of its
text because every piece ends where the pre-tokenizer splits anyway.
"""

from __future__ import annotations

import fnmatch
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from minirea.errors import InputError, MissingFileError
from minirea.evaluation.text.diary import generate_text

BOS: Final = "<s>"
EOS: Final = "</s>"
IGNORE, TEXT, ANSWER = 0, 1, 2

# (words before the key, words between key and value): the first is the one that the demo asks for.
WORDINGS: Final = (
    ("The special magic number for", "is"),
    ("The secret code of", "is"),
    ("The ticket number of", "was"),
    ("The number on the door of", "is"),
    ("The password of", "is"),
    ("The price of", "was"),
)
# What stands before the first and before the second mention of the key. {subject} is the wording before the key. Each
# ends by repeating the needle's own words: a small model copies what followed the same words earlier.
QUESTIONS: Final = (
    ("\nQuestion: What is {lower}", "? Answer: {subject}"),
    ("\nQuestion: Do you remember {lower}", "? Answer: {subject}"),
    ("\nWhat is {lower}", "?\n{subject}"),
    (" Tell me {lower}", ". {subject}"),
)
BARE_QUESTIONS: Final = ("\n{subject}", " {subject}")

Tokens = np.ndarray  # uint16, one dimension


# ---------------------------------------------------------------------------------------------------------------
# Books
# ---------------------------------------------------------------------------------------------------------------
def strip_gutenberg(text: str) -> str:
    """The book without Project Gutenberg's header and footer; text without those marks comes back trimmed."""
    text = text.replace("\r", "").lstrip("\ufeff")
    start = re.search(r"\*\*\* ?START OF.*?\*\*\*", text, re.DOTALL)
    end = re.search(r"\*\*\* ?END OF", text)
    return text[start.end() if start else 0 : end.start() if end else len(text)].strip()


def unwrap(text: str) -> str:
    """Joins the lines of wrapped prose. A paragraph is prose if all its lines but the last are long; verse stays."""
    paragraphs = []
    for paragraph in re.split(r"\n{2,}", text):
        lines = [line.strip() for line in paragraph.split("\n")]
        wrapped = len(lines) > 1 and min(map(len, lines[:-1])) >= 50
        paragraphs.append(" ".join(lines) if wrapped else paragraph)
    return "\n\n".join(paragraphs)


def read_books(folder: Path, hold_out: str) -> list[str]:
    """Every *.txt of the folder whose name does not match the pattern `hold_out`, stripped, in order of name."""
    if not folder.is_dir():
        raise MissingFileError(f"--text {folder}: no such folder, expected one of .txt files")
    files = [path for path in sorted(folder.glob("*.txt")) if not fnmatch.fnmatch(path.name, hold_out)]
    books = [strip_gutenberg(path.read_text(encoding="utf-8", errors="replace")) for path in files]
    books = [book for book in books if book]
    if not books:
        raise InputError(f"--text {folder}: found no text to train on, expected .txt files not named {hold_out}")
    return books


# ---------------------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------------------
def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE in which every digit is a token of its own; encoding puts `<s>` in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *_template_text()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def _template_text() -> list[str]:
    """The wordings, often enough that their words become single tokens."""
    lines = [f" {subject} X {verb}" + first.format(lower=_lower(subject)) + second.format(subject=subject)
             for subject, verb in WORDINGS for first, second in QUESTIONS]  # fmt: skip
    return lines * 60


def _lower(subject: str) -> str:
    return subject[0].lower() + subject[1:]


# ---------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Phrases:
    """One wording's tokens. `questions` and `bare` are the words that lead up to each mention of the key."""

    before_key: Tokens
    after_key: Tokens
    questions: tuple[tuple[Tokens, Tokens], ...]
    bare: tuple[Tokens, ...]


@dataclass(frozen=True)
class Needle:
    """A hidden sentence: which wording it uses, its key and its value as tokens."""

    phrases: Phrases
    key: Tokens
    value: Tokens


Block = tuple[Tokens, np.ndarray]  # tokens and their classes (uint8)


class Samples:
    """Makes training samples from books. `batch` is a pure function of its arguments, so runs can be resumed."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str], text_noise: float, seed: int) -> None:
        """Tokenises the texts twice, as they are and with wrapped prose unwrapped, and all pieces of the templates.

        `text_noise` is the share of the running text's tokens that are replaced by random ones. A model that sees the
        same books dozens of times would learn them by heart; it can not where every reading is a little different.
        """
        self._tokenizer = tokenizer
        self._text_noise = text_noise
        self._seed = seed
        self._bos = np.array([tokenizer.token_to_id(BOS)], dtype=np.uint16)
        self._eos = np.array([tokenizer.token_to_id(EOS)], dtype=np.uint16)
        self._vocab_size = tokenizer.get_vocab_size()
        self.corpus = np.concatenate([part for view in (str, unwrap) for text in texts
                                      for part in (self._encode(view(text)), self._eos)])  # fmt: skip
        self._word_starts, self._sentence_starts = self._boundaries()
        self._phrases = tuple(self._encode_wording(*wording) for wording in WORDINGS)
        self._space, self._hyphen, self._stop = (self._encode(text) for text in (" ", "-", "."))
        self._digits = np.concatenate([self._encode(digit) for digit in "0123456789"])
        self._words = self._encode_words(texts)

    def batch(self, step: int, tokens: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples of step `step`: ids int16 and classes uint8, both [tokens // context, context + 1]."""
        rng = random.Random(f"{self._seed} {step}")
        blocks = [self.sample(rng, context + 1) for _ in range(tokens // context)]
        ids = np.stack([ids for ids, _ in blocks]).astype(np.int16)
        return torch.from_numpy(ids), torch.from_numpy(np.stack([classes for _, classes in blocks]))

    def sample(self, rng: random.Random, length: int) -> Block:
        """One sample of exactly `length` tokens. Short samples hold more repeated noise, which teaches copying."""
        draw = rng.random()
        if draw < (0.25 if length < 400 else 0.05):
            return self._repeated_noise(rng, length)
        if draw > 0.93:
            return self._set_into_text(rng, length - 1, [])
        return self._needles_in_text(rng, length)

    def _repeated_noise(self, rng: random.Random, length: int) -> Block:
        """Random tokens, repeated until the sample is full; every repetition is an answer."""
        period = rng.randrange(12, length // 2)
        noise = np.array([rng.randrange(2, self._vocab_size) for _ in range(period)], dtype=np.uint16)
        repeated = np.resize(noise, length - 1)
        return self._join([(self._bos, IGNORE), (repeated[:period], IGNORE), (repeated[period:], ANSWER)])

    def _needles_in_text(self, rng: random.Random, length: int) -> Block:
        """Needles and questions at random places of running text; the last question ends the sample."""
        most = max(1, min(length // 45, 24))
        count = 1 + int(most * rng.random() ** 1.5)
        phrases = self._phrases[0] if rng.random() < 0.7 else rng.choice(self._phrases)
        needles = [Needle(phrases, key, self._value(rng)) for key in self._keys(rng, count)]
        asked = 1 + int(count * rng.random())
        in_the_middle = rng.random() < 0.4
        placed: list[tuple[float, Block]] = []
        room = length - 1
        for needle in needles[:asked]:
            place = rng.random()
            sentence, question = self._needle_block(needle), self._question_block(rng, needle)
            size = len(sentence[0]) + len(question[0])
            if size > room:
                break
            room -= size
            placed.append((place, sentence))
            placed.append((place + (1.0 - place) * rng.random() if in_the_middle else 1.0, question))
        for needle in needles[asked:]:
            sentence = self._needle_block(needle)
            if len(sentence[0]) <= room:
                room -= len(sentence[0])
                placed.append((rng.random(), sentence))
        return self._set_into_text(rng, room, sorted(placed, key=lambda item: item[0]))

    def _set_into_text(self, rng: random.Random, room: int, placed: Sequence[tuple[float, Block]]) -> Block:
        """Fills `room` tokens with text and sets blocks into it, at their places (0 to 1) or a word boundary after.

        The last block moves to the end: what follows the blocks would otherwise be text that asks nothing.
        """
        start = self._text_start(rng, room)
        text, classes = self._noisy(rng, self.corpus[start : start + room])
        starts = self._word_starts if rng.random() < 0.5 else self._sentence_starts
        parts: list[tuple[np.ndarray, int] | Block] = [(self._bos, IGNORE)]
        previous = 0
        for index, (place, block) in enumerate(placed):
            cut = min(int(starts[start + int(place * room)]) - start, room)
            if index == len(placed) - 1:
                cut = room
            cut = max(cut, previous)
            parts += [(text[previous:cut], classes[previous:cut]), block]
            previous = cut
        return self._join([*parts, (text[previous:], classes[previous:])])

    def _noisy(self, rng: random.Random, text: Tokens) -> Block:
        """The text with some tokens replaced by random ones, which nothing could predict."""
        replaced = np.random.default_rng(rng.getrandbits(64)).random((2, len(text)))
        where = replaced[0] < self._text_noise
        noise = (2 + replaced[1] * (self._vocab_size - 2)).astype(np.uint16)
        return np.where(where, noise, text), np.where(where, IGNORE, TEXT).astype(np.uint8)

    def _needle_block(self, needle: Needle) -> Block:
        phrases = needle.phrases
        return self._join([(part, IGNORE) for part in (phrases.before_key, needle.key, phrases.after_key, needle.value,
                                                       self._stop)])  # fmt: skip

    def _question_block(self, rng: random.Random, needle: Needle) -> Block:
        """A question and its answer. Its first mention of the key is unpredictable, the second is a copy nearby."""
        phrases = needle.phrases
        draw = rng.random()
        lead: list[tuple[np.ndarray, int]]
        if draw < 0.35:
            lead = [(rng.choice(phrases.bare), IGNORE), (needle.key, IGNORE)]
        else:
            first, second = phrases.questions[0] if draw < 0.8 else rng.choice(phrases.questions)
            lead = [(first, IGNORE), (needle.key, IGNORE), (second, TEXT), (needle.key, TEXT)]
        answer = [(part, ANSWER) for part in (needle.value, self._stop, self._eos)]
        return self._join([*lead, (phrases.after_key, TEXT), *answer])

    def _keys(self, rng: random.Random, count: int) -> list[Tokens]:
        """Different random keys. Sometimes all share one word, so that only the rest of the key tells them apart."""
        shared = self._word(rng) if rng.random() < 0.25 else None
        separator = self._hyphen if rng.random() < 0.85 else None
        keys: dict[bytes, Tokens] = {}
        while len(keys) < count:
            parts = 2 if rng.random() < 0.75 else rng.choice((1, 3))
            words = [self._word(rng) for _ in range(parts)]
            if shared is not None and parts > 1:
                words[rng.randrange(parts)] = shared
            key = self._join_words(words, separator)
            keys[key.tobytes()] = key
        return list(keys.values())

    def _join_words(self, words: Sequence[tuple[Tokens, Tokens]], separator: Tokens | None) -> Tokens:
        """The words behind a space each, or with the separator between them. A word comes as (spaced, bare) tokens."""
        pieces = [words[0][0]]
        for spaced, bare in words[1:]:
            pieces += [spaced] if separator is None else [separator, bare]
        return np.concatenate(pieces)

    def _word(self, rng: random.Random) -> tuple[Tokens, Tokens]:
        if rng.random() < 0.06:
            digits = self._digits[[rng.randrange(10) for _ in range(rng.randint(2, 5))]]
            return np.concatenate([self._space, digits]), digits
        return rng.choice(self._words)

    def _value(self, rng: random.Random) -> Tokens:
        """A space and digits: mostly six."""
        count = 6 if rng.random() < 0.85 else rng.randint(3, 9)
        return np.concatenate([self._space, self._digits[[rng.randrange(10) for _ in range(count)]]])

    def _text_start(self, rng: random.Random, length: int) -> int:
        """Where to read `length` tokens from: a sentence's beginning, if the corpus does not end first."""
        latest = len(self.corpus) - length - 1
        if latest < 0:
            raise InputError(f"--text: found {len(self.corpus)} tokens, expected at least {length + 1}")
        return min(int(self._sentence_starts[rng.randrange(latest + 1)]), latest)

    def _boundaries(self) -> tuple[np.ndarray, np.ndarray]:
        """For every corpus position the next one, itself included, at which a word or a sentence starts."""
        tokens = [token for token, _ in sorted(self._tokenizer.get_vocab().items(), key=lambda item: item[1])]
        opens_word = np.array([token[0] in "ĠĊ" for token in tokens])[self.corpus]
        ends_sentence = np.array([token[-1] in ".!?" for token in tokens])[self.corpus]
        opens_sentence = opens_word & np.concatenate([[True], ends_sentence[:-1]])
        return _next_true(opens_word), _next_true(opens_sentence)

    def _encode_wording(self, subject: str, verb: str) -> Phrases:
        fill = {"subject": subject, "lower": _lower(subject)}
        questions = tuple(
            (self._encode(first.format(**fill)), self._encode(second.format(**fill))) for first, second in QUESTIONS
        )
        bare = tuple(self._encode(text.format(**fill)) for text in BARE_QUESTIONS)
        return Phrases(self._encode(f" {subject}"), self._encode(f" {verb}"), questions, bare)

    def _encode_words(self, texts: Sequence[str]) -> list[tuple[Tokens, Tokens]]:
        """Every word of 3 to 10 letters in the texts and, one to four, strings of random letters; spaced and bare."""
        words = sorted(set(re.findall(r"\b[A-Za-z]{3,10}\b", "\n".join(texts))))
        rng = random.Random(f"{self._seed} words")
        letters = "abcdefghijklmnopqrstuvwxyz"
        for _ in range(len(words) // 4):
            word = "".join(rng.choice(letters) for _ in range(rng.randint(2, 8)))
            words.append(word if rng.random() < 0.7 else word.upper())
        spaced = self._tokenizer.encode_batch([" " + word for word in words], add_special_tokens=False)
        bare = self._tokenizer.encode_batch(words, add_special_tokens=False)
        return [(np.array(a.ids, np.uint16), np.array(b.ids, np.uint16)) for a, b in zip(spaced, bare, strict=True)]

    def _encode(self, text: str) -> Tokens:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint16)

    @staticmethod
    def _join(parts: Sequence[tuple[np.ndarray, int] | Block]) -> Block:
        """Parts one after another; a part's classes may be one number for all of its tokens."""
        ids = np.concatenate([ids for ids, _ in parts])
        classes = np.concatenate([np.full(len(ids), of, np.uint8) if isinstance(of, int) else of for ids, of in parts])
        return ids, classes


def _next_true(flags: np.ndarray) -> np.ndarray:
    """For every index the smallest index >= it whose flag is set, or the length where none is."""
    index = np.where(flags, np.arange(len(flags)), len(flags))
    return np.minimum.accumulate(index[::-1])[::-1]


class Batches(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Item `step` is the batch of training step `step`; contexts[step] is its context length in tokens."""

    def __init__(self, samples: Samples, tokens: int, contexts: Sequence[int]) -> None:
        self._samples, self._tokens, self._contexts = samples, tokens, contexts

    def __len__(self) -> int:
        return len(self._contexts)

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._samples.batch(step, self._tokens, self._contexts[step])


def training_texts(folder: Path | None, hold_out: str, generated_chars: int, seed: int) -> list[str]:
    """The books of the folder, if one is given, and generated text besides."""
    books = read_books(folder, hold_out) if folder else []
    return [*books, generate_text(seed, generated_chars)]
