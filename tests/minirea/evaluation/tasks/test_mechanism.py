"""The measures of attention on cases with known answers, and against what the engine does."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from testing import random_ids, tiny_model, write_checkpoint

import minirea
from minirea.attention import Attention
from minirea.config import RopeConfig
from minirea.errors import InputError
from minirea.evaluation.tasks.mechanism import SWEEPS, Mechanism, parse_sweep, settings
from minirea.evaluation.tasks.mechanism_measures import (
    Overlap,
    Spread,
    attention_weights,
    entropy,
    selected_by_step,
    selected_keys,
    shared_fraction,
)
from minirea.evaluation.tasks.observe import observe_end
from minirea.kernels.reference import score
from minirea.observer import Step, observed
from minirea.tokenizer import load_tokenizer

DEMO = Path(__file__).parents[4] / "weights" / "demo"
SCOPE: dict[str, Any] = {"global_size": 4, "local_size": 24, "span_size": 4, "max_spans": 6, "chunk_size": 16}
NEEDS_MATPLOTLIB = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), tiny_model(max_position_embeddings=64))


# ---------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------
def test_entropy_of_known_distributions() -> None:
    weights = torch.tensor([[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    torch.testing.assert_close(entropy(weights), torch.tensor([math.log(4), 0.0, math.log(2)]))


def test_attention_is_uniform_over_equal_keys_and_certain_of_a_far_better_one() -> None:
    q_RD, k_ND = torch.ones(1, 16), torch.zeros(10, 16)
    assert entropy(attention_weights(q_RD, k_ND)).item() == pytest.approx(math.log(10))
    k_ND[3] = 100.0
    assert attention_weights(q_RD, k_ND)[0, 3].item() == pytest.approx(1.0)


def test_shared_winners() -> None:
    winner_GRK = torch.tensor([[[5, 9, 1, 7], [5, 9, 1, 7]], [[5, 9, 1, 7], [2, 3, 4, 6]]])
    other_GRK = torch.tensor([[[7, 1, 9, 5], [2, 3, 4, 6]], [[0, 9, 1, 3], [6, 8, 4, 2]]])
    assert shared_fraction(winner_GRK, other_GRK).tolist() == [[1.0, 0.0], [0.5, 0.75]]


# ---------------------------------------------------------------------------------------------------------------
# Observing
# ---------------------------------------------------------------------------------------------------------------
MODES = {
    "layer": {"attention": "reattention", **SCOPE},
    "kv_head": {"attention": "reattention", **SCOPE, "span_scope": "kv_head"},
    "votes": {"attention": "reattention", **SCOPE, "vote_window": 4, "decode_spans": 2, "carry_votes": True},
    "streaming": {"attention": "streaming", **SCOPE},
    "full": {"attention": "full"},
}


class Recomputed:
    """Attends again with the measured weights, to be compared with what the layer gave."""

    def __init__(self) -> None:
        self.outputs: list[torch.Tensor] = []
        self.steps = 0

    def __call__(self, step: Step) -> None:
        self.steps += 1
        if step.is_decode:
            v_GND = step._cache.v[step.layer]
            parts = [step.weights(g, scope)[-1] @ v_GND[g, scope] for g, scope in enumerate(step.scopes())]
            self.outputs.append(torch.cat(parts))


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Whatever Attention returns for steps of one token, [H, D] each."""
    seen: list[torch.Tensor] = []
    attend = Attention.__call__

    def recorded(self: Attention, layer: int, qkv_TXD: torch.Tensor, cache: Any, seq_len: Any = None) -> torch.Tensor:
        out_THD = attend(self, layer, qkv_TXD, cache, seq_len)
        seen.extend(out_THD if len(out_THD) == 1 else [])
        return out_THD

    monkeypatch.setattr(Attention, "__call__", recorded)
    return seen


ON_GPU = pytest.param(
    "cuda",
    2e-4,  # float32 sums of the fused kernel against torch's
    marks=pytest.mark.gpu,
)


