"""The product that makes gate and up, and SwiGLU of it: in one launch, where that is faster, and neither is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from . import linear
from .dependent_launch import allow_next, dependent_launch, wait_for_previous
from .hopper_linear_swiglu import MOST_ROWS, hopper_linear_swiglu, refused_by_hopper
from .hopper_prefill_linear_swiglu import hopper_prefill_linear_swiglu, refused_by_hopper_prefill
from .linear import check_product, linear_reference, skinny_linear
from .op import Case, Cost, Implementation, Op, needs_gpu
from .skinny_kernels import prefetch
from .swiglu import swiglu, swiglu_reference


def linear_swiglu_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    linear: Callable = linear_reference,
    swiglu: Callable = swiglu_reference,
) -> torch.Tensor:
    """y = silu(gate) · up with [gate, up] = x Wᵀ.

    x [tokens, in], weight [2·intermediate, in] → [tokens, intermediate]
    """
    return swiglu(linear(x, weight))


@triton.jit
def _kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    rows,
    intermediate,
    inputs,
    x_stride,
    weight_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    AHEAD: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """BLOCK_OUT columns of y, from as many rows of the weight for the gate and for up.

    The weight is the left operand, because 64 rows are the least that the matrix unit takes.
    """
    allow_next(DEPENDENT)
    row = tl.arange(0, BLOCK_ROWS)
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    columns = tl.arange(0, BLOCK_IN)
    gate_row = weight_ptr + out.to(tl.int64)[:, None] * weight_stride
    up_row = gate_row + intermediate.to(tl.int64) * weight_stride
    x_row = x_ptr + row[None, :] * x_stride
    if DEPENDENT:
        # Triton moves the loads of a pipelined loop above a wait that is in it (triton issue 11905).
        prefetch(gate_row, out < intermediate, 0, inputs, AHEAD)
        prefetch(up_row, out < intermediate, 0, inputs, AHEAD)
    wait_for_previous(DEPENDENT)
    gate = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    up = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    for start in tl.range(0, inputs, BLOCK_IN, num_stages=STAGES):
        column = start + columns
        if EVEN:
            gate_weight = tl.load(gate_row + column[None, :], eviction_policy="evict_first")
            up_weight = tl.load(up_row + column[None, :], eviction_policy="evict_first")
            x = tl.load(x_row + column[:, None], mask=(row < rows)[None, :], other=0.0)
        else:
            mask = (out < intermediate)[:, None] & (column < inputs)[None, :]
            gate_weight = tl.load(gate_row + column[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
            up_weight = tl.load(up_row + column[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_row + column[:, None], mask=(row < rows)[None, :] & (column < inputs)[:, None], other=0.0)
        gate = tl.dot(gate_weight, x, gate, input_precision="ieee")
        up = tl.dot(up_weight, x, up, input_precision="ieee")
    y = gate / (1 + tl.exp(-gate)) * up
    place = row[None, :].to(tl.int64) * intermediate + out[:, None]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=(row < rows)[None, :] & (out < intermediate)[:, None])


FEW_ROWS = 64
"""The most that `_kernel` takes: with more, cuBLAS and SwiGLU behind it are faster."""

HOPPER_ROWS = range(33, MOST_ROWS + 1)
"""Where the kernel for Hopper is the fastest, for the sizes that it takes: `python -m bench.kernels linear_swiglu`."""

HOPPER_PREFILL_FROM = 640
"""From so many rows on the one for a prefill is, where it keeps the GPU busy; with fewer, cuBLAS and SwiGLU are."""


def _launch(rows: int, intermediate: int, inputs: int) -> dict[str, int]:
    """A tile of BLOCK_OUT gates and as many ups, and AHEAD as for `linear`; with 0 it is no dependent launch. Programs
    that read for long, several on each multiprocessor, are faster without those of the next launch beside them.
    `python -m bench.tune linear_swiglu` sweeps others.
    """
    if inputs <= 1024:
        return {"BLOCK_OUT": 64, "BLOCK_IN": 64, "AHEAD": 128, "STAGES": 5, "num_warps": 4}
    block_in, stages = (128, 2) if rows <= 16 else (64, 3)
    return {"BLOCK_OUT": 64, "BLOCK_IN": block_in, "AHEAD": 0, "STAGES": stages, "num_warps": 4}


def fused_linear_swiglu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `linear_swiglu_reference` in one launch, in float32 to the end and rounded once: for up to 64 tokens in 16
    bits, and for more where a Hopper kernel takes them (`refused_by_hopper`, `refused_by_hopper_prefill`). Else it is
    `skinny_linear` and then `swiglu`.

    Equal inputs give equal bits. ValueError for an odd number of outputs, for float64, for shapes and dtypes that do
    not fit each other, and for a last dimension that is not contiguous.
    """
    check_product("linear_swiglu", x, weight)
    if len(weight) % 2:
        raise ValueError(f"linear_swiglu: weight is [2·intermediate, in], not {list(weight.shape)}")
    if x.dtype not in OP.dtypes:
        raise ValueError(f"linear_swiglu: x is float16, bfloat16 or float32, not {x.dtype}")
    if x.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError("linear_swiglu: the last dimensions of x and weight are contiguous")
    rows = len(x)
    if rows in HOPPER_ROWS and refused_by_hopper(x, weight) is None:
        return hopper_linear_swiglu(x, weight)
    if rows <= FEW_ROWS and x.element_size() <= 2:  # not in float32, for the reason in `linear`
        return few_rows_linear_swiglu(x, weight)
    if rows >= HOPPER_PREFILL_FROM and refused_by_hopper_prefill(x, weight) is None:
        return hopper_prefill_linear_swiglu(x, weight)
    return swiglu(skinny_linear(x, weight))


