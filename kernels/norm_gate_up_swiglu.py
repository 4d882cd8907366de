"""The first half of an MLP, RMSNorm, the gate and up products and SwiGLU, in one launch for one token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from . import norm_linear
from .dependent_launch import allow_next, dependent_launch
from .hopper import is_h200
from .linear_swiglu import linear_swiglu_reference
from .norm_linear import check_norm_product, refuse_rows
from .op import Case, Cost, Implementation, Op, needs_gpu
from .rms_norm import rms_norm_reference
from .skinny_kernels import one_row_product


def norm_gate_up_swiglu_reference(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    *,
    rms_norm: Callable = rms_norm_reference,
    linear_swiglu: Callable = linear_swiglu_reference,
) -> torch.Tensor:
    """y = silu(gate) · up with [gate, up] = rms_norm(x) Wᵀ.

    x [tokens, in], norm_weight [in], weight [2·intermediate, in] → [tokens, intermediate]
    """
    return linear_swiglu(rms_norm(x, norm_weight, eps), weight)


@triton.jit
def _kernel(
    x_ptr,
    norm_weight_ptr,
    eps,
    weight_ptr,
    y_ptr,
    intermediate,
    inputs,
    weight_stride,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """BLOCK_OUT elements of y, from as many gates, the even rows of a tile, and their ups, the odd ones."""
    allow_next(DEPENDENT)
    first = tl.program_id(0) * BLOCK_OUT
    row = tl.arange(0, 2 * BLOCK_OUT)
    inside = first + row // 2 < intermediate
    gate_up = one_row_product(
        x_ptr,
        norm_weight_ptr,
        eps,
        weight_ptr,
        weight_stride,
        None,
        None,
        first + row // 2 + row % 2 * intermediate,
        inside,
        inputs,
        BLOCK_OUT=2 * BLOCK_OUT,
        BLOCK_IN=BLOCK_IN,
        AHEAD=0,
        UNROLL=UNROLL,
        EVEN=EVEN,
        DEPENDENT=DEPENDENT,
    )
    gate, up = tl.split(tl.reshape(gate_up, [BLOCK_OUT, 2]))
    y = gate / (1 + tl.exp(-gate)) * up
    out = first + tl.arange(0, BLOCK_OUT)
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=out < intermediate)


def _launch(intermediate: int, inputs: int, h200: bool) -> dict[str, int]:
    """BLOCK_OUT counts pairs of a gate and its up. `python -m bench.tune norm_gate_up_swiglu` sweeps others."""
    if inputs <= 1024:
        return {"BLOCK_OUT": 2, "BLOCK_IN": 256, "UNROLL": 4, "num_warps": 1}
    if h200:
        return {"BLOCK_OUT": 2, "BLOCK_IN": 256, "UNROLL": 2, "num_warps": 1}
    return {"BLOCK_OUT": 2, "BLOCK_IN": 1024, "UNROLL": 2, "num_warps": 4}


def norm_gate_up_swiglu(x: torch.Tensor, norm_weight: torch.Tensor, eps: float, weight: torch.Tensor) -> torch.Tensor:
    """As `norm_gate_up_swiglu_reference` for one token, in float32 to the end and rounded once.

    ValueError for an odd number of outputs, and as in `norm_linear`.
    """
    check_norm_product("norm_gate_up_swiglu", x, norm_weight, weight)
    if len(weight) % 2:
        raise ValueError(f"norm_gate_up_swiglu: weight is [2·intermediate, in], not {list(weight.shape)}")
    intermediate, inputs = len(weight) // 2, weight.shape[1]
    y = torch.empty(len(x), intermediate, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    launch = _launch(intermediate, inputs, is_h200(x.device))
    _kernel[(triton.cdiv(intermediate, launch["BLOCK_OUT"]),)](
        x,
        norm_weight,
        eps,
        weight,
        y,
        intermediate,
        inputs,
        weight.stride(0),
        EVEN=inputs % launch["BLOCK_IN"] == 0,
        **launch,
        **dependent_launch(x.device),
    )
    return y


def make_inputs(
    tokens: int,
    intermediate: int,
    inputs: int,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> dict[str, Any]:
    options = {"dtype": dtype, "device": device, "generator": generator}
    product = norm_linear.make_inputs(tokens, 2 * intermediate, inputs, eps=eps, **options)
    return {name: product[name] for name in ("x", "norm_weight", "eps", "weight")}


def cost(tokens: int, intermediate: int, inputs: int, eps: float = 1e-6, *, itemsize: int) -> Cost:
    product = norm_linear.cost(tokens, 2 * intermediate, inputs, itemsize=itemsize)
    return Cost(product.read, product.written // 2, product.flops + 5 * tokens * intermediate)


OP = Op(
    "norm_gate_up_swiglu",
    reference=norm_gate_up_swiglu_reference,
    implementations={"triton": Implementation(norm_gate_up_swiglu, needs_gpu, refuses=refuse_rows, most_rows=1)},
    inputs=make_inputs,
    cost=cost,
    cases=(
        Case(tokens=1, intermediate=5, inputs=2048),
        Case(tokens=1, intermediate=7, inputs=1000, eps=8.0),
        Case(tokens=1, intermediate=9, inputs=1288),
        Case(tokens=3, intermediate=8, inputs=64),
        Case(tokens=0, intermediate=8, inputs=64),
    ),
    large_cases=(
        Case(tokens=1, intermediate=18944, inputs=3584),
        Case(tokens=1, intermediate=4864, inputs=896),
    ),
    parts=("rms_norm", "linear_swiglu"),
)
