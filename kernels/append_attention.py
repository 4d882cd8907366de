"""Decode attention and what comes before it: q and k rotated, k and v appended to the paged cache, then attended to.

Sources: those of rotary_store_kv.py and paged_attention.py; the call is flash-attn's `flash_attn_with_kvcache`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .flash_attn_limits import needs_flash_attn, refused_by_flash_attn
from .op import Case, Cost, Implementation, Op, needs_gpu
from .paged_attention import NewTokens, attend, check_decode, paged_attention_reference
from .paged_cache import random_paged_cache
from .rotary import fused_qkv
from .rotary_store_kv import check_rotary_store_kv, rotary_store_kv_reference


def append_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    *,
    rotary_store_kv: Callable = rotary_store_kv_reference,
    paged_attention: Callable = paged_attention_reference,
) -> torch.Tensor:
    """`rotary_store_kv_reference`, then `paged_attention_reference` of the rotated q; their shapes hold here.

    One token a sequence, the last of its context: context_lens counts it, and its slot is the place that the row of the
    table has for it. The caches change in place. → [batch, heads, head_dim]
    """
    q = rotary_store_kv(q, k, v, cos, sin, positions, k_cache, v_cache, slot_mapping)
    return paged_attention(q, k_cache, v_cache, block_table, context_lens, scale)


def append_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """As `append_attention_reference`, in the launches of `paged_attention`; equal inputs give equal bits.

    Attention takes the new token from k and v and never from its slot, which no other row's context may hold: a row
    with a context and a negative slot attends to its token, which is then written nowhere. A row without a context
    writes nothing. ValueError as in `rotary_store_kv` and `paged_attention`; no float8.
    """
    check_rotary_store_kv(q, k, v, cos, sin, positions, k_cache, v_cache, slot_mapping)
    check_decode(q, k_cache, v_cache, block_table, context_lens)
    new = NewTokens(k, v, cos, sin, positions, slot_mapping)
    return attend(q, k_cache, v_cache, block_table, context_lens, scale, new=new)


def flash_attn_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """flash-attn 2 (arXiv:2307.08691), in one call; as `append_attention_reference` where its limits allow it.

    It wants cos and sin in q's dtype. Each call converts the tables, and their rounding is an error of the angle's
    cosine and sine as large as that of rounding the rotated q and k, which comes on top.

    It finds slot and position by context_lens alone. That a row is padded, has no slot, or stands elsewhere than at its
    context's end is for the caller to exclude: to see it here would be to wait for the GPU. ValueError for what shapes
    and dtypes show: block sizes that are no multiple of 256, dtypes but float16 and bfloat16, head sizes that are no
    multiple of 16, fewer rows of cos and sin than a row of the table has room for.
    """
    from flash_attn import flash_attn_with_kvcache

    if words := _refused_shapes(q, cos, k_cache, block_table):
        raise ValueError(words)
    out = flash_attn_with_kvcache(
        q.unsqueeze(1),
        k_cache,
        v_cache,
        k=k.unsqueeze(1),
        v=v.unsqueeze(1),
        rotary_cos=cos.to(q.dtype),
        rotary_sin=sin.to(q.dtype),
        cache_seqlens=context_lens - 1,
        block_table=block_table,
        softmax_scale=scale,
        rotary_interleaved=False,
    )
    return out.squeeze(1)


_INSTEAD = "the implementation 'triton'"


def _refused_shapes(q: torch.Tensor, cos: torch.Tensor, k_cache: torch.Tensor, block_table: torch.Tensor) -> str | None:
    if words := refused_by_flash_attn(q, k_cache, _INSTEAD):
        return words
    if q.shape[2] % 16:
        return f"flash-attn rotates head sizes that are multiples of 16, and head_dim is {q.shape[2]}: use {_INSTEAD}"
    room = block_table.shape[1] * k_cache.shape[1]
    if len(cos) < room:
        return (
            f"flash-attn wants cos and sin for all {room} tokens that a row of the block table has room for, not for "
            f"{len(cos)}: use {_INSTEAD}"
        )
    return None


def _refused(
    *,
    q: torch.Tensor,
    cos: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    **rest: Any,
) -> str | None:
    if words := _refused_shapes(q, cos, k_cache, block_table):
        return words
    if bool((slot_mapping < 0).any()) or bool((context_lens < 1).any()):
        return f"flash-attn appends every row, and some are padded or have no slot: use {_INSTEAD}"
    if not torch.equal(positions, context_lens.to(positions.dtype) - 1):
        return f"flash-attn takes a token's position to be its context's length less 1: use {_INSTEAD}"
    return None


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
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Contexts evenly from `shortest` (default: all alike) to `context`, and `padded` rows more."""
    contexts = F.pad(torch.linspace(shortest or context, context, batch, device=device).round().int(), (0, padded))
    rows = {"dtype": dtype, "device": device, "generator": generator}
    q, k, v = fused_qkv(batch + padded, heads, kv_heads, head_dim, **rows)
    v *= contexts.sqrt().clamp(min=1).view(-1, 1, 1).to(dtype)  # as in `random_paged_cache`: the newest counts
    cache = random_paged_cache(contexts, block_size, kv_heads, head_dim, dtype, generator)
    return inputs_of(q, k, v, *cache, contexts)


