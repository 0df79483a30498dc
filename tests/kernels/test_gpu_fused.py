"""The fused kernel on a GPU: exact selections, errors, repeats, graphs. The judge is the torch path on the same GPU."""

from __future__ import annotations

import functools
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from bench_kernel import gpu_activities
from kernel_cases import Case, as_list, error, make_case, plain_attention, popular_keys_case, rope_table, votes_of

from minirea.kernels import ReAttentionConfig, reattention

pytestmark = pytest.mark.gpu
HALF = torch.bfloat16
# Heads, key/value heads, head_dim, dtype, span_top_k, scope: each is compiled twice, for decode and for chunks.
SHAPES = [
    (32, 8, 128, HALF, 4, "layer"),
    (32, 8, 128, HALF, 4, "kv_head"),
    (4, 2, 64, torch.float32, 4, "layer"),
    (8, 1, 80, torch.float16, 3, "layer"),
    (6, 6, 16, HALF, 5, "kv_head"),
    (16, 2, 256, HALF, 4, "layer"),
    (8, 4, 128, HALF, 2, "layer"),  # so few candidates that a reshape before `take_best` was miscompiled
    (2, 1, 256, HALF, 1, "layer"),
]


def check(case: Case) -> None:
    dtype = case.q.dtype
    out_THD, selection = reattention(*case.arguments(), impl="triton", return_selection=True)
    _, expected = reattention(*case.arguments(), impl="torch", return_selection=True)
    scopes = as_list(expected)
    for found, scope in zip(as_list(selection), scopes, strict=True):
        assert torch.equal(found, scope)
    wide = {name: getattr(case, name).double() for name in ("q", "k_cache", "v_cache", "cos", "sin")}
    exact_THD = plain_attention(replace(case, **wide), scopes)
    assert error(out_THD, exact_THD) <= 2 * error(plain_attention(case, scopes), exact_THD) + torch.finfo(dtype).eps


@pytest.mark.parametrize(("H", "G", "D", "dtype", "span_top_k", "span_scope"), SHAPES)
@pytest.mark.parametrize("decode", [True, False])
def test_exact_on_random_lengths(
    H: int, G: int, D: int, dtype: torch.dtype, span_top_k: int, span_scope: str, decode: bool
) -> None:
    r = random.Random(H * D + decode)
    for seed in range(30):
        config = ReAttentionConfig(
            r.choice([0, 4, 32]),
            r.choice([8, 64, 300]),
            span_top_k,
            r.choice([2, 8, 32]),
            300,
            span_scope=span_scope,
        )
        T = 1 if decode else min(r.choice([2, 7, 8, 31, 64]), config.local_size)
        edge = config.global_size + config.local_size
        lengths = [r.randint(T, edge), edge, edge + r.randint(1, 3), edge + r.randint(0, 3000), edge + 9000]
        case = make_case(config, max(T, r.choice(lengths)), T=T, H=H, G=G, D=D, largest=r.choice([1, 3]), seed=seed)
        check(case.on_gpu(dtype))


@pytest.mark.parametrize(
    ("H", "G", "D", "dtype"),
    [
        *((32, 8, 128, HALF), (9, 3, 64, HALF), (32, 1, 128, HALF), (8, 8, 256, HALF), (40, 2, 80, torch.float16)),
        *((4, 2, 64, torch.float32), (8, 1, 128, torch.float32)),
    ],
)
def test_exact_where_nothing_is_selected(H: int, G: int, D: int, dtype: torch.dtype) -> None:
    """One query over global and local tokens, or all; slices may be empty. What lies behind is NaN."""
    r = random.Random(H * D)
    for seed in range(30):
        config = ReAttentionConfig(r.choice([0, 4, 32]), r.choice([8, 64, 300, 4096]), 0, dense_size=5000)
        n = r.choice([1, 2, 31, 33, r.randint(1, 700), r.randint(1, 5000), 5000, 5001, r.randint(5001, 20000)])
        case = make_case(config, n, H=H, G=G, D=D, largest=3, seed=seed).on_gpu(dtype)
        case.cos, case.sin = (table.cuda() for table in rope_table(config.max_scope, D))
        check(case)
        in_memory = replace(case, seq_len=torch.tensor([n], dtype=torch.int32, device="cuda"))  # type: ignore[arg-type]
        expected = reattention(*case.arguments(), impl="triton")
        assert all(torch.equal(reattention(*in_memory.arguments(), impl="triton"), expected) for _ in range(3))


