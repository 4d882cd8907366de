"""The end of a decode step: what was drawn becomes what is computed next, without the host."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .dependent_launch import allow_next, dependent_launch, wait_for_previous
from .op import Case, Cost, Implementation, Op, needs_gpu


def advance_decode_reference(
    drawn: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    context_lens: torch.Tensor,
    index: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
) -> None:
    """In place, for each row with a context: token ← what was drawn; position, context length and number of the draw
    grow by one; slot ← the new position's place in the row's blocks, as far as the table holds it.

    drawn [rows] int64, −1 for a row whose logits were not numbers, which goes on as 0; tokens, positions, index,
    slot_mapping [rows] int64; context_lens [rows] int32, 0 for a padded row, which stays as it is; block_table [rows,
    max_blocks] int32. Past the end of the table the slot is negative: nowhere.
    """
    runs = context_lens > 0
    tokens.copy_(torch.where(runs, drawn.clamp(min=0), tokens))
    positions += runs
    context_lens += runs
    index += runs
    block = positions // block_size
    inside = block < block_table.shape[1]
    entry = block_table.gather(1, block.clamp(max=block_table.shape[1] - 1).unsqueeze(1)).squeeze(1).long()
    slot = torch.where(inside, entry * block_size + positions % block_size, -1)
    slot_mapping.copy_(torch.where(runs, slot, slot_mapping))


@triton.jit(do_not_specialize=["rows", "max_blocks"])
def _advance_decode_kernel(
    drawn_ptr,
    tokens_ptr,
    positions_ptr,
    context_ptr,
    index_ptr,
    slots_ptr,
    table_ptr,
    rows,
    max_blocks,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    allow_next(DEPENDENT)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(DEPENDENT)
    context = tl.load(context_ptr + row, mask=row < rows, other=0)
    runs = context > 0
    drawn = tl.load(drawn_ptr + row, mask=runs, other=0)
    position = tl.load(positions_ptr + row, mask=runs, other=0) + 1
    index = tl.load(index_ptr + row, mask=runs, other=0)
    block = position // BLOCK_SIZE
    entry = tl.load(table_ptr + row.to(tl.int64) * table_stride + block, mask=runs & (block < max_blocks), other=0)
    slot = tl.where(block < max_blocks, entry.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    tl.store(tokens_ptr + row, tl.maximum(drawn, 0), mask=runs)
    tl.store(positions_ptr + row, position, mask=runs)
    tl.store(context_ptr + row, context + 1, mask=runs)
    tl.store(index_ptr + row, index + 1, mask=runs)
    tl.store(slots_ptr + row, slot, mask=runs)


def advance_decode(
    drawn: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    context_lens: torch.Tensor,
    index: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
) -> None:
    """As `advance_decode_reference`. ValueError for columns of other shapes, dtypes or strides."""
    rows = len(drawn)
    integers = {"drawn": drawn, "tokens": tokens, "positions": positions, "index": index, "slot_mapping": slot_mapping}
    for name, column in (integers | {"context_lens": context_lens}).items():
        dtype = torch.int32 if name == "context_lens" else torch.int64
        if column.shape != (rows,) or column.dtype != dtype or not column.is_contiguous():
            raise ValueError(
                f"{name} is [{rows}] {dtype} and contiguous, not {list(column.shape)} {column.dtype} with strides "
                f"{column.stride()}"
            )
    if block_table.dim() != 2 or len(block_table) != rows or block_table.dtype != torch.int32:
        raise ValueError(
            f"block_table is [{rows}, max_blocks] int32, not {list(block_table.shape)} {block_table.dtype}"
        )
    if rows == 0:
        return
    block = 32
    _advance_decode_kernel[(triton.cdiv(rows, block),)](
        drawn,
        tokens,
        positions,
        context_lens,
        index,
        slot_mapping,
        block_table,
        rows,
        block_table.shape[1],
        block_table.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK=block,
        num_warps=1,
        **dependent_launch(drawn.device),
    )


def make_inputs(
    rows: int,
    block_size: int,
    max_blocks: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Every third row is padded; rows stand anywhere up to the last place of their last block."""

    def integers(high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(high, shape or (rows,), dtype=dtype, device=device, generator=generator)

    positions = integers(block_size * max_blocks)
    if rows > 1:
        positions[1] = block_size * max_blocks - 1
    padded = torch.arange(rows, device=device) % 3 == 2
    return {
        "drawn": integers(50000) - 1,
        "tokens": integers(50000),
        "positions": positions.masked_fill(padded, 0),
        "context_lens": (positions + 1).masked_fill(padded, 0).int(),
        "index": integers(1000),
        "slot_mapping": integers(1 << 40).masked_fill(padded, -1),
        "block_table": integers(1 << 20, rows, max_blocks, dtype=torch.int32),
        "block_size": block_size,
    }


def cost(rows: int, block_size: int, max_blocks: int, *, itemsize: int) -> Cost:
    return Cost(read=rows * (3 * 8 + 2 * 4), written=rows * (4 * 8 + 4))


OP = Op(
    "advance_decode",
    reference=advance_decode_reference,
    implementations={"triton": Implementation(advance_decode, needs_gpu)},
    inputs=make_inputs,
    cost=cost,
    cases=(
        Case(rows=1, block_size=16, max_blocks=4),
        Case(rows=7, block_size=256, max_blocks=1),
        Case(rows=40, block_size=48, max_blocks=3),
        Case(rows=0, block_size=16, max_blocks=2),
    ),
    large_cases=tuple(Case(rows=rows, block_size=256, max_blocks=128) for rows in (1, 35, 256)),
    dtypes=(torch.float32,),
    mutates=("tokens", "positions", "context_lens", "index", "slot_mapping"),
)
