"""Programmatic dependent launch: a kernel's programs start while the kernel before it still runs, and wait for it.

It hides the launch of a short kernel. Whatever reads what the kernel before wrote comes after `wait_for_previous`,
which every program calls before it writes or ends: the kernel after must not overtake the one before.
(CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization")
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def allow_next(DEPENDENT: tl.constexpr):
    """The next kernel's programs may start from here on."""
    if DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(DEPENDENT: tl.constexpr):
    """From here on the previous kernel is over and what it wrote is there."""
    if DEPENDENT:
        gdc_wait()


@cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether `device` has it: GPUs from Hopper on. The interpreter does not."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """The arguments that launch a kernel so, where `device` can; the kernel takes DEPENDENT."""
    return {"DEPENDENT": True, "launch_pdl": True} if has_dependent_launch(device) else {"DEPENDENT": False}
