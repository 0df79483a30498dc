"""Text to token ids and back: tokenizer.json, Mistral's tekken.json and SentencePiece behind one Tokenizer.

Two libraries encode: `tokenizers` for both JSON formats, `sentencepiece` for tokenizer.model. Decoding is done here,
one token at a time: a token is text, or raw bytes that may be part of a character, and StreamDecoder joins them.
`decode` is a stream read to its end, so the two cannot differ.
"""

from __future__ import annotations

import base64
import codecs
import contextlib
import json
import operator
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Protocol

from minirea.config import JsonObject
from minirea.errors import InputError, MinireaError, MissingFileError


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a model directory: its tokenizer.json, else tekken.json, else tokenizer.model (or .model.vN).

    tokenizer.json is taken as it stands: its post-processor says what goes around a text, and add_bos_token in
    tokenizer_config.json does not count, as in transformers 5. The other two formats say nothing of the kind, so BOS
    goes before a text and nothing after it, unless tokenizer_config.json has add_bos_token or add_eos_token.

    Raises:
        MissingFileError: no such directory, or it holds no tokenizer.
        InputError: a file is truncated, malformed or contradicts another; the message names file and key.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise MissingFileError(f"{directory}: no such model directory")
    settings = _Settings(directory)
    backend: _Backend
    if (path := directory / "tokenizer.json").exists():
        backend = _load_json(path, settings)
    elif (path := directory / "tekken.json").exists():
        backend = _load_tekken(path, settings)
    elif (path := _sentencepiece_file(directory)).exists():
        backend = _SentencePiece(path, settings)
    else:
        raise MissingFileError(f"{directory}: no tokenizer, expected tokenizer.json, tekken.json or tokenizer.model")
    return Tokenizer(backend, settings, directory)


