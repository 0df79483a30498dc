"""The decode loop: read the prompt in chunks, then embed, layers, logits, sample, stream, one token at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minirea.cache import KVCache
from minirea.checks import integer, items, shown, switch
from minirea.cpu_steps import CpuDecodeStep
from minirea.errors import InputError
from minirea.graph import compiling_decode_step, decode_ahead, read_captured
from minirea.isolation import isolated, num_threads
from minirea.leader import together
from minirea.memory import peak_bytes
from minirea.model import Model
from minirea.progress import ReadingBar, work_of
from minirea.ranks import SharedSampler
from minirea.sampling import NON_FINITE, Sampler, SamplingConfig
from minirea.steps import Part, chunks, cut, leaving
from minirea.tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerationConfig(SamplingConfig):
    """What to generate: the sampling fields, and when to stop.

    Args:
        max_tokens: at most so many tokens, at least 1.
        stop: strings that end the text; they are not part of it. They may straddle tokens. None: there are none.
        ignore_eos: go on past the model's end-of-text tokens.
    """

    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("max_tokens", integer("max_tokens", self.max_tokens, 1))
        expected = "strings that are not empty"
        given = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else self.stop
        stop = tuple(items("stop", given, expected))
        if not all(isinstance(s, str) and s for s in stop):
            raise InputError(f"stop is {shown(self.stop)}, expected {expected}")
        self._set("stop", stop)
        self._set("ignore_eos", switch("ignore_eos", self.ignore_eos))


@dataclass
class Stats:
    """What one generation ran on and cost. Times in seconds, memory in bytes, lengths in tokens.

    Attributes:
        prompt_tokens: the whole context before the first generated token.
        cached_tokens: those of them that had been read before.
        dtype: of the arithmetic and the cache.
        quantize: "int8" or "int4" where matrices are rounded to that.
        impl: "triton" (the fused kernel) or "torch".
        threads: of the CPU's arithmetic; None on a GPU.
        seed: of the draws, also where one was drawn; None where the best token was taken.
        gpus: devices that share the model; bytes are those of the first.
        trained_context: the longest distance between two tokens that training has shown the model.
        scope: what the last step saw: tokens in the "global", "selected" and "local" part, of "seq_len".
        cache_bytes: of keys and values, and of sketches, if there are any.
        sketch_bytes: those of them that are sketches'.
        host_cache_bytes: those of them that lie in the host's memory, which a GPU reads by its address.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    device: str = ""
    dtype: str = ""
    quantize: str | None = None
    attention: str = ""
    impl: str = ""
    threads: int | None = None
    seed: int | None = None
    gpus: int = 1
    trained_context: int = 0
    generated_tokens: int = 0
    time_to_first_token: float = 0.0
    decode_seconds: float = 0.0
    scope: dict[str, int] = field(default_factory=dict)
    weight_bytes: int = 0
    cache_bytes: int = 0
    sketch_bytes: int = 0
    host_cache_bytes: int = 0
    peak_bytes: int = 0

    @classmethod
    def of(cls, model: Model, config: GenerationConfig, prompt_tokens: int, cached_tokens: int) -> Stats:
        """Before the first step, when only what it will run on is known."""
        device, attention = model.device, model.attention
        return cls(
            prompt_tokens,
            cached_tokens,
            device=device.type,
            dtype=str(model.dtype).removeprefix("torch."),
            quantize=model.quantize,
            attention=attention.mode,
            impl=attention.impl,
            threads=num_threads() if device.type == "cpu" else None,
            seed=config.seed if config.temperature > 0 else None,
            gpus=model.ranks.size if model.ranks else 1,
            trained_context=model.config.trained_context,
            weight_bytes=model.nbytes,
        )

    def count(self, seconds: float) -> None:
        """Book one more token, `seconds` after the start."""
        if self.generated_tokens == 0:
            self.time_to_first_token = seconds
        self.generated_tokens += 1
        self.decode_seconds = seconds - self.time_to_first_token

    @property
    def prompt_tokens_per_second(self) -> float:
        """Of those that were read, from the start to the first token."""
        num_read = self.prompt_tokens - self.cached_tokens
        return num_read / self.time_to_first_token if self.time_to_first_token else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first, which the prompt's time already holds."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def seen_tokens(self) -> int:
        """How many tokens the last step attended to."""
        return sum(tokens for part, tokens in self.scope.items() if part != "seq_len")

    def as_dict(self) -> dict[str, object]:
        rates = {"prompt_tokens_per_second": self.prompt_tokens_per_second, "tokens_per_second": self.tokens_per_second}
        return dataclasses.asdict(self) | rates


@dataclass(frozen=True)
class Piece:
    """A step of a stream: the text that became certain and the tokens behind it.

    The last piece carries `finish_reason`: "eos" (an end-of-text token), "stop" (a stop string) or "length".
    """

    text: str
    token_ids: list[int]
    stats: Stats
    finish_reason: str | None = None


