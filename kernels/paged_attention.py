"""Decode attention: one query token a sequence, over a paged cache (Kwon et al. 2023, arXiv:2309.06180, eq. 4)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton

from .base_two import LOG2_E
from .carve_out import prefer_carve_out
from .dependent_launch import dependent_launch, has_dependent_launch
from .flash_attn_limits import needs_flash_attn, refused_by_flash_attn
from .op import Case, Cost, Implementation, Op, needs_gpu
from .paged_attention_kernels import merge_kernel, paged_attention_kernel
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


def _launch(items: int, bytes_per_head: int, appends: bool) -> dict[str, int]:
    """chunks that all contexts together are cut into (0: they are not cut), tokens a chunk has at least, tokens a tile,
    stages of loads in flight, warps, maxnreg, their registers, and the carve-out.

    items: sequences times KV heads.  bytes_per_head: of a key, its elements padded to a power of 2.  appends: whether
    the programs rotate q and store a token first.

    Chosen for Qwen2-7B in bfloat16 on an H200, whose keys have 256 bytes, from what `python -m bench.tune
    paged_attention` measures: about two chunks a multiprocessor, and whole contexts where there are as many of them. Up
    to 64 items on an H100. There whole contexts in one launch are 11 % faster for 35 sequences of 512 tokens, and 12 %
    slower than the best for 35 of 128 to 8127. Chunks of 1024 tokens at least, which leave the second launch nothing to
    do, make a step of 35 requests the same 5.77 ms (`python -m bench.tune_step`).
    """
    if items <= 64:
        launch = {"chunks": 64 * min(items, 4), "MIN_CHUNK": 32, "TILE": 32, "STAGES": 3, "WARPS": 2}
        if items <= 8:
            # With the driver's own a step of Qwen2-0.5B is 1 % slower, and one of Qwen2-7B the same (an H100).
            launch["carve_out"] = 44
        elif appends:
            # Two warps read the cache of 8 sequences of 512 tokens 3 to 7 % sooner than four, but make a step of 8
            # requests 5.39 ms of 5.36 (Qwen2-7B on an H100).
            launch |= {"MIN_CHUNK": 64, "TILE": 64, "WARPS": 4}
    elif items < 256:
        launch = {"chunks": 280, "MIN_CHUNK": 256, "TILE": 32, "STAGES": 3, "WARPS": 2}
    else:
        launch = {"chunks": 0, "MIN_CHUNK": 64, "TILE": 64, "STAGES": 2, "WARPS": 4}
        if bytes_per_head <= 256:
            launch["maxnreg"] = 128  # so few that a multiprocessor has them for four programs
    for tokens in ("MIN_CHUNK", "TILE"):
        launch[tokens] = max(16, launch[tokens] * 256 // bytes_per_head)
    return launch | {"WARPS": min(launch["WARPS"], launch["TILE"] // 16)}  # the matrix unit takes 16 tokens


class NewTokens(NamedTuple):
    """The last token of each context, on its way into the cache; shapes as in `rotary_store_kv_reference`."""

    k: torch.Tensor
    v: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor


def check_decode(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor, context_lens: torch.Tensor
) -> None:
    """ValueError for queries, a cache and tables that do not fit each other, their dtypes aside."""
    words = misfit(q, k_cache, v_cache)
    _require(words is None, words)
    _require(
        block_table.shape[0] == len(q) and context_lens.shape[0] == len(q),
        "a row of q, of the table, and a length",
    )
    _require(
        len(q) == 0 or block_table.shape[1] > 0,
        f"a row of block_table has an entry at least, and it is {list(block_table.shape)}",
    )


def _require(holds: bool, words: str) -> None:
    if not holds:
        raise ValueError(f"paged_attention: {words}")


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    new: NewTokens | None = None,
) -> torch.Tensor:
    """The launches of `paged_attention`; with `new`, of `append_attention`. The arguments fit each other."""
    batch, heads, head_dim = q.shape
    _, block_size, kv_heads, _ = k_cache.shape
    out = torch.empty(batch, heads, head_dim, dtype=q.dtype, device=q.device)
    if batch == 0:
        return out
    group = heads // kv_heads
    items = batch * kv_heads
    block_dim = triton.next_power_of_2(head_dim)
    launch = dict(_launch(items, block_dim * q.element_size(), new is not None))
    chunks, carve_out = launch["chunks"], launch.pop("carve_out", None)
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
    kernel = paged_attention_kernel[(programs,)](
        q,
        k_cache,
        v_cache,
        block_table,
        context_lens,
        k_scale,
        v_scale,
        *([None] * len(NewTokens._fields) if new is None else new),
        out,
        parts,
        part_lse,
        scale * LOG2_E.value,
        batch,
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *([None] * 4 if new is None else (*new.k.stride()[:2], *new.v.stride()[:2])),
        block_table.stride(0),
        BLOCK_SIZE=block_size,
        CUT=chunks > 0,
        SCALED=k_scale is not None,
        DEPENDENT=has_dependent_launch(q.device),
        num_warps=launch["WARPS"],
        **shape,
        **launch,
    )
    prefer_carve_out(kernel, carve_out)
    if chunks:
        parts_at_once = min(64, triton.next_power_of_2(triton.cdiv(chunks, items)))
        merge_kernel[(batch * heads,)](
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
    check_decode(q, k_cache, v_cache, block_table, context_lens)
    scaled = k_cache.dtype == torch.float8_e4m3fn
    _require(scaled or k_cache.dtype == q.dtype, f"q is {q.dtype} and the cache {k_cache.dtype}")
    _require(
        scaled == (k_scale is not None) == (v_scale is not None),
        "k_scale and v_scale belong to a float8 cache",
    )
    return attend(q, k_cache, v_cache, block_table, context_lens, scale, k_scale, v_scale)


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
    return refused_by_flash_attn(
        q, k_cache, "the implementation paged_attention='triton' (KernelSet.replace or --kernel)"
    )


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
_SERVED = (
    {"batch": 35, "context": 762, "shortest": 378},
    {"batch": 128, "context": 762, "shortest": 378},
    {"batch": 256, "context": 1280, "shortest": 356},
)
"""Contexts as they are in the middle of what `python -m bench.engine` serves."""
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
        Case(batch=2, context=300, shortest=256, heads=4, kv_heads=2, head_dim=64, block_size=256, padded=1),
        Case(batch=2, context=150, shortest=3, heads=14, kv_heads=2, head_dim=64, block_size=16, float8=True),
        Case(batch=0, context=1, heads=2, kv_heads=1, head_dim=64, block_size=16, padded=2),
    ),
    large_cases=(
        *(Case(**load, **_QWEN2_7B, block_size=size) for size in (256, 16) for load in _LOADS),
        *(Case(**load, **_QWEN2_7B, block_size=256) for load in _SERVED),
        *(Case(**load, **shape, block_size=256) for shape in (_QWEN2_HALF_B, _QWEN3_8B) for load in _FEW_LOADS),
        *(Case(**load, **_QWEN2_7B, block_size=256, float8=True) for load in _FEW_LOADS),
        Case(batch=1, context=131072, **_QWEN2_7B, block_size=256),
    ),
)