@pytest.mark.parametrize(("H", "G", "D", "dtype", "span_top_k", "span_scope"), SHAPES)
def test_chunks_in_one_launch(H: int, G: int, D: int, dtype: torch.dtype, span_top_k: int, span_scope: str) -> None:
    """Of three or four chunks, the last often shorter, the first often dense."""
    r = random.Random(H * D)
    for seed in range(8):
        config = ReAttentionConfig(r.choice([0, 4, 32]), 64, span_top_k, 8, 300, span_scope=span_scope)
        # Other sizes may be compiled anew: so only once as many as a step of a small model has.
        chunk_size, chunks = 64, r.choice([3, 4]) if seed else 11
        T = chunk_size * chunks - r.choice([0, 1, chunk_size - 1])
        n = r.choice([T, T + 40, T + r.randint(41, 3000), 12000])
        case = make_case(config, n, T=T, H=H, G=G, D=D, largest=r.choice([1, 3]), seed=seed).on_gpu(dtype)
        out_THD = reattention(*case.arguments(), impl="triton", chunk_size=chunk_size)
        wide = replace(
            case, **{name: getattr(case, name).double() for name in ("q", "k_cache", "v_cache", "cos", "sin")}
        )
        for chunk, exact, out in zip(
            case.chunks(chunk_size), wide.chunks(chunk_size), out_THD.split(chunk_size), strict=True
        ):
            scopes = as_list(reattention(*chunk.arguments(), impl="torch", return_selection=True)[1])
            exact_THD, plain_THD = plain_attention(exact, scopes), plain_attention(chunk, scopes)
            assert error(out, exact_THD) <= 2 * error(plain_THD, exact_THD) + torch.finfo(dtype).eps


def test_exact_on_keys_with_hundreds_of_votes() -> None:
    check(popular_keys_case().on_gpu())


@pytest.mark.parametrize("max_spans", [3, 100])
@pytest.mark.parametrize("T", [1, 64])
def test_exact_when_votes_are_cut(max_spans: int, T: int) -> None:
    for seed in range(5):
        config = ReAttentionConfig(4, 64, 4, 8, max_spans)
        check(make_case(config, 3000 + seed, T=T, H=32, G=8, D=128, largest=1, seed=seed).on_gpu())


