"""The demo model's training: its data, its optimizer, and a run small enough for a CPU."""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path

import demo_data
import demo_text
import numpy as np
import pytest
import torch
import train_demo
from demo_data import ANSWER, IGNORE, TEXT, Samples
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPE = dataclasses.replace(
    train_demo.TINY, steps=40, warmup_steps=5, batch_tokens=1024, learning_rate=1e-2, generated_chars=30_000
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def text() -> str:
    return demo_text.generate_text(seed=1, min_chars=30_000)


@pytest.fixture(scope="module")
def samples(text: str) -> Samples:
    return Samples(demo_data.train_tokenizer([text], 512), [text], text_noise=0.0, seed=0)


def _run(out: Path, *flags: str) -> list[dict[str, float]]:
    return train_demo.run(RECIPE, train_demo.parse_args(["--tiny", "--device", "cpu", "--out", str(out), *flags]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    out = tmp_path_factory.mktemp("whole")
    return out, _run(out)


# ---------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------
def test_strip_gutenberg_keeps_the_book_only() -> None:
    book = (
        "\ufeffLicence\r\n*** START OF THIS EBOOK X ***\r\n\r\nCall me.\r\n\r\n*** END OF THIS EBOOK X ***\r\nLicence"
    )
    assert demo_data.strip_gutenberg(book) == "Call me."
    assert demo_data.strip_gutenberg(" plain \n") == "plain"


def test_unwrap_joins_prose_and_leaves_verse() -> None:
    line = "a line of wrapped prose that is long enough to be taken for it"
    verse = "Of Man's first disobedience,\nand the fruit"
    assert demo_data.unwrap(f"{line}\n{line}\nend.\n\n{verse}") == f"{line} {line} end.\n\n{verse}"


def test_held_out_books_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "moby_dick.txt").write_text("whale")
    (tmp_path / "other.txt").write_text("land")
    assert demo_data.read_books(tmp_path, "moby_dick*") == ["land"]


def test_tokenizer_starts_texts_and_splits_digits(samples: Samples) -> None:
    encoding = samples._tokenizer.encode(" is 1234.")
    assert encoding.tokens[0] == "<s>"
    assert encoding.tokens[-5:] == ["1", "2", "3", "4", "."]


def test_every_answer_is_the_number_of_its_key(samples: Samples) -> None:
    """The ANSWER class sits on the number, the full stop and </s>, and the number stands in the context once before."""
    rng = random.Random(3)
    answers = 0
    for _ in range(40):
        ids, classes = samples._needles_in_text(rng, 513)
        assert len(ids) == len(classes) == 513
        starts = np.flatnonzero((classes[1:] == ANSWER) & (classes[:-1] != ANSWER)) + 1
        for start in starts:
            stop = start + int(np.argmax(classes[start:] != ANSWER)) if (classes[start:] != ANSWER).any() else 513
            answer = samples._tokenizer.decode(ids[start:stop].tolist(), skip_special_tokens=False)
            before = samples._tokenizer.decode(ids[:start].tolist(), skip_special_tokens=False)
            assert re.fullmatch(r" \d{3,9}\.</s>", answer)
            lead = re.search(r"(\S+ \S+ \S+ (?:is|was))$", before)
            assert lead is not None
            assert lead[1] + answer.removesuffix("</s>") in before
            answers += 1
    assert answers > 40


def test_pieces_join_to_the_tokens_of_their_text(samples: Samples) -> None:
    rng = random.Random(4)
    for _ in range(40):
        needle = demo_data.Needle(samples._phrases[0], samples._keys(rng, 1)[0], samples._value(rng))
        for ids, _ in (samples._needle_block(needle), samples._question_block(rng, needle)):
            text = samples._tokenizer.decode(ids.tolist(), skip_special_tokens=False)
            assert samples._tokenizer.encode(text, add_special_tokens=False).ids == ids.tolist()


def test_batches_depend_on_the_step_alone(samples: Samples) -> None:
    first, again, other = (samples.batch(step, 1024, 128)[0] for step in (5, 5, 6))
    assert first.shape == (8, 129)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_noise_is_never_a_target(text: str, samples: Samples) -> None:
    noisy = Samples(samples._tokenizer, [text], text_noise=0.5, seed=0)
    rng = random.Random(0)
    original = samples.corpus[:4000]
    ids, classes = noisy._noisy(rng, original)
    assert 0.4 < (ids != original).mean() < 0.6
    assert np.array_equal(ids[classes == TEXT], original[classes == TEXT])
    assert set(classes.tolist()) == {IGNORE, TEXT}


def test_shipped_prompts_are_what_the_generator_writes(tmp_path: Path) -> None:
    demo_text.write_prompts(tmp_path)
    shipped = Path(demo_text.__file__).parent.parent / "weights" / "demo" / "prompts"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in shipped.iterdir())
    for name in names:
        assert (shipped / name).read_bytes() == (tmp_path / name).read_bytes()


# ---------------------------------------------------------------------------------------------------------------
# Optimizer and schedule
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 48, 16), (2, 16, 48)])  # random squares are ill-conditioned
def test_orthogonalize_evens_out_singular_values(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(train_demo.orthogonalize(matrices).float())
    assert values.min() > 0.2
    assert values.max() < 1.3


def test_schedule_ends_at_zero_and_contexts_grow() -> None:
    recipe = train_demo.Recipe()
    contexts = recipe.contexts()
    assert contexts == sorted(contexts)
    assert contexts[0] < contexts[-1] == recipe.context
    assert recipe.rate(recipe.warmup_steps) == recipe.learning_rate
    assert 0 < recipe.rate(recipe.steps - 1) < recipe.learning_rate / 100


@pytest.mark.gpu
def test_graphed_update_equals_plain_calls() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        total = torch.zeros((), device="cuda")

        def update(ids: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
            total.add_((ids * classes).sum())
            return torch.stack([total, total])

        graphed = train_demo.GraphedUpdate(update)
        ones = torch.ones(2, 3, device="cuda")
        for call in range(1, 8):
            assert graphed(ones * call, ones).tolist() == [3.0 * call * (call + 1)] * 2


# ---------------------------------------------------------------------------------------------------------------
# A whole run
# ---------------------------------------------------------------------------------------------------------------
def test_tiny_run_writes_a_model_that_transformers_loads(trained: tuple[Path, list[dict[str, float]]]) -> None:
    out, _ = trained
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.dtype == torch.bfloat16
    assert model.config.rope_parameters["rope_theta"] == RECIPE.rope_theta
    ids = tokenizer("The wind was north.")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The wind was north."
    assert model(torch.tensor([ids])).logits.isfinite().all()


def test_loss_falls(trained: tuple[Path, list[dict[str, float]]]) -> None:
    _, history = trained
    assert history[-1]["text"] < 5.0 < np.log(RECIPE.vocab_size)


def test_resumed_run_equals_an_uninterrupted_one(trained: tuple[Path, list[dict[str, float]]], tmp_path: Path) -> None:
    whole, _ = trained
    _run(tmp_path, "--stop-after", "0")
    assert '"step": 1,' in (tmp_path / "state" / "state.json").read_text()
    _run(tmp_path, "--resume")
    expected = load_file(whole / "state" / "0.safetensors")
    found = load_file(tmp_path / "state" / "0.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_resume_refuses_another_recipe(
    trained: tuple[Path, list[dict[str, float]]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = trained
    assert train_demo.main(["--tiny", "--device", "cpu", "--out", str(out), "--resume"]) == 1
    assert "batch_tokens is 1024, expected 2048" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--text: not given"),
        (["--text", "nowhere"], "--text nowhere: no such folder"),
        (["--tiny", "--resume"], "state.json, expected the state of an earlier run"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_demo.main(["--device", "cpu", "--out", str(tmp_path), *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("train_demo: error: ")
    assert message in error
    assert error.count("\n") == 1
