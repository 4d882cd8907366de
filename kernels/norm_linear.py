"""RMSNorm and the matrix product of what it gives, in one launch for one token.

RMSNorm commutes with the product: rms_norm(x, γ) Wᵀ = ((x ∘ γ) Wᵀ) / sqrt(mean(x²) + eps). So the program of an output
need not know the norm of x before it has read all of x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import linear, rms_norm
from .linear import check_product, linear_reference, one_row
from .op import Case, Cost, Implementation, Op, needs_gpu
from .rms_norm import rms_norm_reference


def norm_linear_reference(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    rms_norm: Callable = rms_norm_reference,
    linear: Callable = linear_reference,
) -> torch.Tensor:
    """y = rms_norm(x) Wᵀ + b.

    x [tokens, in], norm_weight [in], weight [out, in], bias [out] or None → [tokens, out]
    """
    return linear(rms_norm(x, norm_weight, eps), weight, bias)


def refuse_rows(*, x: torch.Tensor, **rest: Any) -> str | None:
    """Why a kernel for one row, or none, does not take x."""
    return None if len(x) <= 1 else f"it is for one token, not {len(x)}"


def check_norm_product(name: str, x: torch.Tensor, norm_weight: torch.Tensor, weight: torch.Tensor) -> None:
    """ValueError for what a kernel for one row does not take."""
    check_product(name, x, weight)
    if words := refuse_rows(x=x):
        raise ValueError(f"{name}: {words}")
    if norm_weight.dtype != x.dtype or norm_weight.shape != x.shape[1:]:
        raise ValueError(
            f"{name}: norm_weight is {list(norm_weight.shape)} in {norm_weight.dtype}, "
            f"and x {list(x.shape)} in {x.dtype}"
        )
    if x.dtype not in OP.dtypes:
        raise ValueError(f"{name}: x is float16, bfloat16 or float32, not {x.dtype}")
    if not (x.stride(1) == weight.stride(1) == norm_weight.stride(0) == 1):
        raise ValueError(f"{name}: the last dimensions of x, norm_weight and weight are contiguous")


def _launch(outputs: int, inputs: int) -> dict[str, int]:
    """As for `linear`, but for two outputs a program at least: the norm is computed once for both.

    `python -m bench.tune norm_linear` sweeps others.
    """
    if inputs <= 1024:
        return {"BLOCK_OUT": 2, "BLOCK_IN": 1024, "UNROLL": 1, "num_warps": 4}
    return {"BLOCK_OUT": 2, "BLOCK_IN": 256, "UNROLL": 2, "num_warps": 1}


def norm_linear(
    x: torch.Tensor, norm_weight: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """As `norm_linear_reference` for one token, in float32 to the end and rounded once.

    ValueError for more tokens, for float64, for shapes and dtypes that do not fit each other, and for a last dimension
    that is not contiguous.
    """
    check_norm_product("norm_linear", x, norm_weight, weight)
    if len(x) == 0:
        return torch.empty(0, len(weight), dtype=x.dtype, device=x.device)
    return one_row(x, weight, norm_weight=norm_weight, eps=eps, bias=bias, AHEAD=0, **_launch(*weight.shape))


def make_inputs(
    tokens: int,
    outputs: int,
    inputs: int,
    bias: bool = False,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> dict[str, Any]:
    options = {"dtype": dtype, "device": device, "generator": generator}
    norm = rms_norm.make_inputs(tokens, inputs, **options)
    product = linear.make_inputs(0, outputs, inputs, bias, **options)
    return {
        "x": 4 * norm["x"],
        "norm_weight": norm["weight"],
        "eps": eps,
        "weight": product["weight"],
        "bias": product["bias"],
    }


def cost(tokens: int, outputs: int, inputs: int, bias: bool = False, eps: float = 1e-6, *, itemsize: int) -> Cost:
    product = linear.cost(tokens, outputs, inputs, bias, itemsize=itemsize)
    return Cost(product.read + inputs * itemsize, product.written, product.flops + 4 * tokens * inputs)


OP = Op(
    "norm_linear",
    reference=norm_linear_reference,
    implementations={"triton": Implementation(norm_linear, needs_gpu, refuses=refuse_rows, most_rows=1)},
    inputs=make_inputs,
    cost=cost,
    cases=(
        Case(tokens=1, outputs=5, inputs=2048, bias=True),
        Case(tokens=1, outputs=7, inputs=1000, eps=8.0),
        Case(tokens=1, outputs=6, inputs=1288, bias=True),
        Case(tokens=1, outputs=4, inputs=3),
        Case(tokens=3, outputs=8, inputs=64, bias=True),
        Case(tokens=0, outputs=8, inputs=64),
    ),
    large_cases=(
        Case(tokens=1, outputs=4608, inputs=3584, bias=True),
        Case(tokens=1, outputs=1152, inputs=896, bias=True),
    ),
    parts=("rms_norm", "linear"),
)