@pytest.mark.parametrize(("H", "G", "D", "dtype", "span_top_k", "span_scope"), SHAPES)
def test_exact_when_votes_add_up(H: int, G: int, D: int, dtype: torch.dtype, span_top_k: int, span_scope: str) -> None:
    """From layer to layer of a captured step, which begins with zeros at every replay."""
    for seed, vote_size in enumerate((1, 32)):
        config = ReAttentionConfig(4, 64, span_top_k, 16, 16, span_scope=span_scope, vote_size=vote_size)
        case = make_case(config, 9000, H=H, G=G, D=D, largest=1, seed=seed).on_gpu(dtype)
        seq_len = torch.tensor([9000], device="cuda", dtype=torch.int32)
        layers = [replace(case, q=case.q.roll(layer, -1)) for layer in range(4)]

        def step(layers: list[Case] = layers, seq_len: torch.Tensor = seq_len) -> list[tuple[torch.Tensor, ...]]:
            votes = votes_of(layers[0], len(layers))
            on_device = [replace(layer, seq_len=seq_len).arguments() for layer in layers]  # type: ignore[arg-type]
            outs = [reattention(*given, impl="triton", votes=votes) for given in on_device]
            return [(out, votes.counts) for out in outs]

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                found = step()
        torch.cuda.synchronize()
        for n in (9000, 8000, 9000):
            seq_len.fill_(n)
            graph.replay()
            theirs, ours = (votes_of(case, len(layers)) for _ in range(2))
            for layer, (out_1HD, _) in zip(layers, found, strict=True):
                now = replace(layer, seq_len=n)
                _, selection = reattention(*now.arguments(), impl="triton", votes=ours, return_selection=True)
                _, expected = reattention(*now.arguments(), impl="torch", votes=theirs, return_selection=True)
                scopes = as_list(expected)
                assert all(map(torch.equal, as_list(selection), scopes))
                wide = {name: getattr(now, name).double() for name in ("q", "k_cache", "v_cache", "cos", "sin")}
                exact_THD, plain_THD = plain_attention(replace(now, **wide), scopes), plain_attention(now, scopes)
                assert error(out_1HD, exact_THD) <= 2 * error(plain_THD, exact_THD) + torch.finfo(dtype).eps
            assert torch.equal(found[0][1], theirs.counts) and torch.equal(ours.counts, theirs.counts)


@pytest.mark.parametrize(("T", "chunk_size"), [(1, 1), (64, 64), (64, 16)])
def test_repeats_are_bitwise_equal(T: int, chunk_size: int) -> None:
    case = make_case(ReAttentionConfig(32, 256, 4, 32, 128), 20000, T=T, H=32, G=8, D=128).on_gpu()
    first = reattention(*case.arguments(), impl="triton", chunk_size=chunk_size)
    for _ in range(200):
        assert torch.equal(reattention(*case.arguments(), impl="triton", chunk_size=chunk_size), first)


def test_a_captured_graph_follows_seq_len() -> None:
    config = ReAttentionConfig(32, 256, 4, 32, 128)
    case = make_case(config, 5000, H=32, G=8, D=128, capacity=5000).on_gpu()
    seq_len = torch.tensor([3000], device="cuda", dtype=torch.int32)
    captured = replace(case, seq_len=seq_len)  # type: ignore[arg-type]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        reattention(*captured.arguments(), impl="triton")
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out_THD = reattention(*captured.arguments(), impl="triton")
    torch.cuda.synchronize()
    for n in [100, 287, 288, 289, *range(3000, 5000)]:
        seq_len.fill_(n)
        graph.replay()
        fresh = reattention(*replace(case, seq_len=n).arguments(), impl="triton")
        assert torch.equal(out_THD, fresh)


def test_two_streams_at_once() -> None:
    case = make_case(ReAttentionConfig(32, 256, 4, 32, 128), 20000, H=32, G=8, D=128).on_gpu()
    expected = reattention(*case.arguments(), impl="triton")
    outputs = []
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                outputs.append(reattention(*case.arguments(), impl="triton"))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outputs)


