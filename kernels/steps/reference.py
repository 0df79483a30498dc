"""The twins of matvec.py and rows.py in plain torch: same names, arguments and results, one line of arithmetic each.

They run in the tensors' own dtype. On float64 tensors they are the exact result that the kernels are judged by. The
twins of rows.py are also what runs where Triton does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from minirea.kernels.near import Near, write_near
from minirea.quantize import QuantizedMatrix

if TYPE_CHECKING:
    from minirea.kernels.steps.matvec import NewToken

Matrix = torch.Tensor | QuantizedMatrix

# Of rows.py


def rms_norm(x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x_TE, weight_E.shape, weight_E, eps)


def write_kv(
    qkv_TXD: torch.Tensor,
    k_cache_GND: torch.Tensor,
    v_cache_GND: torch.Tensor,
    seq_len: torch.Tensor,
    near: Near | None = None,
) -> None:
    T, G, stop = len(qkv_TXD), len(k_cache_GND), int(seq_len)
    k_GTD, v_GTD = qkv_TXD[:, -2 * G : -G].transpose(0, 1), qkv_TXD[:, -G:].transpose(0, 1)
    k_cache_GND[:, stop - T : stop] = k_GTD
    v_cache_GND[:, stop - T : stop] = v_GTD
    if near is not None:
        write_near(near, stop - T, k_GTD, v_GTD)


def swiglu(gate_up_TM: torch.Tensor) -> torch.Tensor:
    gate_TF, up_TF = gate_up_TM.chunk(2, dim=-1)
    return F.silu(gate_TF).mul_(up_TF)


def widen(matrix_NK: QuantizedMatrix, out_NK: torch.Tensor) -> None:
    out_NK.copy_(matrix_NK.widen(out_NK.dtype))


# Of matvec.py


def product(x_K: torch.Tensor, w_NK: Matrix, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x_K, w_NK if isinstance(w_NK, torch.Tensor) else w_NK.widen(x_K.dtype), bias_N)


def embed(token: torch.Tensor, table_VE: torch.Tensor, seq_len: torch.Tensor, x_E: torch.Tensor) -> None:
    x_E.copy_(table_VE[token.clamp(min=0)][0])
    seq_len += 1


def norm_qkv(
    x_E: torch.Tensor,
    norm_E: torch.Tensor,
    qkv_XE: Matrix,
    bias_X: torch.Tensor | None,
    eps: float,
    seq_len: torch.Tensor,
    q_HD: torch.Tensor,
    k_cache_GND: torch.Tensor,
    v_cache_GND: torch.Tensor,
    near: Near | None = None,
) -> None:
    (H, D), G = q_HD.shape, k_cache_GND.shape[0]
    qkv_XD = product(F.rms_norm(x_E, x_E.shape, norm_E, eps), qkv_XE, bias_X).view(-1, D)
    q, k_GD, v_GD = qkv_XD.split_with_sizes((H, G, G))
    position = int(seq_len) - 1
    q_HD.copy_(q)
    k_cache_GND[:, position] = k_GD
    v_cache_GND[:, position] = v_GD
    if near is not None:
        write_near(near, position, k_GD[:, None], v_GD[:, None])


def add_product(x_K: torch.Tensor, w_NK: Matrix, bias_N: torch.Tensor | None, out_N: torch.Tensor) -> None:
    out_N += product(x_K, w_NK, bias_N)


def norm_gate_up(
    x_E: torch.Tensor,
    norm_E: torch.Tensor,
    gate_up_ME: Matrix,
    bias_M: torch.Tensor | None,
    eps: float,
    out_F: torch.Tensor,
) -> None:
    gate_F, up_F = product(F.rms_norm(x_E, x_E.shape, norm_E, eps), gate_up_ME, bias_M).chunk(2)
    out_F.copy_(F.silu(gate_F) * up_F)


def norm_logits(x_E: torch.Tensor, norm_E: torch.Tensor, head_VE: Matrix, eps: float, logits_V: torch.Tensor) -> None:
    logits_V.copy_(product(F.rms_norm(x_E, x_E.shape, norm_E, eps), head_VE))


def keep_token(token: torch.Tensor, new: NewToken) -> None:
    new.token.copy_(token)
    new.on_host[int(new.seq_len) % 2] = token.item()


def best_token(logits_V: torch.Tensor, _workspace: object, new: NewToken) -> None:
    best = logits_V.max()
    keep_token(torch.where(best.isfinite(), logits_V.argmax(keepdim=True), -1), new)
