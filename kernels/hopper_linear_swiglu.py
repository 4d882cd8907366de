"""The product that makes gate and up, and SwiGLU of it, for NVIDIA's Hopper, in Gluon: up to 128 tokens in one launch.

One warp fetches tiles of x and of the weight by TMA, one or two warpgroups multiply, persistently over the tiles: the
warp has the next tile's weights on their way while SwiGLU of this one is computed and stored (the warp-specialised
persistent product of NVIDIA's CUTLASS).

What bounds it is reading: the weight from memory, and x from the L2 once for every tile of the weight, since so many
rows do not stay in shared memory. 128 rows of x beside a tile of n outputs move 1 + 128 / n times the weight's bytes,
so for them tiles are as wide as the registers allow: 288 outputs. Qwen2-7B's 37888 are then 132 tiles, one for each
multiprocessor of an H100. For up to 64 rows tiles of half the width are faster, two for each multiprocessor: it reads
the second while it stores what the first gave.

`python -m bench.kernels linear_swiglu` times it beside cuBLAS and the SwiGLU kernel. Tried, and slower than this: the
tiles in plain Triton with tensor descriptors; programs that begin at different columns, so as not to read the same of x
at once. 256 rows, as two tiles of x, are slower than cuBLAS and SwiGLU on an H200. y stored by TMA was faster by less
than a hundredth, and needs the buffers: one tile a program. Without SwiGLU the product was no faster than cuBLAS's, nor
were those of the other projections.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .hopper import boxes, load, multiprocessors, refused_linear_swiglu, silu_times_up, stage_barriers

_INPUTS = 64
"""Of a step: 128 bytes, the swizzle that wgmma reads fastest."""


class Tile(NamedTuple):
    """Rows of x; gates and as many ups, in two parts, since Triton's sizes are powers of two; steps held at once."""

    rows: int
    gates: tuple[int, int]
    stages: int


_TILES = (Tile(64, (64, 8), 8), Tile(128, (128, 16), 4))
"""The first that has room for x is taken, one warpgroup for 64 rows of it. They hold 208 of 227 KiB."""

MOST_ROWS = _TILES[-1].rows
_LEAST_INPUTS = _INPUTS * max(tile.stages for tile in _TILES)


def _tile(rows: int) -> Tile:
    return next(tile for tile in _TILES if rows <= tile.rows)


def keeps_busy(rows: int, intermediate: int, multiprocessors: int) -> bool:
    """Whether less than a tenth of the multiprocessors' time is idle, all tiles taking the same.

    A smaller or an uneven product is left to others, who cut it to fit.
    """
    tiles = triton.cdiv(intermediate, sum(_tile(rows).gates))
    return tiles > 0.9 * triton.cdiv(tiles, multiprocessors) * multiprocessors


