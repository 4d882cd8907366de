"""The matrix product of every projection: y = x Wᵀ + b."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton

from .carve_out import prefer_carve_out
from .dependent_launch import dependent_launch
from .hopper import is_h200
from .op import Case, Cost, Implementation, Op, needs_gpu
from .skinny_kernels import few_rows_kernel, one_row_kernel, sum_kernel


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x Wᵀ + b.   x [tokens, in], weight [out, in], bias [out] or None → [tokens, out]"""
    return F.linear(x, weight, bias)


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `linear_reference`, by oneDNN on a CPU, with a weight from `onednn_prepare`.

    MKL, which `F.linear` calls, is slow for few rows on processors that are not Intel's. What that costs shows beside
    transformers, which calls it: `python -m bench.engine --peer transformers`.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def onednn_prepare(weight: torch.Tensor) -> torch.Tensor:
    """The weight [out, in] in oneDNN's blocked layout; ValueError for a dtype that it does not multiply on this CPU."""
    if words := _onednn_refuses(weight=weight):
        raise ValueError(words)
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def _onednn_refuses(*, weight: torch.Tensor, **rest: Any) -> str | None:
    otherwise = "or the implementation linear='reference' (KernelSet.replace or --kernel)"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"oneDNN multiplies float32 and bfloat16 on a CPU, not {weight.dtype}: choose one of these, {otherwise}"
    if weight.dtype == torch.bfloat16 and not onednn_has_bfloat16():
        return f"oneDNN multiplies bfloat16 on a CPU with AVX-512, and this one has none: choose float32, {otherwise}"
    return None


def onednn_has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this CPU."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _needs_onednn(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "it is for a CPU"
    return None if torch.backends.mkldnn.is_available() else "this PyTorch is built without oneDNN"


SKINNY_ROWS = 128
"""More rows than these cuBLAS multiplies."""

# The launches below are for Qwen2's products in bfloat16 on an H100 or H200, which have 132 multiprocessors.
# `python -m bench.tune linear` sweeps others; `python -m bench.kernels linear` times these beside cuBLAS.
_MULTIPROCESSORS = 132


def _one_row_launch(outputs: int, inputs: int, h200: bool) -> dict[str, int]:
    """Outputs and inputs of a tile, and warps. An output's whole row goes to one program.

    A short row is one tile, which is there when x is. Where there are more programs than a GPU runs at once (32 of one
    warp on a multiprocessor), a program takes several outputs. AHEAD is for long rows: the first tiles of all programs
    are then too little to keep the memory busy until x is there. An H200 has it busy with more tiles a turn of the loop
    instead. carve_out is for the products of o and down: a step of `python -m bench.engine --cases 1` takes 4.81 ms on
    an H100, and took 5.08 without (an H200 has not tried it). The head would be slower by itself.
    """

    def launch(block_out: int, block_in: int, unroll: int, warps: int, **more: int) -> dict[str, int]:
        tile = {"BLOCK_OUT": block_out, "BLOCK_IN": block_in, "AHEAD": 0}
        return tile | {"UNROLL": unroll, "num_warps": warps} | more

    if inputs <= 1024:
        return launch(4, 256, 2, 1) if outputs > 32 * _MULTIPROCESSORS else launch(2, 1024, 1, 2)
    if inputs >= 8192:
        return launch(1, 512, 8, 1, carve_out=14) if h200 else launch(1, 512, 4, 1, AHEAD=1024, carve_out=14)
    if outputs < 2048:
        return launch(1, 1024, 4, 4)
    if outputs <= 4096:
        return launch(4, 512, 4, 2 if h200 else 4, carve_out=14)
    if outputs <= 8192:
        return launch(4, 512, 2, 2)
    return launch(1, 1024, 2, 2) if h200 else launch(1, 2048, 4, 4)


