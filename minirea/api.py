"""The Python interface: load a model directory, then generate, stream, or compute logits."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minirea import generate as loop
from minirea.attention import Attention
from minirea.checkpoint_config import load_config
from minirea.checks import choice, integer, items, known_options, path_like, shown, switch, valid_id
from minirea.config import (
    CACHES,
    DEVICES,
    DTYPES,
    IMPLS,
    MODES,
    QUANTIZE,
    SCOPE_FIELDS,
    SKETCHES,
    ModelConfig,
    Packing,
    ReAttentionConfig,
    fields_of,
)
from minirea.context import Origin, StoredContext, context_bytes, save_context
from minirea.errors import InputError, MinireaWarning, MissingFileError
from minirea.files import is_there, model_name, read_start
from minirea.generate import GenerationConfig, Piece, Stats
from minirea.isolation import isolated
from minirea.leader import Leader
from minirea.loading import load_model, new_cache
from minirea.memory import MemoryPlan, human
from minirea.model import Model
from minirea.pinned import wait_for_device
from minirea.plan import fit_steps, plan_run
from minirea.ranks import follows
from minirea.sources import Source, Votes, look, question_start, sources_of
from minirea.steps import num_shared
from minirea.tokenizer import NoTokenizerError, Tokenizer, load_tokenizer
from minirea.weights import checkpoint_dtype, fingerprint


@dataclass(frozen=True)
class Generation:
    """A finished text.

    Attributes:
        token_ids: all sampled tokens, an end-of-text token included.
        sources: where it came from, best first, if that was asked for; each unpacks to (start, end, share, text).
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: Stats
    sources: list[Source] = field(default_factory=list)


def load(
    path: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "reattention",
    impl: str = "auto",
    allow_out_of_distribution: bool = False,
    progress: bool = False,
    gpus: int = 1,
    quantize: str | None = None,
    sketch: str = "auto",
    cache: str = "auto",
    **reattention_fields: Any,
) -> LLM:
    """Load a Hugging Face or Mistral model directory.

    Args:
        path: the directory.
        device: "auto" (the GPU if there is one), "cpu" or "cuda".
        dtype: "auto" (the checkpoint's on a GPU, float32 on a CPU), "float32", "float16" or "bfloat16".
        attention: "reattention", "streaming" (selects nothing) or "full" (ordinary attention).
        impl: "auto" (the fused kernel on a GPU, else torch), "triton" or "torch".
        allow_out_of_distribution: let the scope exceed the trained context.
        progress: show a bar on stderr while loading.
        gpus: so many devices of this machine share the model, by key/value heads, of which it must be a divisor; on a
            CPU so many processes. They are started here and end with this process; under torchrun they are its
            processes, of which only the first returns from here: the others serve it and end with it.
        quantize: "int8" or "int4" rounds the matrices while they are read, all but the embedding; with "int4" the
            output head and the first two layers, but for gate and up, to 8 bits. None leaves them as they are, also
            where a checkpoint's come in 4 bits (GPTQ, AWQ, pack-quantized). Not with several devices.
        sketch: "int8": decode steps read int8 copies of the keys, and of the keys themselves only those that can be
            selected: half as many bytes, and exactly the same selection. The copies take half as much memory as the
            keys, besides them. "auto": on a GPU, where that is faster (from 64K tokens on for 8 key/value heads of
            128) and fits; "off" where tokens vote together.
        cache: where keys and values lie: "device", or "host", which has the values in the host's pinned memory and the
            newest tokens' on the device too, and where it must the keys of some layers, with sketches. Kernels read
            the host's memory where it lies, and the result is the same to the bit. "auto" has there what does not fit
            on the device; of several devices each has its own part there. Not with "full" attention or impl "torch"; on
            a CPU all are the same.
        reattention_fields: fields of ReAttentionConfig; None or absent means its default for this model. An attention
            mode ignores those it does not use.

    Raises:
        MissingFileError, InputError, MemoryLimitError, RankError: with one line that says what to fix.
    """
    options: dict[str, Any] = {"gpus": gpus, "quantize": quantize, "sketch": sketch, "cache": cache}
    files = read_model(path, device, dtype, attention, impl, allow_out_of_distribution, **options, **reattention_fields)
    return files.load(progress)