def few_rows_linear_swiglu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `linear_swiglu_reference` for up to 64 tokens on any GPU; the arguments fit each other."""
    (rows, inputs), intermediate = x.shape, len(weight) // 2
    y = torch.empty(rows, intermediate, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    launch = _launch(rows, intermediate, inputs)
    _kernel[(triton.cdiv(intermediate, launch["BLOCK_OUT"]),)](
        x,
        weight,
        y,
        rows,
        intermediate,
        inputs,
        x.stride(0),
        weight.stride(0),
        BLOCK_ROWS=max(16, triton.next_power_of_2(rows)),
        EVEN=intermediate % launch["BLOCK_OUT"] == 0 and inputs % launch["BLOCK_IN"] == 0,
        **launch,
        **(dependent_launch(x.device) if launch["AHEAD"] else {"DEPENDENT": False}),
    )
    return y


def make_inputs(
    tokens: int, intermediate: int, inputs: int, *, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    product = linear.make_inputs(tokens, 2 * intermediate, inputs, dtype=dtype, device=device, generator=generator)
    return {"x": product["x"], "weight": product["weight"]}


def cost(tokens: int, intermediate: int, inputs: int, *, itemsize: int) -> Cost:
    product = linear.cost(tokens, 2 * intermediate, inputs, itemsize=itemsize)
    return Cost(product.read, product.written // 2, product.flops + 5 * tokens * intermediate)


OP = Op(
    "linear_swiglu",
    reference=linear_swiglu_reference,
    implementations={"triton": Implementation(fused_linear_swiglu, needs_gpu)},
    inputs=make_inputs,
    cost=cost,
    cases=(
        Case(tokens=1, intermediate=130, inputs=264),
        Case(tokens=16, intermediate=64, inputs=128),
        Case(tokens=8, intermediate=70, inputs=200),
        Case(tokens=35, intermediate=128, inputs=320),
        Case(tokens=64, intermediate=64, inputs=1000),
        Case(tokens=65, intermediate=8, inputs=64),
        Case(tokens=130, intermediate=3, inputs=40),
        Case(tokens=0, intermediate=8, inputs=64),
    ),
    large_cases=(
        *(Case(tokens=tokens, intermediate=18944, inputs=3584) for tokens in (8, 35, 64, 128, 512, 2048)),
        *(Case(tokens=tokens, intermediate=4864, inputs=896) for tokens in (8, 35, 64, 2048)),
    ),
    parts=("linear", "swiglu"),
)
