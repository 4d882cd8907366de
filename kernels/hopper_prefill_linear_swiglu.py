"""The product that makes gate and up, and SwiGLU of it, for NVIDIA's Hopper, in Gluon: of a prefill's many tokens.

One warp fetches tiles of x and of the weight by TMA, two warpgroups multiply, persistently over the tiles of y (the
warp-specialised persistent product of NVIDIA's CUTLASS). A tile of the weight is 128 gates and as many ups, so that all
of a pair is in one thread when the sums are there; gate and up are never written, which for as many tokens takes longer
than computing SwiGLU.

It computes as fast as the clock lets it, and power sets the clock: `python -m bench.kernels linear_swiglu` times it
beside cuBLAS and the SwiGLU kernel. Tried, and slower on an H100: y stored from registers, by a tenth; tiles of 256
tokens and 64 gates, by a fiftieth; groups of 4, 8 or 32 tiles. Without SwiGLU it was no faster than cuBLAS, nor were
the other projections.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .hopper import boxes, load, multiprocessors, refused_linear_swiglu, silu_times_up, stage_barriers, store

_TOKENS, _GATES, _INPUTS = 128, 128, 64
"""Of a tile: rows of x, gates and as many ups, inputs of a step."""

_STAGES = 4
"""Steps held at once; with the tile of y they take 224 of 227 KiB."""

_GROUP = 16
"""Tiles of x that are multiplied with a tile of the weight before the next: what 132 programs read at a time is then as
good as square, and stays in the L2."""


def keeps_busy(rows: int, intermediate: int, multiprocessors: int) -> bool:
    """Whether less than a sixth of the multiplications that the tiles have time for are of nothing.

    cuBLAS has smaller tiles for a smaller or an uneven product.
    """
    tiles = triton.cdiv(rows, _TOKENS) * triton.cdiv(intermediate, _GATES)
    turns = triton.cdiv(tiles, multiprocessors)
    return 6 * rows * intermediate > 5 * turns * multiprocessors * _TOKENS * _GATES


def refused_by_hopper_prefill(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why the kernel does not take x [tokens, in] and weight [2·intermediate, in]; None where it does."""
    inputs, intermediate = x.shape[1], len(weight) // 2
    if inputs % _INPUTS:
        return f"the Hopper kernel takes inputs in multiples of {_INPUTS}, not {inputs}"
    if intermediate % 8:
        return f"the Hopper kernel takes columns in multiples of 8, not {intermediate}"
    return refused_linear_swiglu(x, weight, keeps_busy)


@gluon.jit
def _place(tile, tiles_m, tiles_n, GROUP: gl.constexpr):
    """Which tile of x and which of the weight: down a column of GROUP tiles of x, and then the next of the weight."""
    group = tile // (GROUP * tiles_n)
    inside = tile % (GROUP * tiles_n)
    height = gl.minimum(tiles_m - group * GROUP, GROUP)
    return group * GROUP + inside % height, inside // height


