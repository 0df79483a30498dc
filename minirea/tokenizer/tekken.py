"""Mistral's tekken.json: byte-level BPE as a list of tokens by rank, with ids for special tokens before them.

The file holds config.pattern (the regular expression that cuts a text into words), vocab (tokens in base64, whose rank
is both the merge order and, counted from the number of special tokens, the id) and, in newer files, special_tokens.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, Final

from minirea.checks import is_unicode
from minirea.files import read_file
from minirea.json_object import JsonObject
from minirea.tokenizer.backend import LARGEST_FILE

# The special tokens of the first tekken files, which do not list them; ids in this order.
_FIRST_SPECIAL_TOKENS: Final = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
_MOST_SPECIAL_TOKENS: Final = 2**16  # published files have a thousand; a hostile one must not fill the memory
_LONGEST_TOKEN: Final = 1024  # bytes; of published ones 256
_MOST_SPLITS: Final = 2**26  # bytes of all ways to split all tokens; of published ones 2**24


def _byte_characters() -> list[str]:
    """The character for each of the 256 bytes in which byte-level BPE spells its tokens (GPT-2's choice).

    Bytes that print in Latin-1 stand for themselves; the others take the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


CHARACTER_OF_BYTE: Final = dict(enumerate(_byte_characters()))
BYTE_OF_CHARACTER: Final = {character: byte for byte, character in CHARACTER_OF_BYTE.items()}


def read_tekken(path: Path) -> Any:
    """The `tokenizers.Tokenizer` that a tekken.json describes. It puts no BOS before a text.

    Raises:
        InputError: the file is malformed; the message names it and the key.
        Exception: what `tokenizers` raises about a pattern that is no regular expression.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tekken = JsonObject.parse(read_file(path, LARGEST_FILE, "a tokenizer"), str(path))
    header = tekken.child("config") or JsonObject({}, f"{path}: config")
    pattern = header.values.get("pattern")
    if not isinstance(pattern, str):
        raise header.fail("pattern", "a regular expression")
    special = _special_tokens(tekken, header)
    tokens = _vocabulary(tekken)
    most = len(special) + len(tokens)
    size = header.integer("default_vocab_size", most, lowest=len(special) + 256)
    if size > most:
        raise header.fail("default_vocab_size", f"at most {most}, which is what the file holds")

    # Files list more tokens than their models use.
    spelled = [token.decode("latin-1").translate(CHARACTER_OF_BYTE) for token in tokens[: size - len(special)]]
    vocab = {token: len(special) + rank for rank, token in enumerate(spelled)}
    if shadow := next((token for token in special if token in CHARACTER_OF_BYTE.values()), None):
        raise tekken.fail("special_tokens", f"none that is spelled like a byte of vocab, as {shadow!r} is")
    # Two neighbours merge if together they are a token, lowest rank first. Each way to split a token is listed, but
    # only one can occur: until the last two parts of a token merge, no merge has crossed its ends, so inside of it
    # everything went as it goes for that token alone. Hence the order among the splits of one token does not matter.
    splits = ((token[:cut], token[cut:]) for token in spelled for cut in range(1, len(token)))
    merges = [(left, right) for left, right in splits if left in vocab and right in vocab]
    vocab |= {token: token_id for token_id, token in enumerate(special)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


def _special_tokens(tekken: JsonObject, header: JsonObject) -> list[str]:
    """The special tokens by id, with stand-ins for those that only have a place."""
    given = tekken.values.get("special_tokens") is not None
    special = _by_rank(tekken, "special_tokens", "token_str") if given else list(_FIRST_SPECIAL_TOKENS)
    places = header.integer("default_num_special_tokens", len(special), lowest=len(special))
    if places > _MOST_SPECIAL_TOKENS:
        raise header.fail("default_num_special_tokens", f"at most {_MOST_SPECIAL_TOKENS}")
    special += [f"<SPECIAL_{rank}>" for rank in range(len(special), places)]
    if not all(token and is_unicode(token) for token in special) or _repeats(special):
        raise tekken.fail("special_tokens", "distinct strings as token_str")
    return special


def _vocabulary(tekken: JsonObject) -> list[bytes]:
    """The other tokens by rank, the 256 single bytes first."""
    encoded = _by_rank(tekken, "vocab", "token_bytes")
    try:
        tokens = [base64.b64decode(token, validate=True) for token in encoded]
    except (TypeError, ValueError):
        raise tekken.fail("vocab", "token_bytes in base64") from None
    if b"".join(tokens[:256]) != bytes(range(256)) or not all(tokens) or _repeats(tokens):
        raise tekken.fail("vocab", "distinct tokens, those of a single byte first and in order")
    if max(map(len, tokens)) > _LONGEST_TOKEN or sum(len(token) ** 2 for token in tokens) > _MOST_SPLITS:
        raise tekken.fail("vocab", f"words or parts of words as tokens, of at most {_LONGEST_TOKEN} bytes")
    return tokens


def _by_rank(tekken: JsonObject, key: str, name: str) -> list[Any]:
    """Field `name` of each object in a list, in the order of their ranks."""
    try:
        listed = tekken.values[key]
        by_rank = {entry["rank"]: entry[name] for entry in listed}
        return [by_rank[rank] for rank in range(len(listed))]
    except (KeyError, TypeError):
        raise tekken.fail(key, f"a list of objects with {name} and a rank of 0, 1, 2, ...") from None


def _repeats(tokens: list[Any]) -> bool:
    return len(set(tokens)) < len(tokens)
