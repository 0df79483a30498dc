"""Chat templates: where a model directory keeps its own, and how it lays out a conversation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from minirea.errors import InputError
from minirea.tokenizer.config import TokenizerConfig, one_line, read_if_there


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template that lays out a conversation as the model has been trained to read it."""

    text: str
    source: str

    @classmethod
    def find(cls, directory: Path, config: TokenizerConfig) -> ChatTemplate | None:
        """chat_template.jinja, else tokenizer_config.json's, else chat_template.json's; of several, the "default"."""
        path = directory / "chat_template.jinja"
        if path.exists():
            try:
                return cls(path.read_text(encoding="utf-8"), str(path))
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{path}: cannot be read: {one_line(error)}") from None
        for source in (config.main, read_if_there(directory / "chat_template.json")):
            template = source.values.get("chat_template")
            if template is None:
                continue
            if isinstance(template, list):
                named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
                template = named.get("default")
            if not isinstance(template, str):
                raise source.fail("chat_template", 'a template, or a list of named ones with a "default"')
            return cls(template, source.source)
        return None

    def render(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool, names: dict[str, str]) -> str:
        """The conversation as text. `names` are the special tokens that the template may write.

        Raises:
            InputError: malformed messages, or a template that fails or refuses them.
        """
        if not messages:
            raise InputError("the conversation is empty, expected at least one message")
        for message in messages:
            if not (isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))):
                raise InputError(f"message {str(message)[:80]!r} is malformed, expected strings for role and content")
        conversation = [dict(message) for message in messages]
        given = {"messages": conversation, "add_generation_prompt": add_generation_prompt}
        try:
            return _jinja_environment().from_string(self.text).render(**names, **given, tools=None, documents=None)
        except Exception as error:  # a template is a program: it can fail in any way
            raise InputError(f"{self.source}: the chat template fails: {one_line(error)}") from None


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
