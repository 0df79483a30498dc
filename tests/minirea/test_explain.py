"""`minirea explain` and `--sources`: files that can be cited, and a page that stands by itself."""

from __future__ import annotations

import functools
import html.parser
import itertools
import json
import re
import resource
import shutil
import subprocess
import urllib.parse
from pathlib import Path

import pytest
import torch

from minirea import cli
from minirea.errors import InputError
from minirea.explain import Explanation
from minirea.explain.page import render, shown_parts
from minirea.explain.picture import binned, draw
from minirea.sources import Votes, line_of, sources_of
from minirea.tokenizer import Tokenizer, load_tokenizer

DEMO = Path(__file__).parents[2] / "weights" / "demo"
PROMPT = DEMO / "prompts" / "two-needles.txt"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> &amp; <!-- "
    "]]> {{ 7 * 7 }} {% raw %} \u202eright to left\u202c \x00\x1b[31m caf\u00e9 \U0001f30a \n'\"` $x \u2028 end. "
)


@functools.cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO)


def votes_at(entries: list[tuple[int, int, float]], stop: int) -> Votes:
    """(token, position, weight) each."""
    token, position, weight = (list(column) for column in zip(*entries, strict=True))
    return Votes(
        torch.tensor(token),
        torch.zeros(len(token), dtype=torch.int64),
        torch.tensor(position),
        torch.tensor(weight),
        stop,
    )


def page_of(prompt: str, answer: str, votes: Votes) -> str:
    ids, more = tokenizer().encode(prompt), tokenizer().encode(answer, continues=True)
    sources = sources_of(votes, ids + more, 3, tokenizer())
    records = [source._asdict() | {"line": line_of(prompt, ids, source, tokenizer())} for source in sources]
    return render("a <model> & more", ids + more, len(ids), votes, records, tokenizer())


class Page(html.parser.HTMLParser):
    """What a page is made of: elements, the text of its prompt, what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.tokens: dict[int, str] = {}
        self.titles: list[str] = []
        self._token: int | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.loads += [str(values[name]) for name in ("src", "srcset", "data", "action") if name in values]
        self.loads += [
            str(values["href"]) for _ in range("href" in values and not str(values["href"]).startswith("#t"))
        ]
        self._token = (
            int(str(values["id"])[1:]) if tag == "span" and re.fullmatch(r"t\d+", str(values.get("id"))) else None
        )

    def handle_data(self, data: str) -> None:
        if self._token is not None:
            self.tokens[self._token] = self.tokens.get(self._token, "") + data

    def handle_endtag(self, tag: str) -> None:
        self._token = None if tag == "span" else self._token


def test_explain_writes_what_can_be_cited(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "deep" / "out"
    assert (
        cli.main(["explain", "--model", str(DEMO), "--prompt", str(PROMPT), "--max-tokens", "12", "--out", str(out)])
        == 0
    )
    printed = capfd.readouterr()
    assert printed.out == " 381920.\n"
    assert re.search(
        r"sources +\d+\.\d% line 1, tokens 0-20: The special magic number for green-river is 381920\.", printed.err
    )
    record = json.loads((out / "sources.json").read_text())
    assert record["text"] == " 381920."
    assert record["sources"][0]["text"] == "The special magic number for green-river is 381920."
    lines = PROMPT.read_text().splitlines()
    assert all(source["text"] in "\n".join(lines[source["line"] - 1 :]) for source in record["sources"])
    assert (out / "attention.png").read_bytes().startswith(b"\x89PNG")
    page = Page((out / "page.html").read_text(encoding="utf-8"))
    assert "".join(page.tokens.values()) == PROMPT.read_text()
    assert page.loads == []


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text of PROMPT without its question, read and kept."""
    folder = tmp_path_factory.mktemp("context")
    (folder / "text.txt").write_text(PROMPT.read_text().rsplit("\nQuestion:", 1)[0])
    files = ["--prompt", str(folder / "text.txt"), "--save", str(folder / "text.ctx")]
    assert cli.main(["read", "--model", str(DEMO), *files, "--quiet"]) == 0
    return folder / "text.ctx"


