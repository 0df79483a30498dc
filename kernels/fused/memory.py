"""Reading rows, prefetching rows, and storing a few rows of a large tile."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: RET505  (an `if` on constants is decided at compile time only with its `else`)

from __future__ import annotations

import triton
import triton.language as tl

from minirea.kernels.fused.arguments import Heads

# Lines of assembly have another way, or none, in the interpreter, which runs no assembly.
COMPILED: tl.constexpr = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def slice_of(lo, hi, part, parts):
    """Bounds of slice `part` of [lo, hi); the last ones may be short or empty."""
    size = tl.cdiv(hi - lo, parts)
    first = lo + part * size
    return first, tl.minimum(first + size, hi)


@triton.jit
def of_head(x, head):
    """The same tensor from its head `head` on. Offsets are int64: caches exceed 2^31 elements."""
    return Heads(x.ptr + tl.cast(head, tl.int64) * x.stride_h, x.stride_h, x.stride_n, x.stride_d)


@triton.jit
def near_or(cache, near_ptr, head, ROWS: tl.constexpr, D: tl.constexpr):
    """`of_head` for the newest tokens: of near_ptr [G, ROWS, D], in whose rows they go around, or, without ROWS, of the
    cache.
    """
    if ROWS:
        return Heads(near_ptr + tl.cast(head, tl.int64) * (ROWS * D), ROWS * D, D, 1)
    else:
        return of_head(cache, head)


@triton.jit
def load_rows(ptr, offs_row, stride_row, mask_row, offs_d, stride_d, D: tl.constexpr):
    """Rows of a [rows, D] matrix, zero where masked. Row offsets are int64: caches exceed 2^31 elements."""
    ptrs = ptr + offs_row.to(tl.int64)[:, None] * stride_row + offs_d[None, :] * stride_d
    return tl.load(ptrs, mask=mask_row[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def prefetch(ptr, stride_n, offs_n, D: tl.constexpr):
    """Have rows offs_n of a [N, D] cache brought to the L2 cache while something else is computed."""
    LINE: tl.constexpr = 1024 // ptr.dtype.element_ty.primitive_bitwidth  # elements of 128 bytes
    offs_line = tl.minimum(tl.arange(0, triton.next_power_of_2(triton.cdiv(D, LINE))) * LINE, D - 1)
    ptrs = ptr + offs_n.to(tl.int64)[:, None] * stride_n + offs_line[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptrs.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def prefetch_rows(ptr, stride_n, lo, hi, D: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr = 0):
    """`prefetch` for rows [lo, hi), which go around in ROWS if there are ROWS."""
    if COMPILED:
        for first in range(lo, hi, BLOCK_N):
            row = tl.minimum(first + tl.arange(0, BLOCK_N), hi - 1)
            prefetch(ptr, stride_n, row % ROWS if ROWS else row, D)


@triton.jit
def prefetch_spans(k, v, kept_ptr, max_kept, part, mid_lo, mid_hi, span_size, c: tl.constexpr):
    """`prefetch_rows` for keys and values of slice `part` of the spans, before it is known which rows they fill.

    max_kept is how many positions kept_ptr may hold: how many it does is not waited for, and NOWHERE does no harm. The
    L2 cache does not keep what is far, and prefetching two arrays of it takes 13 us.
    """
    if COMPILED and not c.NEAR_K:
        rows = tl.cdiv(max_kept * span_size, c.SLICES)
        for first in range(part * rows, (part + 1) * rows, c.BLOCK_N):
            row = tl.minimum(first + tl.arange(0, c.BLOCK_N), max_kept * span_size - 1)
            position = tl.load(kept_ptr + row // span_size) - span_size // 2 + row % span_size
            prefetch(k.ptr, k.stride_n, tl.minimum(tl.maximum(position, mid_lo), mid_hi - 1), c.D)
            prefetch(v.ptr, v.stride_n, tl.minimum(tl.maximum(position, mid_lo), mid_hi - 1), c.D)


@triton.constexpr_function
def masked_stores(count, pairs):
    """Assembly that stores `count` float32 of a thread, each under its own mask; a warp without any skips all of them.

    Operands: count results (zero), addresses of rows, columns, values, masks. With `pairs`, two elements at a time lie
    side by side. Addresses of elements are computed behind the branch.
    """
    row, column, value, mask = (range(i * count, (i + 1) * count) for i in (1, 2, 3, 4))
    step, kind = (2, "v2.f32") if pairs else (1, "f32")
    lines = ["{ .reg .pred any, wanted; .reg .b32 all, bytes; .reg .b64 at; mov.b32 all, 0;"]
    lines += [f"or.b32 all, all, ${mask[i]};" for i in range(0, count, step)]
    lines += ["setp.ne.b32 any, all, 0; vote.sync.any.pred any, any, -1; @!any bra.uni NONE;"]
    for i in range(0, count, step):
        values = f"{{${value[i]}, ${value[i + 1]}}}" if pairs else f"${value[i]}"
        lines += [f"shl.b32 bytes, ${column[i]}, 2; cvt.u64.u32 at, bytes; add.s64 at, at, ${row[i]};"]
        lines += [f"setp.ne.b32 wanted, ${mask[i]}, 0; @wanted st.global.{kind} [at], {values};"]
    return " ".join([*lines, "NONE:", *(f"mov.b32 ${i}, 0;" for i in range(count)), "}"])


@triton.constexpr_function
def repeat_operands(constraints, count):
    """Constraints of assembly that works on `count` elements at a time, from those for one."""
    return ",".join(constraint for constraint in constraints.split(",") for _ in range(count))


@triton.jit
def store_in_place(row_ptrs, values, mask_row, PAIRS: tl.constexpr):
    """`tl.store` of a matrix [M, N] to row_ptrs [M], most of whose rows are masked, each thread what it holds.

    `tl.store` first brings the whole tile into memory order through shared memory, which takes longer than the matrix
    product that made it. PAIRS: each thread holds two neighbours of a row at a time, as the matrix unit leaves them.
    """
    offs_n = tl.arange(0, values.shape[1])[None, :]
    if COMPILED:
        COUNT: tl.constexpr = min(16, max(1, values.numel // tl.extra.cuda.num_threads()))
        tl.inline_asm_elementwise(
            masked_stores(COUNT, PAIRS and COUNT > 1),
            repeat_operands("=r,l,r,f,r", COUNT),
            [row_ptrs.to(tl.int64)[:, None], offs_n, values, mask_row.to(tl.int32)[:, None]],
            dtype=tl.int32,
            is_pure=False,
            pack=COUNT,
        )
    else:
        tl.store(row_ptrs[:, None] + offs_n, values, mask=mask_row[:, None])
