"""Perplexity against what the engine's own logits and transformers say, and its bookkeeping of positions and bytes."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from testing import oracle, random_ids, tiny_model, write_checkpoint

import minirea
from minirea.errors import InputError, MissingFileError
from minirea.evaluation.tasks import likelihood
from minirea.evaluation.tasks.likelihood import nlls_in_range, token_nlls
from minirea.evaluation.tasks.perplexity import Perplexity, bucket_edges
from minirea.evaluation.text.windows import Text, radical_inverse, token_bytes
from minirea.tokenizer import load_tokenizer

SCOPE: dict[str, Any] = {"global_size": 4, "local_size": 24, "span_size": 4, "max_spans": 3, "chunk_size": 16}
DEMO = Path(__file__).parents[4] / "weights" / "demo"
NEEDS_MATPLOTLIB = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_checkpoint(tmp_path_factory.mktemp("tiny"), tiny_model(max_position_embeddings=64, vocab_size=2048))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, path)
    return path


@pytest.mark.parametrize("mode", ["reattention", "streaming", "full"])
def test_it_is_the_log_softmax_of_the_engines_logits(directory: Path, mode: str) -> None:
    llm = minirea.load(directory, attention=mode, **SCOPE)
    ids = random_ids(150)  # far beyond the scope, and no multiple of the chunk
    expected = -llm.logits(ids)[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(token_nlls(llm, ids), expected, atol=1e-5, rtol=0)


def test_its_mean_is_the_loss_of_transformers(directory: Path) -> None:
    ids = random_ids(60)
    with torch.no_grad():
        loss = oracle(directory)(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    torch.testing.assert_close(token_nlls(minirea.load(directory, attention="full"), ids).mean(), loss)


def test_neither_chunks_nor_tiles_change_full_attention(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(60)
    once = token_nlls(minirea.load(directory, attention="full", local_size=60, chunk_size=60), ids)
    monkeypatch.setattr(likelihood, "TILE_LOGITS", 3 * 2048)  # three tokens at a time
    torch.testing.assert_close(token_nlls(minirea.load(directory, attention="full", chunk_size=7), ids), once)


def test_logits_that_are_not_finite_are_an_error(directory: Path) -> None:
    llm = minirea.load(directory)
    llm.model.norm = torch.full_like(llm.model.norm, float("nan"))
    with pytest.raises(InputError, match="not finite at token 0"):
        token_nlls(llm, random_ids(5))


def test_in_range_every_token_has_half_to_all_of_the_context(directory: Path) -> None:
    """Context 20 with one beginning token: tokens 20 to 29 are read behind the beginning and tokens 11 to 19."""
    llm = minirea.load(directory, attention="full")
    ids = random_ids(47)
    nll_T = nlls_in_range(llm, ids, 20, beginning=1)
    assert len(nll_T) == len(ids) - 1
    torch.testing.assert_close(nll_T[:19], token_nlls(llm, ids[:20]))
    torch.testing.assert_close(nll_T[19:29], token_nlls(llm, [ids[0], *ids[11:30]])[-10:])
    torch.testing.assert_close(nll_T[39:], token_nlls(llm, [ids[0], *ids[28:47]])[-7:])  # the rest, less than half
    without = nlls_in_range(llm, ids, 20)
    torch.testing.assert_close(without[19:29], token_nlls(llm, ids[10:30])[-10:])


def test_within_the_trained_range_both_readings_are_one(directory: Path) -> None:
    llm = minirea.load(directory, attention="reattention", **SCOPE)
    ids = random_ids(64)
    assert torch.equal(nlls_in_range(llm, ids, 64, 1), token_nlls(llm, ids))


@pytest.mark.parametrize(
    ("length", "buckets", "edges"),
    [
        (1000, "log", [0, 128, 256, 512, 1000]),
        (1024, "log", [0, 128, 256, 512, 1024]),
        (100, "log", [0, 100]),
        (10, 4, [0, 4, 8, 10]),
        (8, 4, [0, 4, 8]),
    ],
)
def test_buckets(length: int, buckets: str | int, edges: list[int]) -> None:
    assert bucket_edges(length, buckets) == edges


def test_bytes_of_tokens_add_up_to_the_text() -> None:
    """Characters of one to four bytes, which the demo's vocabulary cuts into several tokens each."""
    tokenizer = load_tokenizer(DEMO)
    text = "Größe: 3 €, 漢字 and 𝄞; naïve façade 🙂\n\ttab"
    ids = tokenizer.encode(text, add_special_tokens=False)
    sizes = token_bytes(tokenizer, ids)
    assert sum(sizes) == len(text.encode())
    assert any(isinstance(tokenizer.piece(i), bytes) and len(tokenizer.decode([i])) == 1 for i in ids)
    start = next(i for i in range(len(ids)) if tokenizer.decode(ids[:i]).endswith("naïve"))
    assert sum(sizes[:start]) == len(text[: text.index("naïve") + 5].encode())


