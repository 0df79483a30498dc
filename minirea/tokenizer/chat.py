"""Chat templates: where a model directory keeps its own, and how it lays out a conversation."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minirea.checks import unicode_text
from minirea.errors import InputError
from minirea.files import as_text, is_there, read_file
from minirea.tokenizer.config import TokenizerConfig, one_line, read_if_there

_LARGEST_TEMPLATE = 2**22  # bytes


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template that lays out a conversation as the model has been trained to read it.

    `text` is None where there are several, none of which is the default: an error once a chat is asked for.
    """

    text: str | None
    source: str

    @classmethod
    def find(cls, directory: Path, config: TokenizerConfig) -> ChatTemplate | None:
        """chat_template.jinja, else tokenizer_config.json's, else chat_template.json's; of several, the "default"."""
        path = directory / "chat_template.jinja"
        if is_there(path):
            return cls(as_text(read_file(path, _LARGEST_TEMPLATE, "a chat template"), str(path)), str(path))
        for source in (config.main, read_if_there(directory / "chat_template.json")):
            template = source.values.get("chat_template")
            if template is None:
                continue
            if isinstance(template, list):
                named = [entry for entry in template if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
                if not named:
                    raise source.fail("chat_template", "a template, or a list of named ones")
                template = next((entry.get("template") for entry in named if entry["name"] == "default"), None)
                if template is None:
                    return cls(None, source.source)
            if not isinstance(template, str):
                raise source.fail("chat_template", 'a template, or a list of named ones with a "default"')
            return cls(template, source.source)
        return None

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool, names: dict[str, str]) -> str:
        """The conversation as text.

        Args:
            messages: as `conversation` returns them.
            names: the special tokens that the template may write, by the names that it has for them.

        Raises:
            InputError: a template that fails, refuses the messages or does not end.
        """
        from minirea.tokenizer.sandbox import Budget, ChatEnvironment

        if self.text is None:
            raise InputError(f'{self.source}: chat_template is a list without a "default", which a chat needs')
        environment = ChatEnvironment(Budget(sum(map(len, _strings(messages)))))
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            text = environment.render(self.text, **names, **given, tools=None, documents=None)
        except Exception as error:  # a template is a program: it can fail in any way
            raise InputError(f"{self.source}: the chat template fails: {one_line(error)}") from None
        return unicode_text(f"{self.source}: what the chat template writes", text)


def conversation(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A copy of the messages, each with its content as one string.

    Raises:
        InputError: no messages, or a malformed one.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise InputError(f"the conversation is {str(messages)[:80]!r}, expected a list of messages")
    copied = [_copied(message) for message in messages]
    if not copied:
        raise InputError("the conversation is empty, expected at least one message")
    return copied


def _copied(message: Any) -> dict[str, Any]:
    if isinstance(message, Mapping):
        message = dict(message)
        parts = message.get("content")
        if isinstance(parts, (list, tuple)) and all(_is_text_part(part) for part in parts):
            message["content"] = "".join(part["text"] for part in parts)
        if all(isinstance(message.get(key), str) for key in ("role", "content")):
            for text in _strings(message):
                unicode_text(f"message {text[:80]!r}", text)
            return message
    raise InputError(
        f"message {str(message)[:80]!r} is malformed, expected strings for role and content, "
        "or a list of parts of type text as content"
    )


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


class Disguise:
    """Hides special tokens that messages spell out from the template's own, by numbers that stand for them.

    Digits pass through what templates do to a text: trimming, changes of case, JSON. A template that cuts a content in
    the middle of a number leaves a part of it, which is ordinary text like the rest.
    """

    def __init__(self, messages: list[dict[str, Any]], spellings: Collection[str], template: str) -> None:
        longest_first = sorted((re.escape(spelling) for spelling in spellings), key=len, reverse=True)
        self._special = re.compile("|".join(longest_first) or "(?!)")
        taken = [*_strings(messages), template]
        key = next(key for key in map(str, range(10**15, 10**16)) if not any(key in text for text in taken))
        self._number: dict[str, str] = {}
        for text in _strings(messages):
            for spelling in self._special.findall(text):
                self._number.setdefault(spelling, f"{key}{len(self._number):05}")
        self._spelling = {number: spelling for spelling, number in self._number.items()}
        self._any_number = re.compile(key + r"\d{5}")
        self.messages = [_mapped(message, self._put_on) for message in messages]

    def _put_on(self, text: str) -> str:
        return self._special.sub(lambda match: self._number[match[0]], text)

    def take_off(self, text: str) -> str:
        """The text with what the numbers stand for."""
        return self._any_number.sub(lambda match: self._spelling.get(match[0], match[0]), text)


def _strings(value: Any) -> list[str]:
    """Every string in nested lists and dicts, but for the keys."""
    found, pending = [], [value]
    while pending:
        part = pending.pop()
        if isinstance(part, str):
            found.append(part)
        elif isinstance(part, dict):
            pending.extend(part.values())
        elif isinstance(part, (list, tuple)):
            pending.extend(part)
    return found


def _mapped(value: Any, change: Any) -> Any:
    """A copy in which every string that is no key has been changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(part, change) for key, part in value.items()}
    return [_mapped(part, change) for part in value] if isinstance(value, (list, tuple)) else value
