"""`minirea chat`: the session holds what the template writes, nothing that was said is lost, and pipes work."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from testing import tiny_model, write_checkpoint, write_tokenizer

import minirea
from minirea.chat import Chat, Conversation, Document, completions
from minirea.cli import main
from minirea.terminal import Interrupts

SCOPE = {"local_size": 24, "global_size": 4, "max_spans": 4, "chunk_size": 16, "dense_size": 60}
FLAGS = [word for name, value in SCOPE.items() for word in ("--" + name.replace("_", "-"), str(value))]
# Trims answers, as some models' templates do.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% elif m.role == 'system' %}<{{ m.content }}>"
    "{% else %}{{ m.content | trim }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}({% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", tiny_model())
    write_tokenizer(directory, chat_template=TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def llm(model: Path) -> minirea.LLM:
    return minirea.load(model, **SCOPE)


def said(conversation: Conversation, text: str, **options: Any) -> str:
    return "".join(piece.text for piece in conversation.stream(text, max_tokens=12, ignore_eos=True, **options))


def rendered(conversation: Conversation) -> list[int]:
    messages = [*conversation.system, *conversation.messages]
    return conversation.llm.tokenizer.encode_chat(messages, add_generation_prompt=False)


def assert_reads_the_conversation(conversation: Conversation) -> None:
    """The session is a beginning of what the template writes, but for what the answer's end is written with."""
    ids, expected = conversation.session.ids, rendered(conversation)
    shared = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(ids))
    answer = len(conversation.messages[-1]["content"]) + 2
    assert shared >= len(expected) - answer


def test_each_turn_goes_on_from_the_cache_and_is_what_the_whole_conversation_gives(llm: minirea.LLM) -> None:
    conversation = Conversation(llm.session(), system="be brief")
    for text in ("hello there", "and then?", "a</s>b", "x" * 90):
        expected = llm.tokenizer.encode_chat(
            [*conversation.system, *conversation.messages, {"role": "user", "content": text}]
        )
        cached = len(conversation.session.ids)
        pieces = list(conversation.stream(text, max_tokens=12, ignore_eos=True))
        asked = pieces[-1].stats.prompt_tokens
        assert conversation.session.ids[:asked] == expected
        assert pieces[-1].stats.cached_tokens >= cached - 16  # no more is read again than the last answer
        assert_reads_the_conversation(conversation)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 4


def test_undo_and_reset_leave_the_conversation_that_is_left(llm: minirea.LLM) -> None:
    conversation = Conversation(llm.session())
    first = said(conversation, "one")
    messages = list(conversation.messages)
    second = said(conversation, "two")
    assert conversation.undo() and conversation.messages == messages
    assert conversation.session.ids == rendered(conversation)[: len(conversation.session.ids)]
    assert said(conversation, "two") == second
    conversation.reset()
    assert conversation.session.ids == [] and not conversation.undo()
    assert said(conversation, "one") == first


def test_a_document_is_read_at_once_and_begins_the_next_message(llm: minirea.LLM) -> None:
    conversation = Conversation(llm.session())
    said(conversation, "hello")
    assert conversation.add_document("the book " * 30).tokens > 200
    assert conversation.add_document("another " * 5).tokens >= 40
    cached = len(conversation.session.ids)
    pieces = list(conversation.stream("who?", max_tokens=3, ignore_eos=True))
    assert pieces[-1].stats.cached_tokens >= cached - 1
    assert conversation.messages[2]["content"] == "the book " * 30 + "\n\n" + "another " * 5 + "\n\nwho?"
    assert conversation.pending == ""


