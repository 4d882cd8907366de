"""The carve-out: how much of a multiprocessor's L1 cache is shared memory while a kernel runs.

A program starts only where the carve-out is what its kernel asks for. Behind a kernel that asks for another it waits
until that one's programs are over, and the next kernel's weights are not on their way while this one ends. What the
driver asks for by itself follows from one kernel alone, not from those before and behind it.
(CUDA Driver API, CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT)
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

PREFERRED_CARVE_OUT = 9
"""The number of the attribute."""


def prefer_carve_out(kernel: Any, percent: int | None) -> None:
    """Has `kernel` ask for that carve-out from its next launch on.

    kernel:   what Triton returns of a launch; None, of the interpreter, is left alone
    percent:  of the shared memory that a multiprocessor has at most, rounded up to what it can be divided into; on
              Hopper, whose most is 228 KiB, 14 are 32 KiB, 28 are 64, and 44 are 100. None leaves it to the driver

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
