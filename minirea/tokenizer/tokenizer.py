"""A model directory's tokenizer: text to token ids and back, and conversations to token ids."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from minirea.checks import items, shown, unicode_text, valid_id
from minirea.errors import InputError, MissingFileError
from minirea.files import is_there, list_directory
from minirea.tokenizer.backend import Backend
from minirea.tokenizer.chat import ChatTemplate, Disguise, conversation
from minirea.tokenizer.config import TokenizerConfig
from minirea.tokenizer.huggingface import ContradictionError, load_json, load_tekken
from minirea.tokenizer.pieces import PIECE_CHARACTERS, pieces
from minirea.tokenizer.sentencepiece import SentencePiece, sentencepiece_file
from minirea.tokenizer.stream import StreamDecoder


class NoTokenizerError(MissingFileError):
    """A model directory without any tokenizer file, which is enough for token ids."""


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a model directory: its tekken.json, else tokenizer.json, else tokenizer.model (or .model.vN).

    Of two the vendor's own counts: tekken.json is Mistral's, and some tokenizer.json files next to it split words
    differently. Only where tokenizer_config.json adds tokens that contradict it, it is older than the model, and
    tokenizer.json counts.

    tokenizer.json is taken as it stands: its post-processor says what goes around a text, and add_bos_token in
    tokenizer_config.json does not count, as in transformers 5. The other two formats say nothing of the kind, so BOS
    goes before a text and nothing after it, unless tokenizer_config.json has add_bos_token or add_eos_token.

    Raises:
        NoTokenizerError: it holds no tokenizer.
        MissingFileError: no such directory, or a file in it is a link to nothing.
        InputError: a file is truncated, malformed or contradicts another; the message names file and key.
    """
    directory = Path(directory)
    list_directory(directory, "model directory")
    config = TokenizerConfig(directory)
    tekken, json_file = directory / "tekken.json", directory / "tokenizer.json"
    backend: Backend
    if is_there(tekken):
        try:
            backend = load_tekken(tekken, config)
        except ContradictionError:
            if not is_there(json_file):
                raise
            backend = load_json(json_file, config)
    elif is_there(json_file):
        backend = load_json(json_file, config)
    elif is_there(path := sentencepiece_file(directory)):
        backend = SentencePiece(path, config)
    else:
        raise NoTokenizerError(f"{directory}: no tokenizer, expected tokenizer.json, tekken.json or tokenizer.model")
    return Tokenizer(backend, config, directory)