def test_undo_takes_back_one_step_at_a_time(llm: minirea.LLM, tmp_path: Path) -> None:
    """A document, or an exchange whose documents stay; a file of the conversation changes nothing of that."""
    conversation, states = Conversation(llm.session()), []
    steps: tuple[Any, ...] = (
        lambda: said(conversation, "hello"),
        lambda: conversation.add_document("the book " * 9, "book"),
        lambda: conversation.add_document("another", "more"),
        lambda: said(conversation, "who?"),
        lambda: said(conversation, "why?"),
        lambda: conversation.add_document("a third", "third"),
    )
    for step in steps:
        states.append((list(conversation.messages), conversation.pending))
        step()
    conversation.save(str(tmp_path / "a.ctx"))
    again = Conversation(llm.open_session(tmp_path / "a.ctx"))
    assert (again.messages, again.pending, again.documents) == (
        conversation.messages,
        conversation.pending,
        conversation.documents,
    )
    expected = ("third", "why?", "the book " * 9 + "\n\nanother\n\nwho?", "more", "book", "hello")
    for one in (conversation, again):
        for state, name in zip(reversed(states), expected, strict=True):
            undone = one.undo()
            assert isinstance(undone, Document) == (name in ("third", "more", "book"))
            assert (undone.name if isinstance(undone, Document) else undone["content"]) == name
            assert (one.messages, one.pending) == state
            left = one._beginning() if one.pending else rendered(one) if one.messages else []
            assert one.session.ids == (left if one.pending else left[: len(one.session.ids)])  # read, and not anew
        assert one.undo() is None
    assert again.session.ids == []


def test_undo_and_reset_that_are_interrupted_leave_the_conversation(llm: minirea.LLM) -> None:
    conversation = Conversation(llm.session())
    conversation.add_document("the book", "book")
    said(conversation, "who?")
    for document in ("", "another"):
        if document:
            conversation.add_document(document)
        state = [list(conversation.messages), conversation.pending, [list(each) for each in conversation.documents]]
        for step in (conversation.undo, conversation.reset):
            interrupted = mock.patch.object(conversation, "_forget", side_effect=KeyboardInterrupt)
            with interrupted, pytest.raises(KeyboardInterrupt):
                step()
            assert [conversation.messages, conversation.pending, conversation.documents] == state


def test_a_document_that_no_message_has_yet_is_kept_in_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "doc.txt").write_text("a document of some words")
    lines = f"/file {tmp_path}/doc.txt\n/save {tmp_path}/a.ctx\nwhat?\n"
    out, err = chat(model, lines)
    tokens = re.search(r"minirea: (\d+) tokens of", err)
    assert tokens
    assert "generation" not in chat(model, f"what?\n/reset\n/stats\nwhat?\n/load {tmp_path}/a.ctx\n/stats\n")[1]
    again, err = chat(model, f"/load {tmp_path}/a.ctx\n/stats\nwhat?\n/undo\n/undo\n/undo\n")
    assert again == out
    document = f"{tmp_path}/doc.txt ({tokens[1]} tokens)"
    begins = f"; the next message begins with {document}"
    assert f"opened from {tmp_path}/a.ctx{begins}\n" in err and f"0 messages{begins}\n" in err
    assert err.splitlines()[-3:] == [
        f"minirea: the last message and its answer are forgotten{begins}",
        f"minirea: {document} is forgotten",
        "minirea: nothing was said yet, and no document was read",
    ]


def test_errors_in_a_chat_name_flags(model: Path, tmp_path: Path) -> None:
    chat(model, f"hello\n/save {tmp_path}/a.ctx\n")
    assert (
        "was read with --local-size 24, expected --local-size 20: load the model with --local-size 24 "
        in (chat(model, f"/load {tmp_path}/a.ctx\n", "--local-size", "20", status=1)[1])
    )


@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_interrupted_answer_is_kept_as_far_as_it_was_said(llm: minirea.LLM, after: int) -> None:
    conversation = Conversation(llm.session())
    conversation.add_document("a document")
    pieces: Any = conversation.stream("tell me", max_tokens=50, ignore_eos=True)
    text = "".join(next(pieces).text for _ in range(after))
    if after:
        text += pieces.throw(KeyboardInterrupt).text
        pieces.close()
        assert conversation.messages[1] == {"role": "assistant", "content": text} and text
        assert conversation.pending == ""
    else:
        pieces.close()
        assert conversation.messages == [] and conversation.pending == "a document\n\n"
    said(conversation, "and?")
    assert_reads_the_conversation(conversation)


