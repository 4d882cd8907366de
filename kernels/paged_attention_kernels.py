"""Decode attention on a GPU, over the paged cache alone or with a new token that goes into it: two launches.

`paged_attention_kernel` cuts the contexts into chunks and attends to each; `merge_kernel` adds the chunks of a context.
Each finds the cut from the lengths, so nothing is planned ahead, and a CUDA graph may hold both while lengths change.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dependent_launch import allow_next, wait_for_previous


@triton.jit
def paged_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    context_ptr,
    k_scale_ptr,
    v_scale_ptr,
    new_k_ptr,
    new_v_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
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
    new_k_stride_row,
    new_k_stride_head,
    new_v_stride_row,
    new_v_stride_head,
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
    whole context. The result of a sequence in one chunk is final, the others are parts for `merge_kernel`.

    new_k_ptr and what goes with it are None, or the last token of each context comes from there and the others from the
    cache. Then q is rotated, and the program whose chunk ends with the new token rotates its k and stores k and v. Its
    place in the cache is read by nobody, for nothing puts one program's read behind another's write.
    """
    APPEND: tl.constexpr = new_k_ptr is not None
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
        context = tl.load(context_ptr + row)
        end = context
    if row < batch:
        if APPEND:
            appends = (context > 0) & (end == context)
            end -= appends.to(tl.int32)  # of the tokens that the cache has
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
        q_heads = q_row + (kv_head * GROUP + head)[:, None] * q_stride_head
        q = tl.load(q_heads + dims[None, :], mask=head_mask, other=0.0)
        if APPEND:
            # The order of the loads and the barrier are as in rotary's kernel: cos and sin, which wait for the
            # position, come last, and all else is under way by then.
            position = tl.load(positions_ptr + row).to(tl.int64)
            slot = tl.load(slots_ptr + row)
            HALF: tl.constexpr = HEAD_DIM // 2
            partner = (dims + HALF) % HEAD_DIM  # the other element of the pair that is turned
            q_partner = tl.load(q_heads + partner[None, :], mask=head_mask, other=0.0)
            new_mask = dims < tl.where(appends, HEAD_DIM, 0)
            new_k_row = new_k_ptr + row.to(tl.int64) * new_k_stride_row + kv_head * new_k_stride_head
            new_k = tl.load(new_k_row + dims, mask=new_mask, other=0.0)
            k_partner = tl.load(new_k_row + partner, mask=new_mask, other=0.0)
            new_v_row = new_v_ptr + row.to(tl.int64) * new_v_stride_row + kv_head * new_v_stride_head
            new_v = tl.load(new_v_row + dims, mask=new_mask, other=0.0)
            tl.debug_barrier()
            angle = position * HALF + dims % HALF
            cos = tl.load(cos_ptr + angle, mask=dims < HEAD_DIM, other=0.0)
            sin = tl.load(sin_ptr + angle, mask=dims < HEAD_DIM, other=0.0)
            sin = tl.where(dims < HALF, -sin, sin)
            q = _turned(q, q_partner, cos[None, :], sin[None, :])
            new_k = _turned(new_k, k_partner, cos, sin)
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
        if APPEND:  # noqa: SIM102  this one is decided by the compiler
            if appends:
                # The softmax begins with the new token: behind the loop q, k and v would be kept in registers for it.
                highest = tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale_log2
                weight_sum = tl.full([BLOCK_GROUP], 1.0, tl.float32)
                acc += new_v.to(tl.float32)[None, :]
                block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
                written = dims < tl.where(slot >= 0, HEAD_DIM, 0)
                tl.store(k_head + block * k_stride_block + offset * k_stride_token + dims, new_k, mask=written)
                tl.store(v_head + block * v_stride_block + offset * v_stride_token + dims, new_v, mask=written)
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
def _turned(x, partner, cos, sin):
    """Elements of heads rotated, in x's dtype: sin is negative for the low halves, whose partners are the high ones."""
    return (x.to(tl.float32) * cos + partner.to(tl.float32) * sin).to(x.dtype)


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
def merge_kernel(
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