def test_windows_are_spread_and_more_of_them_leave_the_others(tmp_path: Path) -> None:
    assert [radical_inverse(n) for n in (1, 2, 3, 4, 5)] == [0.5, 0.25, 0.75, 0.125, 0.625]
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number:04d}" for number in range(500)))
    text = Text(path, load_tokenizer(DEMO))
    begin = text.beginning
    assert len(begin) == 1
    assert len(text.ids) == 2000  # a digit is a token
    window = text.window(0, 101)
    assert window == begin + text.ids[950:1050]
    assert text.window(1, 101)[1:] == text.ids[475:575]
    assert text.window(0, 2001)[1:] == text.ids


@pytest.fixture(scope="module")
def evaluation(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text("0123456789" * 40)  # a digit is a token
    options = {"lengths": (40, 150), "samples": 2, "text": path, "buckets": 50}
    return minirea.evaluate("perplexity", directory, attention=("full", "reattention"), **options, **SCOPE)


def test_records_hold_every_token_once(evaluation: Any, directory: Path) -> None:
    assert len(evaluation.records) == 2 * 2 * 2
    llm = minirea.load(directory, attention="full", **SCOPE)
    for record in evaluation.records:
        assert sum(bucket["tokens"] for bucket in record["buckets"]) == record["length"] - 1
    record = next(r for r in evaluation.records if r["attention"] == "full" and r["length"] == 150)
    ids = Text(evaluation.task.text[0], llm.tokenizer).window(record["sample"], 150)
    nll_T = token_nlls(llm, ids)
    nlls = [bucket["nll"] for bucket in record["buckets"]]
    assert nlls == pytest.approx([nll_T[a:b].sum().item() for a, b in ((0, 49), (49, 99), (99, 149))])
    assert [bucket["bytes"] for bucket in record["buckets"]] == [49, 50, 50]  # BOS stands before them


def test_the_summary_divides_by_tokens_and_by_bytes(evaluation: Any) -> None:
    row = next(row for row in evaluation.rows if row["length"] == 150 and row["from"] == 100)
    buckets = [r["buckets"][2] for r in evaluation.records if r["length"] == 150 and r["attention"] == row["attention"]]
    total = sum(bucket["nll"] for bucket in buckets)
    assert row["windows"] == 2
    assert row["nll_per_token"] == pytest.approx(total / 100)
    assert row["nll_per_byte"] == pytest.approx(total / sum(bucket["bytes"] for bucket in buckets))
    assert row["change"] == pytest.approx(total / sum(bucket["nll_in_range"] for bucket in buckets) - 1)
    short = [row for row in evaluation.rows if row["length"] == 40]
    assert all(row["change"] == 0 for row in short)  # within the trained range of 64
    titles, *lines = evaluation.task.table(evaluation.rows)
    assert titles == ["attention", "length", "from position", "0", "50", "100"]
    assert ["full", "150", "nats/token"] in [line[:3] for line in lines]


@NEEDS_MATPLOTLIB
def test_the_picture_is_drawn(evaluation: Any, tmp_path: Path) -> None:
    (path,) = evaluation.plot(tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_baseline_nothing_is_compared(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("1234" * 50)
    out = minirea.evaluate("perplexity", directory, lengths=100, samples=1, text=path, no_baseline=True)
    assert {row["change"] for row in out.rows} == {None}
    assert "nats/byte" in out.table
    assert "in range" not in out.table


def test_what_was_skipped_is_said(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("1234" * 50)
    options = {"lengths": 100, "samples": 1, "text": path, "at_most": {"full": 50}}
    out = minirea.evaluate("perplexity", directory, attention=("full", "reattention"), **options)
    assert [row["skipped"] for row in out.rows] == [1, 0]
    assert ["full", "100", "skipped", "-"] in out.task.table(out.rows)
    only_skipped = minirea.evaluate("perplexity", directory, attention="full", **options)
    assert only_skipped.task.table(only_skipped.rows)[1:] == [["full", "100", "skipped"]]
    assert only_skipped.plot(tmp_path) == []


def test_a_text_is_needed_that_is_long_enough_and_has_its_own_name(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(DEMO)
    with pytest.raises(InputError, match="text is '', expected at least one file"):
        Perplexity()
    with pytest.raises(MissingFileError, match=r"text is .*nowhere.txt: no such file"):
        Perplexity(text=(tmp_path / "nowhere.txt",)).cells(tokenizer)
    (tmp_path / "b").mkdir()
    paths = (tmp_path / "a.txt", tmp_path / "b" / "a.txt")
    for path in paths:
        path.write_text("1234567890")
    with pytest.raises(InputError, match=r"with 11 tokens, expected 12, the longest of lengths"):
        Perplexity(text=paths[:1], lengths=(12,)).cells(tokenizer)
    with pytest.raises(InputError, match="another has this one"):
        Perplexity(text=paths, lengths=(11,)).cells(tokenizer)
    with pytest.raises(InputError, match="buckets is 1, expected log, or at least 2"):
        Perplexity(text=paths, buckets=1)