def test_threads_on_one_stream_get_their_own_selections() -> None:
    config = ReAttentionConfig(32, 256, 4, 32, 24)
    cases = [make_case(config, 3000 + 500 * i, H=32, G=8, D=128, seed=i).on_gpu() for i in range(8)]

    def select(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        return reattention(*case.arguments(), impl="triton", return_selection=True)

    expected = [select(case) for case in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        for _ in range(20):
            for found, wanted in zip(pool.map(select, cases), expected, strict=True):
                assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("work", ["matmul", "spin"])
@pytest.mark.parametrize("T", [1, 64])
def test_a_busy_gpu_only_delays(T: int, work: str) -> None:
    """Programs wait for one another, so kernels of others must not keep some of them from starting."""
    case = make_case(ReAttentionConfig(32, 256, 4, 32, 128), 20000, T=T, H=32, G=8, D=128).on_gpu()
    expected = reattention(*case.arguments(), impl="triton")
    square, product = (torch.ones(8192, 8192, device="cuda", dtype=HALF) for _ in range(2))
    torch.mm(square, square, out=product)  # loads what the loop below runs
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(100):
            if work == "matmul":  # every multiprocessor, for a millisecond and a half
                torch.mm(square, square, out=product)
            else:  # one thread, for a few milliseconds
                torch.cuda._sleep(10_000_000)
        done.record()
    outputs = [reattention(*case.arguments(), impl="triton")]
    assert not done.query()  # else nothing was shared
    outputs += [reattention(*case.arguments(), impl="triton") for _ in range(49)]
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outputs)


@pytest.mark.parametrize(("H", "G", "D", "chunks"), [(9, 3, 64, 4), (9, 3, 64, 11), (32, 8, 128, 4)])
def test_programs_share_the_work_of_all_chunks(H: int, G: int, D: int, chunks: int) -> None:
    """Each scores some block of rows: a compiler that counts wrong from chunk to chunk gives all work to the first."""
    from minirea.kernels.fused import launch, plan
    from minirea.kernels.fused.arguments import Rope

    chunk_size = 512
    config = ReAttentionConfig(32, 1024, 2, 32, 111)
    T, n = chunks * chunk_size, 16384
    q, out = (torch.randn(T, H, D, device="cuda", dtype=HALF) for _ in range(2))
    k, v = (torch.randn(G, n, D, device="cuda", dtype=HALF) for _ in range(2))
    table = torch.ones(config.max_scope + T, D // 2, device="cuda")

    inputs = launch.Inputs(q, k, v, out, n, Rope(table, table), config)
    step = functools.partial(launch.launch_chunks, inputs, chunk_size)
    tag = step().tag  # the program's own, of the tiles that it keeps of its last block of rows
    tag.fill_(-(1 << 30))
    step()
    idle = int((tag == -(1 << 30)).flatten(1).all(1).sum())
    tiles = plan.chunk_tiles(inputs.layer)
    assert idle == max(0, len(tag) - chunks * G * -(-chunk_size * (H // G) // tiles.BLOCK_M))


@pytest.mark.parametrize("n", [200, 20000])  # dense, selecting
@pytest.mark.parametrize(
    ("T", "span_top_k", "kernel"), [(1, 4, "decode_kernel"), (1, 0, "plain_kernel"), (64, 4, "chunk_kernel")]
)
def test_a_step_is_one_launch(T: int, span_top_k: int, kernel: str, n: int) -> None:
    """The profiler sees one kernel, no copy and no fill, once everything is compiled."""
    case = make_case(ReAttentionConfig(32, 256, span_top_k, 32, 128), n, T=T, H=32, G=8, D=128).on_gpu()
    step = functools.partial(reattention, *case.arguments(), impl="triton")
    step()
    assert gpu_activities(step) == [kernel]


@pytest.mark.slow
def test_a_cache_of_more_than_2_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    config, n = ReAttentionConfig(4, 64, 2, 8, 64), (1 << 31) // 256 + 1000
    case = make_case(config, 100, H=2, G=1, D=256, capacity=100)
    cache = torch.zeros(1, n, 256, device="cuda", dtype=HALF)
    value = torch.randn(1, n, 256, device="cuda", dtype=HALF)
    needle = n - 700  # beyond 2^31 elements
    cache[0, needle] = 1.0
    cos, sin = torch.ones(config.max_scope, 128, device="cuda"), torch.zeros(config.max_scope, 128, device="cuda")
    case = Case(torch.ones_like(case.q, device="cuda", dtype=HALF), cache, value, n, cos, sin, config)
    out_THD, selection = reattention(*case.arguments(), impl="triton", return_selection=True)
    assert needle in selection.tolist()
    expected = plain_attention(replace(case, k_cache=cache, v_cache=value), [selection])
    assert error(out_THD, expected.double()) < 0.02