class Interrupted(KeyboardInterrupt):
    """A generation that was interrupted. `piece` is its last: the text that was held back, and complete statistics."""

    def __init__(self, piece: Piece) -> None:
        super().__init__()
        self.piece = piece

    def __reduce__(self) -> tuple[type[Interrupted], tuple[Piece]]:
        return type(self), (self.piece,)  # to the process that waits for it, as errors of a pool's workers go


class StopStrings:
    """Passes text through until one of `stops` appears, holding back what could be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.held = ""
        self.unseen: set[int] = set()  # characters of `held` that are searched and not passed on
        self.found = False

    def put(self, text: str, is_output: bool = True) -> str:
        """Text that certainly comes before any stop string.

        Without `is_output` the text is a special token's, which can end the output and is no part of it.
        """
        if not is_output:
            self.unseen |= set(range(len(self.held), len(self.held) + len(text)))
        self.held += text
        hits = [at for at in map(self.held.find, self.stops) if at >= 0]
        if hits:
            self.found = True
            return self._take(min(hits))
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        return self._take(len(self.held) - keep)

    def flush(self) -> str:
        """What was held back, once it is clear that no stop string follows."""
        return self._take(len(self.held))

    def _take(self, count: int) -> str:
        out = "".join(c for i, c in enumerate(self.held[:count]) if i not in self.unseen)
        self.held = "" if self.found else self.held[count:]
        self.unseen = {i - count for i in self.unseen if i >= count}
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class TextOfTokens:
    """Turns sampled tokens into text that is certain, up to the first stop string; into none without a tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, stops: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream(continues=True) if tokenizer else None
        self._stops = StopStrings(stops)

    @property
    def stopped(self) -> bool:
        return self._stops.found

    def put(self, token_id: int) -> str:
        if self._tokenizer is None or self._decoder is None:
            return ""
        if token_id not in self._tokenizer.special_ids:
            return self._stops.put(self._decoder.put(token_id))
        spelling = self._tokenizer.piece(token_id)
        return self._stops.put(spelling if isinstance(spelling, str) else spelling.decode(errors="replace"), False)

    def flush(self) -> str:
        """What was held back, once no token follows."""
        if self._decoder is None or self.stopped:
            return ""
        return self._stops.put(self._decoder.flush()) + self._stops.flush()


@isolated()
def prefill(model: Model, cache: KVCache, ids: Sequence[int], to_follow: int = 0, progress: bool = False) -> None:
    """Append `ids` to the cache, step by step, with a bar on stderr if it takes several steps.

    `to_follow` tokens of the same piece are left for the caller. A call that fails leaves the cache as it was.
    """
    attention, cached = model.attention, cache.seq_len
    parts = cut(attention, cached, len(ids), to_follow)
    cache.reserve(cached + len(ids))
    read = read_captured if attention.can_capture else read_one_by_one
    steps = together(read, model, cache, list(ids), parts, cached + len(ids) + to_follow)
    hide = not progress or len(ids) <= attention.step_tokens(attention.config.chunk_size)
    work = work_of(model.config, attention.mode, attention.config, attention.dense_size)
    try:
        with contextlib.closing(steps), ReadingBar(work, cached, len(ids), hide) as bar:
            for num_read in steps:
                bar.update(num_read)
    except BaseException:
        cache.rewind(cached, cached + len(ids))
        raise


def read_one_by_one(
    model: Model, cache: KVCache, ids: Sequence[int], parts: Sequence[Part], horizon: int = 0
) -> Iterator[int]:
    """Read a prompt's chunks by the model's ordinary forward pass; yields the length of each.

    `horizon` is that of Attention.step.
    """
    cache.mark()
    ids_T = torch.tensor(ids, dtype=torch.long, device=model.device)
    parts = [chunk for part in parts for chunk in part.split(part.chunk_size)]
    for (start, stop, chunk_size), leaves_winners in zip(parts, leaving(cache, parts, len(ids)), strict=True):
        model.read(ids_T[start:stop], cache, horizon, chunk_size, leaves_winners)
        yield stop - start


@isolated()
def all_logits(model: Model, cache: KVCache, ids: Sequence[int]) -> Tensor:
    """Logits of every position, float32 [T, V], through the steps that `generate` takes."""
    with torch.inference_mode(False):  # the caller may change them, and compute with them under autograd
        out_TV = torch.empty(len(ids), model.config.vocab_size, dtype=torch.float32, device=model.device)
    parts = [*chunks(model.attention, cache.seq_len, len(ids) - 1, 1), Part(len(ids) - 1, len(ids), 1)]
    cache.reserve(cache.seq_len + len(ids))
    with contextlib.closing(together(_logits_of_parts, model, cache, list(ids), parts)) as steps:
        for part, logits_PV in zip(parts, steps, strict=False):
            out_TV[part.start : part.stop] = logits_PV
    return out_TV


