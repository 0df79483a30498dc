"""The decode loop: invariances, stopping, sessions and statistics."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testing import TINY, random_ids, tiny_model, write_checkpoint, write_tokenizer

import minirea
from minirea.config import ReAttentionConfig
from minirea.cpu_steps import CpuDecodeStep
from minirea.generate import GenerationConfig, Interrupted, StopStrings

# Small enough that a prompt of 100 tokens selects: 4 + 24 dense, then spans.
SCOPE = {"global_size": 4, "local_size": 24, "span_top_k": 2, "span_size": 4, "max_spans": 5, "chunk_size": 16}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), tiny_model())


@pytest.fixture(scope="module")
def llm(directory: Path) -> minirea.LLM:
    return minirea.load(directory, **SCOPE)


def test_logits_end_where_generate_begins(llm: minirea.LLM) -> None:
    ids = random_ids(100)
    assert llm.generate(ids, max_tokens=1).token_ids == [int(llm.logits(ids)[-1].argmax())]


@pytest.mark.parametrize("attention", ["full", "reattention", "streaming"])
def test_decode_is_prefill(directory: Path, attention: str) -> None:
    """Feeding the generated tokens one by one gives the logits of reading them as a prompt in steps of one."""
    llm = minirea.load(directory, attention=attention, **SCOPE | {"chunk_size": 1})
    ids = random_ids(60)
    out = llm.generate(ids, max_tokens=12, ignore_eos=True).token_ids
    expected = llm.logits(ids + out)[len(ids) - 1 : -1].argmax(-1).tolist()
    assert out == expected


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 24])
def test_dense_chunks_do_not_matter(directory: Path, chunk_size: int) -> None:
    ids = random_ids(28)
    one_shot = minirea.load(directory, attention="full", chunk_size=24).logits(ids)
    chunked = minirea.load(directory, **SCOPE | {"chunk_size": chunk_size}).logits(ids)
    torch.testing.assert_close(chunked, one_shot, atol=1e-4, rtol=0)


def test_full_attention_chunks_do_not_matter(directory: Path) -> None:
    ids = random_ids(100)
    logits = [
        minirea.load(directory, attention="full", chunk_size=size, local_size=100).logits(ids) for size in (1, 9, 100)
    ]
    torch.testing.assert_close(logits[0], logits[2], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[1], logits[2], atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["reattention", "full"])
@pytest.mark.parametrize("num_layers", [1, 2])
@torch.inference_mode()
def test_reading_a_prompt_fills_the_cache_as_a_whole_forward_pass_does(
    tmp_path: Path, num_layers: int, attention: str
) -> None:
    llm = minirea.load(
        write_checkpoint(tmp_path, tiny_model(num_hidden_layers=num_layers)), attention=attention, **SCOPE
    )
    ids_T = torch.tensor(random_ids(60))
    read, forward = (llm.session(60).cache for _ in range(2))
    for tensor in (*read.tensors, *forward.tensors):
        tensor.fill_(torch.nan)
    for start, stop in ((0, 16), (16, 32), (32, 48), (48, 60)):
        llm.model.read(ids_T[start:stop], read)
        llm.model.forward(ids_T[start:stop], forward)
    assert read.seq_len == forward.seq_len == 60
    for ours, theirs in zip(read.tensors, forward.tensors, strict=True):
        assert torch.equal(ours, theirs) and not theirs.isnan().any()


def test_streaming_forgets_the_middle(directory: Path) -> None:
    """One layer of streaming attention cannot see the middle of the prompt, whatever it holds."""
    one_layer = write_checkpoint(directory.parent / "one-layer", tiny_model(num_hidden_layers=1))
    streaming = minirea.load(one_layer, attention="streaming", **SCOPE)
    ids, other = random_ids(100), random_ids(100, seed=1)
    changed = ids[:4] + other[4:70] + ids[70:]
    assert torch.equal(streaming.logits(ids)[-1], streaming.logits(changed)[-1])


def test_cache_growth_changes_nothing(llm: minirea.LLM) -> None:
    ids = random_ids(90)
    grown, roomy = llm.session(), llm.session(capacity=400)
    for part in (ids[:30], ids[30:31], ids[31:80]):
        grown.prefill(part)
        roomy.prefill(part)
    assert grown.cache.capacity < 200
    out = [session.generate(ids[80:], max_tokens=30, ignore_eos=True).token_ids for session in (grown, roomy)]
    assert out[0] == out[1]


def test_garbage_beyond_the_cached_tokens_changes_nothing(llm: minirea.LLM) -> None:
    ids = random_ids(90)
    out = []
    for garbage in (0.0, float("nan")):
        session = llm.session(capacity=200)
        for tensor in session.cache.tensors:
            tensor.fill_(garbage)
        out.append(session.generate(ids, max_tokens=20, ignore_eos=True).token_ids)
    assert out[0] == out[1]


def test_rewind_forgets_exactly_what_came_after(llm: minirea.LLM) -> None:
    ids, question = random_ids(90), random_ids(9, seed=3)
    session = llm.session()
    session.prefill(ids)
    first = session.generate(question, max_tokens=10, ignore_eos=True).token_ids
    session.rewind(len(ids))
    session.generate(random_ids(5, seed=4), max_tokens=4, ignore_eos=True)
    session.rewind(len(ids))
    assert session.generate(question, max_tokens=10, ignore_eos=True).token_ids == first


def test_a_session_continues_its_own_output(directory: Path) -> None:
    llm = minirea.load(directory, attention="full")
    ids, more = random_ids(40), random_ids(7, seed=2)
    session = llm.session()
    first = session.generate(ids, max_tokens=6, ignore_eos=True).token_ids
    second = session.generate(more, max_tokens=6, ignore_eos=True).token_ids
    assert second == llm.generate(ids + first + more, max_tokens=6, ignore_eos=True).token_ids


def test_end_of_text_stops_and_can_be_ignored(directory: Path) -> None:
    llm = minirea.load(directory, **SCOPE)
    ids = random_ids(40)
    free = llm.generate(ids, max_tokens=8, ignore_eos=True)
    assert (free.finish_reason, len(free.token_ids)) == ("length", 8)
    eos = free.token_ids[3]
    llm.model.config = type(llm.model.config)(**vars(llm.model.config) | {"eos_token_ids": frozenset({eos})})
    stopped = llm.generate(ids, max_tokens=8)
    assert stopped.finish_reason == "eos"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(eos) + 1]
    assert llm.generate(ids, max_tokens=8, ignore_eos=True).token_ids == free.token_ids


def test_stats_count_what_was_done(llm: minirea.LLM) -> None:
    stats = llm.generate(random_ids(100), max_tokens=5, ignore_eos=True).stats
    assert (stats.prompt_tokens, stats.generated_tokens) == (100, 5)
    scope = stats.scope  # the last decode step feeds the fourth token
    assert (scope["global"], scope["local"], scope["seq_len"]) == (4, 24, 104)
    assert 0 < scope["selected"] <= SCOPE["max_spans"] * SCOPE["span_size"]
    assert stats.cache_bytes == (105 * 2 + 48) * 2 * 2 * 16 * 4  # (k, v, dense k) x layers x G x D x float32
    assert stats.weight_bytes == sum(p.nbytes for p in tiny_model().parameters())


def test_scope_before_anything_is_selected(llm: minirea.LLM) -> None:
    assert llm.generate(random_ids(10), max_tokens=1).stats.scope == {
        "global": 0,
        "selected": 0,
        "local": 10,
        "seq_len": 10,
    }


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "the prompt is empty"), ("", "the prompt is empty"), ([3, TINY["vocab_size"]], "token id 97"), ([-1], "-1")],
)
def test_unusable_prompts(llm: minirea.LLM, prompt: str | list[int], message: str) -> None:
    with pytest.raises(minirea.InputError, match=message):
        llm.generate(prompt)


def test_ids_may_be_any_integers(llm: minirea.LLM) -> None:
    ids = random_ids(20)
    expected = llm.generate(ids, max_tokens=3).token_ids
    for prompt in (torch.tensor(ids), torch.tensor(ids).numpy(), tuple(ids)):
        assert llm.generate(prompt, max_tokens=3).token_ids == expected
    with pytest.raises(minirea.InputError, match=r"token id 1\.5"):
        llm.generate([3, 1.5])  # type: ignore[list-item]


def test_unknown_options_are_named_with_the_one_that_is_meant(llm: minirea.LLM, directory: Path) -> None:
    with pytest.raises(
        minirea.InputError, match=r"unknown option 'max_token', expected .*; the nearest is max_tokens$"
    ):
        llm.generate([3], max_token=5)
    for name, meant in {"quantise": "quantize", "local_sizes": "local_size", "treads": None, "gpu": "gpus"}.items():
        with pytest.raises(minirea.InputError, match=rf"'{name}', expected .*gpus.*dense_size{nearest(meant)}$"):
            minirea.load(directory, **{name: 1})


def nearest(name: str | None) -> str:
    return f"; the nearest is {name}" if name else ""


def test_logits_that_are_not_finite_are_reported(directory: Path) -> None:
    llm = minirea.load(directory, **SCOPE)
    with torch.inference_mode():
        llm.model.norm.fill_(float("inf"))
    with pytest.raises(minirea.InputError, match="not finite after 3 tokens"):
        llm.generate([3, 4, 5])


@settings(max_examples=200)
@given(
    parts=st.lists(st.text("ab.", max_size=4), max_size=12),
    stops=st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_where_the_first_one_appears(parts: list[str], stops: list[str]) -> None:
    """Fed piece by piece, the text ends before the first stop string that completes."""
    matcher = StopStrings(tuple(stops))
    out = ""
    fed = ""
    for part in parts:
        out += matcher.put(part)
        fed += part
        if matcher.found:
            break
    out += matcher.flush()
    hits = [fed.find(stop) for stop in stops if stop in fed]
    assert matcher.found == bool(hits)
    assert out == fed[: min(hits, default=len(fed))]


def test_special_tokens_are_searched_for_stops_and_not_passed_on() -> None:
    for stops, expected in ((("<end>",), "one two"), (("o<end>",), "one tw"), (("nowhere",), "one two three")):
        matcher = StopStrings(stops)
        out = matcher.put("one two") + matcher.put("<end>", is_output=False)
        out += "" if matcher.found else matcher.put(" three")
        assert out + matcher.flush() == expected
        assert matcher.found == (stops != ("nowhere",))


def test_a_stop_string_can_be_a_special_token(directory: Path, tmp_path: Path) -> None:
    """The same tokens with one of the tokenizer's declared special: it leaves the text, and ends it where asked for."""
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    write_tokenizer(tmp_path)
    llm = minirea.load(tmp_path)
    free = llm.generate("hello", 12, ignore_eos=True)
    at = next(i for i, token_id in enumerate(free.token_ids) if i > 2 and token_id > 2)
    mark = llm.tokenizer.decode([free.token_ids[at]])
    write_tokenizer(tmp_path, additional_special_tokens=[mark])
    llm = minirea.load(tmp_path)
    first = free.token_ids.index(free.token_ids[at])
    assert llm.generate("hello", 12, ignore_eos=True).text == free.text.replace(f" {mark}", "")
    out = llm.generate("hello", 12, ignore_eos=True, stop=mark)
    assert (out.finish_reason, out.token_ids) == ("stop", free.token_ids[: first + 1])
    assert mark not in out.text


