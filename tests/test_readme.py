"""The README says what is so: its links lead somewhere, its flags exist, its examples run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minirea.cli import _parser

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CHANGELOG.md", "weights/demo/README.md"]
PAGES += ["kernels/README.md", "kernels/NOTEBOOK.md", "kernels/BENCHMARKS.md"]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\(([^)#]+)\)", text)
    missing = [t for t in targets if not t.startswith("http") and not ((ROOT / page).parent / t).exists()]
    assert not missing


def test_functions_on_the_path_of_a_token_exist() -> None:
    hops = re.findall(r"\[(minirea/\w+\.py)\]\([^)]+\) `([\w.]+)`", README)
    assert len(hops) == 5
    for file, name in hops:
        assert re.search(rf"^\s*(def|class) {name.split('.')[-1]}\b", (ROOT / file).read_text(), re.MULTILINE), name


def test_every_flag_is_described_and_every_described_flag_exists() -> None:
    commands = next(action for action in _parser()._actions if action.dest == "command")
    flags = {flag for action in commands.choices["generate"]._actions for flag in action.option_strings}  # type: ignore[index, union-attr]
    flags -= {"-h", "--help"}
    table = README[README.index("## Flags") : README.index("## Python")]
    described = set(re.findall(r"--[a-z-]+[a-z]", table))
    assert described == flags


def test_python_examples_run_and_find_what_they_ask_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert re.search(r"^green-river +381920\nblue-mountain +557043$", capsys.readouterr().out, re.MULTILINE)


def test_scripts_named_in_the_readme_exist() -> None:
    for script in re.findall(r"tools/\w+\.(?:sh|py)", README):
        assert (ROOT / script).exists(), script
