"""Rotary position embedding of q and k, and the write of k and v into the paged cache, in one launch.

Sources: Su et al. 2021, arXiv:2104.09864, eq. 34; Kwon et al. 2023, arXiv:2309.06180, section 4.3.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .dependent_launch import allow_next, dependent_launch, wait_for_previous
from .op import Case, Cost, Implementation, Op, needs_gpu
from .rotary import (
    check_arguments,
    fused_qkv,
    head_pointers,
    launch_shape,
    rotary_reference,
    rotate,
    table_and_positions,
    tokens_of_program,
)


def store_kv_reference(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """cache[slot // block_size, slot % block_size] = row, in place; a row whose slot is negative is written nowhere.

    k, v [tokens, kv_heads, head_dim]; k_cache, v_cache [blocks, block_size, kv_heads, head_dim];
    slot_mapping [tokens] int64, no slot twice
    """
    written = slot_mapping >= 0
    slots = slot_mapping[written]
    block, offset = slots // k_cache.shape[1], slots % k_cache.shape[1]
    k_cache[block, offset] = k[written]
    v_cache[block, offset] = v[written]


def rotary_store_kv_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """`rotary_reference`, then `store_kv_reference` of the rotated k and of v; their shapes hold here.

    → q rotated, [tokens, heads, head_dim]
    """
    q, k = rotary_reference(q, k, cos, sin, positions)
    store_kv_reference(k, v, k_cache, v_cache, slot_mapping)
    return q


@triton.jit(do_not_specialize=["tokens"])
def _rotary_store_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    q_out_ptr,
    tokens,
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    k_cache_stride_block,
    k_cache_stride_token,
    k_cache_stride_head,
    v_cache_stride_block,
    v_cache_stride_token,
    v_cache_stride_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_V_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    allow_next(DEPENDENT)
    GROUPS: tl.constexpr = (HEADS + KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    token = tokens_of_program(tl.program_id(0) // GROUPS, tokens, BLOCK_TOKENS)
    group = tl.program_id(0) % GROUPS
    head = (group * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[None, :, None]
    column = tl.arange(0, BLOCK_HALF)[None, None, :]
    mask = (head < HEADS + KV_HEADS) & (column < HALF)
    # A token's groups share the heads of v.
    v_head = (group * BLOCK_V_HEADS + tl.arange(0, BLOCK_V_HEADS))[None, :, None]
    dim = tl.arange(0, BLOCK_DIM)[None, None, :]
    v_mask = (v_head < KV_HEADS) & (dim < 2 * HALF)

    # The order of the loads and the barrier are as in rotary's kernel. The slot, which the stores alone need, comes
    # late and is in no load's mask: nothing waits for it before cos and sin are on their way.
    wait_for_previous(DEPENDENT)
    position = tl.load(positions_ptr + token).to(tl.int64)
    source = head_pointers(
        q_ptr, k_ptr, token, head, q_stride_token, q_stride_head, k_stride_token, k_stride_head, HEADS
    )
    low = tl.load(source + column, mask=mask, other=0.0)
    high = tl.load(source + HALF + column, mask=mask, other=0.0)
    v_source = v_ptr + token * v_stride_token + v_head.to(tl.int64) * v_stride_head
    v = tl.load(v_source + dim, mask=v_mask, other=0.0)
    tl.debug_barrier()
    slot = tl.load(slots_ptr + token)
    cos = tl.load(cos_ptr + position * HALF + column, mask=column < HALF, other=0.0)
    sin = tl.load(sin_ptr + position * HALF + column, mask=column < HALF, other=0.0)

    low, high = rotate(low, high, cos, sin)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    k_target = k_cache_ptr + block * k_cache_stride_block + offset * k_cache_stride_token
    v_target = v_cache_ptr + block * v_cache_stride_block + offset * v_cache_stride_token
    target = tl.where(
        head < HEADS,
        q_out_ptr + token * (HEADS * 2 * HALF) + head * (2 * HALF),
        k_target + (head - HEADS).to(tl.int64) * k_cache_stride_head,
    )
    kv_written = tl.where(slot >= 0, KV_HEADS, 0)  # without a slot q alone is
    mask = mask & (head < HEADS + kv_written)
    tl.store(target + column, low.to(q_out_ptr.dtype.element_ty), mask=mask)
    tl.store(target + HALF + column, high.to(q_out_ptr.dtype.element_ty), mask=mask)
    v_target += v_head.to(tl.int64) * v_cache_stride_head
    tl.store(v_target + dim, v, mask=v_mask & (v_head < kv_written))


def check_cache(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    tokens: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    """ValueError for a cache or slots that do not fit so many tokens, heads and dimensions in that dtype."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4 or cache.shape[2:] != (kv_heads, head_dim) or cache.dtype != dtype or cache.stride(3) != 1:
            raise ValueError(
                f"{name} is [blocks, block_size, {kv_heads}, {head_dim}] in {dtype} with a contiguous last "
                f"dimension, not {list(cache.shape)} in {cache.dtype} with strides {cache.stride()}"
            )
    if k_cache.shape != v_cache.shape:
        raise ValueError(f"the caches are of different shapes: {list(k_cache.shape)} and {list(v_cache.shape)}")
    if slot_mapping.shape != (tokens,) or slot_mapping.dtype != torch.int64:
        raise ValueError(f"slot_mapping is [tokens] in int64, not {list(slot_mapping.shape)} in {slot_mapping.dtype}")
    if not slot_mapping.is_contiguous():
        raise ValueError(f"slot_mapping is contiguous, not of strides {slot_mapping.stride()}")


def check_rotary_store_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """ValueError for what `rotary_store_kv` does not take."""
    check_arguments(q, k, cos, sin, positions)
    if v.shape != k.shape or v.dtype != k.dtype or v.stride(2) != 1:
        raise ValueError(
            f"v is as k, {list(k.shape)} in {k.dtype}, with a contiguous last dimension, not {list(v.shape)} in "
            f"{v.dtype} with strides {v.stride()}"
        )
    check_cache(k_cache, v_cache, slot_mapping, len(q), *k.shape[1:], k.dtype)


def rotary_store_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """As `rotary_store_kv_reference`. q, k, v and the caches have any strides, their last dimensions being contiguous.

    Positions outside the table and slots outside the cache are not seen. ValueError for float64, for a cache of another
    dtype than k's, and for shapes that do not fit.
    """
    check_rotary_store_kv(q, k, v, cos, sin, positions, k_cache, v_cache, slot_mapping)
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    if q.numel() + k.numel() == 0:
        return q_out
    launch = launch_shape(tokens, heads + kv_heads, head_dim // 2, most_heads=16)
    groups = triton.cdiv(heads + kv_heads, launch["BLOCK_HEADS"])
    _rotary_store_kv_kernel[(triton.cdiv(tokens, launch["BLOCK_TOKENS"]) * groups,)](
        q,
        k,
        v,
        cos,
        sin,
        positions,
        k_cache,
        v_cache,
        slot_mapping,
        q_out,
        tokens,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        BLOCK_SIZE=k_cache.shape[1],
        BLOCK_V_HEADS=triton.next_power_of_2(triton.cdiv(kv_heads, groups)),
        BLOCK_DIM=triton.next_power_of_2(head_dim),
        **launch,
        **dependent_launch(q.device),
    )
    return q_out


def make_inputs(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    padded: int = 0,
    heads_first: bool = False,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> dict[str, Any]:
    """The tokens go to random slots, the last `padded` of them nowhere.

    heads_first: the caches lie in memory as [blocks, kv_heads, block_size, head_dim], in one tensor
    """
    options = {"device": device, "generator": generator}
    q, k, v = fused_qkv(tokens, heads, kv_heads, head_dim, dtype=dtype, **options)
    cos, sin, positions = table_and_positions(tokens, head_dim, **options)
    blocks = -(-tokens // block_size) + 2
    slots = torch.randperm(blocks * block_size, **options)[:tokens]
    slots[tokens - padded :] = -1
    shape = (kv_heads, block_size) if heads_first else (block_size, kv_heads)
    caches = torch.randn(2, blocks, *shape, head_dim, dtype=torch.float32, **options).to(dtype)
    k_cache, v_cache = caches.transpose(2, 3) if heads_first else caches
    return {
        "q": q,
        "k": k,
        "v": v,
        "cos": cos,
        "sin": sin,
        "positions": positions,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "slot_mapping": slots,
    }


def cost(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    padded: int = 0,
    heads_first: bool = False,
    *,
    itemsize: int,
) -> Cost:
    token = (heads + 2 * kv_heads) * head_dim * itemsize
    table = head_dim * 4 + 16  # float32 cos and sin, an int64 position and a slot
    nowhere = padded * 2 * kv_heads * head_dim * itemsize
    return Cost(
        read=tokens * (token + table) - nowhere,
        written=tokens * token - nowhere,
        flops=3 * tokens * (heads + kv_heads) * head_dim,
    )


OP = Op(
    "rotary_store_kv",
    reference=rotary_store_kv_reference,
    implementations={"triton": Implementation(rotary_store_kv, needs_gpu)},
    inputs=make_inputs,
    cost=cost,
    cases=(
        Case(tokens=1, heads=28, kv_heads=4, head_dim=128, block_size=256),
        Case(tokens=7, heads=14, kv_heads=2, head_dim=64, block_size=16, padded=2),
        Case(tokens=5, heads=12, kv_heads=2, head_dim=64, block_size=16, heads_first=True),
        Case(tokens=3, heads=5, kv_heads=1, head_dim=80, block_size=3),
        Case(tokens=5, heads=40, kv_heads=8, head_dim=96, block_size=16, padded=1),
        Case(tokens=2, heads=4, kv_heads=4, head_dim=256, block_size=32),
        Case(tokens=3, heads=16, kv_heads=16, head_dim=16, block_size=4, padded=3),
        Case(tokens=9, heads=3, kv_heads=3, head_dim=4, block_size=5, padded=4),
        Case(tokens=2, heads=1, kv_heads=1, head_dim=2, block_size=1),
        Case(tokens=30, heads=20, kv_heads=1, head_dim=8, block_size=64, padded=7),
        Case(tokens=0, heads=4, kv_heads=2, head_dim=8, block_size=16),
    ),
    large_cases=tuple(
        Case(tokens=tokens, heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=256)
        for heads, kv_heads, head_dim in ((28, 4, 128), (14, 2, 64))
        for tokens in (1, 8, 35, 128, 256, 4096)
    ),
    mutates=("k_cache", "v_cache"),
)
