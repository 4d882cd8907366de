"""The seam of two blocks of a layer: a product that is added to the residual stream, and the norm of that sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import linear_add
from .dependent_launch import allow_next, dependent_launch, wait_for_previous
from .linear import skinny_product, split_product
from .linear_add import check_linear_add, linear_add_reference, skinny_linear_add
from .op import Case, Cost, Implementation, Op, needs_gpu
from .rms_norm import add_rms_norm, check_norm, rms_norm, rms_norm_reference


def linear_add_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
    *,
    linear_add: Callable = linear_add_reference,
    rms_norm: Callable = rms_norm_reference,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y, rms_norm(y)) with y = residual + x Wᵀ.

    x [tokens, in], weight [out, in], residual [tokens, out], norm_weight [out] → two of [tokens, out]. Without a
    norm_weight the second is None: what reads the norm computes it itself.
    """
    y = linear_add(x, weight, residual)
    return y, None if norm_weight is None else rms_norm(y, norm_weight, eps)


@triton.jit(do_not_specialize=["size"])
def _sum_and_norm_kernel(
    part_ptr,
    residual_ptr,
    norm_weight_ptr,
    y_ptr,
    normed_ptr,
    size,
    outputs,
    eps,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A row of y = Σ part_i + residual, in the order of the splits, and its RMSNorm."""
    allow_next(DEPENDENT)
    column = tl.arange(0, BLOCK)
    inside = column < outputs
    norm_weight = tl.load(norm_weight_ptr + column, mask=inside, other=0.0)
    tl.debug_barrier()  # without it ptxas loads the weight when the sum is there: one latency after the other
    wait_for_previous(DEPENDENT)
    place = tl.program_id(0).to(tl.int64) * outputs + column
    residual = tl.load(residual_ptr + place, mask=inside, other=0.0)
    y = tl.load(part_ptr + place, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        y += tl.load(part_ptr + split * size + place, mask=inside, other=0.0)
    y += residual.to(tl.float32)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)
    normed = y * tl.rsqrt(tl.sum(y * y, 0) / outputs + eps) * norm_weight.to(tl.float32)
    tl.store(normed_ptr + place, normed.to(normed_ptr.dtype.element_ty), mask=inside)


FEW_ROWS = 16
"""Up to these the sums are added by many programs and normed by another launch: one program a row leaves most of a GPU
idle. With more rows one launch is as fast or faster: `python -m bench.kernels linear_add_norm`, beside "unfused"."""


def skinny_linear_add_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `linear_add_norm_reference`; where one launch makes both, the norm is taken of the sum before that is rounded.

    That is the launch which adds up a split product, and beside cuBLAS's products `add_rms_norm`: where cuBLAS adds the
    residual, it and `rms_norm` take 2 µs longer (256 rows of 3584 × 3584 and 3584 × 18944 on an H100).
    ValueError for shapes and dtypes that do not fit each other.
    """
    if norm_weight is None:
        return skinny_linear_add(x, weight, residual), None
    check_linear_add("linear_add_norm", x, weight, residual)
    check_norm(residual, norm_weight)
    rows, outputs = residual.shape
    at_once = rows > FEW_ROWS and residual.is_contiguous()
    parts = split_product(x, weight) if at_once else None
    if parts is None:
        y = skinny_product(x, weight, residual=residual)
        if y is not None:
            return y, rms_norm(y, norm_weight, eps)
        normed, y = add_rms_norm(F.linear(x, weight), residual, norm_weight, eps)
        return y, normed
    y, normed = torch.empty_like(residual), torch.empty_like(residual)
    block = triton.next_power_of_2(outputs)
    _sum_and_norm_kernel[(rows,)](
        parts,
        residual,
        norm_weight,
        y,
        normed,
        rows * outputs,
        outputs,
        eps,
        BLOCK=block,
        SPLITS=len(parts),
        num_warps=min(16, max(1, block // 256)),
        **dependent_launch(x.device),
    )
    return y, normed


def make_inputs(
    rows: int,
    outputs: int,
    inputs: int,
    norm: bool = True,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> dict[str, Any]:
    call = linear_add.make_inputs(rows, outputs, inputs, dtype=dtype, device=device, generator=generator)
    norm_weight = 1 + torch.randn(outputs, dtype=dtype, device=device, generator=generator) / 8
    return call | {"norm_weight": norm_weight if norm else None, "eps": eps}


def cost(rows: int, outputs: int, inputs: int, norm: bool = True, eps: float = 1e-6, *, itemsize: int) -> Cost:
    product = linear_add.cost(rows, outputs, inputs, itemsize=itemsize)
    if not norm:
        return product
    normed = rows * outputs
    return Cost(product.read + outputs * itemsize, product.written + normed * itemsize, product.flops + 4 * normed)


OP = Op(
    "linear_add_norm",
    reference=linear_add_norm_reference,
    implementations={"skinny": Implementation(skinny_linear_add_norm, needs_gpu)},
    inputs=make_inputs,
    cost=cost,
    cases=(
        Case(rows=1, outputs=7, inputs=1000),
        Case(rows=1, outputs=5, inputs=2048, norm=False),
        Case(rows=2, outputs=130, inputs=264),
        Case(rows=8, outputs=192, inputs=640),
        Case(rows=8, outputs=192, inputs=640, norm=False),
        Case(rows=35, outputs=256, inputs=384, eps=2.0),
        Case(rows=65, outputs=64, inputs=128),
        Case(rows=70, outputs=64, inputs=8200),
        Case(rows=0, outputs=64, inputs=128),
    ),
    large_cases=tuple(
        Case(rows=rows, outputs=outputs, inputs=inputs)
        for outputs, inputs in ((3584, 3584), (3584, 18944), (896, 896), (896, 4864))
        for rows in (8, 35, 128, 256)
    ),
    parts=("linear_add", "rms_norm"),
)