def test_what_fails_leaves_the_conversation(llm: minirea.LLM) -> None:
    conversation = Conversation(llm.session())
    said(conversation, "one")
    messages = list(conversation.messages)
    conversation.add_document("book")
    for failing in (lambda: said(conversation, "\ud800"), lambda: said(conversation, "x", temperature=-1)):
        with pytest.raises(minirea.InputError):
            failing()
        assert conversation.messages == messages and conversation.pending == "book\n\n"
    with pytest.raises(minirea.InputError):
        conversation.add_document("\ud800")
    assert conversation.pending == "book\n\n"
    said(conversation, "go on")
    assert_reads_the_conversation(conversation)


def test_a_conversation_after_a_context(llm: minirea.LLM, tmp_path: Path) -> None:
    book = llm.session()
    book.prefill("It was a quiet day in the harbour. " * 3)
    base = list(book.ids)
    conversation = Conversation(book)
    first = said(conversation, "who?")
    assert book.ids[: len(base)] == base and book.ids[len(base) :][:5] == llm.tokenizer.encode("[who?", False)
    conversation.save(str(tmp_path / "a.ctx"))
    second = said(conversation, "why?")
    again = Conversation(llm.open_session(tmp_path / "a.ctx"))
    assert again.messages == conversation.messages[:2] and again.base == len(base)
    assert said(again, "why?") == second
    again.reset()
    assert again.session.ids == base and said(again, "who?") == first


def test_a_kept_conversation_goes_on_in_its_manner(llm: minirea.LLM, model: Path, tmp_path: Path) -> None:
    """With its system message and what special tokens mean in it; what differs from the flags is said in a line."""
    kept = str(tmp_path / "a.ctx")
    first = Conversation(llm.session(), "be brief", allow_special_tokens=True)
    said(first, "one</s>")
    first.save(kept)
    expected, tokens = said(first, "two"), list(first.session.ids)
    for system, special, differences in (
        (None, False, ["special tokens spelled in this conversation's messages act as such, as when it was saved"]),
        ("be brief", True, []),
        ("be long", True, ["has the system message 'be brief', and goes on so"]),
    ):
        again = Conversation(llm.open_session(kept), system, special)
        assert len(again.differences) == len(differences)
        assert all(part in line for part, line in zip(differences, again.differences, strict=True))
        assert said(again, "two") == expected and again.session.ids == tokens
        again.reset()
        assert said(again, "one</s>") == first.messages[1]["content"]
        book = llm.session()
        book.prefill("a book")
        again.open(book)  # which has no manner of its own
        assert (again.manner.system, again.manner.allow_special_tokens) == (system, special)
    (tmp_path / "doc").write_text("some words")
    lines = f"/file {tmp_path}/doc\n/save {kept}\nwhat?\n"
    out, _ = chat(model, lines, "--system", "be brief")
    line = "minirea: this conversation has the system message 'be brief', and goes on so: --system counts for new"
    line += " ones\n"
    for flags, told in (((), ""), (("--system", "x"), line), (("--system", "be brief"), "")):
        assert chat(model, "what?\n", "--context", kept, *flags) == (out, told)
        found = chat(model, f"/load {kept}\nwhat?\n", *flags)
        assert found[0] == out and found[1].endswith("tokens)\n" + told)
    plain = str(tmp_path / "b.ctx")
    chat(model, f"what?\n/undo\n/file {tmp_path}/doc\n/save {plain}\n")
    assert "has no system message, and goes on so" in chat(model, "", "--context", plain, "--system", "x")[1]


def test_what_is_read_after_a_conversation_comes_before_the_next(model: Path, llm: minirea.LLM, tmp_path: Path) -> None:
    """`read --context` makes a plain context of it: its text is not forgotten with the next message."""
    kept, longer = str(tmp_path / "a.ctx"), str(tmp_path / "b.ctx")
    chat(model, f"one\n/save {kept}\n")
    text = " and more words"
    assert main(["read", "--model", str(model), *FLAGS, "--context", kept, "--text", text, "--save", longer]) == 0
    opened = Conversation(llm.open_session(longer))
    ids = [*llm.open_session(kept).ids, *llm.tokenizer.encode(text, continues=True)]
    assert (opened.messages, opened.base) == ([], len(ids))
    said(opened, "two")
    assert opened.session.ids[: len(ids)] == ids