# --- What callers pass ------------------------------------------------------------------------------------------------
BAD_VALUES = {
    "seed": (1.5, True, "7", -1, 2**63, 10**5000),
    "top_k": (1.5, True, None, "3", -1),
    "max_tokens": (0, 1.5, True, None, "3"),
    "temperature": ("hot", True, None, -1, float("nan"), float("inf"), 10**400),
    "top_p": ("most", True, 0, 1.5, float("nan")),
    "min_p": (True, -0.1, None),
    "repetition_penalty": (0, "no", float("inf")),
    "stop": (5, [1], [""], "", b"x", 0, np.array(3)),
    "ignore_eos": (1, "yes"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_values_of_the_wrong_kind_are_refused_by_name(name: str) -> None:
    for value in BAD_VALUES[name]:
        with pytest.raises(minirea.InputError, match=f"^{name} is ") as caught:
            GenerationConfig(**{name: value})
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize("name", ["global_size", "local_size", "span_top_k", "span_size", "max_spans", "chunk_size"])
def test_sizes_of_the_wrong_kind_are_refused_by_name(name: str) -> None:
    for value in (1.5, True, "8", -1, 2**31, 10**30):
        with pytest.raises(minirea.InputError, match=f"^{name} is "):
            ReAttentionConfig(**{name: value})


def test_no_stop_strings_may_be_none() -> None:
    assert GenerationConfig(stop=None) == GenerationConfig()  # type: ignore[arg-type]


def test_numbers_may_be_numpys(llm: minirea.LLM) -> None:
    ids = random_ids(8)
    config = GenerationConfig(
        max_tokens=np.int64(3), seed=np.uint8(7), top_k=np.int32(2), temperature=np.float32(0.5), top_p=np.float64(1)
    )
    assert config == GenerationConfig(max_tokens=3, seed=7, top_k=2, temperature=0.5, top_p=1.0)
    assert type(config.seed) is int
    assert llm.generate(ids, np.int64(3), seed=np.int64(1)).token_ids == llm.generate(ids, 3, seed=1).token_ids
    assert ReAttentionConfig(local_size=np.int64(64)) == ReAttentionConfig(local_size=64)


SCALARS = (np.array(3), torch.tensor(3))


@pytest.mark.parametrize("prompt", [None, 5, 1.5, b"bytes", {"role": "user"}, [None], [True], ["3"], [[3]], *SCALARS])
def test_prompts_of_the_wrong_kind_are_refused(llm: minirea.LLM, prompt: object) -> None:
    with pytest.raises(minirea.InputError, match="the prompt"):
        llm.generate(prompt)  # type: ignore[arg-type]


def test_a_number_after_the_prompt_is_max_tokens(llm: minirea.LLM) -> None:
    assert len(llm.generate([3, 4], 5, ignore_eos=True).token_ids) == 5
    assert sum(len(piece.token_ids) for piece in llm.stream([3, 4], 5, ignore_eos=True)) == 5
    assert len(llm.session().generate([3, 4], 5, ignore_eos=True).token_ids) == 5


@pytest.mark.parametrize("capacity", [-1, 1.5, True, "8", None])
def test_a_capacity_is_a_number_of_tokens(llm: minirea.LLM, capacity: object) -> None:
    with pytest.raises(minirea.InputError, match=r"^capacity is "):
        llm.session(capacity)  # type: ignore[arg-type]


def test_stop_strings_need_a_tokenizer(llm: minirea.LLM) -> None:
    with pytest.raises(minirea.MissingFileError, match="no tokenizer"):
        llm.generate([3, 4], 5, stop="x")


# --- Sessions ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def demo() -> minirea.LLM:
    return minirea.load(Path(__file__).parents[2] / "weights" / "demo")


def test_later_texts_of_a_session_are_continuations(demo: minirea.LLM) -> None:
    """One BOS, whatever the session's texts are appended by; a seam where a token ends changes no token."""
    first, second, third = "The old house by the sea", "\nQuestion: Where?", " It was"
    session = demo.session()
    session.prefill(first)
    session.prefill(second)
    list(session.stream(third, 1))
    whole = demo.encode(first + second + third)
    assert session.ids[: len(whole)] == whole
    assert len(session.ids) == len(whole) + 1
    assert session.ids.count(demo.tokenizer.bos_id) == 1
    session.rewind(0)
    session.prefill(first)
    assert session.ids == demo.encode(first)


def test_a_failed_call_leaves_a_session_as_it_was(demo: minirea.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    session = demo.session()
    expected = demo.session()
    for s in (session, expected):
        s.generate("The old house", 5)

    def unchanged() -> None:
        assert (session.ids, session.cache.seq_len) == (expected.ids, expected.cache.seq_len)

    for options in ({"seed": -1}, {"max_tokens": 10**13}, {"stop": [""]}, {"nonsense": 1}):
        with pytest.raises(minirea.MinireaError):
            session.generate(" by the sea", **options)
        unchanged()
    session.stream(" by the sea")  # never asked for a piece
    unchanged()
    list(session.stream(" by the sea", 3))
    session.rewind(len(expected.ids))
    session.cache.rewind(expected.cache.seq_len)
    unchanged()
    calls: list[object] = []

    def fail_at_times(owner: object, name: str) -> None:
        function = getattr(owner, name)

        def failing(*args: object, **options: object) -> torch.Tensor:
            calls.append(args)
            if len(calls) % 3 == 0:
                raise error
            return function(*args, **options)

        monkeypatch.setattr(owner, name, failing)

    fail_at_times(demo.model, "forward")
    fail_at_times(CpuDecodeStep, "run")
    for error in (RuntimeError("broken"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            session.generate(" by the sea", 5)
        unchanged()
    monkeypatch.undo()
    assert session.generate(" by the sea", 8).token_ids == expected.generate(" by the sea", 8).token_ids


def test_a_stream_that_is_left_keeps_what_it_yielded(demo: minirea.LLM) -> None:
    session = demo.session()
    stream = session.stream("The old house", 9)
    pieces = [next(stream), next(stream)]
    stream.close()
    assert session.ids == demo.encode("The old house") + [token for piece in pieces for token in piece.token_ids]


def test_a_stream_belongs_to_the_context_that_it_was_made_for(demo: minirea.LLM) -> None:
    session = demo.session()
    first, second = session.stream("The old house", 2), session.stream("The old house", 2)
    list(first)
    with pytest.raises(minirea.InputError, match="the session has"):
        list(second)


def test_a_session_whose_stream_waits_refuses_other_calls(demo: minirea.LLM, tmp_path: Path) -> None:
    """And the stream goes on as if none had been tried; once it is closed or has ended, the session is free."""
    expected = demo.generate("The old house", 6, ignore_eos=True).token_ids
    session = demo.session()
    stream = session.stream("The old house", 6, ignore_eos=True)
    found = list(next(stream).token_ids)
    ids, seq_len = list(session.ids), session.cache.seq_len
    calls = {
        "prefill": lambda: session.prefill(" by"),
        "generate": lambda: session.generate(" by", 2),
        "stream": lambda: next(session.stream(" by", 2)),
        "sources": session.sources,
        "rewind": lambda: session.rewind(1),
        "save": lambda: session.save(tmp_path / "context"),
    }
    for name, call in calls.items():
        with pytest.raises(minirea.InputError, match="in use by a stream"):
            call()
        assert (session.ids, session.cache.seq_len) == (ids, seq_len), name
    for piece in stream:
        found += piece.token_ids
    assert found == expected
    left = session.stream(" by", 2)
    next(left)
    left.close()
    for call in calls.values():
        call()


def test_what_other_processes_may_have_can_be_pickled_and_the_rest_says_why_not(demo: minirea.LLM) -> None:
    session = demo.session()
    for thing in (session.generate("The old house", 3, sources=1), demo.config, minirea.GenerationConfig(stop=("a",))):
        assert pickle.loads(pickle.dumps(thing)) == thing
    stream = session.stream(" by", 9)
    next(stream)
    with pytest.raises(Interrupted) as struck:
        stream.throw(KeyboardInterrupt)
    assert pickle.loads(pickle.dumps(struck.value)).piece == struck.value.piece
    for thing, why in ((demo, "load it there"), (session, "save it")):
        for copied in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match=f"cannot be copied, .* another process: .*{why}"):
                copied(thing)


def test_what_there_is_can_be_seen(demo: minirea.LLM) -> None:
    assert set(minirea.__all__) <= set(dir(minirea))
    assert "weights/demo" in repr(demo)
    assert "trained on 2,048 tokens" in repr(demo)
    assert "Session of 0 tokens" in repr(demo.session())


def test_stats_say_what_a_run_ran_on(demo: minirea.LLM) -> None:
    stats = demo.generate("It", 1, temperature=1.0).stats
    assert (stats.device, stats.dtype, stats.attention, stats.impl) == ("cpu", "float32", "reattention", "torch")
    assert stats.threads == torch.get_num_threads()
    assert stats.seed is not None
    again = demo.generate("It", 12, temperature=1.0, seed=stats.seed)
    assert again.token_ids == demo.generate("It", 12, temperature=1.0, seed=stats.seed).token_ids
    assert demo.generate("It", 1, seed=5).stats.seed is None  # nothing is drawn


VOTES = {"vote_window": 5, "vote_size": 4, "decode_spans": 2, "carry_votes": True}
VOTES |= {"global_size": 4, "local_size": 24, "span_top_k": 2, "span_size": 4, "max_spans": 5, "dense_size": 28}


@pytest.mark.parametrize("votes", [VOTES, VOTES | {"vote_window": 1}], ids=["window", "alone"])
@pytest.mark.parametrize("question_tokens", [1, 3, 30])
def test_rewound_sessions_answer_as_if_nothing_had_been_forgotten(
    tmp_path: Path, question_tokens: int, votes: dict[str, int]
) -> None:
    """An answer's last token is read with what follows; and where tokens vote together, winners that what is forgotten
    has written over come back with the rewind.
    """
    llm = minirea.load(write_checkpoint(tmp_path, tiny_model()), device="cpu", **votes)
    question = random_ids(question_tokens, seed=1)

    def after(*detours: tuple[int, int]) -> list[list[int]]:
        """The answer after the text, and one after that answer, each after detours of so many tokens and answers."""
        session = llm.session()
        session.prefill(random_ids(90))
        answers = []
        for _ in range(2):
            tokens = len(session.ids)
            for read, answered in detours:
                session.generate(random_ids(read, seed=read), max_tokens=answered, ignore_eos=True)
                session.rewind(tokens)
                assert session.cache.seq_len == tokens - len(answers)
            answers.append(session.generate(question, max_tokens=8, ignore_eos=True).token_ids)
        return answers

    expected = after()
    for detours in ([(40, 20)], [(1, 1)], [(3, 3), (30, 2)], [(2, 12)]):
        assert after(*detours) == expected, detours


def test_a_prompt_that_fails_leaves_no_winners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the tokens before it come back, also where a step ends after its first layer."""
    llm = minirea.load(write_checkpoint(tmp_path, tiny_model()), device="cpu", **VOTES)
    session = llm.session()
    session.prefill(random_ids(90))
    before, block, calls = session.cache.winners.clone(), llm.model._block, []

    def failing(*arguments: object) -> None:
        calls.append(arguments)
        block(*arguments)
        if len(calls) == 2:  # in the second step
            raise RuntimeError("broken")

    monkeypatch.setattr(llm.model, "_block", failing)
    with pytest.raises(RuntimeError, match="broken"):
        session.prefill(random_ids(4))
    rows = torch.arange(85, 90) % 10
    assert torch.equal(session.cache.winners[:, rows], before[:, rows])
    assert bool((session.cache.winners[:, torch.arange(90, 94) % 10] == -1).all())


def test_a_context_of_streaming_opens_whatever_would_select(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", tiny_model())
    session = minirea.load(path, device="cpu", attention="streaming", local_size=24, span_size=8).session()
    session.prefill(random_ids(50))
    session.save(tmp_path / "kept")
    opened = minirea.load(path, device="cpu", attention="streaming", local_size=24, max_spans=1, span_size=8)
    assert opened.open_session(tmp_path / "kept").ids == session.ids


def test_a_session_made_in_inference_mode_is_rewound_outside(tmp_path: Path) -> None:
    llm = minirea.load(write_checkpoint(tmp_path, tiny_model()), device="cpu", **VOTES)
    with torch.inference_mode():
        session = llm.session()
    session.prefill(random_ids(90))
    answers = []
    for _ in range(2):
        answers.append(session.generate(random_ids(2), max_tokens=20, ignore_eos=True).token_ids)
        session.rewind(90)
    assert answers[0] == answers[1]
