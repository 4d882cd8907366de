"""All of a layer before its attention, RMSNorm, the q, k and v products, rotary and the KV write, in one launch for one
token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from . import norm_linear as norm_product
from . import rotary_store_kv as rotary_store
from .dependent_launch import allow_next, dependent_launch, wait_for_previous
from .norm_linear import check_norm_product, norm_linear_reference, refuse_rows
from .op import Case, Cost, Implementation, Op, needs_gpu
from .rotary import check_table, rotate
from .rotary_store_kv import check_cache, rotary_store_kv_reference
from .skinny_kernels import first_tile, product_from


def norm_qkv_rotary_store_kv_reference(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    heads: int,
    *,
    norm_linear: Callable = norm_linear_reference,
    rotary_store_kv: Callable = rotary_store_kv_reference,
) -> torch.Tensor:
    """`rotary_store_kv_reference` of [q, k, v] = rms_norm(x) Wᵀ + b; its shapes hold here.

    x [tokens, in], norm_weight [in], weight [(heads + 2·kv_heads)·head_dim, in], bias, one for each output, or None
    → q rotated, [tokens, heads, head_dim]
    """
    kv_heads, head_dim = k_cache.shape[2:]
    qkv = norm_linear(x, norm_weight, eps, weight, bias).view(-1, heads + 2 * kv_heads, head_dim)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    return rotary_store_kv(q, k, v, cos, sin, positions, k_cache, v_cache, slot_mapping)


@triton.jit
def _kernel(
    x_ptr,
    norm_weight_ptr,
    eps,
    weight_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    q_out_ptr,
    inputs,
    weight_stride,
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
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """BLOCK_OUT pairs of elements of the heads of q, k and v in a row: the low ones are the even rows of a tile, the
    high ones, half a head behind, the odd.
    """
    allow_next(DEPENDENT)
    first = tl.program_id(0) * BLOCK_OUT
    row = tl.arange(0, 2 * BLOCK_OUT)
    pair = first + row // 2
    inside = pair < (HEADS + 2 * KV_HEADS) * HALF
    out = pair // HALF * (2 * HALF) + pair % HALF + row % 2 * HALF
    weight_row = weight_ptr + out.to(tl.int64)[:, None] * weight_stride
    weight, norm_weight = first_tile(weight_row, norm_weight_ptr, inside, inputs, BLOCK_IN, EVEN)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + out, mask=inside, other=0.0)

    pair = first + tl.arange(0, BLOCK_OUT)
    head, column = pair // HALF, pair % HALF
    rotated = head < HEADS + KV_HEADS
    # The slot comes before x though the stores alone need it, and so do cos and sin, which wait for the position: they
    # are there when the product is done.
    wait_for_previous(DEPENDENT)
    position = tl.load(positions_ptr).to(tl.int64)
    slot = tl.load(slots_ptr)
    cos = tl.load(cos_ptr + position * HALF + column, mask=rotated, other=1.0)  # v is turned by no angle
    sin = tl.load(sin_ptr + position * HALF + column, mask=rotated, other=0.0)
    y = product_from(
        weight,
        norm_weight,
        x_ptr,
        norm_weight_ptr,
        eps,
        weight_row,
        inside,
        inputs,
        2 * BLOCK_OUT,
        BLOCK_IN,
        UNROLL,
        EVEN,
    )
    if bias_ptr is not None:
        y += bias.to(tl.float32)

    low, high = tl.split(tl.reshape(y, [BLOCK_OUT, 2]))
    low, high = rotate(low, high, cos, sin)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    k_target = k_cache_ptr + block * k_cache_stride_block + offset * k_cache_stride_token
    v_target = v_cache_ptr + block * v_cache_stride_block + offset * v_cache_stride_token
    target = tl.where(
        rotated,
        k_target + (head - HEADS).to(tl.int64) * k_cache_stride_head,
        v_target + (head - HEADS - KV_HEADS).to(tl.int64) * v_cache_stride_head,
    )
    target = tl.where(head < HEADS, q_out_ptr + head * (2 * HALF), target) + column
    mask = head < HEADS + tl.where(slot >= 0, 2 * KV_HEADS, 0)  # without a slot q alone is written
    tl.store(target, low.to(q_out_ptr.dtype.element_ty), mask=mask)
    tl.store(target + HALF, high.to(q_out_ptr.dtype.element_ty), mask=mask)


def _launch(pairs: int, inputs: int) -> dict[str, int]:
    """As for `norm_linear`; BLOCK_OUT counts the pairs.

    `python -m bench.tune norm_qkv_rotary_store_kv` sweeps others.
    """
    if inputs <= 1024:
        return {"BLOCK_OUT": 2, "BLOCK_IN": 1024, "UNROLL": 1, "num_warps": 2}
    return {"BLOCK_OUT": 1, "BLOCK_IN": 256, "UNROLL": 2, "num_warps": 1}


def norm_qkv_rotary_store_kv(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """As `norm_qkv_rotary_store_kv_reference` for one token, in float32 to the end and rounded once.

    The caches have any strides, their last dimensions being contiguous. Positions outside the table and slots outside
    the cache are not seen.

    ValueError for an odd head_dim and for a weight of other than so many heads, and as in `norm_linear` and
    `rotary_store_kv`.
    """
    name = "norm_qkv_rotary_store_kv"
    check_norm_product(name, x, norm_weight, weight)
    kv_heads, head_dim = k_cache.shape[-2:]
    check_cache(k_cache, v_cache, slot_mapping, len(x), kv_heads, head_dim, x.dtype)
    check_table(cos, sin, positions, len(x), head_dim)
    if head_dim % 2 or len(weight) != (heads + 2 * kv_heads) * head_dim:
        raise ValueError(
            f"{name}: weight is [({heads} + 2·{kv_heads})·{head_dim}, in], head_dim even, not {list(weight.shape)}"
        )
    q_out = torch.empty(len(x), heads, head_dim, dtype=x.dtype, device=x.device)
    if len(x) * len(weight) == 0:
        return q_out
    half, inputs = head_dim // 2, x.shape[1]
    pairs = len(weight) // 2
    launch = _launch(pairs, inputs)
    _kernel[(triton.cdiv(pairs, launch["BLOCK_OUT"]),)](
        x,
        norm_weight,
        eps,
        weight,
        bias,
        cos,
        sin,
        positions,
        k_cache,
        v_cache,
        slot_mapping,
        q_out,
        inputs,
        weight.stride(0),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=half,
        BLOCK_SIZE=k_cache.shape[1],
        EVEN=inputs % launch["BLOCK_IN"] == 0,
        **launch,
        **dependent_launch(x.device),
    )
    return q_out


def make_inputs(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    inputs: int,
    block_size: int,
    bias: bool = False,
    padded: int = 0,
    heads_first: bool = False,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> dict[str, Any]:
    """padded, heads_first: as in `rotary_store_kv`"""
    options = {"dtype": dtype, "device": device, "generator": generator}
    product = norm_product.make_inputs(tokens, (heads + 2 * kv_heads) * head_dim, inputs, bias, eps, **options)
    rest = rotary_store.make_inputs(tokens, heads, kv_heads, head_dim, block_size, padded, heads_first, **options)
    return product | {name: rest[name] for name in rest if name not in ("q", "k", "v")} | {"heads": heads}


def cost(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    inputs: int,
    block_size: int,
    bias: bool = False,
    padded: int = 0,
    heads_first: bool = False,
    eps: float = 1e-6,
    *,
    itemsize: int,
) -> Cost:
    product = norm_product.cost(tokens, (heads + 2 * kv_heads) * head_dim, inputs, bias, itemsize=itemsize)
    table = head_dim * 4 + 16  # float32 cos and sin, an int64 position and a slot
    return Cost(
        read=product.read + tokens * table,
        written=product.written - padded * 2 * kv_heads * head_dim * itemsize,
        flops=product.flops + 3 * tokens * (heads + kv_heads) * head_dim,
    )


OP = Op(
    "norm_qkv_rotary_store_kv",
    reference=norm_qkv_rotary_store_kv_reference,
    implementations={"triton": Implementation(norm_qkv_rotary_store_kv, needs_gpu, refuses=refuse_rows, most_rows=1)},
    inputs=make_inputs,
    cost=cost,
    cases=(
        Case(tokens=1, heads=3, kv_heads=1, head_dim=2, inputs=2048, block_size=1, bias=True),
        Case(tokens=1, heads=1, kv_heads=1, head_dim=64, inputs=64, block_size=16, bias=True),
        Case(tokens=1, heads=1, kv_heads=1, head_dim=80, inputs=40, block_size=3, eps=8.0),
        Case(tokens=1, heads=2, kv_heads=2, head_dim=10, inputs=1000, block_size=16, bias=True, heads_first=True),
        Case(tokens=1, heads=2, kv_heads=1, head_dim=6, inputs=1288, block_size=5, bias=True, padded=1),
        Case(tokens=3, heads=4, kv_heads=2, head_dim=8, inputs=64, block_size=16, bias=True, padded=1),
        Case(tokens=0, heads=4, kv_heads=2, head_dim=8, inputs=64, block_size=16),
    ),
    large_cases=(
        Case(tokens=1, heads=28, kv_heads=4, head_dim=128, inputs=3584, block_size=256, bias=True),
        Case(tokens=1, heads=14, kv_heads=2, head_dim=64, inputs=896, block_size=256, bias=True),
    ),
    mutates=("k_cache", "v_cache"),
    parts=("norm_linear", "rotary_store_kv"),
)
