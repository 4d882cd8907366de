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
    WARPS: tl.constexpr,
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
        size = _chunk_size(context_ptr, batch, chunks, KV_HEADS, BLOCK_BATCH, TILE, MIN_CHUNK)
        # The programs of a chunk's KV heads are neighbours, for they read neighbouring memory.
        row, before = _row_of(program, context_ptr, batch, size, KV_HEADS, BLOCK_BATCH)
        within = program - before
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
        BLOCK_GROUP: tl.constexpr = max(8, triton.next_power_of_2(GROUP))  # the matrix unit takes 8 columns
        BLOCK_DIM: tl.constexpr = max(16, triton.next_power_of_2(HEAD_DIM))
        WARP_TILE: tl.constexpr = TILE // WARPS
        kv_head = within % KV_HEADS
        head = tl.arange(0, BLOCK_GROUP)
        dims = tl.arange(0, BLOCK_DIM)
        warp = tl.arange(0, WARPS)
        in_tile = warp[:, None] * WARP_TILE + tl.arange(0, WARP_TILE)[None, :]
        # A block is looked up once for as many tokens as lie in one for certain: those of a tile, of a warp, or one.
        # `looked_up` is where in the tile they begin, and `further` where each is from there.
        if BLOCK_SIZE % TILE == 0:
            looked_up = 0
            further = in_tile
        elif BLOCK_SIZE % WARP_TILE == 0:
            looked_up = warp[:, None] * WARP_TILE
            further = tl.arange(0, WARP_TILE)[None, :]
        else:
            looked_up = in_tile
            further = 0
        table_row = table_ptr + row.to(tl.int64) * table_stride
        # A tile's place in the table is loaded while the tile before it is computed; the first tile's with the context,
        # where no mask asks for that: a chunk begins inside its text, so the entry that it begins in is there.
        there = (start + looked_up < end) | (looked_up == 0)
        page = tl.load(table_row + (start + looked_up) // BLOCK_SIZE, mask=there, other=0)
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
        # Each warp attends to its part of every tile as if alone, and what they have is merged once: a softmax of them
        # all would exchange its maxima and weights in each tile. The weights are summed for each place in a tile.
        highest = tl.full([WARPS, BLOCK_GROUP], -1e30, tl.float32)  # finite: an empty tile must not make inf − inf
        weight_sum = tl.zeros([WARPS, WARP_TILE, BLOCK_GROUP], tl.float32)
        acc = tl.zeros([WARPS, BLOCK_DIM, BLOCK_GROUP], tl.float32)
        k_head = k_ptr + kv_head * k_stride_head
        v_head = v_ptr + kv_head * v_stride_head
        if APPEND:  # noqa: SIM102  this one is decided by the compiler
            if appends:
                # The first warp's softmax begins with the new token: behind the loop q, k and v would be kept in
                # registers for it.
                logit = tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale_log2
                highest = tl.broadcast_to(logit[None, :], [WARPS, BLOCK_GROUP])
                weight_sum += (in_tile == 0).to(tl.float32)[:, :, None]
                acc += tl.where((warp == 0)[:, None, None], new_v.to(tl.float32)[None, :, None], 0.0)
                block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
                written = dims < tl.where(slot >= 0, HEAD_DIM, 0)
                tl.store(k_head + block * k_stride_block + offset * k_stride_token + dims, new_k, mask=written)
                tl.store(v_head + block * v_stride_block + offset * v_stride_token + dims, new_v, mask=written)
        # Heads are the columns of the products, which take 8 at least, and not the rows, which take 16.
        q = tl.broadcast_to(tl.trans(q)[None], [WARPS, BLOCK_DIM, BLOCK_GROUP])
        for tile in tl.range(start, end, TILE, num_stages=STAGES):
            seen = tile + in_tile < end
            offset = (tile + looked_up) % BLOCK_SIZE
            k_tile = k_head + page.to(tl.int64) * k_stride_block + offset * k_stride_token
            v_tile = v_head + page.to(tl.int64) * v_stride_block + offset * v_stride_token
            k_row = (k_tile + further * k_stride_token)[:, :, None]
            v_row = (v_tile + further * v_stride_token)[:, None, :]
            k_mask = seen[:, :, None] & (dims < HEAD_DIM)[None, None, :]
            k = tl.load(k_row + dims[None, None, :], mask=k_mask, other=0.0)
            # Transposed by its addresses: with `tl.trans` Triton loads it by way of registers, and waits.
            v_mask = seen[:, None, :] & (dims < HEAD_DIM)[None, :, None]
            v = tl.load(v_row + dims[None, :, None], mask=v_mask, other=0.0)
            ahead = tile + TILE
            page = tl.load(table_row + (ahead + looked_up) // BLOCK_SIZE, mask=ahead + looked_up < end, other=0)

            logits = tl.dot(k.to(q.dtype), q, input_precision="ieee") * logit_scale[None, None, :]
            logits = tl.where(seen[:, :, None], logits, float("-inf"))
            higher = tl.maximum(highest, tl.max(logits, 1))
            fade = tl.exp2(highest - higher)[:, None, :]
            weights = tl.exp2(logits - higher[:, None, :])
            weight_sum = weight_sum * fade + weights
            acc = tl.dot(v.to(q.dtype), weights.to(q.dtype), acc * fade, input_precision="ieee")
            highest = higher

        higher = tl.max(highest, 0)
        fade = tl.exp2(highest - higher)
        total = tl.sum(tl.sum(weight_sum, 1) * fade, 0)
        share = fade / tl.where(total > 0, total, 1.0)
        y = _sum_of_last(tl.permute(acc * share[:, None, :], 2, 1, 0))
        if SCALED:
            y *= tl.load(v_scale_ptr + kv_head)
        place = head[:, None] * HEAD_DIM + dims[None, :]
        item_out = out_ptr + (row * KV_HEADS + kv_head).to(tl.int64) * (GROUP * HEAD_DIM)
        final = tl.where(count == 1, GROUP, 0)  # heads whose result this is; else it is a part of each
        final_mask = (head < final)[:, None] & (dims < HEAD_DIM)[None, :]
        # In runs of 4 as the parts are stored, so that one exchange between threads does for both.
        tl.store(item_out + tl.max_contiguous(place, (1, 4)), y.to(out_ptr.dtype.element_ty), mask=final_mask)
        if CUT:  # noqa: SIM102  this one is decided by the compiler
            if count > 1:
                part = program * GROUP
                tl.store(part_ptr + part.to(tl.int64) * HEAD_DIM + place, y, mask=head_mask)
                tl.store(part_lse_ptr + part + head, higher + tl.log2(total), mask=head < GROUP)


@triton.jit
def _sum_of_last(x):
    """Σ over the last of three dimensions, a power of 2. `tl.sum` would exchange each element between warps; `tl.split`
    brings what is added into one thread, in one exchange of all.
    """
    if x.shape[2] == 1:
        return tl.reshape(x, [x.shape[0], x.shape[1]])
    else:
        left, right = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))
        return _sum_of_last(left + right)


