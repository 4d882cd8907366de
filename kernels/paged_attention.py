"""Decode attention: one query token a sequence, over a paged cache (Kwon et al. 2023, arXiv:2309.06180, eq. 4)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .dependent_launch import allow_next, dependent_launch, has_dependent_launch, wait_for_previous
from .flash_attn_limits import needs_flash_attn, refused_by_flash_attn
from .op import Case, Cost, Implementation, Op, needs_gpu
from .paged_cache import misfit, random_paged_cache


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = softmax(scale · q Kᵀ) V for each sequence and head, K and V being the sequence's first context_len rows.

    q [batch, heads, head_dim]; k_cache, v_cache [blocks, block_size, kv_heads, head_dim], in q's dtype, or in float8
    with k_scale and v_scale [kv_heads] float32, by which a head's elements are multiplied; block_table [batch,
    max_blocks] int32, entries past the context may be anything; context_lens [batch] int32, 0 for a padded row
    → [batch, heads, head_dim] in q's dtype, zeros for a padded row. Query head h reads KV head h // (heads/kv_heads).
    """
    batch, heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    if batch == 0:
        return torch.empty_like(q)
    lengths = context_lens.unsqueeze(1)
    longest = max(1, int(context_lens.max()))
    seen = torch.arange(longest, device=q.device) < lengths  # [batch, longest]

    slots = block_table.unsqueeze(2) * block_size + torch.arange(block_size, device=q.device)
    slots = slots.flatten(1)[:, :longest]
    # Past its context a row gathers its first token again: nothing outside a context is ever read, masked or not.
    slots = torch.where(seen, slots, slots[:, :1])
    slots = torch.where(lengths > 0, slots, 0).flatten()

    def gather(cache: torch.Tensor, head_scale: torch.Tensor | None) -> torch.Tensor:
        rows = cache.flatten(0, 1).index_select(0, slots).view(batch, longest, kv_heads, head_dim).transpose(1, 2)
        return rows if head_scale is None else rows.to(q.dtype) * head_scale.to(q.dtype).view(kv_heads, 1, 1)

    k, v = gather(k_cache, k_scale), gather(v_cache, v_scale)
    # A padded row gathers slot 0, which may hold anything, for it is not read: its zeros are put in by `where`.
    grouped = q.view(batch, kv_heads, heads // kv_heads, head_dim)  # the query heads of a KV head: rows of one product
    y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=seen[:, None, None], scale=scale)
    return torch.where(lengths.unsqueeze(2) > 0, y.reshape_as(q), 0)