def test_where_nothing_was_said_a_manner_can_be_chosen(llm: minirea.LLM, tmp_path: Path) -> None:
    book = llm.session()
    book.prefill("a book")
    Conversation(book).save(str(tmp_path / "a.ctx"))
    again = Conversation(llm.open_session(tmp_path / "a.ctx"), "be brief")
    assert (again.manner.system, again.differences) == ("be brief", [])
    again.save(str(tmp_path / "a.ctx"))
    assert Conversation(llm.open_session(tmp_path / "a.ctx")).manner.system == "be brief"


def test_a_saved_conversation_that_is_malformed_is_one_line(llm: minirea.LLM, tmp_path: Path) -> None:
    conversation = Conversation(llm.session())
    said(conversation, "one")
    for notes in (
        {"messages": "["},
        {"messages": "{}", "base": "0"},
        {"messages": '[{"role": 1, "content": "a"}]', "base": "0"},
        {"messages": "[]", "base": "-1"},
        {"messages": "[]", "base": "999"},
        {"messages": "[]"},
        *(
            {"messages": '[{"role": "user", "content": "ab"}]', "base": "0", "pending": "c", "documents": documents}
            for documents in ("[", "null", "3", "[[]]", "[[], []]", "[[], [[1, 1, 1]]]", '[[], [["a", 1, "1"]]]')
        ),
        *(
            {"messages": "[]", "base": "0", "system": system, "allow_special_tokens": special}
            for system, special in (("[", "true"), ("3", "true"), ('["a"]', "false"), ("null", "1"), ('"a"', "null"))
        ),
        *(
            {"messages": '[{"role": "user", "content": "ab"}]', "base": "0", "documents": documents}
            for documents in (
                "[[]]",
                '[[["a", 3, 1]], []]',
                '[[["a", -1, 1]], []]',
                '[[], [["a", 1, 1]]]',
                '[["abc"], []]',
            )
        ),
    ):
        session = llm.session()
        session.prefill("abc")
        session.notes = notes
        session.save(tmp_path / "a.ctx")
        with pytest.raises(minirea.InputError, match="malformed"):
            conversation.open(llm.open_session(tmp_path / "a.ctx"))
        session.ids = []
        _, err = chat(llm.path, "", "--context", str(tmp_path / "a.ctx"), status=1)
        assert err == f"minirea: error: --context {tmp_path}/a.ctx: the conversation in this context is malformed\n"
    assert conversation.messages and said(conversation, "two")


def chat(model: Path, lines: str | bytes, *flags: str, status: int = 0) -> tuple[str, str]:
    """Standard output and standard error of lines that come from no terminal."""
    words = ["chat", "--model", str(model), *FLAGS, "--max-tokens", "6", "--ignore-eos", "--quiet", *flags]
    data = io.BytesIO(lines.encode() if isinstance(lines, str) else lines)
    out, err = io.StringIO(), io.StringIO()
    with mock.patch("sys.stdin", io.TextIOWrapper(data)), redirect_stdout(out), redirect_stderr(err):
        assert main(words) == status, err.getvalue()
    return out.getvalue(), err.getvalue()


