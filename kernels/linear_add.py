"""A matrix product that is added to the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import linear
from .linear import check_product, linear_reference, skinny_product
from .op import Case, Cost, Implementation, Op, needs_gpu


def linear_add_reference(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, *, linear: Callable = linear_reference
) -> torch.Tensor:
    """y = residual + x Wᵀ.   x [tokens, in], weight [out, in], residual [tokens, out] → [tokens, out]"""
    return residual + linear(x, weight)


def check_linear_add(name: str, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> None:
    """ValueError where x, weight and residual do not fit each other."""
    check_product(name, x, weight)
    if residual.shape != (len(x), len(weight)) or residual.dtype != x.dtype:
        raise ValueError(
            f"{name}: residual is {list(residual.shape)} in {residual.dtype}, "
            f"and x Wᵀ {[len(x), len(weight)]} in {x.dtype}"
        )


def skinny_linear_add(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """As `linear_add_reference`, the sum rounded once from float32, by what `skinny_linear` computes the product with.

    ValueError for shapes and dtypes that do not fit each other.
    """
    check_linear_add("linear_add", x, weight, residual)
    y = skinny_product(x, weight, residual=residual)
    return torch.addmm(residual, x, weight.t()) if y is None else y


def make_inputs(
    rows: int, outputs: int, inputs: int, *, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    product = linear.make_inputs(rows, outputs, inputs, dtype=dtype, device=device, generator=generator)
    residual = 4 * torch.randn(rows, outputs, dtype=dtype, device=device, generator=generator)
    return {"x": product["x"], "weight": product["weight"], "residual": residual}


def cost(rows: int, outputs: int, inputs: int, *, itemsize: int) -> Cost:
    product = linear.cost(rows, outputs, inputs, itemsize=itemsize)
    return Cost(product.read + rows * outputs * itemsize, product.written, product.flops + rows * outputs)


_PRODUCTS = (
    {"outputs": 3584, "inputs": 3584},
    {"outputs": 3584, "inputs": 18944},
    {"outputs": 896, "inputs": 896},
    {"outputs": 896, "inputs": 4864},
)

OP = Op(
    "linear_add",
    reference=linear_add_reference,
    implementations={"skinny": Implementation(skinny_linear_add, needs_gpu)},
    inputs=make_inputs,
    cost=cost,
    cases=(
        Case(rows=1, outputs=5, inputs=2048),
        Case(rows=1, outputs=7, inputs=1000),
        Case(rows=2, outputs=130, inputs=264),
        Case(rows=8, outputs=192, inputs=640),
        Case(rows=35, outputs=256, inputs=384),
        Case(rows=65, outputs=64, inputs=128),
        Case(rows=0, outputs=64, inputs=128),
    ),
    large_cases=tuple(Case(rows=rows, **product) for product in _PRODUCTS for rows in (1, 8, 35, 128)),
    parts=("linear",),
)