@triton.jit
def _turned(x, partner, cos, sin):
    """Elements of heads rotated, in x's dtype: sin is negative for the low halves, whose partners are the high ones."""
    return (x.to(tl.float32) * cos + partner.to(tl.float32) * sin).to(x.dtype)


@triton.jit
def _contexts(context_ptr, batch, first, ROWS: tl.constexpr):
    """Those of ROWS rows from `first` on, and whether there is such a row."""
    row = first + tl.arange(0, ROWS)
    return tl.load(context_ptr + row, mask=row < batch, other=0), row < batch


@triton.jit
def _chunk_size(
    context_ptr,
    batch,
    chunks,
    KV_HEADS: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    TILE: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
):
    """The tokens of a chunk, so that all KV heads have `chunks` chunks together. Rounded up for each sequence, so they
    may be more by one for each sequence and KV head.
    """
    total = 0
    ROWS: tl.constexpr = min(32, BLOCK_BATCH)  # as many as a warp has threads: it need ask no other
    for first in tl.static_range(0, BLOCK_BATCH, ROWS):
        contexts, _ = _contexts(context_ptr, batch, first, ROWS)
        total += tl.sum(contexts, 0)
    size = (total * KV_HEADS + chunks - 1) // chunks
    return tl.maximum((size + TILE - 1) // TILE * TILE, MIN_CHUNK)


@triton.jit
def _row_of(program, context_ptr, batch, size, KV_HEADS: tl.constexpr, BLOCK_BATCH: tl.constexpr):
    """The row whose chunk a program takes, and how many programs the rows before it have."""
    row = 0
    before = 0
    end = 0
    ROWS: tl.constexpr = min(32, BLOCK_BATCH)
    for first in tl.static_range(0, BLOCK_BATCH, ROWS):
        contexts, there = _contexts(context_ptr, batch, first, ROWS)
        programs = tl.where(there, _count(contexts, size) * KV_HEADS, 0)
        ends = end + tl.cumsum(programs, 0)
        end += tl.sum(programs, 0)
        passed = ends <= program
        row += tl.sum(passed.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(passed, ends, 0), 0))
    return row, before


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
    size = _chunk_size(context_ptr, batch, chunks, KV_HEADS, BLOCK_BATCH, TILE, MIN_CHUNK)
    count = _count(tl.load(context_ptr + row), size)
    first = kv_head
    ROWS: tl.constexpr = min(32, BLOCK_BATCH)
    for before in tl.static_range(0, BLOCK_BATCH, ROWS):
        contexts, there = _contexts(context_ptr, row, before, ROWS)
        first += tl.sum(tl.where(there, _count(contexts, size), 0), 0) * KV_HEADS
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
