"""The README says what is so: its links lead somewhere, its flags exist, its examples run."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import bench
import pytest
import sketch_survivors
import sweep_tiles

import minirea
from minirea.cli.parser import make_parser

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CHANGELOG.md", "weights/demo/README.md", "weights/smollm2/README.md"]
PAGES += ["kernels/README.md", "kernels/NOTEBOOK.md", "kernels/BENCHMARKS.md"]
README = (ROOT / "README.md").read_text()
TOOLS = {f"tools/{tool.__name__}.py": tool for tool in (bench, sketch_survivors, sweep_tiles)}
OURS = ("minirea ", "python tools/")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", (ROOT / page).read_text())
    for target, section in targets:
        file = (ROOT / page).parent / target if target else ROOT / page
        assert target.startswith("http") or file.exists(), target
        assert not section or target.startswith("http") or section in sections(file), (target, section)


def sections(page: Path) -> list[str]:
    """Names of a page's headings, as links have them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_functions_on_the_path_of_a_token_exist() -> None:
    path = README[README.index("## The path of a token") : README.index("## Python")]
    hops = re.findall(r"\[([\w/]+\.py)\]\([^)]+\) `([\w.]+)`", path)
    assert len(hops) == 8  # five on each device, the first two of which are the same
    for file, name in hops:
        assert re.search(rf"^\s*(def|class) {name.split('.')[-1]}\b", (ROOT / file).read_text(), re.MULTILINE), name


def commands_of(page: str) -> list[list[str]]:
    """Arguments of every command in a page's blocks, without what a shell does with its output."""
    commands: list[list[str]] = [[]]
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            command = line.removeprefix("$ ")
            if kind != "bash" and not command.startswith(OURS):
                continue  # what it prints, or Python
            commands.append([])
            words = shlex.shlex(command, posix=True, punctuation_chars=True)
            words.whitespace_split = True
            for word in words:
                if set(word) <= set("|&;<>"):
                    commands.append([])  # what a redirection goes to is taken for a command, and is none of ours
                else:
                    commands[-1].append(word)
    return [command for command in commands if command]


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str) -> None:
    """MODE stands for an attention mode."""
    commands = commands_of(page)
    for command in commands:
        if command[0] == "minirea":
            make_parser().parse_args(["full" if word == "MODE" else word for word in command[1:]])
        elif command[0] == "python" and command[1] in TOOLS:
            TOOLS[command[1]].parser().parse_args(command[2:])
        elif command[0] == "python" and command[1] != "-m":
            assert (ROOT / command[1]).exists(), command
    assert commands or not re.search(r"^(\$ )?(minirea|python) ", (ROOT / page).read_text(), re.MULTILINE)


def flags(command: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Of a command and its own commands."""
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from flags(inner)
        else:
            yield action


def test_every_flag_has_help_and_every_flag_that_is_named_exists() -> None:
    known = list(flags(make_parser()))
    assert len(known) > 100
    for action in known:
        assert action.help and len(action.help) > 5, action.option_strings
    options = {option for action in known for option in action.option_strings}
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", prose))
    assert named and named <= options, named - options


def test_python_examples_run_and_find_what_they_ask_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    pages = ("README.md", "kernels/README.md")
    blocks = [re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL) for page in pages]
    assert all(blocks)
    for page, block in ((page, block) for page, found in zip(pages, blocks, strict=True) for block in found):
        exec(compile(block, page, "exec"), {})
    assert re.search(r"^green-river +381920\nblue-mountain +557043$", capsys.readouterr().out, re.MULTILINE)


def test_scripts_named_in_the_readme_exist() -> None:
    for script in re.findall(r"tools/\w+\.(?:sh|py)", README):
        assert (ROOT / script).exists(), script


@pytest.mark.slow
def test_the_demo_answers_as_it_says() -> None:
    """What tools/demo.sh runs, with the default scope: one digit lost is an answer lost."""
    prompt = (ROOT / "weights" / "demo" / "prompts" / "needle-16k.txt").read_text()
    llm = minirea.load(ROOT / "weights" / "demo", device="cpu")
    assert llm.generate(prompt, max_tokens=16, stop=".").text.strip() == "604218"
