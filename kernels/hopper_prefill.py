"""Prefill attention for NVIDIA's Hopper, in Gluon: one warp fetches tiles by TMA, two warpgroups compute.

Source: Shah et al. 2024, arXiv:2407.08608 (FlashAttention-3): specialised warps; the scores of a tile multiplied before
the values of the one before it, whose product covers the softmax.

Plain Triton 3.6 cannot say this: on Hopper the 8 warps of a program cross common barriers in every tile, so that all
multiply at once and then all compute their softmax at once, while the tensor cores wait. `python -m bench.kernels
prefill_attention` times both kernels. The paper's turns of the warpgroups at the tensor cores, which in Gluon are
barriers in shared memory, were slower, and so was one barrier for K and V together.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .base_two import LOG2_E
from .hopper import TYPES, load, multiprocessors

_QUERIES, _TOKENS = 128, 128
"""Queries and tokens of a tile; each warpgroup has half of the queries."""

_WIDTH = 64
"""Elements that TMA writes side by side: 128 bytes, the swizzle that wgmma reads fastest."""

_view = getattr(gl.shared_memory_descriptor, "_reinterpret", None) or gl.shared_memory_descriptor.reinterpret
"""Named otherwise before Triton 3.9."""


def refused_by_hopper(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> str | None:
    """Why the kernel does not take these queries and this paged cache; None where it does."""
    block_size, head_dim = k_cache.shape[1], q.shape[2]
    if q.dtype not in TYPES:
        return f"the Hopper kernel computes in float16 and bfloat16, not in {q.dtype}"
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        return f"the Hopper kernel wants the cache in q's dtype {q.dtype}, not in {k_cache.dtype}, {v_cache.dtype}"
    if head_dim not in (64, 128):
        return f"the Hopper kernel takes head_dim 64 and 128, not {head_dim}"
    if block_size % _TOKENS and (_TOKENS % block_size or block_size < 8):
        return f"the Hopper kernel takes block sizes of 8, 16, 32, 64 and multiples of {_TOKENS}, not {block_size}"
    for x in (q, k_cache, v_cache):
        if x.data_ptr() % 16 or any(stride * x.element_size() % 16 for stride in x.stride()[:-1]):
            return "the Hopper kernel wants tensors and their strides aligned to 16 bytes"
    return None


@gluon.jit
def _extent(start_ptr, chunks):
    """Chunks up to the last that has queries, and queries of the longest.

    A CUDA graph is captured for more of both. Dealt among the programs too, works that are none would leave some of
    them with far more of the others.
    """
    AT_ONCE: gl.constexpr = 128
    chunk = gl.arange(0, AT_ONCE, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    used = 0
    longest = 0
    for _ in range(0, chunks, AT_ONCE):
        start = gl.load(start_ptr + chunk, mask=chunk < chunks, other=0)
        length = gl.load(start_ptr + chunk + 1, mask=chunk < chunks, other=0) - start
        used = gl.maximum(used, gl.max(gl.where(length > 0, chunk + 1, 0), 0))
        longest = gl.maximum(longest, gl.max(length, 0))
        chunk += AT_ONCE
    return used, longest


@gluon.jit
def _work(turn, start_ptr, context_ptr, heads, pairs, works, BLOCK_M: gl.constexpr):
    """What a program computes in a turn: head, chunk, the chunk's first row of q, its length and context, and which
    block of its queries; a block < 0 is none.

    The longest come first. Every second round is dealt backwards, so that no program has the longest each time.
    """
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    index = turn * programs + gl.where(turn % 2 == 1, programs - 1 - program, program)
    pair = index % pairs
    head = pair % heads
    chunk = pair // heads
    start = gl.load(start_ptr + chunk)
    length = gl.load(start_ptr + chunk + 1) - start
    context = gl.load(context_ptr + chunk)
    block = gl.where(index < works, (length + BLOCK_M - 1) // BLOCK_M - 1 - index // pairs, -1)
    return head, chunk, start, length, context, block


@gluon.jit
def _tiles(length, context, block, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Tiles of the cache that a block of queries sees."""
    last = gl.minimum(context - length + (block + 1) * BLOCK_M, context)
    return (last + BLOCK_N - 1) // BLOCK_N