def read_model(
    path: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "reattention",
    impl: str = "auto",
    allow_out_of_distribution: bool = False,
    gpus: int = 1,
    quantize: str | None = None,
    sketch: str = "auto",
    cache: str = "auto",
    **reattention_fields: Any,
) -> ModelFiles:
    """The first half of `load`: everything but the weights, so that a prompt can be counted before they are read.

    Arguments and errors as for `load`.
    """
    known_options(reattention_fields, [*list(inspect.signature(load).parameters)[1:-1], *SCOPE_FIELDS])
    choice("attention", attention, MODES)
    choice("impl", impl, IMPLS)
    choice("dtype", dtype, ("auto", *DTYPES))
    choice("sketch", sketch, SKETCHES)
    choice("cache", cache, CACHES)
    gpus = integer("gpus", gpus, 1)
    if quantize is not None:
        choice("quantize", quantize, QUANTIZE)
        if gpus > 1:
            found = f"quantize is {quantize!r} with gpus={gpus}"
            raise InputError(f"{found}, expected gpus=1: several devices share no quantized model yet")
    if follows(gpus):
        from minirea.follower import launched

        launched()
    target = _device(device)
    if target.type == "cuda" and torch.cuda.device_count() < gpus:
        raise InputError(f"gpus is {gpus}, but torch sees {torch.cuda.device_count()} CUDA devices")
    path = path_like("path", path, "a model directory")
    _check_is_model_directory(path)
    if impl == "triton" and target.type == "cpu":
        raise InputError("impl is 'triton', expected 'auto' or 'torch' on a CPU")
    config = load_config(path)
    if config.packing:
        quantize = _quantize_of_packed(config.packing, quantize, gpus)
    scope = _scope(config, attention, reattention_fields, allow_out_of_distribution)
    tokenizer = _tokenizer(path)
    torch_dtype = _dtype(path, config, dtype, target)
    part = config.of_rank(0, gpus)
    made = Attention(part, attention, scope, impl, target, sketch=sketch, cache=cache)
    if made.sketched and target.type == "cpu":
        about = "sketch is 'int8' on a CPU, where it saves nothing: the same answers take about twice as long"
        warnings.warn(about, MinireaWarning, stacklevel=2)
    return ModelFiles(path, config, tokenizer, made, torch_dtype, quantize)


def _quantize_of_packed(packing: Packing, quantize: str | None, gpus: int) -> str:
    """What matrices are that come in 4 bits."""
    if quantize is not None:
        found = f"quantize is {quantize!r}, but the checkpoint's matrices come in 4 bits ({packing.method})"
        raise InputError(f"{found}, expected none: they are used as they are")
    if gpus > 1:
        found = f"gpus is {gpus}, but the checkpoint's matrices come in 4 bits ({packing.method})"
        raise InputError(f"{found}, expected gpus=1: several devices share no quantized model yet")
    return "int4"


