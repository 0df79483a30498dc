"""Checkpoints in 4 bits, each written from its format's definition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from testing import edit_json, tiny_model, write_checkpoint

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def int32s(fields: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """[..., 8 * n] of 4 bits as [..., n]: field i of a word holds element order[i] of its eight."""
    eights = fields.reshape(*fields.shape[:-1], -1, 8).astype(np.uint32)
    words = sum((eights[..., order[i]] << np.uint32(4 * i) for i in range(8)), start=np.uint32(0))
    return np.ascontiguousarray(words).view(np.int32)


def gptq(q_NK: np.ndarray, z_NG: np.ndarray, s_NG: np.ndarray, size: int, less: int = 1) -> dict[str, np.ndarray]:
    return {
        "qweight": int32s(q_NK).T,
        "qzeros": int32s((z_NG.T - less) % 16),
        "scales": s_NG.T,
        "g_idx": (np.arange(q_NK.shape[1]) // size).astype(np.int32),
    }


def awq(q_NK: np.ndarray, z_NG: np.ndarray, s_NG: np.ndarray, size: int) -> dict[str, np.ndarray]:
    del size
    return {"qweight": int32s(q_NK.T, AWQ_ORDER), "qzeros": int32s(z_NG.T, AWQ_ORDER), "scales": s_NG.T}


def compressed(q_NK: np.ndarray, z_NG: np.ndarray, s_NG: np.ndarray, size: int) -> dict[str, np.ndarray]:
    del size
    shape = np.array(q_NK.shape, dtype=np.int64)
    stored = {"weight_packed": int32s(q_NK), "weight_scale": s_NG, "weight_shape": shape}
    return stored if (z_NG == 8).all() else {**stored, "weight_zero_point": int32s(z_NG.T).T}


def compressed_config(size: int, **weights: Any) -> dict[str, Any]:
    """Of `size` columns in a group; 0: a scale per row."""
    strategy = {"strategy": "group", "group_size": size} if size else {"strategy": "channel", "group_size": None}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, **strategy, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
Kind = tuple[dict[str, Any], Callable[..., dict[str, np.ndarray]], int, bool]
# The config, how a matrix is stored, columns of a group (0: all), and whether all zero points are 8.
KINDS: dict[str, Kind] = {
    "gptq": (GPTQ_CONFIG, gptq, 32, False),
    "gptq, rows": (GPTQ_CONFIG | {"group_size": -1, "checkpoint_format": "gptq"}, gptq, 0, False),
    "gptq, version 2": (GPTQ_CONFIG | {"checkpoint_format": "gptq_v2"}, lambda *a: gptq(*a, less=0), 32, False),
    "awq": (AWQ_CONFIG, awq, 32, False),
    "awq, groups of 64": (AWQ_CONFIG | {"group_size": 64, "version": "GEMM"}, awq, 64, False),
    "compressed-tensors": (compressed_config(32, symmetric=False), compressed, 32, False),
    "compressed-tensors, symmetric rows": (compressed_config(0), compressed, 0, True),
}


def write_packed(directory: Path, kind: str, dtype: torch.dtype = torch.float32, **fields: Any) -> tuple[Path, Path]:
    """A checkpoint in 4 bits, all else in `dtype`, and one in float32 that holds the same matrices."""
    config, store, group_size, symmetric = KINDS[kind]
    model, scale_dtype = tiny_model(**fields), torch.float16 if dtype == torch.float32 else dtype
    packed, wide = (
        write_checkpoint(directory / "packed", model, dtype),
        write_checkpoint(directory / "wide", model, dtype),
    )
    tensors = load_file(wide / "model.safetensors")
    stored, products = dict(tensors), {name: tensor.float() for name, tensor in tensors.items()}
    random = np.random.default_rng(0)
    for name, tensor in tensors.items():
        if "_proj.weight" not in name:
            continue
        (N, K), size = tensor.shape, group_size or tensor.shape[1]
        groups = -(-K // size)
        q_NK = random.integers(0, 16, (N, K))
        z_NG = np.full((N, groups), 8) if symmetric else random.integers(0, 16, (N, groups))
        s_NG = torch.rand(N, groups, generator=torch.Generator().manual_seed(N)).add_(0.5).mul_(K**-0.5 / 4)
        s_NG = s_NG.bfloat16().to(scale_dtype)  # as it is kept
        module = name.removesuffix(".weight")
        del stored[name]
        for kind_of_tensor, values in store(q_NK, z_NG, np.arange(N * groups).reshape(N, groups), size).items():
            held = torch.from_numpy(np.ascontiguousarray(values))
            is_scale = kind_of_tensor in ("scales", "weight_scale")
            stored[f"{module}.{kind_of_tensor}"] = s_NG.flatten()[held] if is_scale else held
        s_NK, z_NK = (np.repeat(x, size, 1)[:, :K] for x in (s_NG.float().numpy(), z_NG))
        products[name] = torch.from_numpy((s_NK * (q_NK - z_NK)).astype(np.float32))
    save_file(stored, packed / "model.safetensors")
    save_file(products, wide / "model.safetensors")
    edit_json(packed / "config.json", quantization_config=config)
    return packed, wide