def test_explain_after_a_context_cites_the_context(
    context: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Lines and tokens are counted from the beginning of the context, and the page shows all of it."""
    text = context.with_suffix(".txt").read_text()
    question = "\nQuestion: What is the special magic number for blue-mountain? Answer: The special magic number for "
    question += "blue-mountain is"
    options = ["--context", str(context), "--text", question, "--max-tokens", "12", "--out", str(tmp_path)]
    assert cli.main(["explain", "--model", str(DEMO), *options]) == 0
    assert capfd.readouterr().out == " 557043.\n"
    record = json.loads((tmp_path / "sources.json").read_text())
    needle = "The special magic number for blue-mountain is 557043."
    first = record["sources"][0]
    assert (first["text"], first["line"]) == (needle, text[: text.index(needle)].count("\n") + 1)
    ids = tokenizer().encode(text) + tokenizer().encode(question, continues=True)
    assert record["prompt_tokens"] == len(ids)
    assert tokenizer().decode(ids[first["start"] : first["end"]]).strip() == needle
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "".join(page.tokens.values()) == text + question


def test_a_series_names_the_sources_of_every_answer(
    context: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As a run of one question does, whether answers go to standard output or to a file."""
    form = "\nQuestion: What is the special magic number for {0}? Answer: The special magic number for {0} is"
    prompts = [form.format(key) for key in ("green-river", "blue-mountain")]
    lines = [json.dumps({"id": i, "prompt": prompt}) for i, prompt in enumerate(prompts)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    options = ["generate", "--model", str(DEMO), "--context", str(context), "--max-tokens", "8", "--sources", "2"]
    options += ["--quiet"]
    assert cli.main([*options, "--questions", str(tmp_path / "questions.jsonl")]) == 0
    answers = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [answer["sources"][0]["text"] for answer in answers] == [
        "The special magic number for green-river is 381920.",
        "The special magic number for blue-mountain is 557043.",
    ]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert cli.main([*options, "--text", prompt, "--json"]) == 0
        assert json.loads(capfd.readouterr().out)["sources"] == answer["sources"]
    out = tmp_path / "answers.jsonl"
    assert cli.main([*options, "--questions", str(tmp_path / "questions.jsonl"), "--out", str(out)]) == 0
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["sources"] for answer in kept] == [answer["sources"] for answer in answers]


def test_sources_in_json(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--model", str(DEMO), "--prompt", str(PROMPT), "--max-tokens", "12", "--json", "--quiet"]
    assert cli.main([*arguments, "--sources", "2"]) == 0
    sources = json.loads(capfd.readouterr().out)["sources"]
    assert len(sources) == 2
    assert set(sources[0]) == {"start", "end", "share", "line", "text"}
    assert sources[0]["text"] == "The special magic number for green-river is 381920."
    assert cli.main(arguments) == 0
    assert "sources" not in json.loads(capfd.readouterr().out)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["generate", "--sources", "-1"], "--sources is -1, expected an integer of at least 0"),
        (["explain", "--out", "FILE"], "where no folder can be made"),
        (["explain", "--out", "FILE/below"], "where no folder can be made"),
        (["explain", "--out", "TAKEN"], "sources.json: is a directory, expected a file"),
        (["explain", "--out", "NEW", "--gpus", "2", "--device", "cpu"], "--gpus is 2, expected 1: sources"),
        (["explain", "--out", "NEW", "--span-size", "0"], "--span-size is 0"),
        (["explain", "--out", "NEW", "--max-tokens", "1000000000000"], "not enough memory"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "sources.json").mkdir(parents=True)
    places = {
        "FILE": str(tmp_path / "file"),
        "TAKEN": str(tmp_path / "taken"),
        "NEW": str(tmp_path / "made" / "by" / "explain"),
    }
    options = [functools.reduce(lambda text, name: text.replace(name, places[name]), places, text) for text in options]
    assert cli.main([*options, "--model", str(DEMO), "--text", "x"]) == 1
    line = capfd.readouterr().err
    assert said in line
    assert line.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "sources.json", "taken"]


def test_no_matplotlib_leaves_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert (
        cli.main(
            [
                "explain",
                "--model",
                str(DEMO),
                "--text",
                "The storm went on. In the",
                "--max-tokens",
                "2",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "sources.json"]


def test_a_hostile_prompt_stays_text() -> None:
    prompt = HOSTILE * 5
    ids = tokenizer().encode(prompt)
    page = page_of(prompt, HOSTILE, votes_at([(0, 3, 0.5), (1, 40, 0.2)], len(ids)))
    found = Page(page)
    assert found.tags.count("script") == 2
    assert not {"img", "iframe", "object", "link"} & set(found.tags)
    assert found.loads == []
    shown = "".join(found.tokens.values())
    assert "</script><script>document.title" in shown
    assert "{{ 7 * 7 }} {% raw %}" in shown
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e]", page)
    assert "default-src 'none'" in page


def test_a_long_prompt_is_shown_in_parts() -> None:
    votes = votes_at([(0, 500_000, 0.9), (1, 900_010, 0.1)], 999_900)
    parts = shown_parts(votes, 1_000_000, [{"start": 499_990, "end": 500_010}])
    shown = {j for start, end in parts for j in range(start, end)}
    assert {0, 499_950, 500_000, 500_050, 900_010, 999_999} <= shown
    assert len(shown) < 2000
    assert parts == sorted(parts)
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(parts))
    assert shown_parts(votes, 400, []) == [(0, 400)]
    assert shown_parts(votes, 0, []) == []


@pytest.mark.parametrize("num_tokens", [1, 7, 1000, 1_000_000])
def test_the_picture_shows_all_votes(num_tokens: int) -> None:
    position = torch.randint(num_tokens, (50,))
    votes = Votes(torch.arange(50) % 3, torch.arange(50) % 2, position, torch.rand(50), num_tokens)
    for row, count in ((votes.layer, 2), (votes.token, 3)):
        share = binned(votes, row, count, num_tokens)
        assert share.sum() == pytest.approx(1.0)
        expected = [float(votes.weight[row == r].sum() / votes.weight.sum()) for r in range(count)]
        assert share.sum(1).tolist() == pytest.approx(expected)