def refused_by_hopper(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why the kernel does not take x [tokens, in] and weight [2·intermediate, in]; None where it does."""
    rows, inputs = x.shape
    if not 0 < rows <= MOST_ROWS:
        return f"the Hopper kernel is for 1 to {MOST_ROWS} tokens, not {rows}"
    if inputs % _INPUTS or inputs < _LEAST_INPUTS:
        return f"the Hopper kernel takes inputs in multiples of {_INPUTS} from {_LEAST_INPUTS} on, not {inputs}"
    return refused_linear_swiglu(x, weight, keeps_busy)


@gluon.jit
def _fetch_weights(wide_desc, narrow_desc, wide, narrow, ready, tile, column, intermediate):
    """Ask for a tile of the weight at `column`: in either part its gates, and behind them their ups."""
    WIDE: gl.constexpr = wide_desc.block_type.shape[0]
    NARROW: gl.constexpr = narrow_desc.block_type.shape[0]
    gate = tile * (WIDE + NARROW)
    load(wide_desc, [gate, column], ready, wide.slice(0, WIDE))
    load(wide_desc, [intermediate + gate, column], ready, wide.slice(WIDE, WIDE))
    load(narrow_desc, [gate + WIDE, column], ready, narrow.slice(0, NARROW))
    load(narrow_desc, [intermediate + gate + WIDE, column], ready, narrow.slice(NARROW, NARROW))


@gluon.jit
def _produce(descs, memory, barriers, tiles, intermediate, steps):
    """The warp that fetches. Weights do not depend on the kernel before: its first stages of them precede the wait."""
    x_desc, wide_desc, narrow_desc = descs
    x_smem, wide_smem, narrow_smem = memory
    ready, empty = barriers
    STAGES: gl.constexpr = x_smem.shape[0]
    STEP: gl.constexpr = x_smem.shape[2]
    BYTES: gl.constexpr = x_desc.block_type.nbytes + 2 * (wide_desc.block_type.nbytes + narrow_desc.block_type.nbytes)
    programs = gl.num_programs(0)
    tile = gl.program_id(0)
    for stage in gl.static_range(STAGES):  # there are as many steps at least
        bar = ready.index(stage)
        wide = wide_smem.index(stage)
        narrow = narrow_smem.index(stage)
        mbarrier.expect(bar, BYTES)
        _fetch_weights(wide_desc, narrow_desc, wide, narrow, bar, tile, stage * STEP, intermediate)
    gdc_wait()
    for stage in gl.static_range(STAGES):
        load(x_desc, [0, stage * STEP], ready.index(stage), x_smem.index(stage))
    step = STAGES
    stage = 0
    phase = 0
    for _ in range(STAGES, (tiles - tile + programs - 1) // programs * steps):
        if step == steps:
            step = 0
            tile += programs
        bar = ready.index(stage)
        wide = wide_smem.index(stage)
        narrow = narrow_smem.index(stage)
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(bar, BYTES)
        _fetch_weights(wide_desc, narrow_desc, wide, narrow, bar, tile, step * STEP, intermediate)
        load(x_desc, [0, step * STEP], bar, x_smem.index(stage))
        step += 1
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1


@gluon.jit
def _store_swiglu(y_ptr, acc, column, rows, intermediate):
    y = silu_times_up(acc)
    layout: gl.constexpr = y.type.layout
    row = gl.arange(0, y.shape[0], gl.SliceLayout(1, layout))
    column += gl.arange(0, y.shape[1], gl.SliceLayout(0, layout))
    inside = (row < rows)[:, None] & (column < intermediate)[None, :]
    gl.store(y_ptr + row[:, None] * intermediate + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def _consume(y_ptr, memory, barriers, tiles, rows, intermediate, steps):
    """The warpgroups that multiply, 64 rows each."""
    x_smem, wide_smem, narrow_smem = memory
    ready, empty = barriers
    STAGES: gl.constexpr = x_smem.shape[0]
    M: gl.constexpr = x_smem.shape[1]
    WIDE: gl.constexpr = wide_smem.shape[1]
    NARROW: gl.constexpr = narrow_smem.shape[1]
    wide_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, WIDE, 16])
    narrow_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, NARROW, 16])
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        wide = gl.zeros([M, WIDE], gl.float32, wide_layout)
        narrow = gl.zeros([M, NARROW], gl.float32, narrow_layout)
        before = 0
        for step in range(steps):
            mbarrier.wait(ready.index(stage), phase)
            x = x_smem.index(stage)
            wide = warpgroup_mma(x, wide_smem.index(stage).permute([1, 0]), wide, is_async=True)
            narrow = warpgroup_mma(x, narrow_smem.index(stage).permute([1, 0]), narrow, is_async=True)
            wide, narrow = warpgroup_mma_wait(2, deps=[wide, narrow])
            mbarrier.arrive(empty.index(before), pred=step > 0)  # the products of the step before are over
            before = stage
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        wide, narrow = warpgroup_mma_wait(0, deps=[wide, narrow])
        mbarrier.arrive(empty.index(before))
        column = tile * ((WIDE + NARROW) // 2)
        _store_swiglu(y_ptr, wide, column, rows, intermediate)
        _store_swiglu(y_ptr, narrow, column + WIDE // 2, rows, intermediate)


@gluon.jit(do_not_specialize=["tiles", "rows", "steps"])
def _hopper_linear_swiglu_kernel(
    x_desc,
    wide_desc,
    narrow_desc,
    y_ptr,
    tiles,
    rows,
    intermediate,
    steps,
    STAGES: gl.constexpr,
):
    gdc_launch_dependents()
    dtype: gl.constexpr = x_desc.dtype
    M: gl.constexpr = x_desc.block_type.shape[0]
    STEP: gl.constexpr = x_desc.block_type.shape[1]
    WIDE: gl.constexpr = 2 * wide_desc.block_type.shape[0]
    NARROW: gl.constexpr = 2 * narrow_desc.block_type.shape[0]
    x_smem = gl.allocate_shared_memory(dtype, [STAGES, M, STEP], x_desc.layout)
    wide_smem = gl.allocate_shared_memory(dtype, [STAGES, WIDE, STEP], wide_desc.layout)
    narrow_smem = gl.allocate_shared_memory(dtype, [STAGES, NARROW, STEP], narrow_desc.layout)
    descs = (x_desc, wide_desc, narrow_desc)
    memory = (x_smem, wide_smem, narrow_smem)
    barriers = stage_barriers(STAGES)
    gl.warp_specialize(
        [
            (_consume, (y_ptr, memory, barriers, tiles, rows, intermediate, steps)),
            (_produce, (descs, memory, barriers, tiles, intermediate, steps)),
        ],
        [1],
        [24],  # registers a thread; the warpgroups have what it leaves
    )


def hopper_linear_swiglu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `linear_swiglu_reference`, in float32 to the end and rounded once, for what `refused_by_hopper` takes.

    x [tokens, in], weight [2·intermediate, in] → [tokens, intermediate]. Equal inputs give equal bits.
    """
    (rows, inputs), intermediate = x.shape, len(weight) // 2
    tile = _tile(rows)
    tiles = triton.cdiv(intermediate, sum(tile.gates))
    programs = min(tiles, multiprocessors(x.device))
    y = torch.empty(rows, intermediate, dtype=x.dtype, device=x.device)
    _hopper_linear_swiglu_kernel[(programs,)](
        boxes(x, tile.rows, _INPUTS),
        *(boxes(weight, gates, _INPUTS) for gates in tile.gates),
        y,
        tiles,
        rows,
        intermediate,
        inputs // _INPUTS,
        STAGES=tile.stages,
        launch_pdl=True,
        num_warps=tile.rows // 16,
        maxnreg=168,  # for 384 threads, the fetching warp being rounded up to four: all that a multiprocessor has
    )
    return y