def inputs_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    contexts: torch.Tensor,
) -> dict[str, Any]:
    """The arguments of a call: each context's last token is the row's of k and v, a context of 0 makes a padded row.

    cos and sin are NaN at the positions that no token has, and so becomes the cache where the new tokens go.
    """
    block_size, head_dim = k_cache.shape[1], q.shape[2]
    positions = (contexts.long() - 1).clamp(min=0)
    blocks = table.gather(1, (positions // block_size).unsqueeze(1)).squeeze(1).long()
    slots = torch.where(contexts > 0, blocks * block_size + positions % block_size, -1)
    for cache in (k_cache, v_cache):
        cache.flatten(0, 1)[slots[slots >= 0]] = torch.nan

    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=q.device) / head_dim)
    angle = torch.full((table.shape[1] * block_size, head_dim // 2), torch.nan, device=q.device)
    angle[positions] = positions.float().unsqueeze(1) * frequency
    return {
        "q": q,
        "k": k,
        "v": v,
        "cos": angle.cos(),
        "sin": angle.sin(),
        "positions": positions,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "slot_mapping": slots,
        "block_table": table,
        "context_lens": contexts,
        "scale": head_dim**-0.5,
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
    itemsize: int,
) -> Cost:
    """The cache read but for the new tokens, which come as arguments and are written to it."""
    cached = batch * (context + (shortest or context)) // 2 - batch
    row = head_dim * itemsize
    q = (batch + padded) * heads * row
    new = 2 * batch * kv_heads * row
    table = batch * (head_dim * 4 + 16)  # float32 cos and sin, an int64 position and a slot
    return Cost(
        read=q + new + table + 2 * cached * kv_heads * row,
        written=q + new,
        flops=(4 * (cached + batch) * heads + 3 * batch * (heads + kv_heads)) * head_dim,
    )


_QWEN2_7B = {"heads": 28, "kv_heads": 4, "head_dim": 128}
_QWEN2_HALF_B = {"heads": 14, "kv_heads": 2, "head_dim": 64}

OP = Op(
    "append_attention",
    reference=append_attention_reference,
    implementations={
        "triton": Implementation(append_attention, needs_gpu),
        "flash_attn": Implementation(
            flash_attn_append,
            needs_flash_attn,
            refuses=_refused,
            unfit="flash-attn appends every row, and an engine pads its batches with rows that have no place",
        ),
    },
    inputs=make_inputs,
    cost=cost,
    cases=(
        Case(batch=1, context=1, heads=1, kv_heads=1, head_dim=64, block_size=16),
        Case(batch=3, context=49, shortest=16, heads=7, kv_heads=1, head_dim=64, block_size=16, padded=2),
        Case(batch=4, context=65, shortest=2, heads=6, kv_heads=2, head_dim=80, block_size=32),
        Case(batch=2, context=257, shortest=256, heads=3, kv_heads=3, head_dim=128, block_size=256),
        Case(batch=3, context=129, shortest=1, heads=16, kv_heads=1, head_dim=96, block_size=48, padded=1),
        Case(batch=2, context=20, shortest=17, heads=4, kv_heads=2, head_dim=6, block_size=16),
        Case(batch=0, context=1, heads=2, kv_heads=1, head_dim=64, block_size=16, padded=2),
    ),
    large_cases=(
        *(
            Case(batch=batch, context=context, **_QWEN2_7B, block_size=256)
            for batch in (1, 8, 35)
            for context in (512, 4096)
        ),
        Case(batch=35, context=8127, shortest=128, **_QWEN2_7B, block_size=256),
        Case(batch=128, context=762, shortest=378, **_QWEN2_7B, block_size=256),
        Case(batch=256, context=1280, shortest=356, **_QWEN2_7B, block_size=256),
        Case(batch=35, context=4096, **_QWEN2_7B, block_size=16),
        Case(batch=35, context=4096, **_QWEN2_HALF_B, block_size=256),
    ),
    mutates=("k_cache", "v_cache"),
    parts=("rotary_store_kv", "paged_attention"),
)
