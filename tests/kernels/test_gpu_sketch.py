"""Sketches on a GPU: selections and outputs are bit for bit those of the kernel without them."""

from __future__ import annotations

import functools
import random
from dataclasses import replace

import pytest
import torch
from bench_kernel import gpu_activities
from kernel_cases import Case, as_list, rope_table
from sketch_cases import CHANGES, Change, changed, found, sketch_of

from minirea.kernels import ReAttentionConfig, Sketch, new_sketch, reattention, sketch_keys
from minirea.kernels.fused.arguments import DecodeScratch

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
HALF = torch.bfloat16
# Heads, key/value heads, head_dim, dtype, span_top_k, max_spans, scope: compiled once without a sketch, once with one.
SHAPES = [
    (32, 8, 128, HALF, 4, 128, "layer"),
    (32, 8, 128, HALF, 4, 9, "kv_head"),
    (9, 3, 64, HALF, 2, 9, "layer"),
    (8, 1, 80, torch.float16, 3, 24, "layer"),
    (4, 2, 64, torch.float32, 4, 7, "layer"),
    (16, 1, 256, HALF, 2, 16, "layer"),
]


def make(
    config: ReAttentionConfig,
    seq_len: int,
    seed: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype = HALF,
    integers: bool = False,
) -> Case:
    """Made on the GPU: normal keys, half of them close to directions that heads share, or integers, of which many tie.
    Beyond seq_len lies NaN.
    """
    (H, G, D), N = shape, seq_len + 5
    on_gpu = {"generator": torch.Generator(DEVICE).manual_seed(seed), "device": DEVICE}
    if integers:
        q_1HD, k_GND = (torch.randint(-3, 4, size, **on_gpu) / 4 for size in ((1, H, D), (G, N, D)))
    else:
        q_1HD, k_GND = (torch.randn(size, **on_gpu) for size in ((1, H, D), (G, N, D)))
        k_GND += 2 * torch.randn(G, 4, D, **on_gpu)[:, torch.randint(0, 4, (N,), **on_gpu)]
    v_GND = torch.randn(G, N, D, **on_gpu)
    k_GND[:, seq_len:] = v_GND[:, seq_len:] = torch.nan
    tensors = (x.to(dtype) for x in (q_1HD, k_GND, v_GND))
    return Case(*tensors, seq_len, *(x.to(DEVICE) for x in rope_table(min(seq_len, config.max_scope), D)), config)


def poison_scratch(byte: int) -> None:
    """Whatever decode steps left behind, but for their counters: NaN, or numbers that lead out of all memory."""
    from minirea.kernels.fused.launch import _workspaces

    for scratch in _workspaces.values():
        if isinstance(scratch, DecodeScratch):
            for name, tensor in scratch._asdict().items():
                if name != "counters" and tensor is not None:
                    tensor.view(torch.uint8).fill_(byte)


def check_equal(case: Case, sketch: Sketch) -> tuple[int, int]:
    """How many slices there are, and of how many all keys were scored."""
    expected_THD, expected = reattention(*case.arguments(), impl="triton", return_selection=True)
    for byte in (0xFF, 0x7F):
        poison_scratch(byte)
        out_THD, selection = reattention(*case.arguments(), impl="triton", return_selection=True, sketch=sketch)
        assert all(map(torch.equal, as_list(selection), as_list(expected)))
        assert torch.equal(out_THD, expected_THD)
    slices, most = found(case)
    return len(slices), sum(survivors > most for survivors in slices)


@pytest.mark.parametrize(("H", "G", "D", "dtype", "span_top_k", "max_spans", "span_scope"), SHAPES)
def test_exact_on_random_lengths(
    H: int, G: int, D: int, dtype: torch.dtype, span_top_k: int, max_spans: int, span_scope: str
) -> None:
    """Integers and real numbers; slices too short for a sketch, and of up to 60 tiles. Of long ones few are scored."""
    r = random.Random(H * D)
    slices = (torch.cuda.get_device_properties(DEVICE).multi_processor_count - 1) // G
    long, scored = 0, 0
    for seed in range(40):
        sizes = (r.choice([0, 4, 32]), r.choice([8, 64, 300]), span_top_k, r.choice([4, 32]), max_spans)
        config = ReAttentionConfig(*sizes, span_scope=span_scope)
        in_slice = r.choice([r.randint(1, 300), 4096, r.randint(2000, 6000), r.randint(5000, 16_000)])
        n = config.dense_size + slices * in_slice + r.randint(0, slices)
        case = make(config, n, seed, (H, G, D), dtype, integers=seed % 4 == 0)
        counts = check_equal(case, sketch_of(case, "triton"))
        if in_slice >= 5000 and seed % 4:
            long, scored = long + counts[0], scored + counts[1]
    assert 0 <= scored < long / 10


