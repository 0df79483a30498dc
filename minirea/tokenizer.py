"""Text to token ids and back: tokenizer.json, Mistral's tekken.json and SentencePiece behind one Tokenizer.

Two libraries encode: `tokenizers` for both JSON formats, `sentencepiece` for tokenizer.model. Decoding is done here,
one token at a time: a token is text, or raw bytes that may be part of a character, and StreamDecoder joins them.
`decode` is a stream read to its end, so the two cannot differ.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import operator
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from minirea.config import JsonObject
from minirea.errors import InputError, MinireaError, MissingFileError
from minirea.tekken import BYTE_OF_CHARACTER, read_tekken
from minirea.tokenizer_config import AddedToken, ChatTemplate, TokenizerConfig, one_line


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
    config = TokenizerConfig(directory)
    backend: _Backend
    if (path := directory / "tokenizer.json").exists():
        backend = _load_json(path, config)
    elif (path := directory / "tekken.json").exists():
        backend = _load_tekken(path, config)
    elif (path := _sentencepiece_file(directory)).exists():
        backend = _SentencePiece(path, config)
    else:
        raise MissingFileError(f"{directory}: no tokenizer, expected tokenizer.json, tekken.json or tokenizer.model")
    return Tokenizer(backend, config, directory)


class Tokenizer:
    """Encodes and decodes; made by `load_tokenizer`.

    Attributes:
        vocab_size: the highest id that `encode` can produce, plus one.
        bos_id: the token that begins a text, if there is one.
        eos_ids: the tokens that end a text, as the tokenizer's own files have them.
    """

    def __init__(self, backend: _Backend, config: TokenizerConfig, directory: Path) -> None:
        self.vocab_size = backend.vocab_size
        self._backend = backend
        self._directory = directory
        self._pieces: dict[int, str | bytes] = {}
        own_bos, own_eos = backend.own_tokens
        self.bos_id = config.token_id("bos_token", backend, own_bos)
        eos_id = config.token_id("eos_token", backend, own_eos)
        self.eos_ids = frozenset(i for i in (eos_id, own_eos) if i is not None)
        self._before: list[int] = []
        self._after: list[int] = []
        if not backend.frames_text:
            self._before = [self.bos_id] if self.bos_id is not None and config.flag("add_bos_token", True) else []
            self._after = [eos_id] if eos_id is not None and config.flag("add_eos_token", False) else []
        first = self.encode("")[:1]
        if self.bos_id is None and first and first[0] not in self.eos_ids:
            self.bos_id = first[0]
        self._leading_bos = first if first == [self.bos_id] else []
        self._chat_template = ChatTemplate.find(directory, config)
        own = {"bos_token": self.bos_id, "eos_token": eos_id}
        names = {key: self.decode([i], skip_special_tokens=False) for key, i in own.items() if i is not None}
        self._template_names = names | config.named_tokens()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special_tokens`, BOS and whatever else the files ask for go around it.

        Special tokens spelled out in the text become their ids, as in transformers.

        Raises:
            InputError: the text holds half of a surrogate pair, or what the vocabulary has no way to write.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"character {error.start} is the lone surrogate {text[error.start]!r}"
            raise InputError(f"text: {found}, expected valid Unicode") from None
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

    def stream(self, skip_special_tokens: bool = True, continues: bool = False) -> StreamDecoder:
        """A decoder that takes one token at a time.

        With `continues` the tokens go on from a text: a leading space is theirs, not SentencePiece's dummy prefix.
        """
        return StreamDecoder(self, self._backend, skip_special_tokens, at_start=not continues)

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
        return ids if ids[:1] == self._leading_bos else self._leading_bos + ids

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

    def __init__(self, tokenizer: Tokenizer, backend: _Backend, skip_special_tokens: bool, at_start: bool) -> None:
        self._tokenizer = tokenizer
        self._backend = backend
        self._skipped = backend.special_ids if skip_special_tokens else frozenset()
        self._bytes = backend.byte_decoder()
        self._at_start = at_start

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
    own_tokens: tuple[int | None, int | None]  # BOS and EOS where no config file names them
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

    def __init__(self, tokenizer: Any, path: Path, config: TokenizerConfig, frames_text: bool) -> None:
        tokenizer.no_truncation()  # a file may ask for both; they are meant for training batches
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._path = path
        self._add_tokens(config)
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
        self.special_ids = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self.frames_text = frames_text
        self.own_tokens = (None, None) if frames_text else (self.token_to_id("<s>"), self.token_to_id("</s>"))
        steps = _decoder_steps(tokenizer.decoder, path)
        self._byte_level = "ByteLevel" in steps
        self._byte_fallback = "ByteFallback" in steps
        self._join = " ".join if tokenizer.decoder is None else tokenizer.decoder.decode

    def _add_tokens(self, config: TokenizerConfig) -> None:
        """Add what the config files add and mark as special what they call special, with transformers' own calls."""
        import tokenizers

        flags = ("special", "normalized", "single_word", "lstrip", "rstrip")
        added = config.added_tokens()
        self._tokenizer.add_tokens(
            [tokenizers.AddedToken(token.content, **{flag: getattr(token, flag) for flag in flags}) for token in added]
        )
        for token in added:
            if (found := self.token_to_id(token.content)) != token.id:
                raise InputError(f"{self._path}: {token.content!r} gets id {found}, {token.source} has {token.id}")
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        named = [token for token in config.special_tokens() if self.token_to_id(token) is not None]
        self._tokenizer.add_special_tokens([token for token in named if token not in known])

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except Exception as error:  # the library raises nothing more exact
            raise InputError(f"{self._path}: cannot encode the text: {one_line(error)}") from None

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


