"""What a prefill step does on a GPU besides attention and matrix products, each in one pass over memory.

    rms_norm   the residual stream -> its rows, normed
    write_kv   keys and values of a chunk -> the cache, behind what it holds
    swiglu     gate and up of a chunk -> silu(gate) * up
    widen      rows of a quantized matrix -> the model's dtype

Matrix products of whole chunks are cuBLAS's, which also adds them to the residual stream. Letters are the project's:
T queries, E model width, F MLP width, H, G, D heads and head dim, N the cache's capacity; a matrix has N rows and K
columns.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minirea.kernels.launching import cdiv, launch, next_power_of_2
from minirea.kernels.near import Near, near_rows
from minirea.kernels.steps.matvec import STEPS_OF_SCALE, decode, weights_of
from minirea.quantize import UNIT, ZERO, QuantizedMatrix

# ------------------------------------------------------------------------------------------------------------- device


@triton.jit
def rms_norm_kernel(x_ptr, norm_ptr, out_ptr, eps, E: tl.constexpr, BLOCK_E: tl.constexpr, EARLY: tl.constexpr):
    """A program takes one row."""
    if EARLY:
        gdc_launch_dependents()
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    norm = tl.load(norm_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)  # constant: before the wait
    if EARLY:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64) * E
    x = tl.load(x_ptr + row + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    out = x * tl.rsqrt(tl.sum(x * x, axis=0) / E + eps) * norm
    tl.store(out_ptr + row + offs_e, out.to(out_ptr.dtype.element_ty), mask=mask_e)


@triton.jit
def write_kv_kernel(
    qkv_ptr, k_ptr, v_ptr, seq_len_ptr, stride_kg, stride_kn, stride_vg, stride_vn, near,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, NEAR_K: tl.constexpr, NEAR_V: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """A program takes one token. `near` has NEAR_K rows of keys and NEAR_V of values, or is None."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0)
    position = tl.load(seq_len_ptr).to(tl.int64) - tl.num_programs(0) + t
    offs = tl.arange(0, BLOCK)
    mask = offs < G * D
    qkv_ptrs = qkv_ptr + t.to(tl.int64) * ((H + 2 * G) * D) + H * D + offs
    g = (offs // D).to(tl.int64)
    k = tl.load(qkv_ptrs, mask=mask)
    v = tl.load(qkv_ptrs + G * D, mask=mask)
    tl.store(k_ptr + g * stride_kg + position * stride_kn + offs % D, k, mask=mask)
    tl.store(v_ptr + g * stride_vg + position * stride_vn + offs % D, v, mask=mask)
    if NEAR_K:
        tl.store(near.k + (g * NEAR_K + position % NEAR_K) * D + offs % D, k, mask=mask)
    if NEAR_V:
        tl.store(near.v + (g * NEAR_V + position % NEAR_V) * D + offs % D, v, mask=mask)


@triton.jit
def swiglu_kernel(gate_up_ptr, out_ptr, F: tl.constexpr, BLOCK_F: tl.constexpr, EARLY: tl.constexpr):
    """A program computes BLOCK_F features of one row."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    pieces: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    row = (tl.program_id(0) // pieces).to(tl.int64)
    offs_f = tl.program_id(0) % pieces * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_f = offs_f < F
    gate_ptrs = gate_up_ptr + row * (2 * F) + offs_f
    gate = tl.load(gate_ptrs, mask=mask_f).to(tl.float32)
    up = tl.load(gate_ptrs + F, mask=mask_f).to(tl.float32)
    act = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * F + offs_f, act.to(out_ptr.dtype.element_ty), mask=mask_f)


@triton.jit
def widen_kernel(
    weights, out_ptr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    BLOCK_U: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program widens BLOCK_U units of four words of a row, whose columns lie in a row."""
    if EARLY:
        gdc_launch_dependents()
    FIELDS: tl.constexpr = 32 // BITS
    COLUMNS: tl.constexpr = 4 * FIELDS  # of a unit
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    U: tl.constexpr = GROUPS * (GROUP // COLUMNS)
    EVEN: tl.constexpr = K % (COLUMNS * BLOCK_U) == 0
    pieces: tl.constexpr = (U + BLOCK_U - 1) // BLOCK_U
    row = (tl.program_id(0) // pieces).to(tl.int64)
    first = tl.program_id(0) % pieces * BLOCK_U
    offs_u = first + tl.arange(0, BLOCK_U)
    offs_w = first * 4 + tl.arange(0, 4 * BLOCK_U)
    offs_k = first * COLUMNS + tl.arange(0, COLUMNS * BLOCK_U)
    mask_u, mask_w, mask_k = None, None, None
    if not EVEN:
        mask_u, mask_w, mask_k = offs_u < U, offs_w < 4 * U, offs_k < K
    w = tl.load(weights.ptr + row * (4 * U) + offs_w, mask=mask_w, eviction_policy="evict_first")
    scale = tl.load(weights.scale + row * GROUPS + offs_u // (GROUP // COLUMNS), mask=mask_u)
    if scale.dtype == tl.int16:
        s, z = decode(scale)
        s *= tl.load(weights.unit + row)
        scale, offset = s * STEPS_OF_SCALE, s * z.to(tl.float32)
    else:
        offset = (scale & -65536).to(tl.float32, bitcast=True)
        scale = (scale << 16).to(tl.float32, bitcast=True)
    shift = tl.arange(0, FIELDS) * BITS
    q = (tl.reshape(w, [BLOCK_U, 1, 4]) >> shift[None, :, None]) & ((1 << BITS) - 1)
    out = (q - ZERO).to(tl.float32) * scale[:, None, None] + offset[:, None, None]
    out = tl.reshape(out.to(out_ptr.dtype.element_ty), [COLUMNS * BLOCK_U])
    if EARLY:
        gdc_wait()  # a product before it may still read what is overwritten
    tl.store(out_ptr + row * K + offs_k, out, mask=mask_k)


# ----------------------------------------------------------------------------------------------------------- launchers

NUM_WARPS: Final = 4
MAX_BYTES: Final = 32 * 32 * NUM_WARPS  # of a program's gates: two loads of 16 bytes for each thread


def rms_norm(x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight per row, [T, E], in float32 up to the last rounding. x is row-major."""
    T, E = x_TE.shape
    out_TE = torch.empty_like(x_TE)
    constants = {"E": E, "BLOCK_E": next_power_of_2(E), "num_warps": NUM_WARPS}
    launch(rms_norm_kernel, T, x_TE.device, x_TE, weight_E, out_TE, eps, **constants)
    return out_TE


def write_kv(
    qkv_TXD: torch.Tensor,
    k_cache_GND: torch.Tensor,
    v_cache_GND: torch.Tensor,
    seq_len: torch.Tensor,
    near: Near | None = None,
) -> None:
    """Put keys and values at [seq_len - T, seq_len) of the cache, and where they go in `near`.

    Args:
        qkv_TXD: query, key and value heads side by side, X = H + 2G, contiguous.
        seq_len: cached tokens, these T included, an integer on the device.
    """
    T, X, D = qkv_TXD.shape
    G = k_cache_GND.shape[0]
    strides = (*k_cache_GND.stride()[:2], *v_cache_GND.stride()[:2])
    constants = {"H": X - 2 * G, "G": G, "D": D, "BLOCK": next_power_of_2(G * D), "num_warps": NUM_WARPS}
    pointers = qkv_TXD, k_cache_GND, v_cache_GND, seq_len
    launch(write_kv_kernel, T, qkv_TXD.device, *pointers, *strides, near, **constants, **near_rows(near))


def swiglu(gate_up_TM: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [T, F], in float32 up to the last rounding. M = 2F: gate's columns, then up's, row-major."""
    T, M = gate_up_TM.shape
    F = M // 2
    out_TF = torch.empty(T, F, dtype=gate_up_TM.dtype, device=gate_up_TM.device)
    block_f = min(MAX_BYTES // gate_up_TM.element_size(), next_power_of_2(F))
    programs = T * cdiv(F, block_f)
    launch(swiglu_kernel, programs, gate_up_TM.device, gate_up_TM, out_TF, F=F, BLOCK_F=block_f, num_warps=NUM_WARPS)
    return out_TF


def widen(matrix_NK: QuantizedMatrix, out_NK: torch.Tensor) -> None:
    """out = the matrix, rounded once from float32. Both are contiguous."""
    (N, K), U, bits = matrix_NK.shape, matrix_NK.words.shape[1] // UNIT, matrix_NK.bits
    block_u = min((256, 128, 64), key=lambda units: cdiv(U, units) * units)
    constants = {"K": K, "BITS": bits, "GROUP": matrix_NK.group_size, "ZERO": ZERO[bits], "BLOCK_U": block_u}
    pointers = weights_of(matrix_NK), out_NK
    launch(widen_kernel, N * cdiv(U, block_u), out_NK.device, *pointers, **constants, num_warps=NUM_WARPS)