@pytest.mark.parametrize("change", CHANGES)
def test_exact_on_keys_that_try_the_bounds(change: Change) -> None:
    for seed in range(3):
        case = make(ReAttentionConfig(4, 64, 4, 32, 128), 350_000, seed, (8, 2, 128))
        case = changed(case, change, seed)
        check_equal(case, sketch_of(case, "triton"))


def test_slices_know_each_others_bounds() -> None:
    """Of keys without a pattern few survive, in all slices of a head together; where all large ones are in one slice,
    none does in the others.
    """
    case = make(ReAttentionConfig(4, 64, 4, 32, 128), 350_000, 0, (8, 2, 128))
    case.k_cache[:, : case.seq_len].normal_(generator=torch.Generator(DEVICE).manual_seed(0))
    check_equal(case, sketch_of(case, "triton"))
    slices, _ = found(case)
    assert 2 * 4 * 4 <= sum(slices) < 4 * len(slices)
    case.k_cache[:, 100_000:350_000] *= 1e-2
    check_equal(case, sketch_of(case, "triton"))
    survivors = torch.tensor(found(case)[0]).view(2, -1)
    ends = case.config.global_size + -(-(350_000 - 68) // survivors.shape[1]) * torch.arange(1, survivors.shape[1] + 1)
    far_behind = ends > 100_000 + 350_000 // survivors.shape[1]
    assert far_behind.any() and not survivors[:, far_behind].any() and int(survivors.sum()) >= 2 * 4 * 4


def test_sketches_are_those_of_the_twin() -> None:
    """Up to a unit, also in bfloat16."""
    case = make(ReAttentionConfig(4, 64), 10_000, 0, (8, 8, 128))
    ours, twin = (sketch_of(case, impl, 10_000) for impl in ("triton", "torch"))
    differ = (ours.codes[:, :10_000].int() - twin.codes[:, :10_000].int()).abs()
    assert int(differ.max()) <= 1 and float((differ > 0).float().mean()) < 1e-2


def test_a_captured_graph_looks_at_sketches_that_are_made_between_replays() -> None:
    """Beyond seq_len lie NaN, and beyond what is sketched sketches of NaN."""
    config = ReAttentionConfig(32, 64, 4, 32, 128)
    case = make(config, 200_400, 0, (32, 8, 128))
    sketch = new_sketch(8, 128, case.k_cache.shape[1], DEVICE)
    sketch.scales.fill_(-1)
    sketch_keys(case.k_cache, sketch, 0, 200_000, new_mean=True)
    seq_len = torch.tensor([200_001], device=DEVICE, dtype=torch.int32)
    captured = replace(case, seq_len=seq_len)  # type: ignore[arg-type]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        reattention(*captured.arguments(), impl="triton", sketch=sketch)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out_THD = reattention(*captured.arguments(), impl="triton", sketch=sketch)
    torch.cuda.synchronize()
    sketched_len = 200_000
    for n in range(200_001, 200_401):
        if sketched_len < n - config.local_size:
            sketch_keys(case.k_cache, sketch, sketched_len, n - 1)
            sketched_len = n - 1
        seq_len.fill_(n)
        graph.replay()
        assert torch.equal(out_THD, reattention(*replace(case, seq_len=n).arguments(), impl="triton"))
    assert sketched_len > 200_300


def test_two_streams_at_once_and_repeats() -> None:
    case = make(ReAttentionConfig(32, 256, 4, 32, 128), 200_000, 0, (32, 8, 128))
    sketch = sketch_of(case, "triton")
    expected = reattention(*case.arguments(), impl="triton")
    streams, outputs = [torch.cuda.Stream(), torch.cuda.Stream()], []
    torch.cuda.synchronize()
    for _ in range(100):
        for stream in streams:
            with torch.cuda.stream(stream):
                outputs.append(reattention(*case.arguments(), impl="triton", sketch=sketch))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outputs)


def test_a_step_is_one_launch() -> None:
    case = make(ReAttentionConfig(32, 256, 4, 32, 128), 100_000, 0, (32, 8, 128))
    step = functools.partial(reattention, *case.arguments(), impl="triton", sketch=sketch_of(case, "triton"))
    step()
    assert gpu_activities(step) == ["decode_kernel"]