class _Encoder:
    """What turns prompts into token ids: a tokenizer, and the size of the vocabulary that they must not leave."""

    config: ModelConfig
    _tokenizer: Tokenizer | None

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises MissingFileError if the model directory has none."""
        if self._tokenizer is None:
            raise MissingFileError(
                "the model directory has no tokenizer: expected tokenizer.json, tokenizer.model or tekken.json"
            )
        return self._tokenizer

    def encode(self, prompt: str | Sequence[int], continues: bool = False) -> list[int]:
        """Token ids of a prompt, checked against the vocabulary.

        Args:
            prompt: text, or token ids, which are taken as they are.
            continues: the text goes on from another one; see Session.

        Raises:
            InputError: no text and no ids, nothing in it, or an id outside the vocabulary.
        """
        if isinstance(prompt, str):
            given: Iterable[Any] = self.tokenizer.encode(prompt, continues=continues) if prompt else ()
        else:
            given = items("the prompt", prompt, "text or token ids")
        ids, size = [], self.config.vocab_size
        for value in given:
            if (checked := valid_id(value, size)) is None:
                found = f"the prompt holds token id {shown(value)}"
                raise InputError(f"{found}, expected integers from 0 to {size - 1}")
            ids.append(checked)
        if not ids:
            raise InputError("the prompt is empty, expected at least one token")
        return ids


class ModelFiles(_Encoder):
    """A model directory that has been read and checked, but for its weights. Made by `read_model`."""

    def __init__(
        self,
        path: str | Path,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        attention: Attention,
        dtype: torch.dtype,
        quantize: str | None = None,
    ) -> None:
        self.path = path
        self.config = config
        self.attention = attention
        self.dtype = dtype
        self.quantize = quantize
        self._tokenizer = tokenizer

    def plan(self, num_tokens: int = 0) -> MemoryPlan:
        """What weights, cache and workspace need for so many tokens, of prompt and text together; 0: not known yet.

        Of each device, where several share the model; of a CPU's memory, which all share, all together.
        """
        arguments = self.path, self.attention, self.dtype, num_tokens, self.quantize
        plan = fit_steps(self.attention, lambda: plan_run(*arguments))
        return plan.together() if self.attention.device.type == "cpu" else plan

    @property
    def gpus(self) -> int:
        """How many devices share the model."""
        return self.attention.model.ranks

    def check_one_device(self, what: str) -> None:
        """As LLM.check_one_device."""
        _check_one_device(self.attention.model, what)

    def open_context(self, path: str | Path) -> StoredContext:
        """A file that Session.save has written, its header checked, for LLM.open_session. Errors as there."""
        self.check_one_device("contexts in files")
        return StoredContext(path, self.config, self.origin(), self.attention.winners_shape)

    def origin(self) -> Origin:
        """What contexts of this model, under these settings, are known by."""
        return _origin(self.path, self.fingerprint, self.attention, self.dtype, self.quantize)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Which model this is, wherever it lies."""
        return fingerprint(self.path, self.config)

    def context_bytes(self, num_tokens: int) -> int:
        """What Session.save takes for so many tokens."""
        self.check_one_device("contexts in files")
        return context_bytes(self.config, num_tokens, self.dtype)

    def seen_tokens(self, num_tokens: int) -> int:
        """How many tokens attention will see at once, at most, in a context of `num_tokens`."""
        window = self.attention.sliding_window if self.attention.mode == "full" else self.attention.config.max_scope
        return min(num_tokens, num_tokens if window is None else window)

    @isolated()
    def load(self, progress: bool = False, num_tokens: int = 0) -> LLM:
        """Read the weights.

        Args:
            progress: show a bar on stderr.
            num_tokens: prompt and max_tokens together, if they are known: the cache for them must fit as well.

        Raises:
            MissingFileError, InputError, MemoryLimitError: with one line that says what to fix.
        """
        self.plan(num_tokens).check(self.attention.device)
        weights = self.path, self.attention, self.dtype, self.quantize
        if self.gpus == 1:
            # Known from here on, so that contexts can be saved whatever becomes of the directory.
            return LLM(load_model(*weights, progress), self._tokenizer, self.path, self.fingerprint)
        leader, attention = Leader.of(self.gpus, self.attention.device), self.attention
        number, digest = leader.new_id(), self.fingerprint
        settings = attention.mode, attention.config, attention.impl, attention.sketch, attention.cache
        dtype = str(self.dtype).removeprefix("torch.")
        try:
            with leader.asking("load", number, str(Path(self.path).resolve()), self.config, settings, dtype, digest):
                model = load_model(*weights, progress, leader)
        except BaseException:
            leader.drop(number)
            raise
        leader.adopt(model, number)
        with leader.asking("open", number):
            model.open_peers()
        return LLM(model, self._tokenizer, self.path, digest)