def _few_rows_launch(rows: int, outputs: int, inputs: int, h200: bool) -> dict[str, int] | None:
    """Tile, splits of the inputs, stages of loads in flight and warps; None where cuBLAS is faster. AHEAD columns are
    fetched into the L2 before the wait for the kernel before.

    The splits give every multiprocessor something to read: one or two programs with five tiles under way, or several
    with three. Past 16 rows the tiles of x leave room for one with five, and past 64 only a long sum is faster than
    cuBLAS's, and one of few outputs. On an H200 the long one of 128 rows is no faster, and a step of 128 requests is
    slower with it; few outputs of as many rows it has not tried. On an H100 these make a step of 128 requests of
    Qwen2-0.5B 1.23 ms, with cuBLAS 1.29. By itself o's product takes 4.65 µs, by cuBLAS 4.54, for the sum of the splits
    is a launch of its own; with the residual and the norm behind it, as in a layer, there is one in any case.
    """
    tiles = triton.cdiv(outputs, 64)

    def launch(block_in: int, stages: int, splits: int) -> dict[str, int]:
        tile = {"BLOCK_OUT": 64, "BLOCK_IN": block_in, "AHEAD": 2 * block_in, "STAGES": stages, "num_warps": 4}
        return tile | {"SPLITS": max(1, min(splits, inputs // block_in))}

    if rows > 64 and inputs < 8192:
        if h200 or not 0.7 * _MULTIPROCESSORS <= 7 * tiles <= _MULTIPROCESSORS:
            return None
        return launch(64, 5, 5 if inputs <= 1024 else 7)
    if rows > 64 and (2 * tiles > _MULTIPROCESSORS or (h200 and rows > 112)):
        return None
    if rows <= 16:
        if tiles >= 2 * _MULTIPROCESSORS:
            return launch(128, 3, 1)
        if inputs <= 1024:
            return launch(64, 5, 4) if tiles >= _MULTIPROCESSORS else launch(128, 3, 7)
        if tiles >= _MULTIPROCESSORS // 2:
            return launch(128, 5, 3)
        return launch(128, 5, 4 if inputs < 8192 else max(2, min(_MULTIPROCESSORS // tiles, 4)))
    if inputs <= 1024:
        if tiles < _MULTIPROCESSORS:
            return launch(64, 5, 5)
        return None if h200 else launch(64, 5, 1)
    if tiles >= 8 * _MULTIPROCESSORS:
        return launch(128, 3, 1)
    if tiles >= 2 * _MULTIPROCESSORS:
        return launch(128, 5, 1)
    splits = min(_MULTIPROCESSORS // tiles, 7)
    if tiles * splits >= 0.7 * _MULTIPROCESSORS:
        return launch(128, 5 if rows <= 64 else 4, splits)
    # Of q, k and v: faster than cuBLAS's in a step of 35 requests, and slower in those of 24, 48 and 64 (an H100).
    return launch(128, 3, 3) if 32 < rows <= 40 and _MULTIPROCESSORS // 2 < tiles < _MULTIPROCESSORS else None


def check_product(name: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    """ValueError where x is not [tokens, in] and weight [out, in] of one dtype."""
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}: x is {list(x.shape)} and weight {list(weight.shape)}, not [tokens, in] and [out, in]"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"{name}: x is {x.dtype} and weight {weight.dtype}")


def skinny_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `linear_reference`, in Triton for up to 128 rows (of float32, one), where reading the weight takes longer than
    the products.

    For more rows, and for the sizes where `_few_rows_launch` says that cuBLAS is faster, cuBLAS computes it. Equal
    inputs give equal bits. ValueError for shapes and dtypes that do not fit each other.
    """
    check_product("linear", x, weight)
    y = skinny_product(x, weight, bias=bias)
    return F.linear(x, weight, bias) if y is None else y


def skinny_product(
    x: torch.Tensor, weight: torch.Tensor, *, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor | None:
    """y = x Wᵀ + bias + residual, rounded once from float32; None where it is cuBLAS that should compute it."""
    rows, (outputs, inputs) = len(x), weight.shape
    if not _is_skinny(x, weight) or not (residual is None or residual.is_contiguous()):
        return None
    if rows == 1:
        return one_row(x, weight, bias=bias, residual=residual, **_one_row_launch(outputs, inputs, is_h200(x.device)))
    launch = _few_rows_launch(rows, outputs, inputs, is_h200(x.device))
    if launch is None:
        return None
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    if launch["SPLITS"] == 1:
        _few_rows(x, weight, bias, residual, y, **launch)
        return y
    parts, block, size = split_product(x, weight), 512, rows * outputs
    sum_kernel[(triton.cdiv(size, block),)](
        parts, bias, residual, y, outputs, size, BLOCK=block, SPLITS=len(parts), **dependent_launch(x.device)
    )
    return y


def split_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """The sums over each split's share of the inputs, float32 [splits, rows, outputs], for the caller to add in their
    order; None where the product is not computed in splits.
    """
    rows, (outputs, inputs) = len(x), weight.shape
    if rows <= 1 or not _is_skinny(x, weight):
        return None
    launch = _few_rows_launch(rows, outputs, inputs, is_h200(x.device))
    if launch is None or launch["SPLITS"] == 1:
        return None
    parts = torch.empty(launch["SPLITS"], rows, outputs, dtype=torch.float32, device=x.device)
    _few_rows(x, weight, None, None, parts, **launch)
    return parts


def _is_skinny(x: torch.Tensor, weight: torch.Tensor) -> bool:
    # In float32 `tl.dot` adds one product after the other: with 8 rows of 37888 × 3584 its error was 1.3e-5 where
    # twice cuBLAS's and one rounding are 5.4e-6 (an H100).
    most_rows = SKINNY_ROWS if x.element_size() <= 2 else 1
    return len(x) <= most_rows and x.stride(1) == 1 and weight.stride(1) == 1


def one_row(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    carve_out: int | None = None,
    **launch: int,
) -> torch.Tensor:
    """y = x Wᵀ + bias + residual, or with a norm_weight rms_norm(x, norm_weight, eps) for x; x [1, in] → [1, out]"""
    outputs, inputs = weight.shape
    y = torch.empty(1, outputs, dtype=x.dtype, device=x.device)
    kernel = one_row_kernel[(triton.cdiv(outputs, launch["BLOCK_OUT"]),)](
        x,
        norm_weight,
        eps,
        weight,
        bias,
        residual,
        y,
        outputs,
        inputs,
        weight.stride(0),
        EVEN=inputs % launch["BLOCK_IN"] == 0,
        **launch,
        **dependent_launch(x.device),
    )
    prefer_carve_out(kernel, carve_out)
    return y


def _few_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    SPLITS: int,
    **launch: int,
) -> None:
    """y [rows, outputs], or the splits' parts of it."""
    (rows, inputs), outputs = x.shape, weight.shape[0]
    few_rows_kernel[(triton.cdiv(outputs, launch["BLOCK_OUT"]), SPLITS)](
        x,
        weight,
        bias,
        residual,
        y,
        rows,
        outputs,
        inputs,
        x.stride(0),
        weight.stride(0),
        BLOCK_ROWS=max(16, triton.next_power_of_2(rows)),
        EVEN=outputs % launch["BLOCK_OUT"] == 0 and inputs % launch["BLOCK_IN"] == 0,
        **launch,
        **dependent_launch(x.device),
    )


def make_inputs(
    rows: int,
    outputs: int,
    inputs: int,
    bias: bool = False,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> dict[str, Any]:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, generator=generator)

    weight = random(outputs, inputs).mul_(inputs**-0.5)
    return {"x": random(rows, inputs), "weight": weight, "bias": random(outputs) if bias else None}


def cost(rows: int, outputs: int, inputs: int, bias: bool = False, *, itemsize: int) -> Cost:
    read = (rows + outputs) * inputs + (outputs if bias else 0)
    return Cost(read * itemsize, rows * outputs * itemsize, 2 * rows * outputs * inputs)


_QWEN2_7B = (
    {"outputs": 4608, "inputs": 3584, "bias": True},
    {"outputs": 3584, "inputs": 3584},
    {"outputs": 37888, "inputs": 3584},
    {"outputs": 3584, "inputs": 18944},
    {"outputs": 152064, "inputs": 3584},
)
_QWEN2_HALF_B = (
    {"outputs": 1152, "inputs": 896, "bias": True},
    {"outputs": 896, "inputs": 896},
    {"outputs": 9728, "inputs": 896},
    {"outputs": 896, "inputs": 4864},
    {"outputs": 151936, "inputs": 896},
)

OP = Op(
    "linear",
    reference=linear_reference,
    implementations={
        "onednn": Implementation(onednn_linear, _needs_onednn, onednn_prepare, refuses=_onednn_refuses),
        "skinny": Implementation(skinny_linear, needs_gpu),
    },
    inputs=make_inputs,
    cost=cost,
    cases=(
        Case(rows=1, outputs=5, inputs=1024, bias=True),
        Case(rows=1, outputs=7, inputs=1000),
        Case(rows=2, outputs=130, inputs=264, bias=True),
        Case(rows=8, outputs=192, inputs=640),
        Case(rows=16, outputs=64, inputs=1000, bias=True),
        Case(rows=35, outputs=256, inputs=384, bias=True),
        Case(rows=64, outputs=64, inputs=128),
        Case(rows=65, outputs=64, inputs=128, bias=True),
        Case(rows=70, outputs=64, inputs=8200, bias=True),
        Case(rows=0, outputs=64, inputs=128),
    ),
    large_cases=tuple(
        Case(rows=rows, **product) for product in (*_QWEN2_7B, *_QWEN2_HALF_B) for rows in (1, 8, 35, 128)
    ),
)