def test_answers_alone_are_on_standard_output(model: Path, llm: minirea.LLM, tmp_path: Path) -> None:
    conversation = Conversation(llm.session())

    def answer(text: str) -> str:
        return "".join(p.text for p in conversation.stream(text, max_tokens=6, ignore_eos=True)) + "\n"

    (tmp_path / "doc.txt").write_text("\ufeffa document of some words")
    context = tmp_path / "a.ctx"
    lines = f"hello\n\nagain\n/undo\n/save {context}\n//usr\n/file {tmp_path}/doc.txt\nwhat?\n/sources\n/stats\n"
    lines += f"/load {context}\nbye"
    out, err = chat(model, lines)
    expected = answer("hello") + answer("again")
    conversation.undo()
    expected += answer("/usr")
    conversation.add_document("a document of some words")
    expected += answer("what?")
    for _ in ("what?", "doc.txt", "/usr"):
        conversation.undo()
    assert out == expected + answer("bye")
    for part in (
        "are forgotten",
        f"tokens kept in {context}",
        "doc.txt read",
        "\n1. ",
        "generation  6 tokens",
        "opened",
    ):
        assert part in err
    assert ">" not in err.replace("/sources", "").splitlines()[0]
    out, _ = chat(model, "bye\n/exit\nnever\n", "--context", str(context))
    assert out == (expected + answer("bye")).splitlines(keepends=True)[-1] or out.count("\n") == 1


def test_commands_that_cannot_be_done_are_one_line_each_and_the_rest_goes_on(model: Path, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").write_bytes(b"")
    bad = {
        "/foo": "unknown command /foo, expected one of /file, /undo",
        "/": "unknown command /,",
        "/save": "/save FILE: a name is missing",
        "/undo 3": "/undo takes nothing after it",
        "/exit now": "/exit takes nothing after it",
        "/\x1b[31m": r"unknown command /\x1b[31m,",
        "/save /none/a": "/none/a: not saved: the context is empty",
        "/load /none/a": "/none/a: no such file",
        f"/load {tmp_path}/latin": "is no context, expected",
        "/file /none/a": "no such file",
        f"/file {tmp_path}/latin": "not UTF-8 text: found byte 0xe9 at offset 3",
        f"/file {tmp_path}/empty": "is empty",
        "/sources": "sources are those of an answer",
    }
    out, err = chat(model, "\n".join([*bad, "hello"]), status=1)
    errors = err.splitlines()
    assert len(errors) == len(bad) and out.count("\n") == 1
    for line, message in zip(errors, bad.values(), strict=True):
        assert line.startswith("minirea: error: ") and message in line
    assert "not UTF-8" in chat(model, b"caf\xe9\n", status=1)[1]
    assert chat(model, "") == ("", "")


def test_what_is_wrong_is_told_before_the_weights_are_read(model: Path, tmp_path: Path) -> None:
    bare = write_checkpoint(tmp_path / "bare", tiny_model())
    write_tokenizer(bare)
    (bare / "model.safetensors").write_bytes(b"")
    assert "no chat template, expected" in chat(bare, "hello", status=1)[1]
    assert "no such file" in chat(model, "hello", "--context", str(tmp_path / "none"), status=1)[1]


def test_the_tab_key_completes_commands_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "books").mkdir()
    for name in ("books/alice.txt", "books/a b.txt", "boat.txt", ".hidden", "new\nline"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "books"))
    for line, expected in (
        ("/s", ["/save ", "/sources", "/stats"]),
        ("/file bo", ["/file boat.txt", "/file books/"]),
        ("/load ", ["/load boat.txt", "/load books/"]),
        ("/load .", ["/load .hidden"]),
        ("/save books/a", ["/save books/a b.txt", "/save books/alice.txt"]),
        ("/save books/a b", ["/save books/a b.txt"]),
        (f"/file {tmp_path}/boa", [f"/file {tmp_path}/boat.txt"]),
        ("/file ~/al", ["/file ~/alice.txt"]),
        *((line, []) for line in ("/file none/", "/undo b", "/foo b", "hello", "hello bo")),
    ):
        assert completions(line) == expected