class LLM(_Encoder):
    """A loaded model. Made by `load`. Threads may share it; another process loads its own."""

    def __init__(
        self, model: Model, tokenizer: Tokenizer | None, path: str | Path | None = None, fingerprint: str = ""
    ) -> None:
        self.model = model
        self.fingerprint = fingerprint
        self.config = model.config.part.whole if model.config.part else model.config
        self.path = path
        self._tokenizer = tokenizer

    def __repr__(self) -> str:
        model, attention = self.model, self.model.attention
        dtype = str(model.dtype).removeprefix("torch.")
        name = "" if self.path is None else f" {self.path}"
        return (
            f"<LLM{name}: {human(model.nbytes)} of weights, {model.device.type}, {dtype}, {attention.mode}, "
            f"{attention.impl}, trained on {self.config.trained_context:,} tokens>"
        )

    def __reduce__(self) -> str:
        raise TypeError("a model cannot be copied, nor sent to another process: share it, or load it there again")

    @property
    def chunk_size(self) -> int:
        """Prompt tokens that share one scope."""
        return self.model.attention.config.chunk_size

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends a text, by config.json, generation_config.json or the tokenizer's own files."""
        return self.model.config.eos_token_ids | (self._tokenizer.eos_ids if self._tokenizer else frozenset())

    def num_shared(self, shared: int, lengths: Sequence[int]) -> int:
        """How many of the `shared` first tokens of prompts of these lengths can be read once for all of them.

        With so many tokens given to Session.prefill, and the rest of each prompt to Session.generate, every prompt is
        read as it is alone: in whole chunks up to there, its tail later. None where a dynamic RoPE turns all keys by
        how long the whole prompt is.
        """
        return num_shared(self.model.attention, shared, lengths)

    def with_attention(self, attention: str, allow_out_of_distribution: bool = False, **reattention_fields: Any) -> LLM:
        """The same weights, not copied, under another attention mode or scope. Arguments and errors as for `load`."""
        choice("attention", attention, MODES)
        config, old = self.model.config, self.model.attention
        scope = _scope(config, attention, reattention_fields, allow_out_of_distribution)
        model = copy.copy(self.model)
        where = "auto" if attention == "full" else old.cache
        options = old.impl, old.device, model.gather, old.sketch, where
        model.attention = Attention(config, attention, scope, *options)
        if isinstance(model.ranks, Leader):
            number = model.ranks.new_id()
            with model.ranks.asking("vary", number, self.model.id, (attention, scope, old.impl, old.sketch, where)):
                pass
            model.ranks.adopt(model, number)
        return LLM(model, self._tokenizer, self.path, self.fingerprint)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given, so that a clock can be read."""
        if self.model.device.type == "cuda":
            wait_for_device(self.model.device)

    def session(self, capacity: int = 0) -> Session:
        """A context that is kept between calls; `capacity` tokens of cache are allocated at once."""
        return Session(self, capacity)

    @isolated()
    def open_session(
        self, context: str | Path | StoredContext, capacity: int = 0, *, progress: bool = False
    ) -> Session:
        """A session that goes on from a file that Session.save has written, as if it had not been closed.

        Args:
            context: the file, or what ModelFiles.open_context has made of it.
            capacity: tokens of cache that are allocated at once, at least those of the file.
            progress: show a bar on stderr.

        Raises:
            MissingFileError: no such file.
            InputError: the file is damaged, or of another model, dtype, attention mode or scope.
            MemoryLimitError: its cache does not fit.
        """
        self.check_one_device("contexts in files")
        if not isinstance(context, StoredContext):
            context = StoredContext(
                path_like("context", context, "the name of a file"),
                self.config,
                self._origin(),
                self.model.attention.winners_shape,
            )
        try:
            session = self.session(max(len(context.ids), integer("capacity", capacity, 0)))
            context.read_into(session.cache, progress)
        finally:
            context.close()
        self.model.attention.rotate_again(session.cache)
        session.ids, session.notes = list(context.ids), dict(context.notes)
        return session

    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 256,
        *,
        progress: bool = False,
        sources: int = 0,
        **options: Any,
    ) -> Generation:
        """Continue a text or token ids.

        Args:
            prompt: text (encoded with the tokenizer's special tokens, such as BOS) or ids, taken as they are. A chat is
                `llm.tokenizer.encode_chat([{"role": "user", "content": ...}])`.
            max_tokens: at most so many tokens.
            progress: show a bar on stderr while the prompt is read.
            sources: so many passages of the prompt, those that the answer used most; see Session.sources.
            options: further fields of GenerationConfig, such as temperature, top_p, seed and stop.

        Raises:
            InputError: an empty prompt, an id outside the vocabulary, an option out of range.
            MissingFileError: text or a stop string for a model that has no tokenizer.
            MemoryLimitError: the cache for prompt and max_tokens does not fit.
        """
        return self.session().generate(prompt, max_tokens, progress=progress, sources=sources, **options)

    def stream(
        self, prompt: str | Sequence[int], max_tokens: int = 256, *, progress: bool = False, **options: Any
    ) -> Generator[Piece, None, None]:
        """Like `generate`, yielding each piece of text as soon as it is certain."""
        return self.session().stream(prompt, max_tokens, progress=progress, **options)

    def check_one_device(self, what: str) -> None:
        """Raises InputError where several devices share the model, with which `what` does not work yet."""
        _check_one_device(self.model.config, what)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Scores of the token after each of `ids`: float32 [T, V] on the model's device, an ordinary tensor.

        They go through the same steps that `generate` takes. Errors as there.
        """
        ids = self.encode(ids)
        return loop.all_logits(self.model, new_cache(self.model, len(ids)), ids)

    def _origin(self) -> Origin:
        return _origin(self.path, self.fingerprint, self.model.attention, self.model.dtype, self.model.quantize)


class Session:
    """One growing context: read it once, then continue it, or answer several questions by rewinding.

    The first text is encoded as `LLM.encode` does, with BOS. Every later one is its continuation: no BOS, no space of
    the tokenizer's own in front, and no token that reaches across the seam. So texts in parts give the same tokens as
    in one where a token ends at the seam, as it does before most line ends and spaces.

    A call that fails leaves the session as it was, and so does one that is interrupted; a stream keeps what it yielded.
    Calls follow one another: while a stream waits for its next piece to be taken, others are refused until it ends or
    is closed.

    Attributes:
        ids: the whole context. The last sampled token is not in the cache yet: it is read at the head of the next
            piece, and shares its chunk there.
        notes: strings of the program's own, which `save` keeps with the context.
    """

    def __init__(self, llm: LLM, capacity: int = 0) -> None:
        self.llm = llm
        self.cache = new_cache(llm.model, integer("capacity", capacity, 0))
        self.ids: list[int] = []
        self.notes: dict[str, str] = {}
        self._in_use = False  # by a call that has not ended
        self._answer: tuple[int, int] | None = None  # where what asked for the last answer starts, and the answer

    def __repr__(self) -> str:
        return f"<Session of {len(self.ids):,} tokens, cache for {self.cache.capacity:,}, of {self.llm!r}>"

    def __reduce__(self) -> str:
        raise TypeError("a session cannot be copied, nor sent to another process: save it, and open it again there")

    def prefill(self, prompt: str | Sequence[int], progress: bool = False, to_follow: int = 0) -> None:
        """Append a text or token ids to the context. Errors as for LLM.generate.

        Args:
            prompt: a piece of its own, whose end is read as a prompt's tail.
            progress: show a bar on stderr.
            to_follow: tokens that the next call appends to the same piece; see LLM.num_shared.
        """
        ids, to_follow = self.llm.encode(prompt, continues=bool(self.ids)), integer("to_follow", to_follow, 0)
        with self._alone(), self._unchanged_by_failure():
            self.ids += ids
            self._answer = None
            loop.prefill(self.llm.model, self.cache, self.ids[self.cache.seq_len :], to_follow, progress)

    def save(self, path: str | Path, *, progress: bool = False) -> None:
        """Keep the context in a file for LLM.open_session; minirea.context describes it.

        A context of that name is replaced once the new one is complete: a crash leaves the old one, or none.

        Raises:
            InputError: the context is empty, notes are not strings, or the file cannot be written, or holds something
                other than a context.
        """
        self.llm.check_one_device("contexts in files")
        path = path_like("path", path, "the name of a file")
        with self._alone():
            save_context(path, self.cache, self.ids, self.llm._origin(), self.notes, progress)

    def rewind(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` of the context and forget the rest.

        Where a piece has ended, at the last MARKS such places, what follows is what would have followed then. Elsewhere
        fewer tokens vote with the next one (`vote_window`).
        """
        if not 0 <= (keep := integer("num_tokens", num_tokens, 0)) <= len(self.ids):
            raise InputError(f"num_tokens is {keep}, expected 0 to {len(self.ids)}, the tokens in this session")
        with self._alone():
            if keep < self.cache.seq_len:
                self.cache.rewind(self.cache.begin_before(keep))
            del self.ids[keep:]
            if self._answer and keep <= self._answer[1]:
                self._answer = None

    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 256,
        *,
        progress: bool = False,
        sources: int = 0,
        **options: Any,
    ) -> Generation:
        """Append a prompt to the context and continue it; see LLM.generate."""
        integer("sources", sources, 0)
        with self._unchanged_by_failure():
            pieces = list(self.stream(prompt, max_tokens, progress=progress, **options))
            used = self.sources(sources) if sources else []
        last = pieces[-1]
        assert last.finish_reason is not None
        ids = [token_id for piece in pieces for token_id in piece.token_ids]
        return Generation("".join(piece.text for piece in pieces), ids, last.finish_reason, last.stats, used)

    def sources(self, most: int = 5) -> list[Source]:
        """The passages of the context that the last answer used most, best first, at most `most`.

        The answer's tokens go through the model once more. A passage's share is its part of the answer's votes, as
        minirea.sources defines them; the end of the text that asked is no source. In the modes "full" and "streaming"
        it says the same of what those can see.

        Returns:
            (start, end, share, text) each: tokens [start, end) of `ids`, which do not overlap, and their text.

        Raises:
            InputError: the session does not end with an answer.
        """
        votes = self.votes()
        return sources_of(votes, self.ids, integer("most", most, 0), self.llm._tokenizer)

    def votes(self) -> Votes:
        """What each token of the last answer looked at, in which layer: what `sources` sums up. Errors as there."""
        self.llm.check_one_device("sources")
        asked, start = self._answer or (0, 0)
        if not 0 < start < len(self.ids):
            raise InputError("sources are those of an answer, expected a session that ends with one: generate first")
        with self._alone():
            return look(self.llm.model, self.cache, self.ids, start, question_start(asked, start))

    def stream(
        self, prompt: str | Sequence[int], max_tokens: int = 256, *, progress: bool = False, **options: Any
    ) -> Generator[Piece, None, None]:
        """Like `generate`, yielding each piece of text as soon as it is certain.

        Nothing is appended before the first piece is taken. Errors in the arguments are raised at once.
        """
        config = generation_config(options | {"max_tokens": max_tokens})
        if config.stop:
            _ = self.llm.tokenizer  # raises if there is none to find the strings with
        return self._stream(self.llm.encode(prompt, continues=bool(self.ids)), len(self.ids), config, progress)

    def _stream(
        self, ids: list[int], after: int, config: GenerationConfig, progress: bool
    ) -> Generator[Piece, None, None]:
        """Append `ids`, which were encoded to follow `after` tokens, and continue."""
        llm, yielded = self.llm, False
        with self._alone(), self._unchanged_by_failure(unless=lambda: yielded):
            if len(self.ids) != after:
                raise InputError(f"the session has {len(self.ids)} tokens, expected the {after} it had for this stream")
            self.ids += ids
            self._answer = after, len(self.ids)
            pieces = loop.generate(llm.model, self.cache, self.ids, config, llm._tokenizer, llm.eos_ids, progress)
            for piece in pieces:
                yielded = True
                try:
                    yield piece
                except KeyboardInterrupt as struck:
                    pieces.throw(struck)  # completes text and statistics

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While it lasts, no other call may use the session."""
        if self._in_use:
            raise InputError("the session is in use by a stream or a thread: let it end, or close() it, first")
        try:
            self._in_use = True
            yield
        finally:
            self._in_use = False

    @contextlib.contextmanager
    def _unchanged_by_failure(self, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Forget what was appended if it ends with an error; an end by the caller keeps it if `unless`."""
        tokens, cached, answer = len(self.ids), self.cache.seq_len, self._answer
        try:
            yield
        except BaseException as error:
            asked_for = isinstance(error, (GeneratorExit, KeyboardInterrupt))
            if not (asked_for and unless()):
                del self.ids[tokens:]
                self._answer = answer
                self.cache.rewind(min(cached, self.cache.seq_len))
            raise


def generation_config(options: dict[str, Any]) -> GenerationConfig:
    """GenerationConfig from keyword arguments. Raises InputError naming an unknown or malformed one."""
    known_options(options, GenerationConfig.__dataclass_fields__)
    return GenerationConfig(**options)


def _origin(
    path: str | Path | None, fingerprint: str, attention: Attention, dtype: torch.dtype, quantize: str | None
) -> Origin:
    """What a context is checked against: the settings that keys and values, or what is read next, depend on."""
    if path is None:
        raise InputError("this model has no directory, by which the files of its contexts are known")
    settings: dict[str, int | str | None] = {"attention": attention.mode, "dtype": str(dtype).removeprefix("torch.")}
    settings |= {name: getattr(attention.config, name) for name in fields_of(attention.mode)}
    settings["quantize"] = quantize
    return Origin(fingerprint, model_name(path), settings)


def _check_one_device(config: ModelConfig, what: str) -> None:
    if config.part:
        raise InputError(f"gpus is {config.part.ranks}, expected 1: {what} do not work on several devices")


def _check_is_model_directory(path: str | Path) -> None:
    """Files and names that are often given instead are errors that say what they are; load_config checks the rest."""
    gguf = "a GGUF file, expected a model directory with config.json, safetensors and a tokenizer: get the original"
    gguf += " model, or convert it (transformers: from_pretrained(..., gguf_file=...), then save_pretrained)"
    name, path = str(path), Path(path)
    if not is_there(path):
        if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
            fetch = f"hf download {path} --local-dir {path.name}"
            raise MissingFileError(
                f"{path}: no such model directory. If it names a model of the Hugging Face Hub, minirea does not fetch "
                f"it: run `{fetch}` and pass that directory"
            )
    elif path.is_file():
        if path.suffix == ".gguf" or read_start(path, 4) == b"GGUF":
            raise InputError(f"{path}: is {gguf}")
        if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".json"):
            raise InputError(f"{path}: is a file of a model, expected its directory: {path.parent}")
    elif not any(is_there(path / name) for name in ("config.json", "params.json")):
        found = next(path.glob("*.gguf"), None)
        if found is not None:
            raise InputError(f"{path}: holds {found.name}, {gguf}")


def _device(name: str) -> torch.device:
    choice("device", name, DEVICES)
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("device is 'cuda', but torch sees no CUDA device; expected 'auto' or 'cpu'")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def _dtype(path: str | Path, config: ModelConfig, name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    return checkpoint_dtype(path, config) if device.type == "cuda" else torch.float32


def _scope(config: ModelConfig, attention: str, fields: dict[str, Any], allow: bool) -> ReAttentionConfig:
    if attention == "streaming":
        fields = fields | {"span_top_k": 0}
    scope = ReAttentionConfig.for_context(config.trained_context, **fields)
    if not switch("allow_out_of_distribution", allow) and attention != "full":
        window = config.sliding_window is not None and config.sliding_window < config.max_position_embeddings
        scope.check_fits(config.trained_context, "sliding_window" if window else "max_position_embeddings")
    return scope


def _tokenizer(path: str | Path) -> Tokenizer | None:
    """The directory's tokenizer; None if it has none, which is enough for token ids."""
    try:
        return load_tokenizer(path)
    except NoTokenizerError:
        return None
