"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34), on halves as GPT-NeoX pairs them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .dependent_launch import allow_next, dependent_launch, wait_for_previous
from .op import Case, Cost, Implementation, Op, needs_gpu


def rotary_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates the pairs (x[i], x[i + head_dim/2]) of each head by the angle of the token's position.

    q [tokens, heads, head_dim], k [tokens, kv_heads, head_dim], cos and sin [positions, head_dim/2] in float32,
    positions [tokens] → q and k rotated, in their dtype
    """
    cos = cos[positions].unsqueeze(1)
    sin = sin[positions].unsqueeze(1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


@triton.jit
def head_pointers(
    q_ptr, k_ptr, token, head, q_stride_token, q_stride_head, k_stride_token, k_stride_head, HEADS: tl.constexpr
):
    """Where the heads of tokens begin; behind those of q come those of k.

    token [tokens, 1, 1] int64, head [1, heads, 1] int32
    """
    return tl.where(
        head < HEADS,
        q_ptr + token * q_stride_token + head.to(tl.int64) * q_stride_head,
        k_ptr + token * k_stride_token + (head - HEADS).to(tl.int64) * k_stride_head,
    )


@triton.jit
def rotate(low, high, cos, sin):
    """The halves of heads, rotated, in float32."""
    low, high = low.to(tl.float32), high.to(tl.float32)
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def tokens_of_program(program, tokens, BLOCK_TOKENS: tl.constexpr):
    """[BLOCK_TOKENS, 1, 1] int64; a program that has too few repeats the last, and writes it again."""
    token = program.to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None, None]
    if BLOCK_TOKENS > 1:
        token = tl.minimum(token, tokens - 1)
    return token


@triton.jit(do_not_specialize=["tokens"])
def _rotary_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    q_out_ptr,
    k_out_ptr,
    tokens,
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    allow_next(DEPENDENT)
    GROUPS: tl.constexpr = (HEADS + KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    token = tokens_of_program(tl.program_id(0) // GROUPS, tokens, BLOCK_TOKENS)
    head = (tl.program_id(0) % GROUPS * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[None, :, None]
    column = tl.arange(0, BLOCK_HALF)[None, None, :]
    mask = (head < HEADS + KV_HEADS) & (column < HALF)

    # Two latencies follow each other, the position's and that of cos and sin; all else is loaded meanwhile. Without the
    # barrier ptxas loads it where it is used, behind the wait for them.
    wait_for_previous(DEPENDENT)
    position = tl.load(positions_ptr + token).to(tl.int64)
    source = head_pointers(
        q_ptr, k_ptr, token, head, q_stride_token, q_stride_head, k_stride_token, k_stride_head, HEADS
    )
    low = tl.load(source + column, mask=mask, other=0.0)
    high = tl.load(source + HALF + column, mask=mask, other=0.0)
    tl.debug_barrier()
    cos = tl.load(cos_ptr + position * HALF + column, mask=column < HALF, other=0.0)
    sin = tl.load(sin_ptr + position * HALF + column, mask=column < HALF, other=0.0)

    low, high = rotate(low, high, cos, sin)
    DIM: tl.constexpr = 2 * HALF
    target = head_pointers(q_out_ptr, k_out_ptr, token, head, HEADS * DIM, DIM, KV_HEADS * DIM, DIM, HEADS)
    tl.store(target + column, low.to(q_out_ptr.dtype.element_ty), mask=mask)
    tl.store(target + HALF + column, high.to(q_out_ptr.dtype.element_ty), mask=mask)


def launch_shape(tokens: int, heads: int, half: int, most_heads: int) -> dict[str, int]:
    """The kernels' BLOCK_ constants, BLOCK_HEADS at most `most_heads`, and num_warps.

    heads: q's and k's together; half: of a head's dimensions
    """
    block_half, block_heads = triton.next_power_of_2(half), triton.next_power_of_2(heads)
    if tokens > 2048 and block_half <= 32:
        # Short heads are little work for a program of one token, and thousands of programs are long in starting. There
        # is a thread for each element of the tokens' cos and sin; `python -m bench.tune rotary` sweeps others.
        shape = {"BLOCK_TOKENS": 4, "BLOCK_HEADS": min(block_heads, 8)}
        return shape | {"BLOCK_HALF": block_half, "num_warps": max(1, block_half // 8)}
    return {
        "BLOCK_TOKENS": 1,
        # Few tokens: one load of each half and of cos and sin a thread, the soonest done. Many: eight elements of
        # several heads a thread, so that more is under way and cos and sin serve more than one.
        "BLOCK_HEADS": min(block_heads, 8 if tokens <= 256 else most_heads),
        "BLOCK_HALF": block_half,
        # More threads than the table's row has elements: then Triton has each thread load those it multiplies with,
        # and otherwise has them meet in shared memory.
        "num_warps": min(16, max(1, block_half // 16)),
    }


def check_table(cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, tokens: int, head_dim: int) -> None:
    """ValueError for a table or positions that do not fit so many tokens and dimensions."""
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32 or table.dim() != 2 or table.shape[1] != head_dim // 2:
            raise ValueError(f"{name} is [positions, head_dim/2] in float32, not {list(table.shape)} in {table.dtype}")
        if not table.is_contiguous():
            raise ValueError(f"{name} is contiguous, not of strides {table.stride()}")
    if positions.shape != (tokens,) or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"positions is [tokens] in int32 or int64, not {list(positions.shape)} in {positions.dtype}")
    if not positions.is_contiguous():
        raise ValueError(f"positions is contiguous, not of strides {positions.stride()}")


def check_arguments(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> None:
    """ValueError for what `rotary` does not take."""
    if q.dtype not in OP.dtypes or k.dtype != q.dtype:
        raise ValueError(f"q and k have one dtype of float16, bfloat16, float32, not {q.dtype} and {k.dtype}")
    if q.dim() != 3 or k.dim() != 3 or q.shape[::2] != k.shape[::2] or q.shape[2] % 2:
        raise ValueError(
            "q is [tokens, heads, head_dim] and k is [tokens, kv_heads, head_dim], head_dim even, not "
            f"{list(q.shape)} and {list(k.shape)}"
        )
    if q.stride(2) != 1 or k.stride(2) != 1:
        raise ValueError(f"the last dimensions of q and k are contiguous, not of strides {q.stride()} and {k.stride()}")
    check_table(cos, sin, positions, len(q), q.shape[2])


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `rotary_reference`. q and k are views of any strides whose last dimension is contiguous.

    Positions outside the table are not seen. ValueError for float64, shapes that do not fit, an odd head_dim.
    """
    check_arguments(q, k, cos, sin, positions)
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    tokens, heads, head_dim = q.shape
    total = heads + k.shape[1]
    if tokens * total * head_dim == 0:
        return q_out, k_out
    launch = launch_shape(tokens, total, head_dim // 2, most_heads=32)
    grid = (triton.cdiv(tokens, launch["BLOCK_TOKENS"]) * triton.cdiv(total, launch["BLOCK_HEADS"]),)
    _rotary_kernel[grid](
        q,
        k,
        cos,
        sin,
        positions,
        q_out,
        k_out,
        tokens,
        *q.stride()[:2],
        *k.stride()[:2],
        HEADS=heads,
        KV_HEADS=k.shape[1],
        HALF=head_dim // 2,
        **launch,
        **dependent_launch(q.device),
    )
    return q_out, k_out


def fused_qkv(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v as a model has them: parts of one product."""
    shape = (tokens, heads + 2 * kv_heads, head_dim)
    product = torch.randn(shape, dtype=torch.float32, device=device, generator=generator).to(dtype)
    return product.split((heads, kv_heads, kv_heads), dim=1)


def table_and_positions(
    tokens: int, head_dim: int, *, device: torch.device, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """cos, sin and positions, all different; NaN at the positions that no token has."""
    length = tokens + 64
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency)
    order = torch.randperm(length, generator=generator, device=device)
    angle[order[tokens:]] = torch.nan
    return angle.cos(), angle.sin(), order[:tokens]


def make_inputs(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> dict[str, Any]:
    q, k, _ = fused_qkv(tokens, heads, kv_heads, head_dim, dtype=dtype, device=device, generator=generator)
    cos, sin, positions = table_and_positions(tokens, head_dim, device=device, generator=generator)
    return {"q": q, "k": k, "cos": cos, "sin": sin, "positions": positions}


def cost(tokens: int, heads: int, kv_heads: int, head_dim: int, *, itemsize: int) -> Cost:
    elements = tokens * (heads + kv_heads) * head_dim
    table = tokens * head_dim * 4 + tokens * 8  # float32 cos and sin, int64 positions
    return Cost(read=elements * itemsize + table, written=elements * itemsize, flops=3 * elements)


OP = Op(
    "rotary",
    reference=rotary_reference,
    implementations={"triton": Implementation(rotary, needs_gpu)},
    inputs=make_inputs,
    cost=cost,
    cases=(
        Case(tokens=1, heads=28, kv_heads=4, head_dim=128),
        Case(tokens=7, heads=14, kv_heads=2, head_dim=64),
        Case(tokens=3, heads=5, kv_heads=1, head_dim=80),
        Case(tokens=5, heads=40, kv_heads=8, head_dim=96),
        Case(tokens=2, heads=4, kv_heads=4, head_dim=256),
        Case(tokens=9, heads=3, kv_heads=3, head_dim=4),
        Case(tokens=2, heads=1, kv_heads=1, head_dim=2),
        Case(tokens=30, heads=20, kv_heads=1, head_dim=16),
        Case(tokens=0, heads=4, kv_heads=2, head_dim=8),
    ),
    large_cases=tuple(
        Case(tokens=tokens, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        for heads, kv_heads, head_dim in ((28, 4, 128), (14, 2, 64))
        for tokens in (1, 8, 35, 128, 256, 4096)
    ),
)