@gluon.jit
def _fetch(desc, smem, stage, ready, row_ptr, tile, kv_head, context, BLOCK_SIZE: gl.constexpr):
    """Ask for a tile of the cache: of each of its pages the part in the tile, 128 bytes of each row at a time."""
    BLOCK_N: gl.constexpr = smem.shape[1]
    ROWS: gl.constexpr = desc.block_type.shape[1]
    WIDTH: gl.constexpr = desc.block_type.shape[3]
    PAGES: gl.constexpr = BLOCK_N // ROWS
    PARTS: gl.constexpr = smem.shape[2] // WIDTH
    boxes = _view(smem, smem.dtype, [smem.shape[0] * PARTS * PAGES, 1, ROWS, 1, WIDTH], desc.layout)
    mbarrier.expect(ready, PARTS * PAGES * desc.block_type.nbytes)
    for i in gl.static_range(PAGES):
        token = tile * BLOCK_N + i * ROWS
        # TMA gives zeros for what lies outside of the cache; a page past the context is asked for there.
        page = gl.load(row_ptr + token // BLOCK_SIZE, mask=token < context, other=-1)
        for part in gl.static_range(PARTS):
            box = boxes.index((stage * PARTS + part) * PAGES + i)
            load(desc, [page, token % BLOCK_SIZE, kv_head, part * WIDTH], ready, box)


@gluon.jit
def _produce(q_desc, cache, call, memory, barriers, BLOCK_SIZE: gl.constexpr):
    """The warp that fetches: of each work its queries, then K and V tile by tile."""
    k_desc, v_desc, table_ptr, table_stride, group = cache
    _, start_ptr, context_ptr, _, heads, pairs, works = call
    q_smem, k_smem, v_smem = memory
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty = barriers
    ROWS: gl.constexpr = q_smem.shape[1]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    STAGES: gl.constexpr = k_smem.shape[0]
    turn = 0
    step = 0
    done = 0
    while turn * gl.num_programs(0) < works:
        head, chunk, start, length, context, block = _work(turn, start_ptr, context_ptr, heads, pairs, works, 2 * ROWS)
        turn += 1
        if block >= 0:
            for half in gl.static_range(2):
                mbarrier.wait(q_empty.index(half), (done & 1) ^ 1)
                mbarrier.expect(q_ready.index(half), q_desc.block_type.nbytes)
                row = start + (2 * block + half) * ROWS
                load(q_desc, [row, head, 0], q_ready.index(half), q_smem.index(half))
            done += 1
            row_ptr = table_ptr + chunk.to(gl.int64) * table_stride
            kv_head = head // group
            for tile in range(_tiles(length, context, block, 2 * ROWS, BLOCK_N)):
                stage = step % STAGES
                phase = ((step // STAGES) & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), phase)
                _fetch(k_desc, k_smem, stage, k_ready.index(stage), row_ptr, tile, kv_head, context, BLOCK_SIZE)
                mbarrier.wait(v_empty.index(stage), phase)
                _fetch(v_desc, v_smem, stage, v_ready.index(stage), row_ptr, tile, kv_head, context, BLOCK_SIZE)
                step += 1


@gluon.jit
def _clear_from(v, first):
    """Zero the rows of a tile of V from `first` on: what nobody wrote may be NaN, and 0 · NaN is NaN."""
    ROWS: gl.constexpr = 32  # at a time, for the registers
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    for i in gl.static_range(v.shape[0] // ROWS):
        part = v.slice(i * ROWS, ROWS)
        value = part.load(layout)
        part.store(gl.where((row + i * ROWS < first)[:, None], value, gl.zeros_like(value)))
    fence_async_shared()


@gluon.jit
def _consume(which: gl.constexpr, call, memory, barriers):
    """A warpgroup that computes one half of each block of queries (FlashAttention-3, algorithm 2)."""
    out_ptr, start_ptr, context_ptr, scale_log2, heads, pairs, works = call
    q_smem, k_smem, v_smem = memory
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty = barriers
    ROWS: gl.constexpr = q_smem.shape[1]
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    HEAD_DIM: gl.constexpr = k_smem.shape[2]
    dtype: gl.constexpr = q_smem.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    y_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    in_half = gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    in_tile = gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
    no_logits = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)

    turn = 0
    step = 0
    done = 0
    while turn * gl.num_programs(0) < works:
        head, _, start, length, context, block = _work(turn, start_ptr, context_ptr, heads, pairs, works, 2 * ROWS)
        turn += 1
        if block >= 0:
            first = (2 * block + which) * ROWS
            visible = gl.minimum(context - length + first + in_half + 1, context)
            tiles = _tiles(length, context, block, 2 * ROWS, BLOCK_N)
            whole = (context - length + first + 1) // BLOCK_N
            whole = gl.maximum(gl.minimum(whole, tiles), 1)  # those that every query sees all of, and the first
            mbarrier.wait(q_ready.index(which), done & 1)
            q = q_smem.index(which).reshape([ROWS, HEAD_DIM])

            # The first tile, masked in any case: every query sees its first token.
            stage = step % STAGES
            mbarrier.wait(k_ready.index(stage), (step // STAGES) & 1)
            k = k_smem.index(stage).permute((1, 0))
            logits = warpgroup_mma(q, k, no_logits, use_acc=False, is_async=True)
            logits = warpgroup_mma_wait(0, deps=(logits,))
            mbarrier.arrive(k_empty.index(stage))
            logits = gl.where(in_tile[None, :] < visible[:, None], logits, float("-inf"))
            highest = gl.max(logits, 1) * scale_log2
            weights = gl.exp2(logits * scale_log2 - highest[:, None])
            weight_sum = gl.sum(weights, 1)
            fade = gl.full_like(highest, 1.0)
            acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, o_layout)

            for MASKED in gl.static_range(2):
                for tile in range(whole if MASKED else 1, tiles if MASKED else whole):
                    before = stage
                    v_phase = (step // STAGES) & 1
                    step += 1
                    stage = step % STAGES
                    mbarrier.wait(k_ready.index(stage), (step // STAGES) & 1)
                    k = k_smem.index(stage).permute((1, 0))
                    logits = warpgroup_mma(q, k, no_logits, use_acc=False, is_async=True)
                    mbarrier.wait(v_ready.index(before), v_phase)
                    acc = acc * gl.convert_layout(fade, o_rows, assert_trivial=True)[:, None]
                    p = gl.convert_layout(weights.to(dtype), p_layout)
                    acc = warpgroup_mma(p, v_smem.index(before), acc, is_async=True)
                    logits = warpgroup_mma_wait(1, deps=(logits,))
                    mbarrier.arrive(k_empty.index(stage))
                    if MASKED:
                        seen = visible - tile * BLOCK_N
                        logits = gl.where(in_tile[None, :] < seen[:, None], logits, float("-inf"))
                    higher = gl.maximum(highest, gl.max(logits, 1) * scale_log2)
                    fade = gl.exp2(highest - higher)
                    weights = gl.exp2(logits * scale_log2 - higher[:, None])
                    weight_sum = weight_sum * fade + gl.sum(weights, 1)
                    highest = higher
                    # Long since there: but ptxas moves no softmax across this, behind the wait for the product below.
                    mbarrier.wait(q_ready.index(which), done & 1)
                    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
                    mbarrier.arrive(v_empty.index(before))

            v = v_smem.index(stage)
            mbarrier.wait(v_ready.index(stage), (step // STAGES) & 1)
            step += 1
            acc = acc * gl.convert_layout(fade, o_rows, assert_trivial=True)[:, None]
            p = gl.convert_layout(weights.to(dtype), p_layout)
            if context < tiles * BLOCK_N:
                _clear_from(v, context - (tiles - 1) * BLOCK_N)
            acc = warpgroup_mma(p, v, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(v_empty.index(stage))

            y = acc / gl.convert_layout(weight_sum, o_rows, assert_trivial=True)[:, None]
            q.store(y.to(dtype))  # and back, so that a row is written in one piece
            y = q.load(y_layout)
            fence_async_shared()
            mbarrier.arrive(q_empty.index(which))
            done += 1
            row = gl.arange(0, ROWS, gl.SliceLayout(1, y_layout))
            dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, y_layout))
            y_ptr = out_ptr + ((start + first).to(gl.int64) * heads + head) * HEAD_DIM
            y_ptrs = y_ptr + (row * (heads * HEAD_DIM))[:, None] + dims[None, :]
            gl.store(y_ptrs, y, mask=(first + row < length)[:, None])


@gluon.jit(do_not_specialize=["table_stride", "chunks"])
def _hopper_prefill_kernel(
    q_desc,
    k_desc,
    v_desc,
    table_ptr,
    start_ptr,
    context_ptr,
    out_ptr,
    scale_log2,
    heads,
    group,
    table_stride,
    chunks,
    BLOCK_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    dtype: gl.constexpr = q_desc.dtype
    ROWS: gl.constexpr = q_desc.block_type.shape[0]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HEAD_DIM], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [2, ROWS, 1, HEAD_DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)  # both warpgroups
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    used, longest = _extent(start_ptr, chunks)
    pairs = heads * used
    works = pairs * ((longest + 2 * ROWS - 1) // (2 * ROWS))
    memory = (q_smem, k_smem, v_smem)
    barriers = (q_ready, q_empty, k_ready, k_empty, v_ready, v_empty)
    call = (out_ptr, start_ptr, context_ptr, scale_log2, heads, pairs, works)
    cache = (k_desc, v_desc, table_ptr, table_stride, group)
    gl.warp_specialize(
        [
            (_consume, (0, call, memory, barriers)),
            (_consume, (1, call, memory, barriers)),
            (_produce, (q_desc, cache, call, memory, barriers, BLOCK_SIZE)),
        ],
        [4, 1],
        [240, 24],  # registers a thread; the first warpgroup has what the others leave, 240 as well
    )


def hopper_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    max_query_len: int,
    max_context_len: int,
    scale: float,
) -> torch.Tensor:
    """As `prefill_attention_reference`, of at least one token and what `refused_by_hopper` takes, on a Hopper GPU.

    max_query_len may exceed the longest chunk and empty chunks may stand at the end, at no cost.
    """
    _, heads, head_dim = q.shape
    _, block_size, kv_heads, _ = k_cache.shape
    dtype = TYPES[q.dtype]
    queries, rows = [_QUERIES // 2, 1, head_dim], [1, min(_TOKENS, block_size), 1, _WIDTH]
    layout = gl.NVMMASharedLayout.get_default_for(rows, dtype)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    works = heads * len(context_lens) * triton.cdiv(max_query_len, _QUERIES)
    _hopper_prefill_kernel[(min(works, multiprocessors(q.device)),)](
        TensorDescriptor.from_tensor(q, queries, gl.NVMMASharedLayout.get_default_for(queries, dtype)),
        TensorDescriptor.from_tensor(k_cache, rows, layout),
        TensorDescriptor.from_tensor(v_cache, rows, layout),
        block_table,
        query_start,
        context_lens,
        out,
        scale * LOG2_E.value,
        heads,
        heads // kv_heads,
        block_table.stride(0),
        len(context_lens),
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        BLOCK_N=_TOKENS,
        # Where a tile is several pages, fetching it takes longer, and a third stage hides that.
        STAGES=3 if block_size < _TOKENS else 2,
        num_warps=4,
    )
    return out