class Tokenizer:
    """Encodes and decodes; made by `load_tokenizer`.

    Attributes:
        vocab_size: the highest id that `encode` can produce, plus one.
        bos_id: the token that begins a text, if there is one.
        eos_ids: the tokens that end a text, as the tokenizer's own files have them.
        special_tokens: id by spelling, of the tokens that decoding leaves out.
    """

    def __init__(self, backend: Backend, config: TokenizerConfig, directory: Path) -> None:
        self.vocab_size = backend.vocab_size
        self.special_tokens = backend.special_tokens
        self._special_ids = frozenset(backend.special_tokens.values())
        self._backend = backend
        self._splits_special = config.flag("split_special_tokens", False)
        self._directory = directory
        self._any_special = _any_of(backend.special_tokens)
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

    def encode(self, text: str, add_special_tokens: bool = True, continues: bool = False) -> list[int]:
        """Token ids of `text`; with `add_special_tokens`, BOS and whatever else the files ask for go around it.

        Special tokens spelled out in the text become their ids, as in transformers, unless tokenizer_config.json has
        split_special_tokens.

        With `continues` the text goes on from one whose ids are already there, and its ids are to be appended: nothing
        goes around it, no dummy prefix goes before it, a space at its start is its own. No token and no pattern reaches
        across the seam: `encode(a) + encode(b, continues=True)` decodes to a + b, and is what `encode(a + b)` gives if
        a token ends there.

        Raises:
            InputError: the text holds half of a surrogate pair, or what the vocabulary has no way to write.
            MemoryLimitError: a long text has no words between which it could be encoded in pieces.
        """
        unicode_text("text", text)
        frame = add_special_tokens and not continues
        ids = self._encode_in_pieces(text, frame, "seam" if continues else "start", not self._splits_special)
        return [*self._before, *ids, *self._after] if frame else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Bytes that are not valid UTF-8 become U+FFFD.

        Raises:
            InputError: no ids, or one is not an integer from 0 to vocab_size - 1.
        """
        stream = self.stream(skip_special_tokens)
        text = [stream.put(self._checked(value)) for value in items("ids", ids, "token ids")]
        return "".join(text) + stream.flush()

    def stream(self, skip_special_tokens: bool = True, continues: bool = False) -> StreamDecoder:
        """A decoder that takes one token at a time.

        With `continues` the tokens go on from a text: a leading space is theirs, not SentencePiece's dummy prefix.
        """
        return StreamDecoder(self.piece, self._backend, skip_special_tokens, at_start=not continues)

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that mark something, such as a turn's end, and are no text; `decode` leaves them out."""
        return self._special_ids

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode_chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        allow_special_tokens: bool = False,
    ) -> list[int]:
        """Token ids of a conversation, laid out by the model's chat template.

        Where `encode` begins a text with BOS, so does this: once, whether or not the template writes one.

        Args:
            messages: each with "role" ("system", "user", "assistant") and "content", a string or a list of parts
                {"type": "text", "text": ...}, which are joined.
            add_generation_prompt: end with what introduces the assistant's next answer.
            allow_special_tokens: special tokens spelled in a message act as such. Otherwise only those act that the
                template writes, and a message's are ordinary text: who writes a line of it cannot end the user's turn.

        Raises:
            InputError: no template, a template that fails, refuses the messages or does not end, a malformed message,
                such as one with half of a surrogate pair.
        """
        template = self._chat_template
        if template is None:
            raise InputError(
                f"{self._directory}: no chat template, expected chat_template.jinja, chat_template.json or "
                "chat_template in tokenizer_config.json"
            )
        copied = conversation(messages)
        spellings = () if allow_special_tokens else self.special_tokens
        disguise = Disguise(copied, spellings, template.text or "")
        text = template.render(disguise.messages, add_generation_prompt, self._template_names)
        ids = self._encode_disguised(text, disguise)
        return ids if ids[:1] == self._leading_bos else self._leading_bos + ids

    def _encode_disguised(self, text: str, disguise: Disguise) -> list[int]:
        """Ids of a rendered conversation: sections with disguised tokens as plain text, all others as ever."""
        ids: list[int] = []
        begun = start = 0  # of the text not yet encoded, and of the section
        for found in [*self._any_special.finditer(text), None]:
            end = found.start() if found else len(text)
            plain = disguise.take_off(text[start:end])
            if plain != text[start:end]:
                ids += self._encode_text(text[begun:start])
                ids += self._encode_plain(plain, "section" if start else "start")
                begun = end
            start = found.end() if found else end
        return ids + self._encode_text(text[begun:])

    def _encode_text(self, text: str) -> list[int]:
        return self._encode_in_pieces(text, frame=False, at="start", match_special=True) if text else []

    def _encode_in_pieces(self, text: str, frame: bool, at: str, match_special: bool) -> list[int]:
        """What the backend's `encode` returns, for long texts with no more memory than a piece of them takes."""
        encode = self._backend.encode
        if len(text) <= PIECE_CHARACTERS:
            return encode(text, frame, at, match_special)
        may_cut = self._backend.may_cut
        if frame and self._backend.frames_text and may_cut:
            bare, framed = (encode("a", framed, at, match_special) for framed in (False, True))
            size, places = len(bare), range(len(framed) - len(bare) + 1)
            place = next((place for place in places if framed[place : place + size] == bare), None)
            if place is not None:
                ids = self._encode_in_pieces(text, False, at, match_special)
                return [*framed[:place], *ids, *framed[place + size :]]
            may_cut = False
        ids = []
        for piece in pieces(text, may_cut):
            ids += encode(piece, frame and not may_cut, at, match_special)
            at = "seam"
        return ids

    def _encode_plain(self, text: str, at: str) -> list[int]:
        """Ids of text in which no special token acts.

        A vocabulary may spell one like ordinary text: cut in two it is no such token any more. One of a single
        character stays, for nothing else spells it.
        """
        ids: list[int] = []
        parts = [text]  # the next one last
        while parts:
            part = parts.pop()
            encoded = self._encode_in_pieces(part, frame=False, at=at, match_special=False)
            present = set(encoded)
            made = [token for token, token_id in self.special_tokens.items() if token_id in present and len(token) > 1]
            cuts = sorted(
                {match.start() + 1 for token in made for match in re.finditer(f"(?={re.escape(token)})", part)}
            )
            if cuts:
                parts += reversed([part[i:j] for i, j in itertools.pairwise([0, *cuts, len(part)])])
                continue
            ids += encoded
            at = "seam"
        return ids

    def piece(self, token_id: int) -> str | bytes:
        """What a token adds to a text: characters, or bytes that may be part of one. Ids of no token add nothing."""
        if token_id not in self._pieces:
            known = 0 <= token_id < self.vocab_size
            self._pieces[token_id] = self._backend.piece(token_id) if known else ""
        return self._pieces[token_id]

    def _checked(self, value: Any) -> int:
        if (checked := valid_id(value, self.vocab_size)) is None:
            raise InputError(f"token id {shown(value)} is not in the vocabulary, expected 0 to {self.vocab_size - 1}")
        return checked


def _any_of(tokens: Collection[str]) -> re.Pattern[str]:
    """Matches each of `tokens`, the longest first."""
    longest_first = sorted(map(re.escape, tokens), key=len, reverse=True)
    return re.compile("|".join(longest_first) or "(?!)")
