"""What `reattention` refuses, and in which words."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import make_case

import minirea
from minirea.errors import InputError
from minirea.kernels import ReAttentionConfig, reattention

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "q of two dimensions": ({"q": torch.zeros(4, 16)}, "q_THD is [4, 16]"),
    "no queries": ({"q": torch.zeros(0, 4, 16)}, "not empty"),
    "empty cache": ({"k_cache": torch.zeros(2, 0, 16)}, "not empty"),
    "another head_dim": ({"q": torch.zeros(1, 4, 8)}, "expected one even head_dim"),
    "heads do not divide": ({"q": torch.zeros(1, 3, 16)}, "3 heads, expected a multiple of the 2"),
    "values differ": ({"v_cache": torch.zeros(2, 52, 16)}, "v_cache_GND is [2, 52, 16], expected [2, 53, 16]"),
    "cos too narrow": ({"cos": torch.zeros(50, 4), "sin": torch.zeros(50, 4)}, "expected [positions, 8]"),
    "sin unlike cos": ({"sin": torch.zeros(49, 8)}, "sin [49, 8]"),
    "cos too short": ({"cos": torch.zeros(3, 8), "sin": torch.zeros(3, 8)}, "3 positions, expected at least 16"),
    "cos of doubles": ({"cos": torch.zeros(16, 8).double()}, "expected torch.float32"),
    "q of doubles": ({"q": torch.zeros(1, 4, 16).double()}, "expected one of float32, float16 and bfloat16"),
    "mixed dtypes": ({"q": torch.zeros(1, 4, 16).half()}, "q_THD is torch.float16, k_cache_GND torch.float32"),
    "another device": ({"q": torch.zeros(1, 4, 16, device="meta")}, "on cpu, meta, expected one device"),
    "beyond the cache": ({"seq_len": 54}, "seq_len is 54"),
    "no tokens": ({"seq_len": 0}, "seq_len is 0"),
    "negative tensor": ({"seq_len": torch.tensor(-1)}, "seq_len is -1"),
    "two lengths": ({"seq_len": torch.tensor([50, 50])}, "expected one integer"),
    "a fraction": ({"seq_len": 50.0}, "seq_len is 50.0"),
    "a fractional tensor": ({"seq_len": torch.tensor(50.0)}, "expected one integer"),
    "a truth": ({"seq_len": True}, "seq_len is True"),
    "chunk beyond local": (
        {"q": torch.zeros(9, 4, 16)},
        "a chunk has 9 queries, expected at most local_size (8)",
    ),
}


@pytest.mark.parametrize(("fields", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(fields: dict[str, Any], message: str) -> None:
    case = dataclasses.replace(make_case(ReAttentionConfig(4, 8, 1, 2, 2), 50), **fields)
    with pytest.raises(InputError) as caught:
        reattention(*case.arguments(), impl="torch")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("chunk_size", [0, -1, True, 2.0])
def test_a_bad_chunk_size_is_named(chunk_size: Any) -> None:
    case = make_case(ReAttentionConfig(4, 8), 12, T=3)
    with pytest.raises(InputError, match=f"chunk_size is {chunk_size}, expected a positive integer"):
        reattention(*case.arguments(), impl="torch", chunk_size=chunk_size)


def test_a_selection_is_of_one_chunk() -> None:
    case = make_case(ReAttentionConfig(4, 8), 12, T=3)
    with pytest.raises(InputError, match="3 queries, expected at most one chunk of 2 with return_selection"):
        reattention(*case.arguments(), impl="torch", chunk_size=2, return_selection=True)
    reattention(*case.arguments(), impl="torch", chunk_size=3, return_selection=True)


def test_tensors_that_record_gradients_and_numpys_numbers_are_like_others() -> None:
    case = make_case(ReAttentionConfig(4, 8, 1, 2, 2), 50, T=7)
    q_THD, k_GND, v_GND, seq_len, *others = case.arguments()
    expected = reattention(q_THD, k_GND, v_GND, seq_len, *others, impl="torch", chunk_size=5)
    inputs = (x.clone().requires_grad_() for x in (q_THD, k_GND, v_GND))
    found = reattention(*inputs, np.int64(seq_len), *others, impl="torch", chunk_size=np.int32(5))  # type: ignore[arg-type]
    assert torch.equal(found, expected) and not found.requires_grad


def test_more_queries_than_local_size_fit_in_chunks() -> None:
    case = make_case(ReAttentionConfig(4, 8, 1, 2, 2), 50, T=20)
    out_THD = reattention(*case.arguments(), impl="torch", chunk_size=8)
    alone = [reattention(*chunk.arguments(), impl="torch") for chunk in case.chunks(8)]
    assert torch.equal(out_THD, torch.cat(alone))


def test_unknown_impl() -> None:
    case = make_case(ReAttentionConfig(4, 8), 5)
    with pytest.raises(InputError, match="impl is 'cuda', expected one of auto, triton, torch"):
        reattention(*case.arguments(), impl="cuda")


def test_a_dense_chunk_may_exceed_local_size() -> None:
    case = make_case(ReAttentionConfig(4, 8), 12, T=12)
    assert reattention(*case.arguments(), impl="torch").shape == (12, 4, 16)


def test_short_tables_suffice_for_short_contexts() -> None:
    case = make_case(ReAttentionConfig(4, 8), 5)
    assert case.cos.shape[0] == 5
    reattention(*case.arguments(), impl="torch")


def test_nan_inside_the_context_is_no_crash() -> None:
    case = make_case(ReAttentionConfig(2, 4, 2, 4, 3), 200)
    for bad in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        case.k_cache[:, :200] = bad
        out_THD, selection = reattention(*case.arguments(), impl="torch", return_selection=True)
        assert out_THD.shape == (1, 4, 16) and selection.min() >= 0 and selection.max() < 200


def test_the_torch_path_does_not_import_triton() -> None:
    code = (
        "import sys, torch; from minirea.kernels import *; c = ReAttentionConfig(1, 2)\n"
        "x = torch.zeros(1, 2, 4); k = torch.zeros(1, 9, 4); t = torch.zeros(9, 2)\n"
        "reattention(x, k, k, 9, t, t, c); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert minirea
