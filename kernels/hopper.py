"""What kernels for NVIDIA's Hopper share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

load = getattr(tma, "async_load", tma.async_copy_global_to_shared)
store = getattr(tma, "async_store", tma.async_copy_shared_to_global)
"""Copies by TMA, named otherwise before Triton 3.9."""

TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@cache
def multiprocessors(device: torch.device) -> int:
    """Those of a Hopper GPU; 0 for any other device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def is_h200(device: torch.device) -> bool:
    """Whether it is an H200 or GH200, whose memory is faster by a third or more: what only reads is launched otherwise
    there. It is measured on an H200 and on an H100; all others have the H100's launches.
    """
    return device.type == "cuda" and "H200" in torch.cuda.get_device_name(device)


def refused_linear_swiglu(
    x: torch.Tensor, weight: torch.Tensor, keeps_busy: Callable[[int, int, int], bool]
) -> str | None:
    """Why TMA and wgmma do not take x [tokens, in] and weight [2·intermediate, in] on x's device; None where they do.

    keeps_busy: given tokens, intermediate and how many multiprocessors there are, whether few of these idle
    """
    if x.dtype not in TYPES or weight.dtype != x.dtype:
        return f"the Hopper kernel computes in float16 and bfloat16, not in {x.dtype} and {weight.dtype}"
    for tensor in (x, weight):
        if tensor.stride(1) != 1 or tensor.data_ptr() % 16 or tensor.stride(0) * tensor.element_size() % 16:
            return "the Hopper kernel wants rows that are contiguous and aligned to 16 bytes"
    rows, intermediate, count = len(x), len(weight) // 2, multiprocessors(x.device)
    if not count:
        return f"the Hopper kernel is for GPUs of compute capability 9.0, not for {x.device}"
    if not keeps_busy(rows, intermediate, count):
        return f"{rows} tokens of {intermediate} columns do not keep {count} multiprocessors busy"
    return None


def boxes(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A tensor [rows, columns] for TMA to move in boxes of so many of both."""
    box = [rows, columns]
    return TensorDescriptor.from_tensor(tensor, box, gl.NVMMASharedLayout.get_default_for(box, TYPES[tensor.dtype]))


@gluon.jit
def stage_barriers(STAGES: gl.constexpr):
    """(ready, empty): for each stage of shared memory, what the warp that fills it and those that read it wait for."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    return ready, empty


@gluon.jit
def silu_times_up(acc):
    """silu(gate) · up of acc, whose left half are gates and whose right half their ups; a pair is in one thread."""
    M: gl.constexpr = acc.shape[0]
    N: gl.constexpr = acc.shape[1] // 2
    gate, up = acc.reshape([M, 2, N]).permute([0, 2, 1]).split()
    return gate / (1 + gl.exp(-gate)) * up
