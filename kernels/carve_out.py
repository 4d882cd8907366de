"""The carve-out: how much of a multiprocessor's L1 cache is shared memory while a kernel runs.

A kernel that asks for another one than the kernel before it may have to wait until that is over (CUDA Driver API,
cuFuncSetCacheConfig). What dependent launch is for, weights on their way while the kernel before ends, is then lost.
The driver's own choice follows from one kernel alone, so which is best between others is measured, in whole steps.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

PREFERRED_CARVE_OUT = 9
"""The number of CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT."""


def prefer_carve_out(kernel: Any, percent: int | None) -> None:
    """Has `kernel` ask for that carve-out from its next launch on.

    kernel:   what Triton returns of a launch; None, of the interpreter, is left alone
    percent:  of the shared memory that a multiprocessor has at most (228 KiB on Hopper); the driver rounds it to what
              that can be divided into. None leaves it as it is, which at first is the driver's own choice

    RuntimeError where the driver refuses it.
    """
    if kernel is None or percent is None:
        return
    function = ctypes.c_void_p(kernel.function)
    if error := _driver().cuFuncSetAttribute(function, PREFERRED_CARVE_OUT, percent):
        raise RuntimeError(f"the driver refuses a carve-out of {percent} %: CUDA error {error}")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