class Terminal:
    """A chat in a terminal of its own."""

    def __init__(self, model: Path, *flags: str) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.environ |= {"TERM": "dumb", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "minirea", "chat", "--model", str(model), *FLAGS, "--ignore-eos", *flags]
            os.execv(sys.executable, command)
        self.shown = ""

    def until(self, text: str) -> str:
        """What is shown up to `text`."""
        while text not in self.shown:
            self.shown += os.read(self.descriptor, 4096).decode(errors="replace")
        before, self.shown = self.shown.split(text, 1)
        return before

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def interrupt(self, text: str) -> None:
        """Ctrl-C at the prompt, up to `text`; again where nothing comes of it.

        A signal between the prompt and the wait for a key is seen by `input` with the next key only.
        """
        while text not in self.shown:
            self.type("\x03")
            while text not in self.shown and select.select([self.descriptor], [], [], 1)[0]:
                self.shown += os.read(self.descriptor, 4096).decode(errors="replace")
        self.until(text)

    def end(self) -> int:
        """The exit status."""
        while True:
            try:
                if not os.read(self.descriptor, 4096):
                    break
            except OSError:  # the other side is closed
                break
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_in_a_terminal(model: Path, tmp_path: Path) -> None:
    """Ctrl-C at the prompt, in an answer, history, and the end of input."""
    terminal = Terminal(model, "--max-tokens", "100000")
    terminal.until("/help lists")
    terminal.until("> ")
    terminal.interrupt("(Ctrl-D or /exit ends)")
    terminal.until("> ")
    terminal.type("hello\n")
    terminal.until("hello")
    terminal.until("\n")
    os.read(terminal.descriptor, 8)  # the answer has begun
    terminal.type("\x03")
    terminal.until("\r\n(interrupted; what was said is kept")
    assert terminal.until("> ") == ")\r\n"
    terminal.type(f"/sa\t{tmp_path}/a.ctx\n")
    terminal.until("tokens kept in")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    session = minirea.load(model, **SCOPE).open_session(tmp_path / "a.ctx")
    messages = json.loads(session.notes["messages"])
    assert [message["role"] for message in messages] == ["user", "assistant"] and messages[1]["content"]


@pytest.mark.parametrize("shown", range(9))
def test_ctrl_c_while_a_line_is_shown_ends_no_chat(llm: minirea.LLM, tmp_path: Path, shown: int) -> None:
    """In a terminal; and what a command has done by then is not said to be undone."""
    options = {"max_tokens": 3, "ignore_eos": True}
    talk = Chat(Conversation(llm.session()), Interrupts(), options, lambda *_: "", str, progress=False)
    talk.in_terminal = True
    (tmp_path / "doc").write_text("some words")
    lines = ["hello", f"/file {tmp_path}/doc", "/undo", "/foo", "/stats", f"/save {tmp_path}/a", "/undo", "/exit"]
    told: list[str] = []

    def strike(text: str) -> None:
        told.append(text)
        if len(told) == shown:
            raise KeyboardInterrupt

    reading = mock.patch.object(talk, "_read_line", side_effect=lines)
    with reading, mock.patch("minirea.chat.say", strike), redirect_stdout(io.StringIO()):
        assert talk.run() == 0
    assert talk.ended and talk.conversation.messages == [] and not any("as it was" in text for text in told)
    assert sum("forgotten" in text for text in told) == 2 and (tmp_path / "a").exists()


def test_an_error_in_an_answer_has_a_line_of_its_own(model: Path) -> None:
    def fail(*_: object) -> Iterator[int]:
        yield from (40, 41)
        raise minirea.InputError("no more")

    with mock.patch("minirea.generate.decode", fail):
        assert chat(model, "hello\n", status=1) == (" E F\n", "minirea: error: no more\n")


def test_an_answer_without_text_is_told(model: Path) -> None:
    with mock.patch("minirea.generate.TextOfTokens.put", return_value=""):
        out, err = chat(model, "hello\n/stats\n")
    assert out == "\n"
    assert err.startswith("minirea: the answer has no text; the message is forgotten\ncontext") and " 0 messages" in err


def test_ctrl_c_in_a_pipe_between_two_lines(model: Path) -> None:
    """The first line's answer is there before the second one comes."""
    expected = chat(model, "hello\n", "--max-tokens", "3")[0]
    command = [sys.executable, "-m", "minirea", "chat", "--model", str(model), *FLAGS, "--max-tokens", "3"]
    command += ["--ignore-eos", "--quiet"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    assert process.stdout.readline().decode() == expected
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and b"Traceback" not in err
