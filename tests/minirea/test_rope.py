"""RoPE tables at the ends of what a config may declare; that they are right is shown with whole models."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from testing import TINY

from minirea.checkpoint_config import load_config
from minirea.rope import inverse_frequencies, rope_table

SCALINGS = [
    *({"type": kind, "factor": factor} for kind, factor in itertools.product(("linear", "dynamic"), (1e-4, 1e6))),
    *(
        {"type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
        | {"original_max_position_embeddings": original}
        for factor, (low, high), original in itertools.product(
            (1e-4, 1e6), ((1e-4, 1e6), (1.0, 1.0001)), (1, 2**31 - 1)
        )
    ),
    *(
        {"type": "yarn", "factor": factor, "beta_fast": fast, "beta_slow": slow, "truncate": truncate}
        | {"original_max_position_embeddings": original, "mscale": mscale, "mscale_all_dim": 1e6}
        for factor, fast, slow, truncate, original, mscale in itertools.product(
            (1e-4, 1e6), (1e-4, 1e6), (1e-4, 1e6), (False, True), (1, 2**31 - 1), (0, 1e-4, 1e6)
        )
    ),
]


@pytest.mark.parametrize("head_dim", [2, 4, 64, 4096])
@pytest.mark.parametrize("theta", [1.0, 1.0000000000000002, 1e4, 1e15])
def test_every_declaration_in_range_gives_finite_tables(head_dim: int, theta: float, tmp_path: Path) -> None:
    for scaling in SCALINGS:
        if (scaling["type"], head_dim) == ("dynamic", 2) or (scaling["type"], theta) == ("yarn", 1.0):
            continue  # refused
        values = TINY | {"model_type": "llama", "head_dim": head_dim, "rope_theta": theta, "rope_scaling": scaling}
        (tmp_path / "config.json").write_text(json.dumps(values))
        config = load_config(tmp_path)
        for seq_len in (0, 2**31 - 1):
            frequencies, factor = inverse_frequencies(config.rope, head_dim, 1, seq_len)
            for table in rope_table(frequencies, factor, 10**6, 10**6 + 2):
                assert torch.isfinite(table).all(), (scaling, seq_len)