def _logits_of_parts(model: Model, cache: KVCache, ids: Sequence[int], parts: Sequence[Part]) -> Iterator[Tensor]:
    """Read parts, one chunk each, and yield the logits of each, float32 [P, V]."""
    ids_T, horizon = torch.tensor(ids, dtype=torch.long, device=model.device), cache.seq_len + len(ids)
    for start, stop, chunk_size in parts:
        yield model.logits(model.forward(ids_T[start:stop], cache, horizon, chunk_size))


@isolated()
def decode(
    model: Model, cache: KVCache, last_id: int, sampler: Sampler, limit: int = sys.maxsize
) -> Generator[int, None, None]:
    """Feed `last_id`, then every sampled token, and yield the samples, at most `limit`.

    Raises:
        InputError: the logits are not finite.
    """
    start = cache.seq_len
    steps = decode_ahead if model.attention.can_capture else decode_one_by_one
    shared = SharedSampler(sampler, sampler.takes_best, model.ranks) if model.ranks else sampler
    with contextlib.closing(together(steps, model, cache, last_id, shared, limit)) as token_ids:
        for count, token_id in enumerate(token_ids, 1):
            if token_id == NON_FINITE:
                raise InputError(
                    f"the logits are not finite after {start + count} tokens: the weights are damaged, or too large "
                    f'for {str(model.dtype).removeprefix("torch.")} (try dtype="float32")'
                )
            yield token_id


def decode_one_by_one(
    model: Model, cache: KVCache, last_id: int, sampler: Sampler | SharedSampler, limit: int
) -> Generator[int, None, None]:
    """`decode` by the model's ordinary forward pass, or on a CPU what computes the same with less ado, each token
    read before the next step begins.
    """
    ids_T = torch.tensor([last_id], dtype=torch.long, device=model.device)
    step = CpuDecodeStep(model, cache) if CpuDecodeStep.serves(model, cache) else None
    for _ in range(limit):
        model.attention.sketch_keys(cache)
        logits_TV = step.run(ids_T) if step else model.logits(model.forward(ids_T, cache))
        ids_T = sampler(logits_TV[-1])
        yield int(ids_T)


def generate(
    model: Model,
    cache: KVCache,
    ids: list[int],
    config: GenerationConfig,
    tokenizer: Tokenizer | None,
    eos_ids: frozenset[int],
    progress: bool = False,
) -> Generator[Piece, None, None]:
    """Continue a context, token by token.

    Args:
        ids: the whole context. What the cache does not hold yet, at least one token, is read first; every sampled token
            is appended.
        tokenizer: turns tokens into text; without one every piece's text is empty.
        eos_ids: tokens that end the text, unless config.ignore_eos.

    Raises:
        Interrupted: for a KeyboardInterrupt once tokens are being sampled; its piece completes text and statistics.
    """
    started = time.perf_counter()
    if config.seed is None and config.temperature > 0:
        config = dataclasses.replace(config, seed=secrets.randbits(63))
    stats = Stats.of(model, config, len(ids), cache.seq_len)
    cache.reserve(len(ids) + config.max_tokens)
    sampler = Sampler(config, ids, model.config.vocab_size, model.device)
    with compiling_decode_step(model, cache):
        prefill(model, cache, ids[cache.seq_len : -1], 1, progress)
    text = TextOfTokens(tokenizer, config.stop)
    try:
        with contextlib.closing(decode(model, cache, ids[-1], sampler, config.max_tokens)) as token_ids:
            for token_id in token_ids:
                ids.append(token_id)
                stats.count(time.perf_counter() - started)
                ended = token_id in eos_ids and not config.ignore_eos
                new_text = "" if ended else text.put(token_id)
                if ended or text.stopped or stats.generated_tokens == config.max_tokens:
                    new_text += text.flush()
                    break
                yield Piece(new_text, [token_id], stats)
    except KeyboardInterrupt:
        _complete(stats, model, cache, ids)
        raise Interrupted(Piece(text.flush(), [], stats, "interrupted")) from None
    _complete(stats, model, cache, ids)
    yield Piece(new_text, [token_id], stats, "eos" if ended else "stop" if text.stopped else "length")


@isolated()
def _complete(stats: Stats, model: Model, cache: KVCache, ids: list[int]) -> None:
    """Statistics that are known once the last step is done."""
    with contextlib.closing(together(_last_scope, model, cache, ids[cache.seq_len - 1])) as scopes:
        stats.scope = next(scopes)
    stats.cache_bytes, stats.sketch_bytes, stats.host_cache_bytes = cache.nbytes, cache.sketch_nbytes, cache.far_nbytes
    stats.peak_bytes = peak_bytes(model.device)


def _last_scope(model: Model, cache: KVCache, last_id: int) -> Iterator[dict[str, int]]:
    """Attention.scope of the last token in the cache."""
    scope = model.attention.scope(cache, model.first_query(last_id))
    if model.ranks is not None:
        model.ranks.meet()  # before a step uses the room again in which winners were gathered
    yield scope