@gluon.jit
def _produce(descs, memory, barriers, tiles_m, tiles_n, intermediate, steps, GROUP: gl.constexpr):
    """The warp that fetches."""
    x_desc, weight_desc = descs
    x_smem, weight_smem = memory
    ready, empty = barriers
    STAGES: gl.constexpr = x_smem.shape[0]
    TOKENS: gl.constexpr = x_smem.shape[1]
    STEP: gl.constexpr = x_smem.shape[2]
    GATES: gl.constexpr = weight_desc.block_type.shape[0]
    BYTES: gl.constexpr = x_desc.block_type.nbytes + 2 * weight_desc.block_type.nbytes
    gdc_wait()
    stage = 0
    phase = 1  # the first fill of a stage waits for nobody
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        for step in range(steps):
            bar = ready.index(stage)
            weight = weight_smem.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, BYTES)
            load(x_desc, [m * TOKENS, step * STEP], bar, x_smem.index(stage))
            load(weight_desc, [n * GATES, step * STEP], bar, weight.slice(0, GATES))
            load(weight_desc, [intermediate + n * GATES, step * STEP], bar, weight.slice(GATES, GATES))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _consume(y_desc, y_smem, memory, barriers, tiles_m, tiles_n, steps, GROUP: gl.constexpr):
    """The warpgroups that multiply, 64 rows each. A tile of y is on its way out while they multiply the next."""
    x_smem, weight_smem = memory
    ready, empty = barriers
    STAGES: gl.constexpr = x_smem.shape[0]
    TOKENS: gl.constexpr = x_smem.shape[1]
    OUTPUTS: gl.constexpr = weight_smem.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, OUTPUTS, 16])
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        acc = gl.zeros([TOKENS, OUTPUTS], gl.float32, layout)
        before = 0
        for step in range(steps):
            mbarrier.wait(ready.index(stage), phase)
            weight = weight_smem.index(stage).permute([1, 0])
            acc = warpgroup_mma(x_smem.index(stage), weight, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index(before), pred=step > 0)  # the product of the step before is over
            before = stage
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(before))
        y = silu_times_up(acc).to(y_desc.dtype)
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        tma.store_wait(0)
        y_smem.store(y)
        fence_async_shared()
        store(y_desc, [m * TOKENS, n * (OUTPUTS // 2)], y_smem)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles_m", "tiles_n", "steps"])
def _hopper_prefill_linear_swiglu_kernel(
    x_desc,
    weight_desc,
    y_desc,
    tiles_m,
    tiles_n,
    intermediate,
    steps,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    gdc_launch_dependents()
    dtype: gl.constexpr = x_desc.dtype
    TOKENS: gl.constexpr = x_desc.block_type.shape[0]
    STEP: gl.constexpr = x_desc.block_type.shape[1]
    GATES: gl.constexpr = weight_desc.block_type.shape[0]
    x_smem = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, STEP], x_desc.layout)
    weight_smem = gl.allocate_shared_memory(dtype, [STAGES, 2 * GATES, STEP], weight_desc.layout)
    y_smem = gl.allocate_shared_memory(dtype, [1, TOKENS, GATES], y_desc.layout).index(0)
    memory = (x_smem, weight_smem)
    barriers = stage_barriers(STAGES)
    gl.warp_specialize(
        [
            (_consume, (y_desc, y_smem, memory, barriers, tiles_m, tiles_n, steps, GROUP)),
            (_produce, ((x_desc, weight_desc), memory, barriers, tiles_m, tiles_n, intermediate, steps, GROUP)),
        ],
        [1],
        [24],  # registers a thread; the warpgroups have what it leaves
    )


def hopper_prefill_linear_swiglu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `linear_swiglu_reference`, in float32 to the end and rounded once, for what `refused_by_hopper_prefill` takes.

    x [tokens, in], weight [2·intermediate, in] → [tokens, intermediate]. A token's y has the same bits whatever the
    others are.
    """
    (rows, inputs), intermediate = x.shape, len(weight) // 2
    tiles_m, tiles_n = triton.cdiv(rows, _TOKENS), triton.cdiv(intermediate, _GATES)
    y = torch.empty(rows, intermediate, dtype=x.dtype, device=x.device)
    _hopper_prefill_linear_swiglu_kernel[(min(tiles_m * tiles_n, multiprocessors(x.device)),)](
        boxes(x, _TOKENS, _INPUTS),
        boxes(weight, _GATES, _INPUTS),
        boxes(y, _TOKENS, _GATES),
        tiles_m,
        tiles_n,
        intermediate,
        inputs // _INPUTS,
        STAGES=_STAGES,
        GROUP=_GROUP,
        launch_pdl=True,
        num_warps=_TOKENS // 16,
        maxnreg=168,  # for 384 threads, the fetching warp being rounded up to four: all that a multiprocessor has
    )
    return y
