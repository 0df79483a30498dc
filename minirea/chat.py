"""`minirea chat`: a conversation over one session, whose cache is continued from turn to turn.

The model's template lays the whole conversation out anew for every turn. The session always holds a beginning of that:
what differs, such as an answer that the template trims, is forgotten and read again, and nothing else is.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from minirea.api import LLM, Session
from minirea.errors import InputError, MinireaError, printable
from minirea.files import as_text, read_file
from minirea.generate import Interrupted, Piece
from minirea.terminal import Interrupts, put, say
from minirea.threads import delayed_keyboard_interrupt

Message = dict[str, str]

SOURCES: Final = 5
_MALFORMED: Final = "the conversation in this context is malformed"
_DOCUMENT_LIMIT: Final = 2**30  # bytes
_LINE_LIMIT: Final = 2**30  # bytes


class Document(NamedTuple):
    """A text that a message begins with: its name, characters with the empty line after it, and tokens."""

    name: str
    length: int
    tokens: int

    def __str__(self) -> str:
        return f"{printable(self.name, 200)} ({self.tokens:,} token{'s' * (self.tokens != 1)})"


class Manner(NamedTuple):
    """How messages become tokens.

    Attributes:
        system: the text of a system message before them.
        allow_special_tokens: those that a message spells act as such, instead of being text.
    """

    system: str | None = None
    allow_special_tokens: bool = False


class Conversation:
    """Messages, and the session that has read them.

    Args:
        session: a context that the conversation follows, or one that a conversation was saved with.
        system: a system message, at the beginning.
        allow_special_tokens: those that a message spells act as such, instead of being text.

    Attributes:
        manner: that of the arguments; of a conversation that was saved, its own, since its tokens are laid out so.
        messages: what was said, each {"role": ..., "content": ...}.
        pending: text of the documents that the next message begins with.
        documents: for each message of the user those that it begins with; the last entry is of `pending`.
    """

    def __init__(self, session: Session, system: str | None = None, allow_special_tokens: bool = False) -> None:
        self.asked_for = Manner(system, allow_special_tokens)
        self.open(session)

    def open(self, session: Session) -> None:
        """Go on with another session, and with the conversation that was saved with it.

        Raises:
            InputError: what was saved with it is no conversation; this one stays as it is.
        """
        messages, base, pending, documents = _saved_conversation(session)
        kept = _saved_manner(session) or self.asked_for
        free = not messages and not pending and self.asked_for != Manner()
        with delayed_keyboard_interrupt():
            self.messages, self.base, self.pending, self.documents = messages, base, pending, documents
            self.manner = self.asked_for if free else kept
            self.session = session

    @property
    def llm(self) -> LLM:
        return self.session.llm

    @property
    def differences(self) -> list[str]:
        """A line each for what is other than was asked for."""
        lines, (system, special) = [], self.manner
        if self.asked_for.system not in (None, system):
            found = "has no system message" if system is None else f"has the system message {printable(system, 80)!r}"
            lines.append(f"this conversation {found}, and goes on so: --system counts for new ones")
        if self.asked_for.allow_special_tokens != special:
            found = "act as such" if special else "are text"
            lines.append(f"special tokens spelled in this conversation's messages {found}, as when it was saved")
        return lines

    @property
    def system(self) -> list[Message]:
        return [] if self.manner.system is None else [{"role": "system", "content": self.manner.system}]

    def add_document(self, text: str, name: str = "the document", progress: bool = False) -> Document:
        """Put a text before the next message, and read it; `tokens` of what is returned are those that were read."""
        with self._whole():
            self.pending += f"{text}\n\n"
            ids = self._forget_what_differs(self._beginning())
            if ids:
                self.session.prefill(ids, progress)
            document = Document(name, len(text) + 2, len(ids))
            self.documents[-1].append(document)
        return document

    def stream(self, text: str, **options: Any) -> Iterator[Piece]:
        """Add a message and answer it. What was said of an answer that ends early is kept; of none, nothing is.

        A KeyboardInterrupt that is thrown in ends the answer; the last piece then has finish_reason "interrupted".
        """
        message, answer = self._message(text), ""
        ids = self._forget_what_differs(self._ids([*self.messages, message]), keep=1)
        pieces = self.session.stream(ids, **options)
        try:
            for piece in pieces:
                answer += piece.text
                yield piece
        except KeyboardInterrupt as struck:
            try:
                if not isinstance(struck, Interrupted):
                    pieces.throw(struck)  # it struck between two pieces
            except KeyboardInterrupt as passed_on:
                struck = passed_on
            if isinstance(struck, Interrupted):
                answer += struck.piece.text
                yield struck.piece
            elif not answer:
                raise
        finally:
            with delayed_keyboard_interrupt():
                pieces.close()
                if answer:
                    self.messages += [message, {"role": "assistant", "content": answer}]
                    self.pending = ""
                    self.documents.append([])

    def undo(self) -> Document | Message | None:
        """Take the last step back, and return it: a document that no message has yet, or a message with its answer.

        The documents that a message begins with stay, before the next one.
        """
        undone: Document | Message | None = None
        with self._whole():
            if self.documents[-1]:
                undone = self.documents[-1].pop()
                self.pending = self.pending[: len(self.pending) - undone.length]
            else:
                while self.messages:
                    undone = self.messages.pop()
                    if undone["role"] == "user":
                        self.documents.pop()
                        self.pending = undone["content"][: sum(document.length for document in self.documents[-1])]
                        break
            self._forget()
        return undone

    def reset(self) -> None:
        """Forget everything that was said, and all documents."""
        with self._whole():
            self.messages, self.pending, self.documents = [], "", [[]]
            self._forget()

    def save(self, path: str, progress: bool = False) -> None:
        """Keep the context and the conversation in a file. Errors as of Session.save."""
        notes = {"messages": json.dumps(self.messages), "base": str(self.base)}
        notes |= {"pending": self.pending, "documents": json.dumps(self.documents)}
        notes |= {name: json.dumps(value) for name, value in self.manner._asdict().items()}
        self.session.notes = self.session.notes | notes
        self.session.save(path, progress=progress)

    def _message(self, text: str) -> Message:
        return {"role": "user", "content": self.pending + text}

    def _ids(self, messages: list[Message], add_generation_prompt: bool = True) -> list[int]:
        """All tokens of the context that the session is to have, those before the conversation too."""
        tokenizer = self.llm.tokenizer
        ids = tokenizer.encode_chat([*self.system, *messages], add_generation_prompt, self.manner.allow_special_tokens)
        if self.base and ids[:1] == [tokenizer.bos_id]:
            ids = ids[1:]
        return self.session.ids[: self.base] + self.llm.encode(ids)

    def _forget_what_differs(self, ids: list[int], keep: int = 0) -> list[int]:
        """Rewind the session to what it shares with `ids`, all but the last `keep`; returns the ids that follow."""
        shared = min(_shared(self.session.ids, ids), len(ids) - keep)
        self.session.rewind(shared)
        return ids[shared:]

    def _beginning(self) -> list[int]:
        """What the context has in common whatever the next message says after its documents."""
        first, second = (self._ids([*self.messages, self._message(end)]) for end in ("1", "Why"))
        return first[: _shared(first, second)]

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """What is interrupted within it, or fails, leaves the conversation as it was."""
        before = list(self.messages), self.pending, [list(documents) for documents in self.documents]
        try:
            yield
        except BaseException:
            self.messages, self.pending, self.documents = before
            raise

    def _forget(self) -> None:
        """Rewind the session to the messages and documents that are left."""
        if self.pending:
            ids = self._beginning()
        elif self.messages:
            ids = self._ids(self.messages, add_generation_prompt=False)
        else:
            ids = self.session.ids[: self.base]
        self.session.rewind(_shared(self.session.ids, ids))


def without_conversation(notes: dict[str, str]) -> dict[str, str]:
    """A session's notes without what Conversation.save has left there: of a context that has gone on otherwise."""
    kept = {"messages", "base", "pending", "documents", *Manner._fields}
    return {name: note for name, note in notes.items() if name not in kept}


