"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4), alone and with the residual added first."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .dependent_launch import allow_next, dependent_launch, wait_for_previous
from .op import Case, Cost, Implementation, Op, needs_gpu


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """y = x / sqrt(mean(x², dim=-1) + eps) · weight, the quotient computed in float32 at least.

    x [..., hidden], weight [hidden] → [..., hidden] in x's dtype
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(s), s) with s = x + residual, the residual stream.

    x, residual [tokens, hidden], weight [hidden] → two of [tokens, hidden]
    """
    residual = x + residual
    return rms_norm_reference(residual, weight, eps), residual


@triton.jit
def _normalize(x, weight, hidden, eps):
    """x [rows, columns] in float32, zeros past `hidden`."""
    mean_square = tl.sum(x * x, axis=1) / hidden
    return x * tl.rsqrt(mean_square + eps)[:, None] * weight.to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    rows,
    hidden,
    eps,
    stride_token,
    stride_head,
    HEADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    allow_next(DEPENDENT)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_HIDDEN)
    mask = (row < rows)[:, None] & (column < hidden)[None, :]
    x_row = x_ptr + (row // HEADS).to(tl.int64) * stride_token + (row % HEADS).to(tl.int64) * stride_head
    weight = tl.load(weight_ptr + column, mask=column < hidden, other=0.0)
    tl.debug_barrier()  # without it ptxas loads the weight when x is there: one latency after the other
    wait_for_previous(DEPENDENT)
    x = tl.load(x_row[:, None] + column[None, :], mask=mask, other=0.0)
    y = _normalize(x.to(tl.float32), weight, hidden, eps)
    tl.store((y_ptr + row.to(tl.int64) * hidden)[:, None] + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    sum_ptr,
    rows,
    hidden,
    eps,
    x_stride,
    residual_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    allow_next(DEPENDENT)
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK_HIDDEN)
    mask = (row < rows)[:, None] & (column < hidden)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < hidden, other=0.0)
    tl.debug_barrier()  # as above
    wait_for_previous(DEPENDENT)
    x = tl.load((x_ptr + row * x_stride)[:, None] + column[None, :], mask=mask, other=0.0)
    residual = tl.load((residual_ptr + row * residual_stride)[:, None] + column[None, :], mask=mask, other=0.0)
    total = x.to(tl.float32) + residual.to(tl.float32)
    out = (row * hidden)[:, None] + column[None, :]
    tl.store(sum_ptr + out, total.to(sum_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + out, _normalize(total, weight, hidden, eps).to(y_ptr.dtype.element_ty), mask=mask)


MAX_HIDDEN = 16384
"""A row stays in the registers of one program between its sum and its store."""


def _launch(rows: int, hidden: int, adds: bool) -> dict[str, int]:
    """BLOCK_ROWS, BLOCK_HIDDEN and num_warps for that many rows of `hidden` elements; adds: with a residual each.

    `python -m bench.tune rms_norm add_rms_norm` sweeps others.
    """
    block = triton.next_power_of_2(hidden)
    # As many as are on the GPU at once with one 16-byte load a thread are done soonest that way. With more, several
    # loads a thread keep more under way, and a warp that has a row to itself needs no barrier.
    few = rows * block <= 2**20
    if block == 1024 and not few:
        # 4096 rows of 896: several a program.
        block_rows, num_warps = (4, 2) if adds else (2, 4)
    elif block >= 1024:
        block_rows, num_warps = 1, min(16, block // (256 if few else 1024))
    else:
        # More threads than the weight has elements: then Triton has each thread load those it multiplies with, and
        # otherwise has them meet in shared memory.
        num_warps = min(8 if few else 4, max(1, block // 16))
        block_rows = max(1, num_warps * (256 if few else 512) // block)
    return {"BLOCK_ROWS": block_rows, "BLOCK_HIDDEN": block, "num_warps": num_warps}


def check_norm(x: torch.Tensor, weight: torch.Tensor) -> None:
    """ValueError where x [..., hidden] and weight [hidden] are not what the kernels take."""
    if x.dtype not in OP.dtypes or weight.dtype != x.dtype:
        raise ValueError(f"x and weight have one dtype of float16, bfloat16, float32, not {x.dtype} and {weight.dtype}")
    if weight.dim() != 1 or x.shape[-1:] != weight.shape:
        raise ValueError(f"x [..., hidden] and weight [hidden] do not fit: {list(x.shape)} and {list(weight.shape)}")
    if not 0 < x.shape[-1] <= MAX_HIDDEN:
        raise ValueError(f"hidden is 1 to {MAX_HIDDEN}, not {x.shape[-1]}")
    if x.stride(-1) != 1 or not weight.is_contiguous():
        raise ValueError(f"the last dimensions of x and weight are contiguous, and the strides are {x.stride()}")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `rms_norm_reference`. x is a view of any strides whose last dimension is contiguous: q in a fused q, k and v.

    It computes in float32 to the end and rounds once. ValueError for float64, for a hidden over MAX_HIDDEN, and where
    x is neither [tokens, hidden] nor [tokens, heads, hidden].
    """
    check_norm(x, weight)
    if not 2 <= x.dim() <= 3:
        raise ValueError(f"x is [tokens, hidden] or [tokens, heads, hidden], not {list(x.shape)}")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    heads, stride_token, stride_head = 1, x.stride(0), 0
    if x.dim() == 3:
        heads, stride_head = x.shape[1], x.stride(1)
        if stride_token == heads * stride_head:  # as far apart as the heads of one token: every head is a row
            heads, stride_token, stride_head = 1, stride_head, 0
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    launch = _launch(rows, hidden, False) | dependent_launch(x.device)
    grid = (triton.cdiv(rows, launch["BLOCK_ROWS"]),)
    _rms_norm_kernel[grid](x, weight, y, rows, hidden, eps, stride_token, stride_head, HEADS=heads, **launch)
    return y


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `add_rms_norm_reference`, the norm taken of the sum before that is rounded. ValueError as in `rms_norm`."""
    check_norm(x, weight)
    check_norm(residual, weight)
    if x.dim() != 2 or x.shape != residual.shape:
        raise ValueError(f"x and residual are [tokens, hidden] both, not {list(x.shape)} and {list(residual.shape)}")
    y, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    rows, hidden = x.shape
    if rows == 0:
        return y, total
    launch = _launch(rows, hidden, True) | dependent_launch(x.device)
    grid = (triton.cdiv(rows, launch["BLOCK_ROWS"]),)
    strides = x.stride(0), residual.stride(0)
    _add_rms_norm_kernel[grid](x, residual, weight, y, total, rows, hidden, eps, *strides, **launch)
    return y, total


def make_inputs(
    tokens: int,
    hidden: int,
    heads: int | None = None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> dict[str, Any]:
    """heads: x is [tokens, heads, hidden], part of a fused product as Qwen3's q and k are, with a head on each side."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float32, device=device, generator=generator).to(dtype)

    if heads is None:
        x = normal(tokens, hidden)
    else:
        fused = torch.full((tokens, heads + 2, hidden), torch.nan, dtype=dtype, device=device)
        x = fused[:, 1:-1]
        x.copy_(normal(tokens, heads, hidden))
    return {"x": x, "weight": 1 + normal(hidden) / 8, "eps": 1e-6}


def make_add_inputs(
    tokens: int, hidden: int, *, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    options = {"dtype": dtype, "device": device, "generator": generator}
    residual = make_inputs(tokens, hidden, **options)["x"]
    return {"residual": 4 * residual, **make_inputs(tokens, hidden, **options)}


def cost(tokens: int, hidden: int, heads: int | None = None, *, itemsize: int) -> Cost:
    elements = tokens * (heads or 1) * hidden
    return Cost(read=(elements + hidden) * itemsize, written=elements * itemsize, flops=4 * elements)


def add_cost(tokens: int, hidden: int, *, itemsize: int) -> Cost:
    elements = tokens * hidden
    return Cost(read=(2 * elements + hidden) * itemsize, written=2 * elements * itemsize, flops=5 * elements)


_CASES = (
    Case(tokens=1, hidden=896),
    Case(tokens=7, hidden=1000),
    Case(tokens=3, hidden=1),
    Case(tokens=19, hidden=37),
    Case(tokens=1, hidden=MAX_HIDDEN),
    Case(tokens=0, hidden=64),
)
_LARGE_CASES = (
    *(Case(tokens=tokens, hidden=3584) for tokens in (1, 8, 35, 128, 256, 4096)),
    *(Case(tokens=tokens, hidden=896) for tokens in (1, 35, 4096)),
)

OP = Op(
    "rms_norm",
    reference=rms_norm_reference,
    implementations={"triton": Implementation(rms_norm, needs_gpu)},
    inputs=make_inputs,
    cost=cost,
    cases=(
        *_CASES,
        Case(tokens=1, heads=1, hidden=64),
        Case(tokens=5, heads=3, hidden=80),
        Case(tokens=13, heads=7, hidden=128),
        Case(tokens=4, heads=2, hidden=15),
        Case(tokens=205, heads=7, hidden=16),
        Case(tokens=0, heads=2, hidden=16),
    ),
    large_cases=(*_LARGE_CASES, Case(tokens=1, heads=32, hidden=128), Case(tokens=4096, heads=32, hidden=128)),
)
ADD_OP = Op(
    "add_rms_norm",
    reference=add_rms_norm_reference,
    implementations={"triton": Implementation(add_rms_norm, needs_gpu)},
    inputs=make_add_inputs,
    cost=add_cost,
    cases=_CASES,
    large_cases=_LARGE_CASES,
)