@triton.jit
def _paged_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    context_ptr,
    k_scale_ptr,
    v_scale_ptr,
    out_ptr,
    part_ptr,
    part_lse_ptr,
    scale_log2,
    batch,
    q_stride_row,
    q_stride_head,
    k_stride_block,
    k_stride_token,
    k_stride_head,
    v_stride_block,
    v_stride_token,
    v_stride_head,
    table_stride,
    chunks,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    TILE: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    CUT: tl.constexpr,
    SCALED: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A program takes one chunk of one sequence, for one KV head and the query heads that read it; without CUT, the
    whole context. The result of a sequence in one chunk is final, the others are parts for `_merge_kernel`.
    """
    allow_next(DEPENDENT)
    program = tl.program_id(0)
    if CUT:
        counts, size = _cut(context_ptr, batch, chunks, KV_HEADS, BLOCK_BATCH, TILE, MIN_CHUNK)
        # The programs of a chunk's KV heads are neighbours, for they read neighbouring memory. The rows whose programs
        # all come before this one, and how many these are, in one reduction.
        ends = tl.cumsum(counts, 0) * KV_HEADS
        before = ((tl.arange(0, BLOCK_BATCH) + 1).to(tl.int64) << 32) | ends.to(tl.int64)
        before = tl.max(tl.where(ends <= program, before, 0), 0)
        row = (before >> 32).to(tl.int32)
        within = program - (before & 0x7FFFFFFF).to(tl.int32)
        context = tl.load(context_ptr + row, mask=row < batch, other=0)
        count = _count(context, size)
        tiles = (context + TILE - 1) // TILE
        chunk = within // KV_HEADS
        start = chunk * tiles // count * TILE
        end = tl.minimum((chunk + 1) * tiles // count * TILE, context)
    else:
        row = program // KV_HEADS
        within = program % KV_HEADS
        count = tl.full((), 1, tl.int32)
        start = 0
        end = tl.load(context_ptr + row)
    if row < batch:
        BLOCK_GROUP: tl.constexpr = max(16, triton.next_power_of_2(GROUP))  # the matrix unit takes 16 rows
        BLOCK_DIM: tl.constexpr = max(16, triton.next_power_of_2(HEAD_DIM))
        kv_head = within % KV_HEADS
        head = tl.arange(0, BLOCK_GROUP)
        dims = tl.arange(0, BLOCK_DIM)
        in_tile = tl.arange(0, TILE)
        table_row = table_ptr + row.to(tl.int64) * table_stride
        # A tile's place in the table is loaded while the tile before it is computed; the first, with the context.
        if BLOCK_SIZE % TILE == 0:
            page = tl.load(table_row + start // BLOCK_SIZE)
        else:
            page = tl.load(table_row + (start + in_tile) // BLOCK_SIZE, mask=start + in_tile < end, other=0)
        head_mask = (head < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
        q_row = q_ptr + row.to(tl.int64) * q_stride_row
        q = tl.load(
            q_row + (kv_head * GROUP + head)[:, None] * q_stride_head + dims[None, :], mask=head_mask, other=0.0
        )
        logit_scale = tl.full([BLOCK_GROUP], 1.0, tl.float32) * scale_log2
        if SCALED:
            logit_scale *= tl.load(k_scale_ptr + kv_head)
            if q.dtype == tl.bfloat16:
                # float8 becomes float16 at once, and bfloat16 only by way of it. So q does too, each head brought into
                # float16's range by a power of 2.
                largest = tl.maximum(tl.max(tl.abs(q.to(tl.float32)), 1), 2.0**-100)
                power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
                q = (q.to(tl.float32) / power[:, None]).to(tl.float16)
                logit_scale *= power
        highest = tl.full([BLOCK_GROUP], -1e30, tl.float32)  # finite: an empty tile must not make inf − inf
        weight_sum = tl.zeros([BLOCK_GROUP], tl.float32)
        acc = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
        k_head = k_ptr + kv_head * k_stride_head
        v_head = v_ptr + kv_head * v_stride_head
        for tile in tl.range(start, end, TILE, num_stages=STAGES):
            seen = tile + in_tile < end
            offset = (tile + in_tile) % BLOCK_SIZE
            k_row = k_head + page.to(tl.int64) * k_stride_block + offset * k_stride_token
            v_row = v_head + page.to(tl.int64) * v_stride_block + offset * v_stride_token
            mask = seen[:, None] & (dims < HEAD_DIM)[None, :]
            k = tl.load(k_row[:, None] + dims[None, :], mask=mask, other=0.0)
            v = tl.load(v_row[:, None] + dims[None, :], mask=mask, other=0.0)
            ahead = tile + TILE
            if BLOCK_SIZE % TILE == 0:
                page = tl.load(table_row + ahead // BLOCK_SIZE, mask=ahead < end, other=0)
            else:
                page = tl.load(table_row + (ahead + in_tile) // BLOCK_SIZE, mask=ahead + in_tile < end, other=0)

            logits = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * logit_scale[:, None]
            logits = tl.where(seen[None, :], logits, float("-inf"))
            higher = tl.maximum(highest, tl.max(logits, 1))
            fade = tl.exp2(highest - higher)
            weights = tl.exp2(logits - higher[:, None])
            weight_sum = weight_sum * fade + tl.sum(weights, 1)
            acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * fade[:, None], input_precision="ieee")
            highest = higher

        acc = acc / tl.where(weight_sum > 0, weight_sum, 1.0)[:, None]
        if SCALED:
            acc *= tl.load(v_scale_ptr + kv_head)
        place = head[:, None] * HEAD_DIM + dims[None, :]
        item_out = out_ptr + (row * KV_HEADS + kv_head).to(tl.int64) * (GROUP * HEAD_DIM)
        final = tl.where(count == 1, GROUP, 0)  # heads whose result this is; else it is a part of each
        final_mask = (head < final)[:, None] & (dims < HEAD_DIM)[None, :]
        tl.store(item_out + place, acc.to(out_ptr.dtype.element_ty), mask=final_mask)
        if CUT:  # noqa: SIM102  this one is decided by the compiler
            if count > 1:
                part = program * GROUP
                tl.store(part_ptr + part.to(tl.int64) * HEAD_DIM + place, acc, mask=head_mask)
                tl.store(part_lse_ptr + part + head, highest + tl.log2(weight_sum), mask=head < GROUP)


@triton.jit
def _cut(
    context_ptr,
    batch,
    chunks,
    KV_HEADS: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    TILE: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
):
    """(into how many chunks each context is cut, their size), so that all KV heads have `chunks` chunks together.

    Rounded up for each sequence, so they may be more by one for each sequence and KV head. A row past the batch has
    none.
    """
    rows = tl.arange(0, BLOCK_BATCH)
    contexts = tl.load(context_ptr + rows, mask=rows < batch, other=0)
    size = (tl.sum(contexts, 0) * KV_HEADS + chunks - 1) // chunks
    size = tl.maximum((size + TILE - 1) // TILE * TILE, MIN_CHUNK)
    return tl.where(rows < batch, _count(contexts, size), 0), size


@triton.jit
def _count(context, size):
    """Chunks of a context; a padded row has one, for somebody must write its zeros."""
    return tl.maximum((context + size - 1) // size, 1)


@triton.jit
def _merge_kernel(
    context_ptr,
    part_ptr,
    part_lse_ptr,
    out_ptr,
    batch,
    chunks,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    TILE: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Σ 2^(lse_i − lse) · part_i over the parts of a query head whose context is cut, PARTS at a time."""
    allow_next(DEPENDENT)
    row = tl.program_id(0) // (KV_HEADS * GROUP)
    kv_head = tl.program_id(0) // GROUP % KV_HEADS
    head = tl.program_id(0) % GROUP
    counts, size = _cut(context_ptr, batch, chunks, KV_HEADS, BLOCK_BATCH, TILE, MIN_CHUNK)
    count = _count(tl.load(context_ptr + row), size)
    first = tl.sum(tl.where(tl.arange(0, BLOCK_BATCH) < row, counts, 0), 0) * KV_HEADS + kv_head
    # The lengths were there before the kernel that made the parts began, for it is no dependent launch itself.
    wait_for_previous(DEPENDENT)
    if count > 1:
        dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
        highest = tl.full((), -1e30, tl.float32)
        weight_sum = tl.full((), 0.0, tl.float32)
        acc = tl.zeros([triton.next_power_of_2(HEAD_DIM)], tl.float32)
        for start in tl.range(0, count, PARTS):
            chunk = start + tl.arange(0, PARTS)
            part = (first + chunk * KV_HEADS) * GROUP + head
            lse = tl.load(part_lse_ptr + part, mask=chunk < count, other=float("-inf"))
            value = tl.load(
                part_ptr + part.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :],
                mask=(chunk < count)[:, None] & (dims < HEAD_DIM)[None, :],
                other=0.0,
            )
            higher = tl.maximum(highest, tl.max(lse, 0))
            fade = tl.exp2(highest - higher)
            weight = tl.exp2(lse - higher)
            weight_sum = weight_sum * fade + tl.sum(weight, 0)
            acc = acc * fade + tl.sum(weight[:, None] * value, 0)
            highest = higher
        y = acc / weight_sum
        tl.store(
            out_ptr + tl.program_id(0).to(tl.int64) * HEAD_DIM + dims,
            y.to(out_ptr.dtype.element_ty),
            mask=dims < HEAD_DIM,
        )


