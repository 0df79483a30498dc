"""The twins of prefill_step.py in plain torch: what runs where Triton does not."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x_TE, weight_E.shape, weight_E, eps)


def write_kv(
    qkv_TXD: torch.Tensor, k_cache_GND: torch.Tensor, v_cache_GND: torch.Tensor, seq_len: torch.Tensor
) -> None:
    T, G, stop = len(qkv_TXD), len(k_cache_GND), int(seq_len)
    k_cache_GND[:, stop - T : stop] = qkv_TXD[:, -2 * G : -G].transpose(0, 1)
    v_cache_GND[:, stop - T : stop] = qkv_TXD[:, -G:].transpose(0, 1)


def swiglu(gate_up_TM: torch.Tensor) -> torch.Tensor:
    gate_TF, up_TF = gate_up_TM.chunk(2, dim=-1)
    return F.silu(gate_TF).mul_(up_TF)
