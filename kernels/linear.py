"""The matrix product of every projection: y = x Wᵀ + b."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .dependent_launch import allow_next, dependent_launch, wait_for_previous
from .op import Case, Cost, Implementation, Op, needs_gpu


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
    """The weight [out, in] in oneDNN's blocked layout; ValueError for a dtype but float32 and bfloat16."""
    if words := _onednn_refuses(weight=weight):
        raise ValueError(words)
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def _onednn_refuses(*, weight: torch.Tensor, **rest: Any) -> str | None:
    if weight.dtype in (torch.float32, torch.bfloat16):
        return None
    return (
        f"oneDNN multiplies float32 and bfloat16 on a CPU, not {weight.dtype}: choose one of these, or "
        "kernels=KernelSet.default().replace(linear='reference')"
    )


def _needs_onednn(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "it is for a CPU"
    return None if torch.backends.mkldnn.is_available() else "this PyTorch is built without oneDNN"


@triton.jit
def _weight_tile(weight_row, inside, column, inputs, EVEN: tl.constexpr):
    """Columns of the rows at `weight_row`; those past `inputs` are 0, and anything where all of them are past it."""
    mask = inside[:, None] & (column < inputs)[None, :]
    if EVEN:
        return tl.load(weight_row + column[None, :], mask=mask, eviction_policy="evict_first")
    return tl.load(weight_row + column[None, :], mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def first_tile(weight_row, norm_weight_ptr, inside, inputs, BLOCK_IN: tl.constexpr, EVEN: tl.constexpr):
    """The first columns of the weights and of the norm's: what `product_from` begins with. They are loaded before the
    wait, for weights do not depend on the kernel before.
    """
    column = tl.arange(0, BLOCK_IN)
    weight = _weight_tile(weight_row, inside, column, inputs, EVEN)
    norm_weight = 1.0
    if norm_weight_ptr is not None:
        norm_weight = tl.load(norm_weight_ptr + column, mask=column < inputs, other=0.0)
    return weight, norm_weight


@triton.jit
def product_from(
    weight,
    norm_weight,
    x_ptr,
    norm_weight_ptr,
    eps,
    weight_row,
    inside,
    inputs,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN: tl.constexpr,
):
    """x Wᵀ [BLOCK_OUT] in float32 for one x, or for its RMSNorm where there is a norm_weight_ptr, from `first_tile` on.

    By plain products: the matrix unit would idle on 15 rows of 16. A tile of weights is loaded while the one before is
    multiplied. RMSNorm's factor is one for all of x, so it comes last, when the squares are summed.
    """
    columns = tl.arange(0, BLOCK_IN)
    acc = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    squares = tl.zeros([BLOCK_IN], tl.float32)
    for start in tl.range(0, inputs, BLOCK_IN, loop_unroll_factor=UNROLL):
        ahead = start + BLOCK_IN + columns
        weight_ahead = _weight_tile(weight_row, inside, ahead, inputs, EVEN)
        if norm_weight_ptr is not None:
            norm_weight_ahead = tl.load(norm_weight_ptr + ahead, mask=ahead < inputs, other=0.0)
        # Without it ptxas loads the next tile when this one is used up, and nothing is under way meanwhile.
        tl.debug_barrier()
        column = start + columns
        x = tl.load(x_ptr + column) if EVEN else tl.load(x_ptr + column, mask=column < inputs, other=0.0)
        x = x.to(tl.float32)
        if norm_weight_ptr is not None:
            squares += x * x
            x *= norm_weight.to(tl.float32)
            norm_weight = norm_weight_ahead
        acc += weight.to(tl.float32) * x[None, :]
        weight = weight_ahead
    y = tl.sum(acc, 1)
    if norm_weight_ptr is not None:
        y *= tl.rsqrt(tl.sum(squares, 0) / inputs + eps)
    return y


@triton.jit
def one_row_product(
    x_ptr,
    norm_weight_ptr,
    eps,
    weight_ptr,
    weight_stride,
    bias_ptr,
    residual_ptr,
    out,
    inside,
    inputs,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """x Wᵀ + bias + residual at the outputs `out` [BLOCK_OUT], for one x or its RMSNorm; what is None is left out."""
    weight_row = weight_ptr + out.to(tl.int64)[:, None] * weight_stride
    weight, norm_weight = first_tile(weight_row, norm_weight_ptr, inside, inputs, BLOCK_IN, EVEN)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + out, mask=inside, other=0.0)
    wait_for_previous(DEPENDENT)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + out, mask=inside, other=0.0)
    y = product_from(
        weight, norm_weight, x_ptr, norm_weight_ptr, eps, weight_row, inside, inputs, BLOCK_OUT, BLOCK_IN, UNROLL, EVEN
    )
    if bias_ptr is not None:
        y += bias.to(tl.float32)
    if residual_ptr is not None:
        y += residual.to(tl.float32)
    return y


@triton.jit
def _one_row_kernel(
    x_ptr,
    norm_weight_ptr,
    eps,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    outputs,
    inputs,
    weight_stride,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    allow_next(DEPENDENT)
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = out < outputs
    y = one_row_product(
        x_ptr,
        norm_weight_ptr,
        eps,
        weight_ptr,
        weight_stride,
        bias_ptr,
        residual_ptr,
        out,
        inside,
        inputs,
        BLOCK_OUT,
        BLOCK_IN,
        UNROLL,
        EVEN,
        DEPENDENT,
    )
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _prefetch(weight_ptr, out, stride, first, inputs, COLUMNS: tl.constexpr):
    """Has the columns from `first` on of the weight's rows `out` fetched into the L2, by sectors of 32 bytes."""
    SECTOR: tl.constexpr = 256 // weight_ptr.dtype.element_ty.primitive_bitwidth
    column = tl.minimum(first + tl.arange(0, COLUMNS // SECTOR) * SECTOR, inputs - 1)
    weight_row = weight_ptr + out.to(tl.int64)[:, None] * stride
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [weight_row + column[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _few_rows_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    rows,
    outputs,
    inputs,
    x_stride,
    weight_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """BLOCK_OUT rows of the weight times a split's share of the inputs of all of x; y [splits, rows, outputs].

    The weight is the left operand, because 64 rows are the least that the matrix unit takes.
    """
    allow_next(DEPENDENT)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    row = tl.arange(0, BLOCK_ROWS)
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    columns = tl.arange(0, BLOCK_IN)
    weight_row = weight_ptr + out.to(tl.int64)[:, None] * weight_stride
    x_row = x_ptr + row[None, :] * x_stride
    steps = (inputs + BLOCK_IN - 1) // BLOCK_IN
    first = steps * split // splits
    if DEPENDENT:
        # Triton moves the loads of a pipelined loop above a wait that is in it (triton issue 11905).
        _prefetch(weight_ptr, tl.minimum(out, outputs - 1), weight_stride, first * BLOCK_IN, inputs, 2 * BLOCK_IN)
    wait_for_previous(DEPENDENT)
    acc = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    for step in tl.range(first, steps * (split + 1) // splits, num_stages=STAGES):
        column = step * BLOCK_IN + columns
        if EVEN:
            weight = tl.load(weight_row + column[None, :], eviction_policy="evict_first")
            x = tl.load(x_row + column[:, None], mask=(row < rows)[None, :], other=0.0)
        else:
            inside = column < inputs
            weight = tl.load(
                weight_row + column[None, :],
                mask=(out < outputs)[:, None] & inside[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            x = tl.load(x_row + column[:, None], mask=(row < rows)[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(weight, x, acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + out, mask=out < outputs, other=0.0).to(tl.float32)[:, None]
    place = (split * rows + row[None, :]).to(tl.int64) * outputs + out[:, None]
    inside = (row < rows)[None, :] & (out < outputs)[:, None]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_kernel(
    part_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    outputs,
    size,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """y = Σ part_i + bias + residual, in the order of the splits."""
    allow_next(DEPENDENT)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + place % outputs, mask=inside, other=0.0)
    wait_for_previous(DEPENDENT)
    y = tl.load(part_ptr + place, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        y += tl.load(part_ptr + split * size + place, mask=inside, other=0.0)
    if bias_ptr is not None:
        y += bias.to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


SKINNY_ROWS = 64
"""More rows than these cuBLAS multiplies."""

# The launches below are for Qwen2's products in bfloat16 on an H100 or H200, which have 132 multiprocessors.
# `python -m bench.tune linear` sweeps others; `python -m bench.kernels linear` times these beside cuBLAS.
_MULTIPROCESSORS = 132


def _one_row_launch(outputs: int, inputs: int) -> dict[str, int]:
    """Outputs and inputs of a tile, and warps. An output's whole row goes to one program.

    A short row is one tile, loaded by as many threads as have a 16-byte load each: it is there when x is. Where there
    are more programs than a GPU runs at once (32 one-warp programs a multiprocessor), a program takes several outputs.
    """
    if inputs <= 1024:
        if outputs > 32 * _MULTIPROCESSORS:
            return {"BLOCK_OUT": 4, "BLOCK_IN": 256, "UNROLL": 2, "num_warps": 1}
        return {"BLOCK_OUT": 1, "BLOCK_IN": 1024, "UNROLL": 1, "num_warps": 4}
    if inputs >= 8192:
        return {"BLOCK_OUT": 1, "BLOCK_IN": 512, "UNROLL": 4, "num_warps": 1}
    if 2048 <= outputs <= 8192:
        return {"BLOCK_OUT": 2, "BLOCK_IN": 512, "UNROLL": 2, "num_warps": 1}
    return {"BLOCK_OUT": 1, "BLOCK_IN": 1024, "UNROLL": 2, "num_warps": 2}


def _few_rows_launch(rows: int, outputs: int, inputs: int) -> dict[str, int] | None:
    """Tile, splits of the inputs, stages of loads in flight and warps; None where cuBLAS is faster.

    The splits give every multiprocessor something to read: two or three programs each for up to 16 rows, one for more,
    whose tiles of x leave room for no second.

    EARLY: whether it is a dependent launch. Waiting programs take the place of those that still read, which costs more
    than it gains where programs are many and long: 3 µs at 8 × 3584 × 3584, where two programs share a tile of 64
    outputs it gains 1.5 (`python -m bench.kernels linear` on an H100).
    """
    tiles = triton.cdiv(outputs, 64)
    if rows <= 16:
        if tiles >= 2 * _MULTIPROCESSORS:
            return {"BLOCK_OUT": 64, "BLOCK_IN": 128, "SPLITS": 1, "STAGES": 3, "num_warps": 4, "EARLY": False}
        if tiles >= _MULTIPROCESSORS:
            return None
        splits = max(1, min(triton.cdiv(320, tiles), inputs // 128, 8))
        if inputs >= 8192:
            return {"BLOCK_OUT": 64, "BLOCK_IN": 128, "SPLITS": splits, "STAGES": 3, "num_warps": 4, "EARLY": False}
        short = inputs <= 4 * 64 * splits
        return {"BLOCK_OUT": 64, "BLOCK_IN": 64, "SPLITS": splits, "STAGES": 4, "num_warps": 4, "EARLY": short}
    if tiles >= 2 * _MULTIPROCESSORS:
        return {"BLOCK_OUT": 128, "BLOCK_IN": 64, "SPLITS": 1, "STAGES": 3, "num_warps": 8, "EARLY": False}
    splits = min(_MULTIPROCESSORS // tiles, inputs // 256)
    if tiles * splits < 0.75 * _MULTIPROCESSORS:
        return None
    return {"BLOCK_OUT": 64, "BLOCK_IN": 128, "SPLITS": splits, "STAGES": 5, "num_warps": 4, "EARLY": True}


def check_product(name: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    """ValueError where x is not [tokens, in] and weight [out, in] of one dtype."""
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}: x is {list(x.shape)} and weight {list(weight.shape)}, not [tokens, in] and [out, in]"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"{name}: x is {x.dtype} and weight {weight.dtype}")


def skinny_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `linear_reference`, in Triton for up to 64 rows, where reading the weight takes longer than the products.

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
    (rows, inputs), outputs = x.shape, weight.shape[0]
    contiguous = residual is None or residual.is_contiguous()
    if rows > SKINNY_ROWS or x.stride(1) != 1 or weight.stride(1) != 1 or not contiguous:
        return None
    if rows == 1:
        return one_row(x, weight, bias=bias, residual=residual, **_one_row_launch(outputs, inputs))
    launch = _few_rows_launch(rows, outputs, inputs)
    if launch is None:
        return None
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if rows:
        _few_rows(x, weight, bias, residual, y, **launch)
    return y


def one_row(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    **launch: int,
) -> torch.Tensor:
    """y = x Wᵀ + bias + residual, or with a norm_weight rms_norm(x, norm_weight, eps) for x; x [1, in] → [1, out]"""
    outputs, inputs = weight.shape
    y = torch.empty(1, outputs, dtype=x.dtype, device=x.device)
    _one_row_kernel[(triton.cdiv(outputs, launch["BLOCK_OUT"]),)](
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
    return y


def _few_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    SPLITS: int,
    EARLY: bool,
    **launch: int,
) -> None:
    (rows, inputs), outputs = x.shape, weight.shape[0]
    whole = SPLITS == 1
    parts = y if whole else torch.empty(SPLITS, rows, outputs, dtype=torch.float32, device=x.device)
    _few_rows_kernel[(triton.cdiv(outputs, launch["BLOCK_OUT"]), SPLITS)](
        x,
        weight,
        bias if whole else None,
        residual if whole else None,
        parts,
        rows,
        outputs,
        inputs,
        x.stride(0),
        weight.stride(0),
        BLOCK_ROWS=max(16, triton.next_power_of_2(rows)),
        EVEN=outputs % launch["BLOCK_OUT"] == 0 and inputs % launch["BLOCK_IN"] == 0,
        **launch,
        **(dependent_launch(x.device) if EARLY else {"DEPENDENT": False}),
    )
    if not whole:
        block = 512
        size = rows * outputs
        _sum_kernel[(triton.cdiv(size, block),)](
            parts, bias, residual, y, outputs, size, BLOCK=block, SPLITS=SPLITS, **dependent_launch(x.device)
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
        Case(rows=0, outputs=64, inputs=128),
    ),
    large_cases=tuple(
        Case(rows=rows, **product) for product in (*_QWEN2_7B, *_QWEN2_HALF_B) for rows in (1, 8, 35, 128)
    ),
)