def test_an_answer_that_used_nothing_is_drawn_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ids, empty = tokenizer().encode("One line."), torch.empty(0, dtype=torch.int64)
    votes = Votes(empty, empty, empty, torch.empty(0), 0)
    with torch.device("meta"):  # the caller's default, which is not where votes are
        written = Explanation("demo", [*ids, 5], len(ids), "x", votes, 6, []).write(tmp_path, tokenizer())
    assert all(path.stat().st_size for path in written)
    assert "None: the answer used no part" in (tmp_path / "page.html").read_text()


def test_a_full_disk_leaves_the_old_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ids, empty = tokenizer().encode("One line."), torch.empty(0, dtype=torch.int64)
    votes = Votes(empty, empty, empty, torch.empty(0), 0)
    before = {
        p: p.read_bytes() for p in Explanation("demo", [*ids, 5], 3, "x", votes, 6, []).write(tmp_path, tokenizer())
    }
    other = Explanation("another", [*ids, 5], 3, "x" * 20, votes, 6, [])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, name in ((10, "sources.json"), (1000, "page.html")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(InputError, match=f"{name}: cannot be written: File too large"):
                other.write(tmp_path, tokenizer())
            with pytest.raises(InputError, match=r"attention\.png: cannot be written: File too large"):
                draw(tmp_path / "attention.png", "another", votes, 3, 6, ["x"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert set(tmp_path.iterdir()) == set(before)
        assert all(path.read_bytes() == content for path, content in before.items() if path.name != "sources.json")
        assert json.loads((tmp_path / "sources.json").read_bytes())


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shades_what_is_chosen(tmp_path: Path) -> None:
    prompt = HOSTILE * 5
    ids = tokenizer().encode(prompt)
    path = tmp_path / "page.html"
    votes = votes_at([(0, 3, 0.5), (1, 40, 0.1), (1, 41, 0.4)], len(ids))
    path.write_bytes(page_of(prompt, " one two three", votes).encode())

    def shaded(fragment: str) -> dict[int, float]:
        command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}"]
        command += ["--dump-dom", path.as_uri() + fragment]
        dom = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert 'data-ready="true"' in dom
        assert "<title>Where the answer came from</title>" in dom
        assert dom.count("<rect") >= 1
        assert dom.count('<span role="button" tabindex="0" aria-pressed="true"') == (1 if fragment else 0)
        found = re.findall(r'<span id="t(\d+)"[^>]* style="--w: ?([\d.]+);?"', dom)
        return {int(position): float(weight) for position, weight in found}

    assert shaded("") == {3: 1.0, 40: pytest.approx(0.2**0.5, abs=1e-3), 41: pytest.approx(0.8**0.5, abs=1e-3)}
    assert shaded("#a1") == {40: 0.5, 41: 1.0}


MEASURE = """<script>
  const tokens = Array.from(document.querySelectorAll("#answer span")), pressed = [];
  const note = () => pressed.push(tokens.map(token => Number(token.ariaPressed === "true")));
  tokens[1].click(); note();
  for (const key of ["x", "Enter", " "]) {
    tokens[2].dispatchEvent(new KeyboardEvent("keydown", {key: key, bubbles: true})); note();
  }
  const places = tokens.map(token => {
    const range = document.createRange();
    range.selectNodeContents(token);
    const boxes = range.getClientRects(), last = boxes[boxes.length - 1];
    return [token.textContent, Math.round(last.top), Math.round(last.left)];
  });
  getSelection().selectAllChildren(document.getElementById("answer"));
  const data = {places: places, pressed: pressed, copied: getSelection().toString()};
  document.documentElement.dataset.measured = encodeURIComponent(JSON.stringify(data));
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_the_answer_as_it_is_written(tmp_path: Path) -> None:
    """Its lines are lines, what is copied is the answer, and its tokens can be chosen by mouse and by key."""
    answer = " one\n\ntwo.\n  three\n"
    page = page_of("A prompt.", answer, votes_at([(0, 1, 1.0)], 3))
    page = re.sub(r"<meta http-equiv[^>]*>", "", page).replace("</body>", MEASURE)  # a script of our own may run
    (tmp_path / "page.html").write_text(page)
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}"]
    command += ["--dump-dom", (tmp_path / "page.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r'data-measured="([^"]*)"', dom)
    assert found
    measured = json.loads(urllib.parse.unquote(found[1]))
    assert "".join(text for text, *_ in measured["places"]) == answer
    assert measured["copied"].strip() == answer.strip()
    top = {text.strip(): y for text, y, _ in measured["places"]}
    line = top["three"] - top["t"]
    assert line > 0 and abs(top["t"] - top["one"] - 2 * line) <= 2  # pixels, of rounding
    left = {text.strip(): x for text, _, x in measured["places"]}
    assert left["t"] < left["three"]
    pressed = [[i for i, token in enumerate(tokens) if token] for tokens in measured["pressed"]]
    assert pressed == [[1], [1], [2], []]