def _shared(one: list[int], other: list[int]) -> int:
    """How many tokens two lists have in common at their beginnings."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _saved_conversation(session: Session) -> tuple[list[Message], int, str, list[list[Document]]]:
    """Messages of a session from a file, the number of tokens before them, and their documents."""
    notes = session.notes
    if "messages" not in notes:
        return [], len(session.ids), "", [[]]
    malformed = InputError(_MALFORMED)
    try:
        messages, base = json.loads(notes["messages"]), int(notes.get("base", ""))
        pending, given = notes.get("pending", ""), json.loads(notes.get("documents", "null"))
    except (ValueError, RecursionError):
        raise malformed from None
    texts = isinstance(messages, list) and all(
        isinstance(m, dict) and m.keys() == {"role", "content"} and all(isinstance(v, str) for v in m.values())
        for m in messages
    )
    if not texts or not 0 <= base <= len(session.ids):
        raise malformed
    contents = [*(m["content"] for m in messages if m["role"] == "user"), pending]
    documents = [[] for _ in contents] if given is None and not pending else _documents(given)
    if documents is None or len(documents) != len(contents):
        raise malformed
    lengths = [sum(document.length for document in before) for before in documents]
    if any(length > len(content) for length, content in zip(lengths, contents, strict=True)):
        raise malformed
    if lengths[-1] != len(pending):
        raise malformed
    return messages, base, pending, documents


def _saved_manner(session: Session) -> Manner | None:
    """That of a session from a file; None of one that has none.

    Raises:
        InputError: it is malformed.
    """
    notes = session.notes
    if not notes.keys() >= set(Manner._fields):
        return None
    try:
        system, special = (json.loads(notes[name]) for name in Manner._fields)
    except (ValueError, RecursionError):
        raise InputError(_MALFORMED) from None
    if not isinstance(system, str | None) or not isinstance(special, bool):
        raise InputError(_MALFORMED)
    return Manner(system, special)


def _documents(given: Any) -> list[list[Document]] | None:
    """Documents as JSON has them; None of what is malformed."""
    try:
        documents = [[Document(*document) for document in before] for before in given]
    except TypeError:
        return None
    for name, *numbers in (document for before in documents for document in before):
        if not isinstance(name, str) or any(type(number) is not int or number < 0 for number in numbers):
            return None
    return documents


class Chat:
    """What reads lines and prints answers. Answers go to standard output, everything else to standard error.

    Args:
        options: of Session.stream.
        footer: lines of statistics about an answer's last piece.
        worded: a message of an error, in the words of the command line.
        progress: show bars.
    """

    def __init__(
        self,
        conversation: Conversation,
        interrupts: Interrupts,
        options: dict[str, Any],
        footer: Callable[[Any, str | None], str],
        worded: Callable[[str], str],
        progress: bool = True,
    ) -> None:
        self.conversation = conversation
        self.interrupts = interrupts
        self.options = options
        self.footer = footer
        self.worded = worded
        self.progress = progress
        self.last: Piece | None = None
        self.failed = self.ended = False
        self.in_terminal = sys.stdin is not None and sys.stdin.isatty()

    def run(self) -> int:
        """Until the end of input; the exit status, 1 if a line of a pipe could not be answered."""
        self.interrupts.raises = True
        if self.in_terminal:
            _edit_lines()
            if self.progress:
                say("minirea: /help lists what there is besides messages; Ctrl-D ends")
        for line in self.conversation.differences:
            say(f"minirea: {line}")
        while not self.ended:
            try:
                self._take_next()
            except KeyboardInterrupt:
                if not self.in_terminal:
                    raise
                say("\n(Ctrl-D or /exit ends)")
        return 1 if self.failed and not self.in_terminal else 0

    def _take_next(self) -> None:
        """Do what the next line says."""
        line = self._read_line()
        if line is None:
            self.ended = True
            return
        try:
            self._take(line)
        except MinireaError as error:
            say(f"minirea: error: {self.worded(str(error))}")
            self.failed = True

    def _read_line(self) -> str | None:
        """A line without its end; None at the end of input."""
        try:
            if self.in_terminal and sys.stdout is not None and sys.stdout.isatty():
                return input("> ")
            if self.in_terminal and sys.stderr is not None:
                print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.buffer.readline(_LINE_LIMIT) if sys.stdin is not None else b""
            return line.decode("utf-8", "surrogateescape").rstrip("\r\n") if line else None
        except EOFError:
            say("")
            return None
        except OSError as error:
            raise InputError(f"standard input: cannot be read: {error.strerror}") from None

    def _take(self, line: str) -> None:
        """Do what a line says."""
        if not line.strip():
            return
        if not line.isascii() and any("\ud800" <= character <= "\udfff" for character in line):
            raise InputError(f"standard input: not UTF-8 text: {line!r:.80}")
        if not line.startswith("/") or line.startswith("//"):
            self._answer(line[1:] if line.startswith("/") else line)
            return
        name, _, argument = line[1:].strip().partition(" ")
        command = COMMANDS.get("exit" if name == "quit" else name)
        if command is None:
            expected = ", ".join(f"/{name}" for name in COMMANDS)
            raise InputError(f"unknown command /{printable(name, 80)}, expected one of {expected}")
        does, needs, _ = command
        if bool(needs) != bool(argument.strip()):
            raise InputError(f"/{name} " + (f"{needs}: a name is missing" if needs else "takes nothing after it"))
        try:
            done = does(self, os.path.expanduser(argument.strip()))
        except KeyboardInterrupt:
            done = "\nminirea: interrupted; the conversation is as it was"
        if done:
            say(done)

    def _answer(self, text: str) -> None:
        pieces = self.conversation.stream(text, progress=self.progress, **self.options)
        said, ended, before = False, False, len(self.conversation.messages)
        try:
            for piece in pieces:
                self.last, said = piece, True
                put(piece.text)
                self.interrupts.defer()
                if self.interrupts.pending and piece.finish_reason is None:
                    ended = True
                    break
        except KeyboardInterrupt:
            ended = self.interrupts.pending or said
            if not ended:
                say("\nminirea: interrupted before an answer; the message is forgotten")
        finally:
            if ended:
                self._end_early(pieces)
            pieces.close()  # type: ignore[attr-defined]  # a generator
            self.interrupts.resume()
            if said:
                put("\n")
        if said and len(self.conversation.messages) == before:
            say("minirea: the answer has no text; the message is forgotten")
        elif ended and self.in_terminal:
            say("(interrupted; what was said is kept)")

    def _end_early(self, pieces: Any) -> None:
        with contextlib.suppress(KeyboardInterrupt, StopIteration):
            self.last = pieces.throw(KeyboardInterrupt)
            put(self.last.text)

    # Commands, each of which returns what is to be said once it is done.

    def _reset(self, _: str) -> str:
        self.conversation.reset()
        self.last = None
        return "minirea: everything said is forgotten, and every document"

    def _undo(self, _: str) -> str:
        undone = self.conversation.undo()
        if isinstance(undone, Document):
            return f"minirea: {undone} is forgotten"
        if undone is not None:
            return f"minirea: the last message and its answer are forgotten{self._to_come()}"
        return "minirea: nothing was said yet, and no document was read"

    def _save(self, path: str) -> str:
        self.conversation.save(path, self.progress)
        return f"minirea: {len(self.conversation.session.ids):,} tokens kept in {printable(path)}"

    def _load(self, path: str) -> str:
        session = self.conversation.llm.open_session(path, progress=self.progress)
        try:
            self.conversation.open(session)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        self.last = None
        said = len(self.conversation.messages) // 2
        answers = f"{said} answer{'s' * (said != 1)} among them"
        opened = f"{len(session.ids):,} tokens, {answers}, opened from {printable(path)}{self._to_come()}"
        return "\n".join(f"minirea: {line}" for line in (opened, *self.conversation.differences))

    def _to_come(self) -> str:
        """What the next message begins with."""
        documents = self.conversation.documents[-1]
        return f"; the next message begins with {', '.join(map(str, documents))}" if documents else ""

    def _file(self, path: str) -> str:
        text = as_text(read_file(path, _DOCUMENT_LIMIT, "a document", pipes=True), path)
        if not text:
            raise InputError(f"{path}: is empty, expected some text")
        document = self.conversation.add_document(text, path, self.progress)
        return f"minirea: {document.tokens:,} tokens of {printable(path)} read, which the next message begins with"

    def _stats(self, _: str) -> str:
        tokens = len(self.conversation.session.ids)
        messages = len(self.conversation.messages)
        context = f"context     {tokens:,} tokens, {messages} message{'s' * (messages != 1)}{self._to_come()}"
        return context if self.last is None else f"{context}\n{self.footer(self.last.stats, self.last.finish_reason)}"

    def _sources(self, _: str) -> str:
        found = self.conversation.session.sources(SOURCES)
        lines = (
            f"{number}. {share:4.0%}  tokens {start:,} to {end:,}: {printable(' '.join(text.split()), 160)}"
            for number, (start, end, share, text) in enumerate(found, 1)
        )
        return "\n".join(lines) or "minirea: the answer used nothing before the question"

    def _help(self, _: str) -> str:
        lines = [f"{f'/{name} {needs}':<12} {about}" for name, (_does, needs, about) in COMMANDS.items()]
        return "\n".join([*lines, f"{'//TEXT':<12} a message that begins with a slash"])

    def _exit(self, _: str) -> str:
        self.ended = True
        return ""


def _edit_lines() -> None:
    """Have input() edit lines, remember them, and complete commands and names of files with the tab key."""
    try:
        import readline
    except ImportError:
        return

    def complete(line: str, index: int) -> str | None:
        found = completions(line)
        return found[index] if index < len(found) else None

    readline.set_completer_delims("\n")  # a line is completed as a whole
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")


def completions(line: str) -> list[str]:
    """Lines that a line may be the beginning of: a command, or one that a file or directory is named for."""
    command, space, name = line.partition(" ")
    if not space:
        found = [f"/{known}{' ' if needs else ''}" for known, (_, needs, _) in COMMANDS.items()]
        return [whole for whole in found if whole.startswith(line)]
    if not COMMANDS.get(command.removeprefix("/"), ("", "", ""))[1]:
        return []
    start, typed = os.path.expanduser(name), os.path.basename(name)
    folder = name[: len(name) - len(typed)]
    try:
        entries = sorted(os.scandir(os.path.dirname(start) or "."), key=lambda entry: entry.name)
    except OSError:
        return []
    found = [entry.name + "/" * entry.is_dir() for entry in entries if entry.name.startswith(typed)]
    return [f"{command} {folder}{name}" for name in found if name.isprintable() and (typed or name[0] != ".")]


# What each command does, what it needs and what /help says of it.
COMMANDS: Final[dict[str, tuple[Callable[[Chat, str], str], str, str]]] = {
    "file": (Chat._file, "FILE", "read a document, which the next message begins with"),
    "undo": (Chat._undo, "", "forget the last message and its answer, or the document read since"),
    "reset": (Chat._reset, "", "forget everything that was said, and every document"),
    "save": (Chat._save, "FILE", "keep the context and the conversation in a file"),
    "load": (Chat._load, "FILE", "go on with a kept one"),
    "sources": (Chat._sources, "", "passages that the last answer used most"),
    "stats": (Chat._stats, "", "sizes and speed of the last answer"),
    "help": (Chat._help, "", "this list"),
    "exit": (Chat._exit, "", "end, as the end of input does"),
}