def _load_tekken(path: Path, config: TokenizerConfig) -> _HuggingFace:
    with _reading(path):
        tokenizer = read_tekken(path)
    return _HuggingFace(tokenizer, path, config, frames_text=False)


def _load_json(path: Path, config: TokenizerConfig) -> _HuggingFace:
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
    return _HuggingFace(tokenizer, path, config, frames_text=True)


def _decoder_steps(decoder: Any, path: Path) -> set[str]:
    """The types of a decoder's steps, all of which `_HuggingFace.piece` can do token by token."""
    if decoder is None:
        return set()
    steps, pending = set(), [json.loads(decoder.__getstate__())]
    while pending:
        step = pending.pop()
        pending += step.get("decoders", [])
        steps.add(step["type"])
    known = {"ByteLevel", "Fuse"} if "ByteLevel" in steps else {"ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"}
    if unknown := sorted(steps - known - {"Sequence"}):
        raise InputError(f"{path}: decoder has a {unknown[0]} step, expected only {', '.join(sorted(known))}")
    return steps


def _bytes_of(token: str) -> bytes:
    """The bytes of a byte-level token. Added tokens may be spelled as plain text, and then stand for just that."""
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()


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

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        from sentencepiece import SentencePieceProcessor

        with _reading(path):
            serialized = path.read_bytes()
            self._model = model = SentencePieceProcessor(model_proto=serialized)
            bare = SentencePieceProcessor(model_proto=serialized + _NO_DUMMY_PREFIX)
            self._num_pieces = model.piece_size()
            if not serialized or not self._num_pieces:
                raise ValueError("the vocabulary is empty")
        self._first = model if config.flag("add_prefix_space", True) else bare
        self._rest = model if config.flag("legacy", False) else bare
        bos_id, eos_id = model.bos_id(), model.eos_id()
        self.own_tokens = (bos_id if bos_id >= 0 else None, eos_id if eos_id >= 0 else None)
        self._added = {token.content: token for token in self._matched_tokens(config)}
        self._content = {token.id: token.content for token in self._added.values()}
        self._pattern = _any_of(self._added.values())
        self.special_ids = frozenset(token.id for token in self._added.values() if token.special)
        self.vocab_size = max(self._num_pieces, *(token_id + 1 for token_id in self._content))
        self._drops_prefix, self.drops_every_leading_space = self._leading_space()

    def _matched_tokens(self, config: TokenizerConfig) -> list[AddedToken]:
        """Tokens that are found in a text as they are: the model's own for control, and what the config files add."""
        unknown = self._model.unk_id()
        named = {unknown, *(self._model.piece_to_id(token) for token in config.special_tokens())}
        ids = [i for i in range(self._num_pieces) if i in named or self._model.is_control(i)]
        own = [AddedToken(i, self._model.id_to_piece(i), "tokenizer.model", special=i != unknown) for i in ids]
        return own + config.added_tokens()

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


def _any_of(tokens: Iterable[AddedToken]) -> re.Pattern[str]:
    """Matches each of `tokens`, the longest first, with the white space that it swallows."""
    longest_first = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    return re.compile("|".join(r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in longest_first))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Make one line of whatever a library does with a hostile file. A Rust panic is not even an Exception."""
    try:
        with _muted_stderr():
            yield
    except (MinireaError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(f"{path}: cannot be read as a tokenizer: {one_line(error)}") from None


@contextlib.contextmanager
def _muted_stderr() -> Iterator[None]:
    """Native code prints panics and logs on file descriptor 2, past sys.stderr; what it raises says the same."""
    with _STDERR_LOCK, open(os.devnull, "wb") as null:
        try:
            saved = os.dup(2)
        except OSError:  # standard error is closed: there is nothing to mute
            yield
            return
        os.dup2(null.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


_STDERR_LOCK: Final = threading.Lock()  # two threads at once would restore each other's silence
