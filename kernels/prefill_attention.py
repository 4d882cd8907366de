"""Prefill attention: a ragged batch of prompt chunks, each causal over all that its sequence has in the paged cache.

Sources: Dao 2023, arXiv:2307.08691 (FlashAttention-2), the tiles; Kwon et al. 2023, arXiv:2309.06180, the pages. For
Hopper GPUs there is a kernel of its own, in `hopper_prefill`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .base_two import LOG2_E
from .flash_attn_limits import needs_flash_attn, refused_by_flash_attn
from .hopper import multiprocessors
from .hopper_prefill import hopper_prefill, refused_by_hopper
from .op import Case, Cost, Implementation, Op, needs_gpu
from .paged_cache import misfit, random_paged_cache
from .rotary import fused_qkv

REFERENCE_SCORES = 1 << 27
"""Scores that the reference holds at once; in float64 they take a GiB."""

HOPPER_OVER = {64: (2048, 1536), 128: (512, 64)}
"""By head size, the tokens of all chunks together, and of a chunk on average, over which the Hopper kernel computes
them: its tiles have 128 queries, of which short chunks leave most empty. `python -m bench.kernels prefill_attention`
times both kernels on either side of it. An engine's captured prefill, with room for more tokens and chunks, is to run
the kernel of the same one uncaptured: so the longest chunk does not count, nor a cached prefix, with which the Hopper
kernel gains from fewer tokens on."""


def prefill_attention_reference(
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
    """y = softmax(scale · q Kᵀ + mask) V, where query i of n sees the first context_len − n + i + 1 rows of K and V.

    The chunk's own keys and values are in the cache already, behind those of a cached prefix and of earlier chunks.

    q [tokens, heads, head_dim], the chunks one behind the other; k_cache, v_cache [blocks, block_size, kv_heads,
    head_dim]; block_table [chunks, max_blocks] int32, entries past the context may be anything; query_start
    [chunks + 1] int32, cumulative; context_lens [chunks] int32, prefix and chunk together; max_query_len and
    max_context_len, the longest chunk and context or more → as q. Query head h reads KV head h // (heads/kv_heads).
    """
    out = torch.empty_like(q)
    block_size = k_cache.shape[1]
    starts = query_start.tolist()
    for i, context in enumerate(context_lens.tolist()):
        start, end = starts[i], starts[i + 1]
        blocks = block_table[i, : -(-context // block_size)].long()
        k = k_cache[blocks].flatten(0, 1)[:context].transpose(0, 1)  # [kv_heads, context, head_dim]
        v = v_cache[blocks].flatten(0, 1)[:context].transpose(0, 1)
        rows = max(1, REFERENCE_SCORES // (q.shape[1] * max(context, 1)))  # of a slice: the scores of a chunk are many
        for first in range(start, end, rows):
            last = min(first + rows, end)
            seen = torch.arange(first, last, device=q.device) + context - end + 1
            mask = torch.arange(context, device=q.device) < seen.unsqueeze(1)
            chunk = q[first:last].transpose(0, 1)
            y = F.scaled_dot_product_attention(
                chunk[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=True
            )
            out[first:last] = y[0].transpose(0, 1)
    return out


@triton.jit(do_not_specialize=["table_stride"])  # its divisors change with the batch, and each is another compilation
def _prefill_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    start_ptr,
    context_ptr,
    out_ptr,
    scale_log2,
    heads,
    group,
    q_stride_token,
    q_stride_head,
    k_stride_block,
    k_stride_token,
    k_stride_head,
    v_stride_block,
    v_stride_token,
    v_stride_head,
    table_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_M queries of a head, over tiles of BLOCK_N tokens (FlashAttention-2, algorithm 1)."""
    head = tl.program_id(0) % heads
    chunk = tl.program_id(0) // heads
    start = tl.load(start_ptr + chunk).to(tl.int64)
    length = (tl.load(start_ptr + chunk + 1) - start).to(tl.int32)
    # A chunk's last queries see most: they begin first, so that short programs fill the gaps at the launch's end.
    block = (length + BLOCK_M - 1) // BLOCK_M - 1 - tl.program_id(1)
    if block < 0:
        return
    context = tl.load(context_ptr + chunk)
    in_block = tl.arange(0, BLOCK_M)
    query = block * BLOCK_M + in_block
    dims = tl.arange(0, BLOCK_DIM)
    query_mask = (query < length)[:, None] & (dims < HEAD_DIM)[None, :]
    q_ptr += (start + block * BLOCK_M) * q_stride_token + head * q_stride_head
    q = tl.load(q_ptr + (in_block * q_stride_token)[:, None] + dims[None, :], mask=query_mask, other=0.0)

    k_ptr += head // group * k_stride_head
    v_ptr += head // group * v_stride_head
    table_ptr += chunk.to(tl.int64) * table_stride
    visible = context - length + query + 1
    whole = (context - length + block * BLOCK_M + 1) // BLOCK_N  # tiles that the first query sees all of, and so do all
    last = tl.minimum(context - length + (block + 1) * BLOCK_M, context)
    tiles = (last + BLOCK_N - 1) // BLOCK_N

    in_tile = tl.arange(0, BLOCK_N)
    ONE_PAGE: tl.constexpr = BLOCK_SIZE % BLOCK_N == 0
    acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    weight_sum = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)  # until the first tile, whose first token every query sees
    # First the tiles that need no mask, then those on the diagonal and at the context's end.
    for MASKED in tl.static_range(2):
        first = whole if MASKED else 0
        stop = tiles if MASKED else whole
        # A tile's place in the table is loaded while the tile before it is computed.
        if ONE_PAGE:
            page = tl.load(table_ptr + first * BLOCK_N // BLOCK_SIZE, mask=first < stop, other=0)
        else:
            tokens = first * BLOCK_N + in_tile
            page = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=tokens < context, other=0)
        for tile in tl.range(first, stop, num_stages=STAGES):
            tokens = tile * BLOCK_N + in_tile
            if ONE_PAGE:
                inside = tile * BLOCK_N % BLOCK_SIZE
                k_tile = k_ptr + page.to(tl.int64) * k_stride_block + inside * k_stride_token
                v_tile = v_ptr + page.to(tl.int64) * v_stride_block + inside * v_stride_token
                k_ptrs = k_tile + (in_tile * k_stride_token)[:, None] + dims[None, :]
                v_ptrs = v_tile + (in_tile * v_stride_token)[:, None] + dims[None, :]
                page = tl.load(table_ptr + (tile + 1) * BLOCK_N // BLOCK_SIZE, mask=tile + 1 < stop, other=0)
            else:
                inside = tokens % BLOCK_SIZE
                k_ptrs = k_ptr + (page.to(tl.int64) * k_stride_block + inside * k_stride_token)[:, None] + dims[None, :]
                v_ptrs = v_ptr + (page.to(tl.int64) * v_stride_block + inside * v_stride_token)[:, None] + dims[None, :]
                ahead = tokens + BLOCK_N
                page = tl.load(table_ptr + ahead // BLOCK_SIZE, mask=ahead < context, other=0)
            if MASKED:
                mask = (tokens < context)[:, None] & (dims < HEAD_DIM)[None, :]
                k = tl.load(k_ptrs, mask=mask, other=0.0)
                v = tl.load(v_ptrs, mask=mask, other=0.0)  # what nobody wrote may be NaN, and 0 · NaN is NaN
            elif HEAD_DIM < BLOCK_DIM:
                k = tl.load(k_ptrs, mask=(dims < HEAD_DIM)[None, :], other=0.0)
                v = tl.load(v_ptrs, mask=(dims < HEAD_DIM)[None, :], other=0.0)
            else:
                k = tl.load(k_ptrs)
                v = tl.load(v_ptrs)

            logits = tl.dot(q, tl.trans(k), input_precision="ieee")
            if MASKED:
                logits = tl.where(tokens[None, :] < visible[:, None], logits, float("-inf"))
            higher = tl.maximum(highest, tl.max(logits, 1) * scale_log2)
            fade = tl.exp2(highest - higher)
            weights = tl.exp2(logits * scale_log2 - higher[:, None])
            weight_sum = weight_sum * fade + tl.sum(weights, 1)
            acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
            highest = higher

    y = (acc / weight_sum[:, None]).to(out_ptr.dtype.element_ty)
    out_ptr += ((start + block * BLOCK_M) * heads + head) * HEAD_DIM
    tl.store(out_ptr + (in_block * (heads * HEAD_DIM))[:, None] + dims[None, :], y, mask=query_mask)


def _launch(head_dim: int, itemsize: int, block_size: int, max_query_len: int, shared_memory: int) -> dict[str, int]:
    """Queries and tokens a tile, loads in flight and warps, for a GPU with that many bytes of shared memory a block.

    `python -m bench.tune prefill_attention` sweeps others.
    """
    if itemsize == 4:  # products without tensor cores, whose operands are held in registers
        return {"BLOCK_M": 32 if head_dim <= 128 else 16, "BLOCK_N": 16, "STAGES": 2, "num_warps": 8}
    roomy = shared_memory >= 227 << 10
    if max_query_len <= 512 or head_dim <= 64 or not roomy:
        stages = 3 if roomy else 2
        if head_dim <= 128:
            return {"BLOCK_M": 64, "BLOCK_N": 64, "STAGES": stages, "num_warps": 4}
        return {"BLOCK_M": 64, "BLOCK_N": 32, "STAGES": stages, "num_warps": 8}
    if head_dim <= 128:
        # Where a tile is several pages, their addresses take the registers of a third stage.
        return {"BLOCK_M": 128, "BLOCK_N": 128, "STAGES": 2 if block_size % 128 else 3, "num_warps": 8}
    return {"BLOCK_M": 128, "BLOCK_N": 32, "STAGES": 3, "num_warps": 8}


def _shared_memory(device: torch.device) -> int:
    """Bytes that a block may take; without bound for the interpreter."""
    if device.type != "cuda":
        return sys.maxsize
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _is_for_hopper(tokens: int, chunks: int, head_dim: int, device: torch.device) -> bool:
    if head_dim not in HOPPER_OVER or not multiprocessors(device):
        return False
    together, mean = HOPPER_OVER[head_dim]
    return tokens > max(together, mean * chunks)


def _require(holds: bool, words: str) -> None:
    if not holds:
        raise ValueError(f"prefill_attention: {words}")


def prefill_attention(
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
    """As `prefill_attention_reference`, in Triton, in one launch; equal inputs give equal bits.

    On a Hopper GPU, `hopper_prefill` computes what HOPPER_OVER says unless `refused_by_hopper` says why not; one kernel
    for all GPUs computes everything else.

    Block sizes, head_dim and strides are free, but the last dimensions are contiguous. Of a chunk longer than
    max_query_len, queries may stay unwritten. ValueError for dtypes and shapes that do not fit each other, and for a
    scale that is not positive.
    """
    (tokens, _, head_dim), chunks = q.shape, len(context_lens)
    _require(q.dtype in OP.dtypes, f"it computes in float16, bfloat16 and float32, not in {q.dtype}")
    _require(
        k_cache.dtype == v_cache.dtype == q.dtype,
        f"q is {q.dtype}, the cache {k_cache.dtype}, {v_cache.dtype}",
    )
    words = misfit(q, k_cache, v_cache)
    _require(words is None, words)
    _require(
        len(block_table) == chunks and len(query_start) == chunks + 1,
        "chunks: query_start, table, contexts differ",
    )
    _require(block_table.stride(1) == 1, "a row of the table must be contiguous")
    _require(scale > 0, f"the scale must be positive, and is {scale}")

    if _is_for_hopper(tokens, chunks, head_dim, q.device) and refused_by_hopper(q, k_cache, v_cache) is None:
        compute = hopper_prefill
    else:
        compute = prefill_on_any_gpu
    return compute(q, k_cache, v_cache, block_table, query_start, context_lens, max_query_len, max_context_len, scale)


def prefill_on_any_gpu(
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
    """As `prefill_attention`, of what that has checked, by the kernel for all GPUs."""
    tokens, heads, head_dim = q.shape
    _, block_size, kv_heads, _ = k_cache.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    launch = _launch(head_dim, q.element_size(), block_size, max_query_len, _shared_memory(q.device))
    # Programs start in the order of the first axis: all heads and chunks with their longest block, then the next.
    _prefill_attention_kernel[(heads * len(context_lens), triton.cdiv(max_query_len, launch["BLOCK_M"]))](
        q,
        k_cache,
        v_cache,
        block_table,
        query_start,
        context_lens,
        out,
        scale * LOG2_E.value,
        heads,
        heads // kv_heads,
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        block_table.stride(0),
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_DIM=max(16, triton.next_power_of_2(head_dim)),
        **launch,
    )
    return out


def flash_attn_prefill(
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
    """flash-attn 2 (arXiv:2307.08691) through its block table; as `prefill_attention_reference`.

    ValueError where flash-attn cannot: block sizes that are no multiple of 256, dtypes but float16 and bfloat16.
    """
    from flash_attn import flash_attn_varlen_func

    if words := _refused(q=q, k_cache=k_cache):
        raise ValueError(words)
    context_start = F.pad(context_lens.cumsum(0, dtype=torch.int32), (1, 0))
    return flash_attn_varlen_func(
        q,
        k_cache,
        v_cache,
        cu_seqlens_q=query_start,
        cu_seqlens_k=context_start,
        max_seqlen_q=max_query_len,
        max_seqlen_k=max_context_len,
        softmax_scale=scale,
        causal=True,
        block_table=block_table,
    )


def _refused(*, q: torch.Tensor, k_cache: torch.Tensor, **rest: Any) -> str | None:
    return refused_by_flash_attn(
        q, k_cache, "the implementation prefill_attention='triton' (KernelSet.replace or --kernel)"
    )


def _spread(first: int, last: int, count: int) -> list[int]:
    return [round(first + (last - first) * i / max(count - 1, 1)) for i in range(count)]


def _chunks(prompts: int, query: int, shortest: int | None, prefix: int) -> list[tuple[int, int]]:
    """Length and context of each chunk: lengths evenly from `shortest` (default: all alike) to `query`, what stands
    before them evenly from `prefix` to 0."""
    lengths = _spread(query if shortest is None else shortest, query, prompts)
    return [(n, n + before) for n, before in zip(lengths, _spread(prefix, 0, prompts), strict=True)]


def make_inputs(
    prompts: int,
    query: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    *,
    shortest: int | None = None,
    prefix: int = 0,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Chunks with lengths evenly from `shortest` (default: all alike) to `query`, after prefixes from `prefix` to 0."""
    chunks = _chunks(prompts, query, shortest, prefix)
    lengths, contexts = torch.tensor(chunks, dtype=torch.int32, device=device).view(-1, 2).unbind(1)
    tokens = sum(length for length, _ in chunks)
    q, _, _ = fused_qkv(tokens, heads, kv_heads, head_dim, dtype=dtype, device=device, generator=generator)
    k_cache, v_cache, table = random_paged_cache(contexts, block_size, kv_heads, head_dim, dtype, generator)
    return {
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": table,
        "query_start": F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        "context_lens": contexts.contiguous(),
        "max_query_len": max((length for length, _ in chunks), default=0),
        "max_context_len": max((context for _, context in chunks), default=0),
        "scale": head_dim**-0.5,
    }


def cost(
    prompts: int,
    query: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    *,
    shortest: int | None = None,
    prefix: int = 0,
    itemsize: int,
) -> Cost:
    """Two products for each query and each token that it sees; contexts, queries and results moved once."""
    chunks = _chunks(prompts, query, shortest, prefix)
    pairs = sum(n * (context - n) + n * (n + 1) // 2 for n, context in chunks)
    rows = sum(n for n, _ in chunks) * heads * head_dim
    kv = 2 * kv_heads * head_dim * sum(context for n, context in chunks if n)
    return Cost(read=(rows + kv) * itemsize, written=rows * itemsize, flops=4 * head_dim * heads * pairs)


_QWEN2_7B = {"heads": 28, "kv_heads": 4, "head_dim": 128}
_QWEN2_HALF_B = {"heads": 14, "kv_heads": 2, "head_dim": 64}

OP = Op(
    "prefill_attention",
    reference=prefill_attention_reference,
    implementations={
        "flash_attn": Implementation(flash_attn_prefill, needs_flash_attn, refuses=_refused),
        "triton": Implementation(prefill_attention, needs_gpu),
    },
    inputs=make_inputs,
    cost=cost,
    cases=(
        Case(prompts=1, query=1, heads=1, kv_heads=1, head_dim=16, block_size=16),
        Case(prompts=1, query=17, heads=2, kv_heads=2, head_dim=64, block_size=16),
        Case(prompts=1, query=20, heads=2, kv_heads=1, head_dim=64, block_size=16, prefix=62),
        Case(prompts=3, query=70, shortest=0, heads=6, kv_heads=2, head_dim=64, block_size=32, prefix=45),
        Case(prompts=4, query=33, shortest=2, heads=7, kv_heads=1, head_dim=80, block_size=16, prefix=50),
        Case(prompts=2, query=130, shortest=128, heads=2, kv_heads=2, head_dim=96, block_size=64),
        Case(prompts=1, query=200, heads=2, kv_heads=1, head_dim=128, block_size=256, prefix=131),
        Case(prompts=2, query=66, shortest=5, heads=16, kv_heads=1, head_dim=64, block_size=128, prefix=130),
        Case(prompts=2, query=90, shortest=1, heads=2, kv_heads=1, head_dim=256, block_size=256, prefix=200),
        Case(prompts=2, query=0, heads=2, kv_heads=1, head_dim=64, block_size=16, prefix=9),
        Case(prompts=2, query=300, shortest=230, heads=1, kv_heads=1, head_dim=128, block_size=32, prefix=40),
    ),
    large_cases=(
        *(Case(prompts=1, query=n, **_QWEN2_7B, block_size=256) for n in (512, 1024, 2048, 4096, 16384)),
        Case(prompts=1, query=4096, **_QWEN2_7B, block_size=16),
        Case(prompts=1, query=4096, **_QWEN2_HALF_B, block_size=256),
        Case(prompts=1, query=2048, **_QWEN2_7B, block_size=256, prefix=6144),
        Case(prompts=35, query=512, shortest=128, **_QWEN2_7B, block_size=256),
        # Near HOPPER_OVER.
        Case(prompts=1, query=300, **_QWEN2_7B, block_size=256),
        Case(prompts=1, query=640, **_QWEN2_7B, block_size=256),
        Case(prompts=64, query=32, **_QWEN2_7B, block_size=256),
        Case(prompts=64, query=100, **_QWEN2_7B, block_size=256),
        Case(prompts=1, query=2048, **_QWEN2_HALF_B, block_size=256),
        Case(prompts=5, query=900, shortest=148, **_QWEN2_HALF_B, block_size=256),
    ),
)
