"""Products of few rows in Triton, where reading the weight takes longer than the products: tiles of the weight's rows.

Weights do not depend on the kernel before, so a program has its first tiles on their way before it waits for that one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dependent_launch import allow_next, wait_for_previous


@triton.jit
def _weight_tile(weight_row, inside, column, inputs, EVEN: tl.constexpr):
    """Columns of the rows at `weight_row`; those past `inputs` are 0, and anything where all of them are past it."""
    mask = inside[:, None] & (column < inputs)[None, :]
    if EVEN:
        return tl.load(weight_row + column[None, :], mask=mask, eviction_policy="evict_first")
    return tl.load(weight_row + column[None, :], mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def prefetch(weight_row, inside, first, inputs, COLUMNS: tl.constexpr):
    """Has COLUMNS columns of the rows at `weight_row`, from `first` on, fetched into the L2, by sectors of 32 bytes."""
    SECTOR: tl.constexpr = 256 // weight_row.dtype.element_ty.primitive_bitwidth
    column = first + tl.arange(0, COLUMNS // SECTOR) * SECTOR
    wanted = inside[:, None] & (column < inputs)[None, :]
    tl.inline_asm_elementwise(
        "{.reg .pred wanted; setp.ne.s32 wanted, $2, 0; @wanted prefetch.global.L2 [$1]; mov.u32 $0, 0;}",
        "=r,l,r",
        [weight_row + column[None, :], wanted.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


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
    AHEAD: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """x Wᵀ + bias + residual at the outputs `out` [BLOCK_OUT], for one x or its RMSNorm; what is None is left out.

    AHEAD columns behind the first tile are on their way to the L2 before the wait too.
    """
    weight_row = weight_ptr + out.to(tl.int64)[:, None] * weight_stride
    weight, norm_weight = first_tile(weight_row, norm_weight_ptr, inside, inputs, BLOCK_IN, EVEN)
    if DEPENDENT and AHEAD > 0:
        prefetch(weight_row, inside, BLOCK_IN, inputs, AHEAD)
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
def one_row_kernel(
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
    AHEAD: tl.constexpr,
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
        AHEAD,
        UNROLL,
        EVEN,
        DEPENDENT,
    )
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def few_rows_kernel(
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
    AHEAD: tl.constexpr,
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
        prefetch(weight_row, out < outputs, first * BLOCK_IN, inputs, AHEAD)
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
def sum_kernel(
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