LOG2_E = 1.4426950408889634


def _launch(items: int, bytes_per_head: int) -> dict[str, int]:
    """chunks that all contexts together are cut into (0: they are not cut), tokens a chunk has at least, tokens a
    tile, stages of loads in flight, and warps.

    items: sequences times KV heads.  bytes_per_head: of a key, its elements padded to a power of 2.

    Chosen for Qwen2-7B in bfloat16 on an H200, whose keys have 256 bytes, from what `python -m bench.tune
    paged_attention` measures: about three chunks a multiprocessor, and whole contexts where there are more than that.
    """
    if items <= 64:
        launch = {"chunks": min(64 * items, 384), "MIN_CHUNK": 32 if items <= 8 else 64, "TILE": 32, "STAGES": 3}
    elif items < 256:
        launch = {"chunks": 420, "MIN_CHUNK": 256, "TILE": 64, "STAGES": 2}
    else:
        launch = {"chunks": 0, "MIN_CHUNK": 64, "TILE": 64, "STAGES": 2}
    for tokens in ("MIN_CHUNK", "TILE"):
        launch[tokens] = max(16, launch[tokens] * 256 // bytes_per_head)
    return launch | {"num_warps": 4}


def _require(holds: bool, words: str) -> None:
    if not holds:
        raise ValueError(f"paged_attention: {words}")


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `paged_attention_reference`, in Triton, in two launches; equal inputs give equal bits.

    The cache is in q's dtype, or in float8_e4m3fn with scales. Strides are free but for the last dimension's. Lengths
    and tables may change between replays of a CUDA graph. ValueError for shapes and dtypes that do not fit each other.
    """
    batch, heads, head_dim = q.shape
    _, block_size, kv_heads, _ = k_cache.shape
    words = misfit(q, k_cache, v_cache)
    _require(words is None, words)
    _require(
        block_table.shape[0] == batch and context_lens.shape[0] == batch,
        "a row of q, of the table, and a length",
    )
    scaled = k_cache.dtype == torch.float8_e4m3fn
    _require(scaled or k_cache.dtype == q.dtype, f"q is {q.dtype} and the cache {k_cache.dtype}")
    _require(
        scaled == (k_scale is not None) == (v_scale is not None),
        "k_scale and v_scale belong to a float8 cache",
    )

    out = torch.empty(batch, heads, head_dim, dtype=q.dtype, device=q.device)
    if batch == 0:
        return out
    group = heads // kv_heads
    items = batch * kv_heads
    block_dim = triton.next_power_of_2(head_dim)
    launch = _launch(items, block_dim * q.element_size())
    chunks = launch["chunks"]
    shape = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_BATCH": triton.next_power_of_2(batch),
    }
    programs = items + chunks
    parts = part_lse = None
    if chunks:
        parts = torch.empty(programs, group, head_dim, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(programs, group, dtype=torch.float32, device=q.device)
    _paged_attention_kernel[(programs,)](
        q,
        k_cache,
        v_cache,
        block_table,
        context_lens,
        k_scale,
        v_scale,
        out,
        parts,
        part_lse,
        scale * LOG2_E,
        batch,
        q.stride(0),
        q.stride(1),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        block_table.stride(0),
        BLOCK_SIZE=block_size,
        CUT=chunks > 0,
        SCALED=scaled,
        DEPENDENT=has_dependent_launch(q.device),
        **shape,
        **launch,
    )
    if chunks:
        parts_at_once = min(64, triton.next_power_of_2(triton.cdiv(chunks, items)))
        _merge_kernel[(batch * heads,)](
            context_lens,
            parts,
            part_lse,
            out,
            batch,
            PARTS=parts_at_once,
            num_warps=max(1, parts_at_once // 16),
            **shape,
            **{name: launch[name] for name in ("chunks", "MIN_CHUNK", "TILE")},
            **dependent_launch(q.device),
        )
    return out


def flash_attn_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """flash-attn 2 (arXiv:2307.08691) through its block table; as `paged_attention_reference`, without float8.

    ValueError where flash-attn cannot: block sizes that are no multiple of 256, dtypes but float16 and bfloat16.
    """
    from flash_attn import flash_attn_with_kvcache

    if words := _refused(q=q, k_cache=k_cache):
        raise ValueError(words)
    return flash_attn_with_kvcache(
        q.unsqueeze(1), k_cache, v_cache, cache_seqlens=context_lens, block_table=block_table, softmax_scale=scale
    ).squeeze(1)


def _refused(*, q: torch.Tensor, k_cache: torch.Tensor, **rest: Any) -> str | None:
    return refused_by_flash_attn(q, k_cache, "kernels=KernelSet.default().replace(paged_attention='triton')")


def make_inputs(
    batch: int,
    context: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    *,
    shortest: int | None = None,
    padded: int = 0,
    float8: bool = False,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Contexts evenly from `shortest` (default: all alike) to `context`, and `padded` rows more."""
    contexts = torch.linspace(shortest or context, context, batch, device=device).round().int()
    contexts = F.pad(contexts, (0, padded))
    cache_dtype = torch.float8_e4m3fn if float8 else dtype
    k_cache, v_cache, table = random_paged_cache(contexts, block_size, kv_heads, head_dim, cache_dtype, generator)
    q = torch.randn(batch + padded, heads, head_dim, dtype=dtype, device=device, generator=generator)
    scales = (
        [torch.rand(kv_heads, device=device, generator=generator) + 0.5 for _ in range(2)] if float8 else [None] * 2
    )
    return {
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": table,
        "context_lens": contexts,
        "scale": head_dim**-0.5,
        "k_scale": scales[0],
        "v_scale": scales[1],
    }


def cost(
    batch: int,
    context: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    *,
    shortest: int | None = None,
    padded: int = 0,
    float8: bool = False,
    itemsize: int,
) -> Cost:
    tokens = batch * (context + (shortest or context)) // 2
    rows = (batch + padded) * heads * head_dim
    kv = 2 * tokens * kv_heads * head_dim * (1 if float8 else itemsize)
    return Cost(read=kv + rows * itemsize, written=rows * itemsize, flops=4 * tokens * heads * head_dim)


_QWEN2_7B = {"heads": 28, "kv_heads": 4, "head_dim": 128}
_QWEN2_HALF_B = {"heads": 14, "kv_heads": 2, "head_dim": 64}
_QWEN3_8B = {"heads": 32, "kv_heads": 8, "head_dim": 128}
_LOADS = (
    *({"batch": 1, "context": context} for context in (512, 4096, 32768)),
    *({"batch": 8, "context": context} for context in (512, 4096, 32768)),
    *({"batch": 35, "context": context} for context in (512, 4096)),
    {"batch": 35, "context": 8127, "shortest": 128},
    *({"batch": 128, "context": context} for context in (512, 4096)),
    {"batch": 256, "context": 512},
)
_FEW_LOADS = ({"batch": 1, "context": 4096}, {"batch": 35, "context": 4096}, {"batch": 128, "context": 512})

OP = Op(
    "paged_attention",
    reference=paged_attention_reference,
    implementations={
        "triton": Implementation(paged_attention, needs_gpu),
        "flash_attn": Implementation(flash_attn_decode, needs_flash_attn, refuses=_refused),
    },
    inputs=make_inputs,
    cost=cost,
    cases=(
        Case(batch=1, context=1, heads=1, kv_heads=1, head_dim=64, block_size=16),
        Case(batch=2, context=33, heads=7, kv_heads=1, head_dim=64, block_size=16, padded=1),
        Case(batch=1, context=300, heads=4, kv_heads=2, head_dim=64, block_size=16),
        Case(batch=3, context=200, shortest=1, heads=14, kv_heads=2, head_dim=80, block_size=32, padded=2),
        Case(batch=5, context=70, shortest=60, heads=6, kv_heads=3, head_dim=96, block_size=48),
        Case(batch=2, context=129, shortest=64, heads=16, kv_heads=1, head_dim=128, block_size=128),
        Case(batch=2, context=257, shortest=256, heads=2, kv_heads=2, head_dim=256, block_size=256),
        Case(batch=2, context=150, shortest=3, heads=14, kv_heads=2, head_dim=64, block_size=16, float8=True),
        Case(batch=0, context=1, heads=2, kv_heads=1, head_dim=64, block_size=16, padded=2),
    ),
    large_cases=(
        *(Case(**load, **_QWEN2_7B, block_size=size) for size in (256, 16) for load in _LOADS),
        *(Case(**load, **shape, block_size=256) for shape in (_QWEN2_HALF_B, _QWEN3_8B) for load in _FEW_LOADS),
        *(Case(**load, **_QWEN2_7B, block_size=256, float8=True) for load in _FEW_LOADS),
        Case(batch=1, context=131072, **_QWEN2_7B, block_size=256),
    ),
)
