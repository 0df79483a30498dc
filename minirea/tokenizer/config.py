"""What a model directory says besides its tokenizer: named tokens and added tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from minirea.checks import is_unicode
from minirea.files import is_there, read_file
from minirea.json_object import JsonObject

_NAMED_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LARGEST_FILE: Final = 2**26  # bytes; published ones have some 50,000


class Vocabulary(Protocol):
    """What finds a token by its spelling."""

    vocab_size: int

    def token_to_id(self, token: str) -> int | None: ...


@dataclass(frozen=True)
class AddedToken:
    """A token outside the trained vocabulary, or one of it that is matched as a whole.

    The flags are those of `tokenizers.AddedToken`; lstrip and rstrip swallow the white space on that side.
    """

    id: int
    content: str
    source: str
    special: bool
    normalized: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False


class TokenizerConfig:
    """tokenizer_config.json, special_tokens_map.json and added_tokens.json. Each of them may be missing.

    Raises:
        InputError: from every method, if a file holds something malformed; the message names file and key.
    """

    def __init__(self, directory: Path) -> None:
        self.main = read_if_there(directory / "tokenizer_config.json")
        self._map = read_if_there(directory / "special_tokens_map.json")
        self._added = read_if_there(directory / "added_tokens.json")

    def flag(self, key: str, default: bool) -> bool:
        return self.main.boolean(key, default)

    def token_id(self, key: str, vocabulary: Vocabulary, default: int | None) -> int | None:
        """The id of a named token, which files spell out or, rarely, give; null says that there is none."""
        for source in (self.main, self._map):
            value = source.values.get(key)
            if value is None:
                continue
            token_id = value if type(value) is int else vocabulary.token_to_id(_spelling(source, key, value))
            if token_id is None or not 0 <= token_id < vocabulary.vocab_size:
                raise source.fail(key, "a token of the vocabulary")
            return token_id
        return None if key in self.main.values else default

    def named_tokens(self) -> dict[str, str]:
        """bos_token, eos_token and so on, as the files spell them."""
        return {
            key: _spelling(source, key, value)
            for source in (self._map, self.main)
            for key, value in source.values.items()
            if key in _NAMED_TOKENS and value is not None and type(value) is not int
        }

    def special_tokens(self) -> list[str]:
        """The spelling of every token that the files call special."""
        tokens = list(self.named_tokens().values())
        for source in (self.main, self._map):
            for key in ("additional_special_tokens", "extra_special_tokens"):
                value = source.values.get(key) or []
                listed = list(value.values()) if isinstance(value, dict) else value
                if not isinstance(listed, list):
                    raise source.fail(key, "a list of tokens")
                tokens += [_spelling(source, key, token) for token in listed]
        return tokens

    def added_tokens(self) -> list[AddedToken]:
        """The tokens of added_tokens_decoder or, in older directories, of added_tokens.json, by id."""
        decoder = self.main.child("added_tokens_decoder")
        if decoder is not None:
            tokens = [_declared_token(decoder, key) for key in decoder.values]
        else:
            special = set(self.special_tokens())
            tokens = [self._listed_token(content, content in special) for content in self._added.values]
        return sorted(tokens, key=lambda token: token.id)

    def _listed_token(self, content: str, special: bool) -> AddedToken:
        token_id = self._added.integer(content, lowest=0)
        return AddedToken(token_id, _spelling(self._added, content, content), self._added.source, special, not special)


def _declared_token(decoder: JsonObject, key: str) -> AddedToken:
    """One entry of added_tokens_decoder."""
    fields = decoder.child(key)
    if fields is None or not key.isdecimal() or len(key) > 10 or int(key) >= 2**31:
        raise decoder.fail(key, "a token id as the key and an object")
    special = fields.boolean("special", False)
    return AddedToken(
        id=int(key),
        content=_spelling(decoder, key, fields.values),
        source=decoder.source,
        special=special,
        normalized=fields.boolean("normalized", not special),
        single_word=fields.boolean("single_word", False),
        lstrip=fields.boolean("lstrip", False),
        rstrip=fields.boolean("rstrip", False),
    )


def _spelling(source: JsonObject, key: str, value: Any) -> str:
    """Files spell a token as a string, or as the content of an object with flags."""
    content = value.get("content") if isinstance(value, dict) else value
    if not content or not is_unicode(content):
        raise source.fail(key, "a token, or an object with the token as its content")
    return content


def one_line(error: BaseException) -> str:
    """What an exception of some library says, short enough for the end of a message."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_if_there(path: Path) -> JsonObject:
    raw = read_file(path, _LARGEST_FILE, "JSON") if is_there(path) else b"{}"
    return JsonObject.parse(raw, str(path))
