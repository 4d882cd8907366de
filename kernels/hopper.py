"""What the Gluon kernels for NVIDIA's Hopper share."""

from __future__ import annotations

from functools import cache

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

load = getattr(tma, "async_load", tma.async_copy_global_to_shared)
"""A copy by TMA, named otherwise before Triton 3.9."""

TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@cache
def multiprocessors(device: torch.device) -> int:
    """Those of a Hopper GPU; 0 for any other device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count