class Tokenizer:
    """Encodes and decodes; made by `load_tokenizer`.

    Attributes:
        vocab_size: the highest id that `encode` can produce, plus one.
        bos_id: the token that begins a text, if there is one.
        eos_ids: the tokens that end a text, as the tokenizer's own files have them.
    """

    def __init__(self, backend: _Backend, settings: _Settings, directory: Path) -> None:
        self.vocab_size = backend.vocab_size
        self._backend = backend
        self._directory = directory
        self._pieces: dict[int, str | bytes] = {}
        self._before: list[int] = []
        self._after: list[int] = []
        self.bos_id = settings.token_id("bos_token", backend)
        eos_id = settings.token_id("eos_token", backend)
        self.eos_ids = frozenset(i for i in (eos_id, backend.own_tokens["eos_token"]) if i is not None)
        if not backend.frames_text:
            self._before = [self.bos_id] if self.bos_id is not None and settings.flag("add_bos_token", True) else []
            self._after = [eos_id] if eos_id is not None and settings.flag("add_eos_token", False) else []
        first = self.encode("")[:1]
        self._begins_with_bos = bool(first) and first[0] not in self.eos_ids
        if self._begins_with_bos and self.bos_id is None:
            self.bos_id = first[0]
        self._chat_template = _ChatTemplate.find(directory, settings)
        own = {"bos_token": self.bos_id, "eos_token": eos_id}
        names = {key: self.decode([i], skip_special_tokens=False) for key, i in own.items() if i is not None}
        self._template_names = names | settings.named_tokens()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special_tokens`, BOS and whatever else the files ask for go around it.

        Special tokens spelled out in the text become their ids, as in transformers.

        Raises:
            InputError: the text holds half of a surrogate pair, or what the vocabulary has no way to write.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text: character {error.start} is the lone surrogate {text[error.start]!r}, expected valid Unicode"
            ) from None
        ids = self._backend.encode(text, add_special_tokens)
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Bytes that are not valid UTF-8 become U+FFFD.

        Raises:
            InputError: an id is not an integer from 0 to vocab_size - 1.
        """
        stream = self.stream(skip_special_tokens)
        text = [stream.put(self._checked(token_id)) for token_id in ids]
        return "".join(text) + stream.flush()

    def stream(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder that takes one token at a time."""
        return StreamDecoder(self, self._backend, skip_special_tokens)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode_chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation, laid out by the model's chat template.

        Where `encode` begins a text with BOS, so does this: once, whether or not the template writes one.

        Args:
            messages: each with "role" ("system", "user", "assistant") and "content".
            add_generation_prompt: end with what introduces the assistant's next answer.

        Raises:
            InputError: no template, a template that fails or refuses the messages, or a malformed message.
        """
        if self._chat_template is None:
            raise InputError(
                f"{self._directory}: no chat template, expected chat_template.jinja, chat_template.json or "
                "chat_template in tokenizer_config.json"
            )
        text = self._chat_template.render(messages, add_generation_prompt, self._template_names)
        ids = self.encode(text, add_special_tokens=False)
        bos = [self.bos_id] if self._begins_with_bos and self.bos_id is not None else []
        return ids if ids[:1] == bos else bos + ids

    def piece(self, token_id: int) -> str | bytes:
        """What a token adds to a text: characters, or bytes that may be part of one. Ids of no token add nothing."""
        if token_id not in self._pieces:
            known = 0 <= token_id < self.vocab_size
            self._pieces[token_id] = self._backend.piece(token_id) if known else ""
        return self._pieces[token_id]

    def _checked(self, token_id: Any) -> int:
        try:
            value = operator.index(token_id)
        except TypeError:
            value = -1
        if not 0 <= value < self.vocab_size:
            raise InputError(f"token id {token_id!r} is not in the vocabulary, expected 0 to {self.vocab_size - 1}")
        return value


class StreamDecoder:
    """Text from tokens as they come. What `put` and `flush` return, joined, is what `Tokenizer.decode` returns.

    A character is handed out once its bytes are all there and no later token can change it. Only the current run of
    byte tokens is ever held back, so a token costs the same anywhere in a text.
    """

    def __init__(self, tokenizer: Tokenizer, backend: _Backend, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._backend = backend
        self._skipped = backend.special_ids if skip_special_tokens else frozenset()
        self._bytes = backend.byte_decoder()
        self._at_start = True

    def put(self, token_id: int) -> str:
        """The text that is certain now that `token_id` has come, maybe "".

        An id that the tokenizer does not have is no error here, unlike in `decode`: embeddings are often padded beyond
        the vocabulary, and what a model picks from there has no text.
        """
        if token_id in self._skipped:
            return ""
        piece = self._tokenizer.piece(token_id)
        if isinstance(piece, bytes):
            self._at_start = False
            return self._bytes.decode(piece)
        if self._at_start and piece:
            piece = self._backend.first_piece(token_id)
            self._at_start = self._backend.drops_every_leading_space and not piece
        return self._bytes.decode(b"", final=True) + piece

    def flush(self) -> str:
        """What was held back; call it after the last token."""
        return self._bytes.decode(b"", final=True)


class _ByteRun(codecs.IncrementalDecoder):
    """Bytes to text as the ByteFallback step of `tokenizers` does: one bad byte spoils its whole run of byte tokens.

    So nothing of a run is certain before it ends; then it is text, or one U+FFFD for each of its bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._run = bytearray()

    def decode(self, data: Any, final: bool = False) -> str:
        self._run += data
        if not final:
            return ""
        try:
            return self._run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(self._run)
        finally:
            self._run.clear()


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """UTF-8 error handler: one U+FFFD for each bad byte, as in sentencepiece, where Python has one for several."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("minirea.replace_each_byte", _replace_each_byte)


class _Backend(Protocol):
    """What Tokenizer needs of a library."""

    vocab_size: int
    special_ids: frozenset[int]
    own_tokens: dict[str, int | None]  # bos_token and eos_token where no config file names them
    frames_text: bool  # encode's add_special_tokens does something
    drops_every_leading_space: bool  # not only a dummy prefix

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def token_to_id(self, token: str) -> int | None: ...

    def piece(self, token_id: int) -> str | bytes:
        """What a token adds to a text."""

    def first_piece(self, token_id: int) -> str:
        """The same for a token that is text and starts it, where a dummy prefix is taken back."""

    def byte_decoder(self) -> codecs.IncrementalDecoder: ...


class _HuggingFace:
    """A `tokenizers.Tokenizer`, from tokenizer.json or built from tekken.json."""

    drops_every_leading_space = False

    def __init__(self, tokenizer: Any, path: Path, settings: _Settings, frames_text: bool) -> None:
        tokenizer.no_truncation()  # a file may ask for both; they are meant for training batches
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._path = path
        self._add_tokens(settings)
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
        self.special_ids = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self.frames_text = frames_text
        own = {"bos_token": "<s>", "eos_token": "</s>"}
        self.own_tokens = {key: None if frames_text else self.token_to_id(token) for key, token in own.items()}
        steps = _decoder_steps(tokenizer.decoder, path)
        self._byte_level = "ByteLevel" in steps
        self._byte_fallback = "ByteFallback" in steps
        self._join = " ".join if tokenizer.decoder is None else tokenizer.decoder.decode

    def _add_tokens(self, settings: _Settings) -> None:
        """Add what the config files add and mark as special what they call special, with transformers' own calls."""
        from tokenizers import AddedToken

        added = settings.added_tokens()
        self._tokenizer.add_tokens([AddedToken(token.content, **token.flags) for token in added])
        for token in added:
            found = self.token_to_id(token.content)
            if found != token.id:
                raise InputError(f"{self._path}: {token.content!r} gets id {found}, {token.source} has {token.id}")
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        named = [token for token in settings.special_tokens() if self.token_to_id(token) is not None]
        self._tokenizer.add_special_tokens([token for token in named if token not in known])

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except Exception as error:  # the library raises nothing more exact
            raise InputError(f"{self._path}: cannot encode the text: {_one_line(error)}") from None

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def piece(self, token_id: int) -> str | bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return ""
        if self._byte_level:
            return _bytes_of(token)
        if self._byte_fallback and (match := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)):
            return bytes.fromhex(match[1])
        return self._join(["a", token])[1:]  # after another token, so that it is not taken for the start of a text

    def first_piece(self, token_id: int) -> str:
        return self._join([self._tokenizer.id_to_token(token_id)])

    def byte_decoder(self) -> codecs.IncrementalDecoder:
        return codecs.getincrementaldecoder("utf-8")("replace") if self._byte_level else _ByteRun()


def _load_json(path: Path, settings: _Settings) -> _HuggingFace:
    import tokenizers

    declared = JsonObject.read(path)
    with _reading(path):
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        tokenizer.encode("")  # fails if the post-processor names a token that it does not define
    for token in declared.values.get("added_tokens") or []:
        if (found := tokenizer.token_to_id(token["content"])) != token["id"]:  # the library renumbers in silence
            raise InputError(f"{path}: added token {token['content']!r} has id {token['id']}, expected {found}")
    if not tokenizer.get_vocab_size():
        raise InputError(f"{path}: the vocabulary is empty")
    return _HuggingFace(tokenizer, path, settings, frames_text=True)


def _decoder_steps(decoder: Any, path: Path) -> set[str]:
    """The types of a decoder's steps, all of which `_HuggingFace.piece` can do token by token."""
    steps, pending = set(), [json.loads(decoder.__getstate__())] if decoder is not None else []
    while pending:
        step = pending.pop()
        pending += step.get("decoders", [])
        steps.add(step["type"])
    known = {"ByteLevel", "Fuse"} if "ByteLevel" in steps else {"ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"}
    if unknown := sorted(steps - known - {"Sequence"}):
        raise InputError(f"{path}: decoder has a {unknown[0]} step, expected only {', '.join(sorted(known))}")
    return steps


def _byte_characters() -> list[str]:
    """The character for each of the 256 bytes in which byte-level BPE spells its tokens (GPT-2's choice).

    Bytes that print in Latin-1 stand for themselves; the others take the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


_CHARACTER_OF_BYTE: Final = dict(enumerate(_byte_characters()))
_BYTE_OF_CHARACTER: Final = {character: byte for byte, character in _CHARACTER_OF_BYTE.items()}


def _bytes_of(token: str) -> bytes:
    """The bytes of a byte-level token. Added tokens may be spelled as plain text, and then stand for just that."""
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()


# The special tokens of the first tekken files, which do not list them; ids in this order.
_TEKKEN_SPECIAL_TOKENS: Final = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


def _load_tekken(path: Path, settings: _Settings) -> _HuggingFace:
    """Mistral's byte-level BPE: ids are the special tokens, then the vocabulary by rank, which is the merge order."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tekken = JsonObject.read(path)
    config = tekken.child("config") or JsonObject({}, f"{path}: config")
    pattern = config.values.get("pattern")
    if not isinstance(pattern, str):
        raise config.fail("pattern", "a regular expression")
    special = _tekken_special_tokens(tekken)
    num_special = config.integer("default_num_special_tokens", len(special), lowest=len(special))
    special += [f"<SPECIAL_{rank}>" for rank in range(len(special), num_special)]
    tokens = _tekken_tokens(tekken)
    size = config.integer("default_vocab_size", num_special + len(tokens), lowest=num_special + 256)
    if size > num_special + len(tokens):
        raise config.fail("default_vocab_size", f"at most {num_special + len(tokens)}, which is what the file holds")

    # Files list more tokens than their models use.
    spelled = [token.decode("latin-1").translate(_CHARACTER_OF_BYTE) for token in tokens[: size - num_special]]
    vocab = {token: num_special + rank for rank, token in enumerate(spelled)}
    # Two neighbours merge if together they are a token, lowest rank first. Each way to split a token is listed, but
    # only one can occur: until the last two parts of a token merge, no merge has crossed its ends, so inside of it
    # everything went as it goes for that token alone. Hence the order among the splits of one token does not matter.
    splits = ((token[:cut], token[cut:]) for token in spelled for cut in range(1, len(token)))
    merges = [(left, right) for left, right in splits if left in vocab and right in vocab]
    with _reading(path):
        tokenizer = Tokenizer(models.BPE(vocab | {t: i for i, t in enumerate(special)}, merges, ignore_merges=True))
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(special)
    return _HuggingFace(tokenizer, path, settings, frames_text=False)


def _tekken_special_tokens(tekken: JsonObject) -> list[str]:
    """The special tokens by id."""
    listed = tekken.values.get("special_tokens")
    if listed is None:
        return list(_TEKKEN_SPECIAL_TOKENS)
    try:
        by_rank = {entry["rank"]: entry["token_str"] for entry in listed}
        special = [by_rank[rank] for rank in range(len(listed))]
        well_formed = all(isinstance(token, str) and token for token in special) and len({*special}) == len(special)
    except (KeyError, TypeError):
        well_formed = False
    if not well_formed:
        raise tekken.fail("special_tokens", "a list of distinct token_str, ranked 0, 1, 2, ...")
    return special


def _tekken_tokens(tekken: JsonObject) -> list[bytes]:
    """The vocabulary by rank, the 256 single bytes first."""
    try:
        listed = tekken.values["vocab"]
        by_rank = {entry["rank"]: base64.b64decode(entry["token_bytes"], validate=True) for entry in listed}
        tokens = [by_rank[rank] for rank in range(len(listed))]
        well_formed = b"".join(tokens[:256]) == bytes(range(256)) and len({*tokens}) == len(tokens) and all(tokens)
    except (KeyError, TypeError, ValueError):
        well_formed = False
    if not well_formed:
        raise tekken.fail("vocab", "a list of distinct token_bytes in base64, ranked 0, 1, 2, ..., single bytes first")
    return tokens


# Appended to a serialized SentencePiece model this turns its dummy prefix off: protocol buffers merge a field that
# comes twice, the last value winning; this is field 3 (normalizer_spec) with its field 3 (add_dummy_prefix) at false.
_NO_DUMMY_PREFIX: Final = b"\x1a\x02\x18\x00"


class _SentencePiece:
    """A SentencePiece model, with special and added tokens found in the text before the library sees it.

    The dummy prefix goes before a text but not before what follows a special token in it: `"legacy": false` of
    tokenizer_config.json, the default of transformers 5. `"legacy": true` has it in both places, and
    `"add_prefix_space": false` in neither.
    """

    frames_text = False

    def __init__(self, path: Path, settings: _Settings) -> None:
        from sentencepiece import SentencePieceProcessor

        with _reading(path):
            serialized = path.read_bytes()
            self._model = model = SentencePieceProcessor(model_proto=serialized)
            bare = SentencePieceProcessor(model_proto=serialized + _NO_DUMMY_PREFIX)
            self._num_pieces = model.piece_size()
            if not serialized or not self._num_pieces:
                raise ValueError("the vocabulary is empty")
        self._first = model if settings.flag("add_prefix_space", True) else bare
        self._rest = model if settings.flag("legacy", False) else bare
        own = {"bos_token": model.bos_id(), "eos_token": model.eos_id()}
        self.own_tokens = {key: token_id if token_id >= 0 else None for key, token_id in own.items()}
        self._added = {token.content: token for token in self._matched_tokens(settings)}
        self._content = {token.id: token.content for token in self._added.values()}
        self._pattern = _any_of(self._added.values())
        self.special_ids = frozenset(token.id for token in self._added.values() if token.flags["special"])
        self.vocab_size = max(self._num_pieces, *(token_id + 1 for token_id in self._content))
        self._drops_prefix, self.drops_every_leading_space = self._leading_space()

    def _matched_tokens(self, settings: _Settings) -> list[_AddedToken]:
        """Tokens that are found in a text as they are: the model's own for control, and what the config files add."""
        unknown = self._model.unk_id()
        named = {self._model.piece_to_id(token) for token in settings.special_tokens()} - {unknown}
        special = [i for i in range(self._num_pieces) if i in named or self._model.is_control(i)]
        own = [_AddedToken(i, self._model.id_to_piece(i), {"special": i != unknown}) for i in (unknown, *special)]
        return own + settings.added_tokens()

    def _leading_space(self) -> tuple[bool, bool]:
        """Whether decoding takes back a leading space, and whether it goes on doing so; the library does not tell."""
        pieces = (self._model.id_to_piece(i) for i in range(self._num_pieces))
        space = min((piece for piece in pieces if piece.startswith("▁")), key=len, default="▁")
        lost = 2 * len(space) - len(self._first.decode_pieces([space, space]))
        return lost > 0, lost > 1

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:  # noqa: ARG002  Tokenizer adds them
        ids: list[int] = []
        start = 0
        for match in self._pattern.finditer(text):
            ids += self._encode_plain(text[start : match.start()], start)
            token = self._added.get(match.group()) or self._added[match.group().strip()]
            ids.append(token.id)
            start = match.end()
        return ids + self._encode_plain(text[start:], start)

    def _encode_plain(self, text: str, start: int) -> list[int]:
        return (self._rest if start else self._first).encode(text) if text else []

    def token_to_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token].id
        token_id = self._model.piece_to_id(token)
        return token_id if token_id != self._model.unk_id() else None

    def piece(self, token_id: int) -> str | bytes:
        if token_id == self._model.unk_id():
            return self._model.decode_ids([token_id]).encode()  # " ⁇ " as bytes: this space is no dummy prefix
        if token_id in self._content:
            return self._content[token_id]
        if token_id >= self._num_pieces:
            return ""
        piece = self._model.id_to_piece(token_id)
        return bytes.fromhex(piece[3:5]) if self._model.is_byte(token_id) else piece.replace("▁", " ")

    def first_piece(self, token_id: int) -> str:
        piece = str(self.piece(token_id))
        return piece.removeprefix(" ") if self._drops_prefix else piece

    def byte_decoder(self) -> codecs.IncrementalDecoder:
        return codecs.getincrementaldecoder("utf-8")("minirea.replace_each_byte")


def _sentencepiece_file(directory: Path) -> Path:
    """tokenizer.model, or the newest of those that Mistral publishes with a version at the end of the name."""
    versions = sorted(directory.glob("tokenizer.model.v*"), key=lambda path: (len(path.name), path.name))
    plain = directory / "tokenizer.model"
    return versions[-1] if versions and not plain.exists() else plain


@dataclass(frozen=True)
class _AddedToken:
    """A token outside the trained vocabulary, or one of it that is matched as a whole.

    `flags` are those of `tokenizers.AddedToken`: special, normalized, single_word, lstrip, rstrip.
    """

    id: int
    content: str
    flags: dict[str, bool]
    source: str = "tokenizer.model"


def _any_of(tokens: Iterable[_AddedToken]) -> re.Pattern[str]:
    """Matches each of `tokens`, the longest first, with the white space around it that its flags make it swallow."""
    spaces = {True: r"\s*", False: ""}
    longest_first = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    return re.compile(
        "|".join(
            spaces[token.flags.get("lstrip", False)]
            + re.escape(token.content)
            + spaces[token.flags.get("rstrip", False)]
            for token in longest_first
        )
    )


class _Settings:
    """What tokenizer_config.json, special_tokens_map.json and added_tokens.json say. Each of them may be missing."""

    def __init__(self, directory: Path) -> None:
        self.main = _read_if_there(directory / "tokenizer_config.json")
        self._map = _read_if_there(directory / "special_tokens_map.json")
        self._added = _read_if_there(directory / "added_tokens.json")

    def flag(self, key: str, default: bool) -> bool:
        return self.main.boolean(key, default)

    def token_id(self, key: str, backend: _Backend) -> int | None:
        """The id of a named token: a string, an object with its content, or an id; null says that there is none."""
        for source in (self.main, self._map):
            value = source.values.get(key)
            if value is None:
                continue
            token_id = value if type(value) is int else backend.token_to_id(_content(source, key, value))
            if token_id is None or not 0 <= token_id < backend.vocab_size:
                raise source.fail(key, "a token of the vocabulary")
            return token_id
        return None if key in self.main.values else backend.own_tokens[key]

    def named_tokens(self) -> dict[str, str]:
        """bos_token, eos_token and so on, as the files spell them."""
        return {
            key: _content(source, key, value)
            for source in (self._map, self.main)
            for key, value in source.values.items()
            if key in _NAMED_TOKENS and value is not None and type(value) is not int
        }

    def special_tokens(self) -> list[str]:
        """Every token that the files call special by name."""
        tokens = list(self.named_tokens().values())
        for source in (self.main, self._map):
            for key in ("additional_special_tokens", "extra_special_tokens"):
                value = source.values.get(key) or []
                listed = list(value.values()) if isinstance(value, dict) else value
                if not isinstance(listed, list):
                    raise source.fail(key, "a list of tokens")
                tokens += [_content(source, key, token) for token in listed]
        return tokens

    def added_tokens(self) -> list[_AddedToken]:
        """The tokens of added_tokens_decoder or, in older directories, of added_tokens.json, by id."""
        decoder = self.main.child("added_tokens_decoder")
        if decoder is not None:
            tokens = [_declared_token(decoder, key) for key in decoder.values]
        else:
            tokens = [self._undeclared_token(content) for content in self._added.values]
        return sorted(tokens, key=lambda token: token.id)

    def _undeclared_token(self, content: str) -> _AddedToken:
        special = content in self.special_tokens()
        flags = {"special": special, "normalized": not special}
        return _AddedToken(self._added.integer(content, lowest=0), content, flags, self._added.source)


_NAMED_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _declared_token(decoder: JsonObject, key: str) -> _AddedToken:
    """One entry of added_tokens_decoder: an id, and what `tokenizers.AddedToken` takes."""
    fields = decoder.child(key)
    if fields is None or not key.isdecimal() or int(key) >= 2**31:
        raise decoder.fail(key, "an object with a token's content, its id being the key")
    special = fields.boolean("special", False)
    flags = {name: fields.boolean(name, False) for name in ("single_word", "lstrip", "rstrip")}
    flags |= {"special": special, "normalized": fields.boolean("normalized", not special)}
    return _AddedToken(int(key), _content(decoder, key, fields.values), flags, decoder.source)


def _content(source: JsonObject, key: str, value: Any) -> str:
    """How a token is spelled: files have it as a string, or as an object with flags."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise source.fail(key, "a token, or an object with the token as its content")
    return content


@dataclass(frozen=True)
class _ChatTemplate:
    """A Jinja template that lays out a conversation as the model has been trained to read it."""

    text: str
    source: str

    @classmethod
    def find(cls, directory: Path, settings: _Settings) -> _ChatTemplate | None:
        """chat_template.jinja, else tokenizer_config.json's, else chat_template.json's; of several, the "default"."""
        path = directory / "chat_template.jinja"
        if path.exists():
            try:
                return cls(path.read_text(encoding="utf-8"), str(path))
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{path}: cannot be read: {_one_line(error)}") from None
        for source in (settings.main, _read_if_there(directory / "chat_template.json")):
            template = source.values.get("chat_template")
            if isinstance(template, list):
                named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
                template = named.get("default", template)
            if template is not None and not isinstance(template, str):
                raise source.fail("chat_template", 'a template, or a list of named ones with a "default"')
            if template is not None:
                return cls(template, source.source)
        return None

    def render(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool, names: dict[str, str]) -> str:
        if not messages:
            raise InputError("the conversation is empty, expected at least one message")
        for message in messages:
            if not (isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))):
                raise InputError(f"message {str(message)[:80]!r} is malformed, expected strings for role and content")
        try:
            template = _jinja_environment().from_string(self.text)
            conversation = [dict(message) for message in messages]
            given = {"messages": conversation, "add_generation_prompt": add_generation_prompt}
            return template.render(**names, **given, tools=None, documents=None)
        except Exception as error:  # a template is a program: it can fail in any way
            raise InputError(f"{self.source}: the chat template fails: {_one_line(error)}") from None


def _jinja_environment() -> Any:
    """What transformers lets chat templates use, in a sandbox: they come with models, from anybody."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's words for training; here it is its body and nothing more."""

        tags = {"generation"}  # noqa: RUF012  as the base class has it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes HTML

    extensions = [Generation, jinja2.ext.loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _read_if_there(path: Path) -> JsonObject:
    return JsonObject.read(path) if path.exists() else JsonObject({}, str(path))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Make one line of whatever a library does with a hostile file. A Rust panic is not even an Exception."""
    try:
        with _muted_stderr():
            yield
    except (MinireaError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(f"{path}: cannot be read as a tokenizer: {_one_line(error)}") from None


@contextlib.contextmanager
def _muted_stderr() -> Iterator[None]:
    """Native code prints panics and logs on file descriptor 2, past sys.stderr; what it raises says the same."""
    try:
        saved = os.dup(2)
    except OSError:  # closed: there is nothing to mute
        yield
        return
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