@pytest.mark.parametrize(("device", "tolerance"), [("cpu", 1e-5), ON_GPU])
@pytest.mark.parametrize("how", MODES)
def test_measured_weights_are_those_that_the_engine_uses(
    directory: Path, outputs: list[torch.Tensor], how: str, device: str, tolerance: float
) -> None:
    llm = minirea.load(directory, device=device, dtype="float32", **MODES[how])
    again = Recomputed()
    observe_end(llm.model, random_ids(155), 5, again)
    assert again.steps == 2 * (5 + 1)  # 2 layers; the chunk before the 5 tokens is observed too
    assert len(again.outputs) == len(outputs) == 2 * 5
    for ours, theirs in zip(again.outputs, outputs, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_measured_weights_follow_a_sliding_window(tmp_path: Path, outputs: list[torch.Tensor]) -> None:
    llm = minirea.load(write_checkpoint(tmp_path, tiny_model(mistral=True, sliding_window=40)), attention="full")
    again = Recomputed()
    observe_end(llm.model, random_ids(100), 3, again)
    torch.testing.assert_close(again.outputs, outputs, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_an_observer_changes_nothing_and_leaves(directory: Path) -> None:
    llm = minirea.load(directory, **SCOPE)
    ids_T = torch.tensor(random_ids(16))
    attention, cache, other = llm.model.attention, llm.session(40).cache, llm.session(40).cache
    expected = [llm.model.forward(ids_T, cache) for _ in range(3)]
    calls: list[Step] = []
    watched = observed(llm.model, calls.append, horizon=48)
    for x_TE in expected:
        assert torch.equal(watched.forward(ids_T, other), x_TE)
    llm.model.forward(ids_T[:1], other)
    assert len(calls) == 3 * 2
    assert llm.model.attention is attention


@pytest.mark.parametrize("span_scope", ["layer", "kv_head"])
def test_selected_keys_are_those_of_the_engine(directory: Path, span_scope: str) -> None:
    llm = minirea.load(directory, **SCOPE | {"span_scope": span_scope, "max_spans": 3})
    compared = []

    def compare(step: Step) -> None:
        if step.is_decode:
            config, n = step.attention.config, step.seq_len
            middle = range(config.global_size, n - config.local_size)
            winner_GRK = score(step.q_GRD, step.k_GND, middle.start, middle.stop, config.span_top_k)
            chosen_Gn = selected_keys(winner_GRK, n, config)
            for chosen_n, scope in zip(chosen_Gn, step.scopes(), strict=True):
                assert chosen_n.nonzero()[:, 0].tolist() == [j for j in scope.tolist() if j in middle]
                compared.append(n)

    observe_end(llm.model, random_ids(120), 4, compare)
    assert len(compared) == 2 * 4 * 2


# ---------------------------------------------------------------------------------------------------------------
# Studies of a model
# ---------------------------------------------------------------------------------------------------------------
def test_without_rope_the_two_selections_are_one(tmp_path: Path) -> None:
    """Positions divided by a billion turn nothing, so scores with and without RoPE have the same winners.

    No token comes twice: equal ones have equal keys in the first layer, and rounding would choose between them.
    """
    llm = minirea.load(write_checkpoint(tmp_path, tiny_model(vocab_size=200)))
    rope = RopeConfig(type="linear", factor=1e9)  # beyond what a config.json may say
    llm.model.config = dataclasses.replace(llm.model.config, rope=rope)
    llm = llm.with_attention("reattention", **SCOPE | {"max_spans": 16, "span_top_k": 4})
    overlap = Overlap(llm.model.config)
    ids = torch.randperm(197, generator=torch.Generator().manual_seed(0)).add(3).tolist()
    observe_end(llm.model, ids[:120], 4, overlap)
    heads = {name: torch.tensor(values) for name, values in overlap.per_head.items()}
    assert heads["shared"].shape == (2, 4)
    assert heads["shared"].min() == heads["found"].min() == 1.0
    torch.testing.assert_close(heads["covered"], heads["covered_by_rope"])
    assert (heads["covered"] <= heads["middle"]).all()
    middles = [n - 28 for n in range(117, 121)]
    assert overlap.chance["shared"] == pytest.approx(sum(4 / middle for middle in middles) / 4)


@pytest.mark.parametrize("attention", ["reattention", "full"])
def test_covered_are_the_spans_that_the_engine_selected(directory: Path, attention: str) -> None:
    """With other tokens' and layers' votes too; a step that attends to everything has those of its own best keys."""
    llm = minirea.load(directory, **MODES["votes"] | {"attention": attention})
    chosen: list[tuple[torch.Tensor, list[torch.Tensor]]] = []

    def look(step: Step) -> None:
        if step.is_decode:
            config, n = step.attention.config, step.seq_len
            winner_GRK = score(step.q_GRD, step.k_GND, config.global_size, n - config.local_size, config.span_top_k)
            alone_Gn = selected_keys(winner_GRK, n, config.of_decode_step)
            chosen.append((selected_by_step(step, winner_GRK), [alone_Gn, step.scopes()]))

    observe_end(llm.model, random_ids(120), 4, look)
    differ = 0
    for chosen_Gn, (alone_Gn, scopes) in chosen:
        for chosen_n, alone_n, scope in zip(chosen_Gn, alone_Gn, scopes, strict=True):
            middle = [j for j in scope.tolist() if 4 <= j < len(chosen_n) - 24]
            expected = alone_n.nonzero()[:, 0].tolist() if attention == "full" else middle
            assert chosen_n.nonzero()[:, 0].tolist() == expected
            differ += not torch.equal(chosen_n, alone_n)
    assert len(chosen) == 2 * 4
    assert (differ > 0) == (attention == "reattention")


def test_with_rope_they_differ_and_everything_is_a_fraction(directory: Path) -> None:
    for mode in ("reattention", "full"):
        llm = minirea.load(directory, attention=mode, **SCOPE)
        overlap = Overlap(llm.model.config)
        observe_end(llm.model, random_ids(150), 4, overlap)
        heads = torch.tensor(list(overlap.per_head.values()))
        assert heads.min() >= 0
        assert heads.max() <= 1
        assert heads[0].mean() < 1
        assert 0 < overlap.chance["covered"] < 1


def test_no_position_exceeds_the_scope_and_full_attention_has_no_bound(directory: Path) -> None:
    for mode, highest in {"reattention": 51, "streaming": 27, "full": 159}.items():
        llm = minirea.load(directory, attention=mode, **SCOPE)
        spread = Spread(llm.model.config)
        observe_end(llm.model, random_ids(160), 3, spread)
        if mode == "reattention":
            assert 27 < spread.highest_position <= highest  # 4 + 6 * 4 + 24 keys at most
        else:
            assert spread.highest_position == highest
        assert spread.widest_scope == spread.highest_position + 1
        entropies = torch.tensor(spread.entropy)
        assert entropies.shape == (2, 4)
        assert 0 < entropies.min() <= entropies.max() <= math.log(spread.widest_scope)


# ---------------------------------------------------------------------------------------------------------------
# The task
# ---------------------------------------------------------------------------------------------------------------
def test_sweeps_are_parsed() -> None:
    assert settings("span-size=8,32") == [("span_size", 8), ("span_size", 32)]
    assert settings("span_scope=layer,kv_head") == [("span_scope", "layer"), ("span_scope", "kv_head")]
    assert [parse_sweep(sweep) for sweep in SWEEPS] == list(SWEEPS)
    for bad in ("span_size", "span_size=", "span_size=x", "speed=3", "span_scope=", ""):
        with pytest.raises(InputError, match=r"sweep is .*, expected FIELD=VALUE,VALUE with a field of global_size"):
            minirea.evaluate("mechanism", DEMO, sweep=bad)


def test_every_record_has_its_own_place() -> None:
    task = Mechanism(lengths=(2048, 1200), samples=2)
    cells = task.cells(load_tokenizer(DEMO))
    places = [tuple(place.items()) for cell in cells for place in cell.places]
    assert len(set(places)) == len(places) == 2 * (2 * 2 + 2 + 25 * 20 + 25)
    assert [cell.tokens for cell in cells] == sorted(cell.tokens for cell in cells)
    swept = [cell.fields for cell in cells if cell.fields]
    assert {"span_size": 8} in swept
    assert {"span_scope": "kv_head"} in swept


def test_more_samples_leave_the_others() -> None:
    tokenizer = load_tokenizer(DEMO)
    prompts = []
    for samples in (1, 3):
        cells: list[Any] = Mechanism(lengths=(600,), samples=samples, studies=("overlap",)).cells(tokenizer)
        prompts.append({str(cell.places[0]): cell.build() for cell in cells})
    assert len(prompts[0]) == 2
    assert prompts[0].items() <= prompts[1].items()


def test_the_observed_end_of_a_needle_is_its_answer() -> None:
    tokenizer = load_tokenizer(DEMO)
    cells: list[Any] = Mechanism(lengths=(600,), samples=1, studies=("overlap",)).cells(tokenizer)
    watched = cells[0].build()
    assert len(watched.ids) <= 600
    text = tokenizer.decode(watched.ids)
    question, _, answer = text.rpartition(" is ")
    assert question.split("Answer:")[1].startswith(" The special magic number for")
    assert f" is {answer}" in question  # the needle; the answer's last digit is not read any more
    assert len(tokenizer.encode(f" {answer}", add_special_tokens=False)) == watched.steps - 1


@pytest.fixture(scope="module")
def evaluation() -> Any:
    options = {"lengths": 700, "samples": 1, "depths": 1, "local_size": 256, "sweep": ("span_top_k=0,4",)}
    return minirea.evaluate("mechanism", DEMO, attention=("reattention", "full", "streaming"), **options)


def test_the_demo_model_needs_its_selection(evaluation: Any) -> None:
    rows = {(row.get("field"), row.get("value"), row["study"]): row for row in evaluation.rows}
    assert rows["span_top_k", 4, "sweep"]["score"] == 1
    assert rows["span_top_k", 0, "sweep"]["score"] < 1
    assert rows["span_top_k", 4, "cost"]["prefill_seconds"] > 0


def test_the_summary_has_a_row_for_each_study_and_mode(evaluation: Any) -> None:
    rows = {(row["study"], row["attention"], row.get("kind")): row for row in evaluation.rows}
    assert ("overlap", "streaming", "text") not in rows
    assert rows["spread", "full", None]["highest_position"] == 699
    assert rows["spread", "full", None]["bound"] is None
    assert rows["spread", "streaming", None]["widest_scope"] == 288
    assert rows["spread", "reattention", None]["widest_scope"] <= rows["spread", "reattention", None]["bound"] == 1152
    assert rows["overlap", "full", "needle"]["shared"] > 10 * rows["overlap", "full", "needle"]["shared_chance"]
    lines = evaluation.task.table(evaluation.rows)
    assert lines[0] == ["study", "attention", "of", "measure", "700"]
    assert ["spread", "full", "", "highest position", "699"] in lines


@NEEDS_MATPLOTLIB
def test_pictures_of_every_study_are_drawn(evaluation: Any, tmp_path: Path) -> None:
    names = {path.name for path in evaluation.plot(tmp_path) if path.read_bytes().startswith(b"\x89PNG")}
    pairs = {f"overlap-{kind}-{mode}.png" for kind in ("needle", "text") for mode in ("full", "reattention")}
    assert names == {*pairs, "spread.png", "sweep.png"}


def test_where_nothing_is_selected_there_is_no_overlap() -> None:
    out = minirea.evaluate("mechanism", DEMO, lengths=300, samples=1, studies="overlap")
    assert all("nothing is selected from" in record["skipped"] for record in out.records)
    assert {cell for line in out.task.table(out.rows)[1:] for cell in line[4:]} == {"skipped"}
